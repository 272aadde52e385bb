"""Distortion of the sampled Gauss-Newton matrix against the stated 1 +- eps.

With probability 1 - failure all eigenvalues of K^-1 K~ are within eps of 1, where K is the reduced
Gauss-Newton matrix with the ridges and K~ that of the sampled rows. The distortion is measured over
many seeds at the planted matrices (`ridged_problem`) and its failures are counted. `one row in` is
the factor between rows available and rows sampled; candidates are the rows whose co-moments had to
be computed for it.

The second table divides the rate of the formula by 10 and by 100: how cautious the formula is.

    python -m benchmarks.sketch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg.curvature.dense import assemble_gauss_newton
from attnreg.curvature.sketch import RowSample, oversampling
from attnreg.objective import Point
from benchmarks.common import command_line, machine, parse, print_table, save, show
from benchmarks.ridged_problem import ridged

SEEDS = 200
DIVISORS = (1, 10, 100)


@dataclass(frozen=True)
class Case:
    """Sizes, ridges, and what is stated."""

    sequences: int
    rows: int
    width: int
    ratio: float
    ridge_y: float
    eps: float
    failure: float
    logit_std: float = 0.5


CASES = (
    Case(1, 1024, 4, 3.0, 0.3, 0.6, 0.01),
    Case(1, 2048, 8, 3.0, 0.3, 0.6, 0.01),
    Case(1, 2048, 8, 10.0, 1.0, 0.6, 0.01),
    Case(1, 2048, 8, 10.0, 1.0, 0.6, 0.5),
    Case(1, 2048, 8, 30.0, 1.0, 0.3, 0.1),
    Case(1, 2048, 8, 10.0, 1.0, 1.0, 0.5),
    Case(1, 2048, 8, 10.0, 1.0, 0.6, 0.01, 2.0),
    Case(16, 128, 8, 10.0, 1.0, 0.6, 0.01),
    Case(1, 2048, 16, 30.0, 1.0, 0.6, 0.1),
)
QUICK = (CASES[0], CASES[5])


def run(case: Case, seeds: int) -> dict[str, Any]:
    """Distortions of all seeds, and again with fewer rows than the formula asks for."""
    made = ridged(
        case.rows,
        case.width,
        ratio=case.ratio,
        ridge_y=case.ridge_y,
        sequences=case.sequences,
        logit_std=case.logit_std,
    )
    point = made.point()
    root = torch.linalg.cholesky(assemble_gauss_newton(point))
    rate = oversampling(point.theta.numel() + point.readout.numel(), case.eps, case.failure)
    entry = {**asdict(case), "available": case.rows * case.sequences, "rate": rate, "rates": {}}
    for divisor in DIVISORS:
        drawn = [draw(point, root, rate / divisor, seed) for seed in range(seeds)]
        distortions = [distortion for distortion, _, _ in drawn]
        entry["rates"][str(divisor)] = {
            "distortions": distortions,
            "failures": sum(distortion > case.eps for distortion in distortions),
            "sampled": float(torch.tensor([s for _, s, _ in drawn]).double().median()),
            "candidates": float(torch.tensor([c for _, _, c in drawn]).double().median()),
        }
    return entry


def draw(point: Point, root: Tensor, rate: float, seed: int) -> tuple[float, int, int]:
    """Distortion of one sketch, rows sampled and candidates."""
    sample = RowSample(point, rate, torch.Generator().manual_seed(seed))
    matrix = assemble_gauss_newton(point, sample)
    half = torch.linalg.solve_triangular(root, matrix, upper=False)
    whitened = torch.linalg.solve_triangular(root, half.mT, upper=False)
    values = torch.linalg.eigvalsh((whitened + whitened.mT) / 2)
    candidates = sample.available if sample.candidates is None else len(sample.candidates)
    return float((values - 1).abs().max()), sample.sampled, candidates


def print_cases(entries: Sequence[dict[str, Any]], seeds: int) -> None:
    """One line a case, then one line a case and divisor."""
    columns = ("sequences x n, d, ridge_x, ridge_y, logits", "eps", "failure", "sampled", "one in")
    columns += ("candidates", "median", "largest", f"failures of {seeds}")
    rows = []
    for entry in entries:
        full = entry["rates"]["1"]
        rows.append(
            (
                name(entry),
                show(entry["eps"]),
                show(entry["failure"]),
                f"{full['sampled']:.0f}",
                f"{entry['available'] / max(1.0, full['sampled']):.1f}",
                f"{full['candidates']:.0f}",
                *statistics(full["distortions"]),
                str(full["failures"]),
            )
        )
    print_table("Distortion of the sketch", columns, rows)
    rows = [
        (
            name(entry),
            divisor,
            f"{part['sampled']:.0f}",
            *statistics(part["distortions"]),
            str(part["failures"]),
        )
        for entry in entries
        for divisor, part in entry["rates"].items()
        if divisor != "1"
    ]
    columns = ("sequences x n, d, ridge_x, ridge_y, logits", "rate over", "sampled", "median")
    print_table("Fewer rows than stated", (*columns, "largest", f"beyond eps of {seeds}"), rows)


def statistics(values: Sequence[float]) -> tuple[str, str]:
    """Median and largest."""
    tensor = torch.tensor(values)
    return f"{float(tensor.median()):.3f}", f"{float(tensor.max()):.3f}"


def name(entry: dict[str, Any]) -> str:
    """A case in a few characters."""
    sizes = f"{entry['sequences']} x {entry['rows']}, {entry['width']}"
    return f"{sizes}, {entry['ratio']:g} top, {entry['ridge_y']:g}, {entry['logit_std']:g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = command_line("sketch", __doc__, quick="two cases, 20 seeds")
    parser.add_argument("--seeds", type=int, help=f"of the sample ({SEEDS})")
    options = parse(parser, arguments)
    seeds = options.seeds or (20 if options.quick else SEEDS)
    entries = [run(case, seeds) for case in (QUICK if options.quick else CASES)]
    print_cases(entries, seeds)
    content = {"machine": machine(), "setting": {"seeds": seeds}, "cases": entries}
    save("sketch", content, quick=options.quick)


if __name__ == "__main__":
    main()
