"""What a Gauss-Newton product costs: beside the forward features, beside its own matrix products.

Float32, d = 384, 12 heads, at n = 128 (32 sequences) and n = 2048 (2 sequences). The three are
timed in turns and the medians are of the ratios within a turn. "Forward" is the computation of the
features that the solver runs at each new point; "GEMMs" are the matrix products of one
Gauss-Newton product run again alone (see `attnreg.roofline.replay`). Peak memory is that of a
process of its own: one sequence of n = 16384, one head, features and one product.

    python -m benchmarks.product_cost
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnreg.roofline.replay import Replay
from attnreg.roofline.trace import trace
from benchmarks.common import command_line, machine, median, parse, print_table, save, show

if TYPE_CHECKING:
    from attnreg.objective import Point

WIDTH, HEADS, HEAD_DIM = 384, 12, 32
LIMITS = {"product / forward": {128: 3.0, 2048: 4.5}, "product / GEMMs": {128: 1.8, 2048: 1.8}}
LONG, LONG_LIMIT_GIB = 16384, 2.0
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement."""

    sequences: int
    rows: int
    width: int = WIDTH
    heads: int = HEADS


def make_point(case: Case) -> Point:
    """The reduced objective at random weights on random data."""
    from attnreg import AttentionProblem, MultiHead
    from attnreg.objective import Objective, Point

    generator = torch.Generator().manual_seed(0)
    shape = (case.sequences, case.rows, case.width)
    A, B = (torch.randn(shape, generator=generator) for _ in range(2))
    problem = AttentionProblem(A, B)
    model = MultiHead(case.heads, head_dim=HEAD_DIM)
    theta, _ = model.split(problem, model.start(problem, seed=0))
    objective = Objective(problem, model)
    return Point(objective, objective.features(theta))


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Times forward, product and the product's matrix products in turns."""
    point = make_point(case)
    direction = torch.randn(point.theta.shape, generator=torch.Generator().manual_seed(1))
    objective, theta = point.objective, point.theta
    kept = [
        matrix for attention in point.features._attention for matrix in attention._softmax or ()
    ]
    products = trace(lambda: point.gauss_newton(direction), kept).products
    bodies: dict[str, Callable[[], Any]] = {
        "forward": lambda: objective.features(theta),
        "product": lambda: point.gauss_newton(direction),
        "GEMMs": Replay(products),
    }
    times: dict[str, list[float]] = {name: [] for name in bodies}
    for turn in range(repeats + 1):  # the first warms up
        for name, body in bodies.items():
            begin = time.perf_counter()
            body()
            if turn:
                times[name].append(time.perf_counter() - begin)
    ratios = {
        f"product / {other}": [a / b for a, b in zip(times["product"], times[other], strict=True)]
        for other in ("forward", "GEMMs")
    }
    flops = sum(product.flops for product in products)
    gemm_seconds = median(times["GEMMs"])
    return {
        "sequences": case.sequences,
        "rows": case.rows,
        "seconds": {name: median(values) for name, values in times.items()},
        "ratios": {name: median(values) for name, values in ratios.items()},
        "gemm_count": len(products),
        "gemm_gflop": flops / 1e9,
        "gemm_gflop_per_second": flops / 1e9 / gemm_seconds if gemm_seconds else None,
        "times": times,
    }


def peak_memory() -> dict[str, float]:
    """Peak resident GiB of a process of its own, and of the same process before the problem."""
    command = [sys.executable, "-m", "benchmarks.product_cost", "--memory-child"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory_child() -> None:
    """Runs in the child: prints its own peak as JSON."""
    import attnreg  # noqa: F401  what the imports take is not the product's

    before = _peak_gib()
    point = make_point(Case(1, LONG, width=HEAD_DIM, heads=1))
    product = point.gauss_newton(torch.ones_like(point.theta))
    assert bool(torch.isfinite(product).all())
    print(json.dumps({"imports_gib": before, "peak_gib": _peak_gib()}))


def _peak_gib() -> float:
    """Peak resident memory of this process.

    Linux's ru_maxrss starts at what the parent held when it started this process; VmHWM does not.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return kib * 1024 / GIB


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = command_line("product_cost", __doc__, quick="few turns, a quarter of the size")
    parser.add_argument("--repeats", type=int, help="turns (15)")
    parser.add_argument("--memory-child", action="store_true", help=argparse.SUPPRESS)
    options = parse(parser, arguments)
    if options.memory_child:
        memory_child()
        return
    repeats = options.repeats or (3 if options.quick else 15)
    cases = [Case(8, 128), Case(1, 1024)] if options.quick else [Case(32, 128), Case(2, 2048)]
    content: dict[str, Any] = {
        "machine": machine(),
        "setting": {"width": WIDTH, "heads": HEADS, "dtype": "float32", "repeats": repeats},
        "limits": LIMITS,
        "cases": [measure(case, repeats) for case in cases],
        "memory": {"rows": LONG, "heads": 1, "limit_gib": LONG_LIMIT_GIB, **peak_memory()},
    }
    print_table(
        "One Gauss-Newton product (float32, d = 384, 12 heads)",
        ("case", "forward ms", "product ms", "GEMMs ms", "/ forward", "/ GEMMs", "GFLOP/s"),
        [_line(entry) for entry in content["cases"]],
    )
    memory = content["memory"]
    print_table(
        f"Peak memory at n = {LONG}, one head",
        ("", "GiB"),
        [
            ("imports alone", f"{memory['imports_gib']:.2f}"),
            ("features and one product", f"{memory['peak_gib']:.2f}"),
        ],
    )
    save("product_cost", content, quick=options.quick)


def _line(entry: dict[str, Any]) -> tuple[str, ...]:
    limits = {name: by_rows.get(entry["rows"]) for name, by_rows in LIMITS.items()}
    ratios = [
        show(entry["ratios"][name]) + (f" (<= {limit:g})" if limit else "")
        for name, limit in limits.items()
    ]
    milliseconds = [show(1e3 * entry["seconds"][n]) for n in ("forward", "product", "GEMMs")]
    name = f"{entry['sequences']} x {entry['rows']}"
    return (name, *milliseconds, *ratios, show(entry["gemm_gflop_per_second"]))


if __name__ == "__main__":
    main()
