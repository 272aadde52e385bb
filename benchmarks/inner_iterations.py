"""Products of conjugate gradients in the natural metric: bounded whatever n, d and conditioning.

The reduced Gauss-Newton system with ridge_x = c times the top of its curvature is solved at the
planted matrices to a relative residual of 1e-8, preconditioned by the natural metric G1 (x) G2.
Its spectrum relative to G is within [c, 1 + c] times the top, so that the number of products is at
most 1/2 sqrt(1 + 1/c) ln(2 sqrt(1 + 1/c) / 1e-8) + 1 (`docs/theory.md`).

Inputs span 0, 3 or 6 decades of singular values, one sequence or several; they are whitened by QR
(`ridged_problem`). The ridge is strong where c is 1 and weak where it is 1e-4.

    python -m benchmarks.inner_iterations
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnreg.curvature.preconditioner import natural_metric
from attnreg.linear_solve.cg import conjugate_gradients
from benchmarks.common import command_line, machine, median, parse, print_table, save
from benchmarks.ridged_problem import ridged

RATIOS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
DECADES = (0.0, 3.0, 6.0)
TOLERANCE, RIDGE_Y, LOGIT_STD = 1e-8, 0.1, 1.0
MAX_PRODUCTS = 5000


@dataclass(frozen=True)
class Shape:
    """Sequences, rows of each, width."""

    sequences: int
    rows: int
    width: int


SHAPES = (
    Shape(1, 128, 4),
    Shape(1, 128, 8),
    Shape(1, 512, 4),
    Shape(1, 512, 8),
    Shape(1, 512, 16),
    Shape(1, 2048, 8),
    Shape(1, 2048, 16),
    Shape(1, 2048, 32),
    Shape(8, 64, 8),
    Shape(8, 256, 16),
    Shape(32, 64, 32),
)
QUICK = (SHAPES[1], SHAPES[8])


def bound(ratio: float) -> float:
    """The stated number of products."""
    root = math.sqrt(1.0 + 1.0 / ratio)
    return 0.5 * root * math.log(2.0 * root / TOLERANCE) + 1.0


def products(shape: Shape, decades: float, ratio: float, seed: int) -> int:
    """Products that one solve takes."""
    made = ridged(
        shape.rows,
        shape.width,
        ratio=ratio,
        ridge_y=RIDGE_Y,
        sequences=shape.sequences,
        decades=decades,
        logit_std=LOGIT_STD,
        seed=seed,
    )
    point = made.point()
    inverse = natural_metric(point).inverse(0.0)
    solve = conjugate_gradients(
        point.gauss_newton, point.gradient, inverse, 0.0, TOLERANCE, MAX_PRODUCTS
    )
    if not solve.converged:
        raise RuntimeError(f"{shape}, {decades} decades, c = {ratio}: {solve.iterations} products")
    return solve.iterations


def run(shape: Shape, decades: float, seeds: int) -> dict[str, Any]:
    """Products at each ratio, median of the seeds."""
    found = {
        f"{ratio:g}": [products(shape, decades, ratio, seed) for seed in range(seeds)]
        for ratio in RATIOS
    }
    return {
        "sequences": shape.sequences,
        "rows": shape.rows,
        "width": shape.width,
        "decades": decades,
        "products": {ratio: median(counts) for ratio, counts in found.items()},
        "largest": {ratio: max(counts) for ratio, counts in found.items()},
    }


def print_entries(entries: Sequence[dict[str, Any]]) -> None:
    """One line a shape and conditioning; the range and the bound below."""
    rows = [
        (
            f"{entry['sequences']} x {entry['rows']}, {entry['width']}",
            f"1e{entry['decades']:.0f}",
            *(f"{entry['products'][f'{ratio:g}']:.0f}" for ratio in RATIOS),
        )
        for entry in entries
    ]
    keys = [f"{ratio:g}" for ratio in RATIOS]
    least = [min(entry["products"][key] for entry in entries) for key in keys]
    most = [max(entry["largest"][key] for entry in entries) for key in keys]
    rows.append(("least", "", *(f"{value:.0f}" for value in least)))
    rows.append(("most of all seeds", "", *(f"{value:.0f}" for value in most)))
    rows.append(("stated bound", "", *(f"{bound(ratio):.0f}" for ratio in RATIOS)))
    columns = ("sequences x n, d", "condition", *(f"c = {ratio:g}" for ratio in RATIOS))
    print_table(f"Products to a relative residual of {TOLERANCE:g}", columns, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = command_line("inner_iterations", __doc__, quick="two shapes, one seed")
    parser.add_argument("--seeds", type=int, help="problems of each kind (3)")
    options = parse(parser, arguments)
    seeds = options.seeds or (1 if options.quick else 3)
    shapes = QUICK if options.quick else SHAPES
    entries = [run(shape, decades, seeds) for shape in shapes for decades in DECADES]
    print_entries(entries)
    content = {
        "machine": machine(),
        "setting": {
            "seeds": seeds,
            "tolerance": TOLERANCE,
            "ridge_y": RIDGE_Y,
            "logit_std": LOGIT_STD,
        },
        "bounds": {f"{ratio:g}": bound(ratio) for ratio in RATIOS},
        "entries": entries,
    }
    save("inner_iterations", content, quick=options.quick)


if __name__ == "__main__":
    main()
