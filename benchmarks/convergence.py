"""Iterations to a gap eps of the regularised objective: at most a + b log(1 / eps).

Whitened problems whose ridge_x is a multiple of the top of their curvature (`ridged_problem`),
solved by the three solvers from random matrices of the size of the ridges' centre. The gap is that
of the regularised objective over ||B - mean||^2, against the best value of all solvers at a
tolerance of 1e-15. For the sketched solver a line is fitted to iterations against log10(1 / eps):
b is iterations a decade.
For the trust region, which ends with exact Newton steps, the order of convergence is given as in
`tail`: it is 2 where the number of right digits doubles.

    python -m benchmarks.convergence
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.common import (
    RESULTS,
    command_line,
    console,
    machine,
    parse,
    print_table,
    save,
    show,
)
from benchmarks.ridged_problem import ridged
from benchmarks.tail import order

DECADES = range(2, 13)
TOLERANCE = 1e-15
SOLVERS = ("newton-sketch", "newton-cg", "trust-region")
PICTURE = RESULTS.parent.parent / "docs" / "convergence.png"


@dataclass(frozen=True)
class Case:
    """Sizes, ridge_x over the top of the curvature, and ridge_y."""

    rows: int
    width: int
    ratio: float
    ridge_y: float


CASES = (
    Case(128, 8, 1.0, 0.1),
    Case(512, 8, 0.1, 0.1),
    Case(512, 16, 1.0, 0.1),
    Case(1024, 32, 1.0, 0.3),
    Case(1024, 8, 30.0, 1.0),
    Case(2048, 8, 10.0, 0.3),
    Case(2048, 8, 10.0, 1.0),
    Case(2048, 8, 30.0, 1.0),
    Case(2048, 16, 10.0, 1.0),
    Case(2048, 16, 30.0, 1.0),
    Case(2048, 32, 30.0, 1.0),
    Case(2048, 64, 100.0, 1.0),
)
QUICK = (CASES[0], CASES[4])


def run(case: Case) -> dict[str, Any]:
    """All solvers on one case."""
    import attnreg

    made = ridged(
        case.rows, case.width, ratio=case.ratio, ridge_y=case.ridge_y, logit_std=0.5, seed=0
    )
    generator = torch.Generator().manual_seed(10**6)
    start = {}
    for key, matrix in made.center.items():
        start[key] = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
        start[key] *= matrix.norm() / start[key].norm()
    results = {
        solver: attnreg.fit(made.problem, solver=solver, init=start, tol=TOLERANCE)
        for solver in SOLVERS
    }
    best = min(result.regularised_loss for result in results.values())
    unit = made.problem.target_norm_squared
    entry: dict[str, Any] = {**asdict(case), "ridge_x": made.problem.ridge_x, "solvers": {}}
    for solver, result in results.items():
        records = [record for record in result.history if record.accepted]
        gaps = [max(0.0, (record.regularised - best) / unit) for record in records]
        norms = [record.gradient_norm for record in records]
        found = {
            f"1e-{k}": next(
                (r.iteration for r, g in zip(records, gaps, strict=True) if g <= 10.0**-k), None
            )
            for k in DECADES
        }
        orders = [order(*norms[i - 2 : i + 1]) for i in range(2, len(norms)) if norms[i] > 1e-16]
        entry["solvers"][solver] = {
            "status": result.status.name,
            "relative_error": result.relative_error,
            "iterations_to": found,
            "gaps": gaps,
            "gradient_norms": norms,
            "best_order": max((o for o in orders if o is not None), default=None),
            "inner_iterations": [record.inner_iterations for record in records],
            "rows_sampled": [record.rows_sampled for record in records],
            "passes": result.history[-1].passes,
            "seconds": result.history[-1].seconds,
        }
    entry["line"] = line(entry["solvers"]["newton-sketch"]["iterations_to"])
    return entry


def line(found: dict[str, int | None]) -> dict[str, float]:
    """Least squares a + b log10(1 / eps) over the gaps that the start has not, and its residual.

    `a_bound` is the smallest a with which the line of the same slope is above all points.
    """
    points = [(float(k[3:]), n) for k, n in found.items() if n is not None and n > 0]
    x, y = np.array(points).T
    b, a = np.polyfit(x, y, 1)
    return {
        "a": a,
        "b": b,
        "a_bound": float((y - b * x).max()),
        "largest_residual": float(np.abs(y - a - b * x).max()),
    }


def sampled(entry: dict[str, Any]) -> float | None:
    """Median of the rows sampled an iteration; None where all rows entered each time."""
    rows = entry["solvers"]["newton-sketch"]["rows_sampled"][1:]
    found = [entry["rows"] if r is None else r for r in rows]
    return None if all(r is None for r in rows) else float(np.median(found))


def print_cases(entries: Sequence[dict[str, Any]]) -> None:
    """Two tables: iterations of the sketched solver, and the solvers beside each other."""
    columns = ("n, d, ridge_x, ridge_y", "rows sampled", *(f"1e-{k}" for k in DECADES), "a", "b")
    rows = []
    for entry in entries:
        found = entry["solvers"]["newton-sketch"]["iterations_to"]
        few = sampled(entry)
        rows.append(
            (
                name(entry),
                "exact" if few is None else f"{few:.0f}",
                *(show(found[f"1e-{k}"]) for k in DECADES),
                f"{entry['line']['a']:.2f}",
                f"{entry['line']['b']:.2f}",
            )
        )
    print_table("newton-sketch: iterations to a gap; a + b log10(1 / eps)", columns, rows)
    columns = ("n, d, ridge_x, ridge_y", "sketch", "cg", "exact Newton", "order", "its gradients")
    rows = []
    for entry in entries:
        solvers = entry["solvers"]
        tail = solvers["trust-region"]["gradient_norms"][-4:]
        rows.append(
            (
                name(entry),
                *(show(solvers[s]["iterations_to"]["1e-12"]) for s in SOLVERS),
                show(solvers["trust-region"]["best_order"]),
                " ".join(f"{norm:.0e}" for norm in tail),
            )
        )
    print_table("Iterations to a gap of 1e-12", columns, rows)


def name(entry: dict[str, Any]) -> str:
    """A case in a few characters."""
    return f"{entry['rows']}, {entry['width']}, {entry['ratio']:g} top, {entry['ridge_y']:g}"


def draw(entries: Sequence[dict[str, Any]]) -> None:
    """Gap against iterations, one line a case; sketched on the left, exact Newton on the right."""
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        for axes, solver in zip(
            figure.subplots(1, 2, sharey=True), ("newton-sketch", "trust-region"), strict=True
        ):
            colours = mpl.colormaps["viridis"](np.linspace(0, 0.95, len(entries)))
            for entry, colour in zip(entries, colours, strict=True):
                gaps = np.maximum(entry["solvers"][solver]["gaps"], 1e-17)
                axes.semilogy(gaps, marker=".", linewidth=1, color=colour, label=name(entry))
            axes.set(xlabel="iteration", title=solver)
            axes.axhline(1e-12, color="grey", linewidth=0.8, linestyle="--")
            axes.grid(alpha=0.3)
        axes.legend(fontsize=6, title="n, d, ridge_x, ridge_y", title_fontsize=6)
        figure.axes[0].set_ylabel("gap / ||B - mean||²")
        figure.savefig(PICTURE, dpi=130)
    console.print(f"[dim]written: docs/{PICTURE.name}[/dim]")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = command_line("convergence", __doc__, quick="two small problems, no picture")
    options = parse(parser, arguments)
    entries = []
    for case in QUICK if options.quick else CASES:
        entries.append(run(case))
        console.print(f"[dim]{name(entries[-1])}[/dim]")
    print_cases(entries)
    content = {"machine": machine(), "setting": {"tol": TOLERANCE}, "cases": entries}
    save("convergence", content, quick=options.quick)
    if not options.quick:
        draw(entries)


if __name__ == "__main__":
    main()
