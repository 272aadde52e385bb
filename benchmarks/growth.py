"""Seconds of one iteration on a multi-head layer against rows, width, heads and sequences.

One iteration is what the damped Newton loop does between two points: features, readout and gradient
at the new point, Kronecker preconditioner, and products of the Gauss-Newton matrix and solves with
the preconditioner as in conjugate gradients, `PRODUCTS` of each (a fixed number, so that only the
cost of each is measured). Heads are 32 wide, each with its own key/value head; float32.

Exponents are fitted to log seconds by least squares over the grid, with their standard errors, from
cells of at least 5e8 operations; the same fit to the counted operations and to the formula of a
pass, s w n (n + d + w) for s sequences of n rows and w = 32 heads, on the same cells, stands
beside. Small products run below the rate of large ones, so that seconds can grow more slowly than
operations. With one thread seconds are those of the process, so that what else runs on the machine
counts little.

    python -m benchmarks.growth
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from attnreg.curvature.preconditioner import gauss_newton_estimate
from attnreg.objective import Objective, Point
from attnreg.roofline.replay import Replay
from attnreg.roofline.trace import trace
from benchmarks.common import command_line, console, machine, median, parse, print_table, save, show
from benchmarks.complexity import exponents
from benchmarks.product_cost import HEAD_DIM, Case, make_point

PRODUCTS = 8
SEQUENCES, ROWS = (4, 16, 64), (64, 128, 256, 512)
WIDTHS, HEADS = (64, 128, 256, 512), (2, 4, 8, 16)
GRID = (SEQUENCES, ROWS, WIDTHS, HEADS)
AXES = {"n": "rows", "d": "width", "heads": "heads", "sequences": "sequences"}
BUDGET = 5e10
"""Cells with more operations an iteration, about, are left out."""

LARGE = 5e8
"""Cells with fewer are left out of the fits: overhead."""


class Cell(Case):
    """One measurement."""

    @property
    def formula(self) -> float:
        """Of one pass."""
        inner = self.heads * HEAD_DIM
        return float(self.sequences * inner * self.rows) * (self.rows + self.width + inner)


def iteration(objective: Objective, theta: torch.Tensor) -> None:
    """One iteration from the features on."""
    point = Point(objective, objective.features(theta))
    estimate = gauss_newton_estimate(point, torch.Generator().manual_seed(0))
    precondition = estimate.inverse(estimate.mean_eigenvalue)
    direction = precondition(point.gradient)
    for _ in range(PRODUCTS):
        direction = precondition(point.gauss_newton(direction))


def measure(cell: Cell, repeats: int) -> dict[str, Any]:
    """Times the iteration and its matrix products in turns."""
    point = make_point(cell)
    objective, theta = point.objective, point.theta
    before = objective.operations.as_dict()
    replay = Replay(trace(lambda: iteration(objective, theta)).products)
    operations = {k: v - before[k] for k, v in objective.operations.as_dict().items()}
    times: dict[str, list[float]] = {"iteration": [], "GEMMs": []}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(repeats):
        for name, body in (("iteration", lambda: iteration(objective, theta)), ("GEMMs", replay)):
            begin = clock()
            body()
            times[name].append(clock() - begin)
    return {
        **asdict(cell),
        "seconds": median(times["iteration"]),
        "gemm_seconds": median(times["GEMMs"]),
        "ratio": median(a / b for a, b in zip(*times.values(), strict=True)),
        "operations": {kind: count for kind, count in operations.items() if count},
        "formula": cell.formula,
        "times": times,
    }


def summarise(entries: Sequence[dict[str, Any]], least: float) -> dict[str, Any]:
    """Exponents of seconds, counted operations and formula."""
    fitted = [e for e in entries if sum(e["operations"].values()) >= least]
    values = {
        "seconds": [e["seconds"] for e in fitted],
        "counted": [sum(e["operations"].values()) for e in fitted],
        "formula, s w n (n + d + w)": [e["formula"] for e in fitted],
    }
    fits = {name: exponents(fitted, numbers, AXES) for name, numbers in values.items()}
    ratios = [e["ratio"] for e in fitted]
    return {"fits": fits, "cells": len(fitted), "ratio": [min(ratios), max(ratios)]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = command_line("growth", __doc__, quick="the two smallest of each size, one turn")
    parser.add_argument("--repeats", type=int, help="turns (3)")
    options = parse(parser, arguments)
    repeats = options.repeats or (1 if options.quick else 3)
    most = 2 if options.quick else None
    cells = [Cell(*sizes) for sizes in product(*(axis[:most] for axis in GRID))]
    entries = []
    for cell in cells:
        if 10 * PRODUCTS * cell.formula <= BUDGET:
            entries.append(measure(cell, repeats))
            console.print(f"[dim]{cell}: {show(1e3 * entries[-1]['seconds'])} ms[/dim]")
    summary = summarise(entries, 0.0 if options.quick else LARGE)
    rows = [
        (name, *(f"{fit[axis][0]:.2f} +- {fit[axis][1]:.2f}" for axis in AXES))
        for name, fit in summary["fits"].items()
    ]
    print_table(f"Exponents, {summary['cells']} cells", ("", *AXES), rows)
    low, high = summary["ratio"]
    console.print(f"an iteration takes {low:.2f} to {high:.2f} times its matrix products")
    content = {
        "machine": machine(),
        "setting": {"repeats": repeats, "products": PRODUCTS, "head_dim": HEAD_DIM},
        "left_out": len(cells) - len(entries),
        "summary": summary,
        "entries": entries,
    }
    save("growth", content, quick=options.quick)


if __name__ == "__main__":
    main()
