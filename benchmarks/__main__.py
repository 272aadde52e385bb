"""`python -m benchmarks [name ...] [--quick]`: runs the benchmarks named, or all of them.

A benchmark has more options when it is run by itself: `python -m benchmarks.planted --help`.
"""

from __future__ import annotations

import argparse
import importlib

from benchmarks.common import console

NAMES = (
    "convergence",
    "sketch",
    "inner_iterations",
    "product_cost",
    "roofline",
    "tail",
    "certificate_tightness",
    "certificate_layer",
    "growth",
    "complexity",
    "certificates",
    "little_data",
    "large_layers",
    "planted_suite",
    "real_layer",
    "multimodal",
    "grouping",
    "conversion",
    "conversion_minilm",
    "planted",
)  # the shortest first


def main() -> None:
    """Runs them one after the other, each in this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats")
    parser.add_argument("--threads", type=int, help="of torch")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}: choose from {', '.join(NAMES)}")
    arguments = ["--quick"] if options.quick else []
    if options.threads:
        arguments += ["--threads", str(options.threads)]
    for name in options.names or NAMES:
        console.rule(name)
        importlib.import_module(f"benchmarks.{name}").main(arguments)


if __name__ == "__main__":
    main()
