"""Certificates are never wrong, are issued where they can be, and cannot be doctored.

On random problems (n <= 64, d <= 6; see benchmarks/certificate_problems.py) the point at which a
fit ends is certified, and a point that is no minimiser: stopped early, perturbed, a saddle point,
or the solution of another problem. Whenever LOCAL or GLOBAL is issued, Newton's method in ball
arithmetic finds the minimiser to more than 50 digits, and the true gap and distance are compared
with those of the certificate. Then at least 200 doctored certificates are checked, and one large
problem is timed.

    python -m benchmarks.certificates
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attnreg import AttentionProblem, Bilinear, Certificate, fit, predict, verify
from benchmarks.certificate_mutations import refusals
from benchmarks.certificate_problems import (
    POINTS,
    Instance,
    Parameters,
    condition,
    converged,
    exact_answer,
    make,
    other_point,
)
from benchmarks.common import command_line, console, machine, parse, print_table, save, show

CUTS = (1e4, 1e6, 1e8)
CONVERGED = 1e-12
"""Gradient norm at which a fit counts as converged; fits go on to 1e-15 or to rounding."""


def checked(
    instance: Instance, point: Parameters, certificate: Certificate, near: Parameters
) -> dict[str, Any]:
    """What a certificate says and, where it says something, whether it is true."""
    row: dict[str, Any] = {"kind": certificate.kind.name, "gap": certificate.gap}
    row["loss"] = certificate.loss
    if certificate.certified:
        answer = exact_answer(instance, point, certificate, near)
        assert certificate.gap is not None
        assert certificate.radius is not None
        row["resolved"] = answer.resolved
        row["true_gap"] = answer.gap
        row["violated"] = answer.resolved and not (
            answer.gap <= certificate.gap and answer.distance <= certificate.radius
        )
        row["share_of_radius"] = answer.distance / certificate.radius
    return row


def problem_case(index: int) -> dict[str, Any]:
    """Both points of one problem."""
    instance = make(index)
    result = converged(instance)
    near = dict(result.parameters)
    certificate = verify(instance.problem, result)
    ended = checked(instance, near, certificate, near)
    ended["converged"] = result.gradient_norm <= CONVERGED
    ended["condition"] = condition(instance.problem, near)
    which = POINTS[(index // len(POINTS)) % len(POINTS)]
    other: dict[str, Any] | None = None
    found = other_point(instance, result, which)
    if found is not None:
        changed, point = found
        other = checked(changed, point, verify(changed.problem, point["X"], point["Y"]), near)
    row = {"index": index, "family": instance.family, "ended": ended}
    return row | {"other": which, "other_point": other}


def summary(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers that the documentation quotes."""
    ended = [case["ended"] for case in cases]
    others = [case["other_point"] for case in cases if case["other_point"]]
    issued = [row for row in [*ended, *others] if "violated" in row]
    shares = {}
    low = 0.0
    for cut in CUTS:
        rows = [
            r for r in ended if r["converged"] and r["condition"] and low < r["condition"] <= cut
        ]
        shares[f"{low:g} to {cut:g}"] = [sum("violated" in r for r in rows), len(rows)]
        low = cut
    gaps = [r["gap"] / r["loss"] for r in ended if "violated" in r and r["loss"] > 0]
    ratios = [r["gap"] / r["true_gap"] for r in issued if r.get("true_gap", 0.0) > 0]
    return {
        "problems": len(cases),
        "kinds": Counter(row["kind"] for row in ended),
        "issued": len(issued),
        "violations": sum(row["violated"] for row in issued),
        "unresolved": sum(not row["resolved"] for row in issued),
        "issued_of_converged_by_condition": shares,
        "gap_over_loss": _quantiles(gaps),
        "gap_over_true_gap": _quantiles(ratios),
        "other_points": {
            which: Counter(
                case["other_point"]["kind"]
                for case in cases
                if case["other"] == which and case["other_point"]
            )
            for which in POINTS
        },
    }


def large_case(rows: int, width: int) -> dict[str, Any]:
    """Seconds of ``verify`` on one large problem at a fit that is warm and short."""
    generator = torch.Generator().manual_seed(0)
    A, Y, noise = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((1, rows, width), (width, width), (1, rows, width))
    )
    X = torch.randn(width, width, generator=generator, dtype=torch.float64) / width
    blank = AttentionProblem(A, torch.zeros_like(A), ridge_x=0.1, ridge_y=0.1)
    truth = {"X": X, "Y": Y}
    problem = blank.replace(B=predict(Bilinear(), truth, blank) + 0.1 * noise)
    result = fit(problem, init=truth, tol=1e-12, max_iterations=60)
    began = time.perf_counter()
    certificate = verify(problem, result)
    seconds = time.perf_counter() - began
    return {
        "rows": rows,
        "width": width,
        "seconds": seconds,
        "kind": certificate.kind.name,
        "gap": certificate.gap,
        "loss": certificate.loss,
        "gradient_norm": certificate.gradient_norm,
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    places = {"least": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "largest": 1.0}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in places.items()}


def print_summary(content: dict[str, Any]) -> None:
    """Tables of what was found."""
    numbers = content["summary"]
    rows = [
        (name, str(numbers[name])) for name in ("problems", "issued", "violations", "unresolved")
    ]
    rows += [(f"ended: {kind.lower()}", str(n)) for kind, n in sorted(numbers["kinds"].items())]
    rows += [
        (f"issued, condition {name}", f"{got} of {all_}")
        for name, (got, all_) in numbers["issued_of_converged_by_condition"].items()
    ]
    for name in ("gap_over_loss", "gap_over_true_gap"):
        values = ", ".join(f"{k} {show(v)}" for k, v in numbers[name].items())
        rows.append((name.replace("_", " "), values))
    for which, kinds in numbers["other_points"].items():
        rows.append((which, ", ".join(f"{k.lower()} {n}" for k, n in sorted(kinds.items()))))
    doctored, large = content["doctored"], content["large"]
    rows.append(("doctored", f"{doctored['tried']} tried, {len(doctored['accepted'])} accepted"))
    rows.append(
        (f"n {large['rows']}, d {large['width']}", f"{large['kind']}, {large['seconds']:.1f} s")
    )
    print_table("certificates", ("what", "found"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = command_line("certificates", __doc__, quick="100 problems, a smaller large one")
    parser.add_argument("--problems", type=int, help="how many (2000)")
    options = parse(parser, arguments, threads=1)  # the small problems are fastest on one
    count = options.problems or (100 if options.quick else 2000)
    began, cases = time.perf_counter(), []
    for index in range(count):
        cases.append(problem_case(index))
        if (index + 1) % 100 == 0:
            wrong = sum(_violated(case) for case in cases)
            seconds = time.perf_counter() - began
            console.print(f"{index + 1} problems, {wrong} violations, {seconds:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        doctored = refusals(200, Path(folder))
    content = {
        "machine": machine(),
        "setting": {"problems": count, "digits": 76, "converged": CONVERGED, "dtype": "float64"},
        "summary": summary(cases),
        "doctored": doctored,
        "large": large_case(256, 16) if options.quick else large_case(1024, 32),
        "seconds": time.perf_counter() - began,
        "wrong": [case for case in cases if _violated(case)],
        "not_issued": [
            case["index"]
            for case in cases
            if case["ended"]["converged"]
            and case["ended"]["condition"]
            and "violated" not in case["ended"]
        ],
    }
    print_summary(content)
    save("certificates", content, quick=options.quick)


def _violated(case: dict[str, Any]) -> bool:
    other = case["other_point"] or {}
    return bool(case["ended"].get("violated") or other.get("violated"))


if __name__ == "__main__":
    main()
