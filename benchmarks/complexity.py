"""Seconds and counted operations of one iteration over a grid of n and d, beside the formulas.

One iteration is what the approximate Newton loop does between two points: preconditioner, inner
solve with products of the exact Hessian, features and gradient at the new point. Three ways:

* dense: the Gauss-Newton matrix of all rows, assembled and factored;
* sketch: that of sampled rows (`newton-sketch`);
* metric: the natural metric, no matrix (`newton-cg`).

The first two cost n^2 d for scores and products, n d^2 for the co-moments of each of n or of fewer
rows, d^4 for their sums, and d^6. Inputs are standard normal, ridges are strong (`RATIO` times the
top of the curvature), the iterate is near the planted matrices.

Exponents are fitted to log seconds by least squares over the grid, with their standard errors, from
cells of at least 2e8 operations; the same fit to the counted operations and to the formula, on the
same cells, stands beside. The paper's bound is T_mat(n, n, d) + T_mat(n, d, d) + d^(2 omega), ours
is without the last term; omega = 3 here, as the products are the ordinary ones.

"/ GEMMs" is the time over that of the iteration's matrix products alone, run again
(`attnreg.roofline.replay`): medians of the ratios within a turn (one turn where it takes long).
Softmax matrices up to 1 GB are kept: where the system maps fresh memory for each point, a single
turn can be slower than the rest (n = 8192). All of it takes about a quarter of an hour.

    python -m benchmarks.complexity
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attnreg import AttentionProblem, Bilinear
from attnreg.curvature.dense import assemble_gauss_newton
from attnreg.linear_solve.cholesky import DenseSolver
from attnreg.objective import Objective, Point
from attnreg.roofline.replay import Replay
from attnreg.roofline.trace import trace
from attnreg.solvers.approximate_newton import (
    Preconditioner,
    from_metric,
    from_sketch,
    newton_step,
)
from attnreg.solvers.run import relative_gradient_norm
from benchmarks.common import command_line, console, machine, median, parse, print_table, save, show

ROWS = (256, 512, 1024, 2048, 4096, 8192, 16384)
WIDTHS = {"dense": (8, 16, 32, 64), "sketch": (8, 16, 32, 64), "metric": (8, 16, 32, 64, 128)}
RATIO, RIDGE_Y, LOGIT_STD, DISTANCE = 30.0, 1.0, 0.5, 0.3
LIMITS = {8: 5.0, 16: 5.0, 32: 2.5, 64: 2.5, 128: 2.5}
BUDGET = {"dense": 3.0e11, "sketch": 3.0e11, "metric": 7.5e11}
"""Cells with more operations an iteration are left out."""

AXES = {"n": "rows", "d": "width"}
LARGE = 2.0e8
"""Cells with fewer are left out of the fits: overhead."""

FORMULAS: dict[str, dict[str, Callable[[float, float], float]]] = {
    "dense": {"n^2 d^2 + n d^4 + d^6": lambda n, d: n**2 * d**2 + n * d**4 + d**6},
    "sketch": {"paper's, n^2 d + n d^2 + d^6": lambda n, d: n**2 * d + n * d**2 + d**6},
    "metric": {"ours, n^2 d + n d^2": lambda n, d: n**2 * d + n * d**2},
}


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    method: str
    rows: int
    width: int

    @property
    def estimate(self) -> float:
        """Operations, roughly: what decides whether it is measured."""
        n, d = float(self.rows), float(self.width)
        passes = 20 * n**2 * d + 20 * n * d**2
        if self.method == "metric":
            return passes
        rows = n if self.method == "dense" else min(n, 12 * d + 0.02 * n)
        moments = n if self.method == "dense" else min(n, 100 * d)
        return passes + 2 * moments * n * d**2 + 2.5 * rows * d**4 + 2.3 * d**6


def make_point(rows: int, width: int) -> Point:
    """A ridged problem near its planted matrices; the top of its curvature is estimated.

    For standard normal inputs and small logits it is close to the largest eigenvalue of
    Cov(w) / n, w the values' outputs.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A, X, Y = normal(rows, width), normal(width, width), normal(width, width) / width**0.5
    X *= LOGIT_STD / width
    problem = AttentionProblem(A, normal(rows, width))
    F = Objective(problem, Bilinear()).features(X.flatten()).columns
    B = F @ Y + 0.1 * F.std() * normal(rows, width)
    top = float(torch.linalg.eigvalsh(Y.mT @ Y)[-1]) / rows
    center = {"X": X, "Y": Y}
    problem = AttentionProblem(A, B, ridge_x=RATIO * top, ridge_y=RIDGE_Y, center=center)
    objective = Objective(problem, Bilinear())
    start = X + DISTANCE * LOGIT_STD / width * normal(width, width)
    return Point(objective, objective.features(start.flatten()))


def preconditioner(method: str, point: Point) -> Preconditioner:
    """That of a method."""
    if method == "metric":
        return from_metric(point)
    if method == "sketch":
        return from_sketch(point, torch.Generator().manual_seed(0))
    return Preconditioner(
        DenseSolver(assemble_gauss_newton(point), point.objective.operations).inverse()
    )


def iteration(method: str, theta: torch.Tensor, objective: Objective) -> tuple[int | None, int]:
    """One iteration from the features on; rows sampled and inner iterations."""
    point = Point(objective, objective.features(theta))
    relative_gradient_norm(point)
    used = preconditioner(method, point)
    step = newton_step(point, used)
    return used.rows_sampled, step.inner_iterations


def measure(cell: Cell, repeats: int) -> dict[str, Any]:
    """Times the iteration and its matrix products in turns."""
    point = make_point(cell.rows, cell.width)
    objective, theta = point.objective, point.theta
    before = objective.operations.as_dict()
    found: list[tuple[int | None, int]] = []
    replay = Replay(trace(lambda: found.append(iteration(cell.method, theta, objective))).products)
    (sampled, inner) = found[0]
    operations = {k: v - before[k] for k, v in objective.operations.as_dict().items()}
    times: dict[str, list[float]] = {"iteration": [], "GEMMs": []}
    bodies = {"iteration": lambda: iteration(cell.method, theta, objective), "GEMMs": replay}
    for _ in range(repeats if cell.estimate < 2e10 else 1):
        for name, body in bodies.items():
            begin = time.perf_counter()
            body()
            times[name].append(time.perf_counter() - begin)
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    return {
        "method": cell.method,
        "rows": cell.rows,
        "width": cell.width,
        "seconds": median(times["iteration"]),
        "gemm_seconds": median(times["GEMMs"]),
        "ratio": median(ratios),
        "operations": operations,
        "rows_sampled": sampled,
        "inner_iterations": inner,
        "times": times,
    }


def exponents(
    entries: Sequence[dict[str, Any]], values: Sequence[float], axes: Mapping[str, str] = AXES
) -> dict[str, tuple[float, float]]:
    """Exponents of the axes in a fitted product of powers, each with its standard error."""
    columns = [[1.0, *(np.log(e[axis]) for axis in axes.values())] for e in entries]
    design, target = np.array(columns), np.log(np.array(values))
    solution, *_ = np.linalg.lstsq(design, target, rcond=None)
    rest = target - design @ solution
    variance = float(rest @ rest) / max(1, len(target) - 1 - len(axes))
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * variance)
    return {name: (float(solution[i]), float(errors[i])) for i, name in enumerate(axes, 1)}


def summarise(entries: Sequence[dict[str, Any]], least: float) -> dict[str, Any]:
    """Exponents of seconds, counted operations and formulas on the grid of each method."""
    summary = {}
    for method in WIDTHS:
        own = [e for e in entries if e["method"] == method]
        fitted = [e for e in own if sum(e["operations"].values()) >= least]
        fits = {
            "seconds": exponents(fitted, [e["seconds"] for e in fitted]),
            "counted": exponents(fitted, [sum(e["operations"].values()) for e in fitted]),
        }
        for name, formula in FORMULAS[method].items():
            fits[name] = exponents(fitted, [formula(e["rows"], e["width"]) for e in fitted])
        large = [e["ratio"] for e in own if e["width"] >= 32]
        small = [e["ratio"] for e in own if e["width"] < 32]
        summary[method] = {
            "fits": fits,
            "largest_ratio": {
                "d >= 32": max(large, default=None),
                "d < 32": max(small, default=None),
            },
        }
    return summary


def print_entries(entries: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """All cells, then the exponents."""
    kinds = list(entries[0]["operations"])
    rows = [
        (
            f"{e['method']}, {e['rows']}, {e['width']}",
            show(1e3 * e["seconds"]),
            *(show(e["operations"][kind] / 1e6) for kind in kinds),
            "-" if e["rows_sampled"] is None else str(e["rows_sampled"]),
            str(e["inner_iterations"]),
            f"{e['ratio']:.2f}" + (" !" if e["ratio"] > LIMITS[e["width"]] else ""),
        )
        for e in entries
    ]
    columns = ("method, n, d", "ms", *(kind.replace("_", " ") for kind in kinds))
    title = "One iteration; operations in millions; ! where the ratio is above its limit"
    print_table(title, (*columns, "rows", "inner", "/ GEMMs"), rows)
    rows = [
        (f"{method}: {name}", *(f"{fit[v][0]:.2f} +- {fit[v][1]:.2f}" for v in ("n", "d")))
        for method, part in summary.items()
        for name, fit in part["fits"].items()
    ]
    print_table("Exponents on the grid of each method", ("", "of n", "of d"), rows)
    for method, part in summary.items():
        console.print(f"largest ratio to the GEMMs, {method}: {part['largest_ratio']}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = command_line("complexity", __doc__, quick="n to 1024, d to 32, one repeat")
    parser.add_argument("--repeats", type=int, help="turns (3)")
    options = parse(parser, arguments)
    repeats = options.repeats or (1 if options.quick else 3)
    cells = [Cell(method, n, d) for method, widths in WIDTHS.items() for n in ROWS for d in widths]
    if options.quick:
        cells = [cell for cell in cells if cell.rows <= 1024 and cell.width <= 32]
    entries = []
    for cell in cells:
        if cell.estimate <= BUDGET[cell.method]:
            entries.append(measure(cell, repeats))
            console.print(f"[dim]{cell.method}, {cell.rows}, {cell.width}[/dim]")
    summary = summarise(entries, 0.0 if options.quick else LARGE)
    print_entries(entries, summary)
    content = {
        "machine": machine(),
        "setting": {"repeats": repeats, "ratio": RATIO, "ridge_y": RIDGE_Y, "dtype": "float64"},
        "limits": {str(width): limit for width, limit in LIMITS.items()},
        "left_out": [vars(cell) for cell in cells if cell.estimate > BUDGET[cell.method]],
        "summary": summary,
        "entries": entries,
    }
    save("complexity", content, quick=options.quick)


if __name__ == "__main__":
    main()
