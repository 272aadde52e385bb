"""What `attnreg bench roofline` prints, at the sizes of the README and in every precision there is.

The kernels of a fit (d = 384, 12 heads, 64 x 128 tokens; the dense step: d = 32, n = 1024) beside
their own matrix products run again alone, in turns: the share is the rate achieved over theirs.
float32, then bf16 and, on a CUDA device, tf32, each with the errors against float64.

    python -m benchmarks.roofline
    python -m benchmarks.roofline --device cuda      (make bench-gpu)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attnreg.roofline import Roofline, Sizes, measure
from attnreg.roofline.picture import draw
from benchmarks.common import (
    add_device,
    command_line,
    console,
    machine,
    parse,
    print_table,
    save,
    show,
)

PICTURE = Path(__file__).parent.parent / "docs" / "roofline.png"
BARS = {"features": 0.6, "JVP": 0.6, "VJP": 0.6, "Gauss-Newton": 0.6, "Newton step": 0.5}
"""Least shares. Of the Newton step: within twice its matrix products and Cholesky factor."""


def precisions(device: str) -> list[str]:
    """Those to measure on a device."""
    return ["float32", "tf32", "bf16"] if device.startswith("cuda") else ["float32", "bf16"]


def print_roofline(found: Roofline) -> None:
    """One table; a share below its bar has a mark."""
    rows = []
    for kernel in found.kernels:
        bar = BARS.get(kernel.name) if found.precision == "float32" else None
        share = f"{kernel.share:.0%}" + (f" (>= {bar:.0%})" if bar else "")
        rates = [show(value / 1e9) for value in (kernel.rate, kernel.gemm_rate)]
        counts = (kernel.gemm_operations / 1e9, kernel.entrywise_operations / 1e9)
        numbers = [show(value) for value in (*counts, kernel.bytes / 1e6, kernel.intensity)]
        missed = " !" if bar and kernel.share < bar else ""
        line = (*numbers, show(1e3 * kernel.seconds), *rates, share + missed)
        rows.append((kernel.name, *line, f"{kernel.error:.0e}"))
        if kernel.note:
            console.print(f"[dim]{kernel.name}: {kernel.note}[/dim]")
    columns = ("GFLOP", "other", "MB", "FLOP/B", "ms", "GFLOP/s", "alone", "share", "error")
    title = f"{found.device}, products in {found.precision}: large product "
    title += f"{found.peak / 1e9:.0f} GFLOP/s, memory {found.bandwidth / 1e9:.0f} GB/s"
    print_table(title, ("kernel", *columns), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = command_line("roofline", __doc__, quick="4 sequences, few turns")
    parser.add_argument("--repeats", type=int, help="turns (15)")
    add_device(parser)
    options = parse(parser, arguments)
    repeats = options.repeats or (3 if options.quick else 15)
    sizes = Sizes(sequences=4) if options.quick else Sizes()
    runs: dict[str, Any] = {}
    for precision in precisions(options.device):
        found = measure(sizes, precision=precision, device=options.device, repeats=repeats)
        print_roofline(found)
        runs[precision] = found.as_dict()
        if precision == "float32" and options.device == "cpu" and not options.quick:
            draw(found, PICTURE)
    content = {"machine": machine(), "bars": BARS, "runs": runs}
    if options.device != "cpu":
        content["device"] = torch.cuda.get_device_name(options.device)
    kind = "" if options.device == "cpu" else "_gpu"
    save(f"roofline{kind}", content, quick=options.quick)


if __name__ == "__main__":
    main()
