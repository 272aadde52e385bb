"""The end of a fit: on a noisy problem the last iterations converge quadratically.

The residual is as large as the prediction, so that the exact Hessian matters: Gauss-Newton alone
converges linearly there. The fit goes on from one with little noise.

Where convergence is quadratic the number of right digits doubles: with g_k the gradient norms,
log(g_{k+1} / g_k) / log(g_k / g_{k-1}) tends to 2 (1 where it is linear). Rounding ends the
doubling at about 1e-15. The order in the last column is taken between accepted steps.

    python -m benchmarks.tail
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import command_line, machine, parse, print_table, save, show
from benchmarks.planted_problem import NOISE, planted

WIDTH, START_TOLERANCE, TOLERANCE, WANTED = 16, 1e-10, 1e-15, 1e-12
EXTRA_NOISE = 1.0  # as large as the prediction
LAST = 10


def tail_case(seed: int, logit_std: float, seconds: float) -> dict[str, Any]:
    """One fit to 1e-15 and its accepted iterations."""
    import attnreg

    instance = planted(0.0, seed, logit_std, width=WIDTH)
    arrays = instance.arrays
    bounds = {"max_iterations": 10**4, "max_seconds": seconds}
    start = attnreg.fit(attnreg.AttentionProblem(arrays.A, arrays.B), tol=START_TOLERANCE, **bounds)
    generator = torch.Generator().manual_seed(10**6 + seed)  # not the seed of the inputs
    noise = torch.randn(arrays.B.shape, generator=generator, dtype=torch.float64)
    noise *= (instance.noise_floor / noise.numel()) ** 0.5 * (EXTRA_NOISE / NOISE)
    problem = attnreg.AttentionProblem(arrays.A, arrays.B + noise)
    floor = instance.noise_floor * (1 + (EXTRA_NOISE / NOISE) ** 2)
    result = attnreg.fit(problem, init=start, tol=TOLERANCE, **bounds)
    records = [record for record in result.history if record.accepted]
    norms = [record.gradient_norm for record in records]
    orders = [None, None, *(order(*norms[i - 2 : i + 1]) for i in range(2, len(norms)))]
    return {
        "seed": seed,
        "logit_std": logit_std,
        "status": result.status.name,
        "gradient_norm": min(norms),
        "reached_1e-12": min(norms) <= WANTED,
        "loss_over_floor": result.loss / floor,
        "best_order": max((o for o in orders[-LAST:] if o is not None), default=None),
        "iterations": [
            {
                "iteration": record.iteration,
                "phase": record.phase,
                "gradient_norm": record.gradient_norm,
                "order": order,
                "inner_iterations": record.inner_iterations,
                "loss_over_floor": record.loss / floor,
                "seconds": record.seconds,
            }
            for record, order in zip(records, orders[: len(records)], strict=True)
        ],
    }


def order(first: float, second: float, third: float) -> float | None:
    if not 0 < third < second < first:
        return None
    return math.log(third / second) / math.log(second / first)


def print_case(case: dict[str, Any]) -> None:
    """The last accepted iterations."""
    title = (
        f"seed {case['seed']}, logit std {case['logit_std']:g}: {case['status'].lower()}, loss "
        f"{case['loss_over_floor']:.4f} of the noise floor"
    )
    columns = ("iteration", "phase", "gradient norm", "order", "inner", "loss / floor")
    rows = [
        (
            str(row["iteration"]),
            row["phase"],
            f"{row['gradient_norm']:.2e}",
            show(row["order"]),
            str(row["inner_iterations"]),
            f"{row['loss_over_floor']:.10f}",
        )
        for row in case["iterations"][-LAST:]
    ]
    print_table(title, columns, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = command_line("tail", __doc__, quick="one problem")
    parser.add_argument("--seeds", type=int, help="problems (3)")
    parser.add_argument("--logit-std", type=float, default=4.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="bound on each fit")
    options = parse(parser, arguments)
    seeds = options.seeds or (1 if options.quick else 3)
    cases = []
    for seed in range(seeds):
        cases.append(tail_case(seed, options.logit_std, options.seconds))
        print_case(cases[-1])
    content = {
        "machine": machine(),
        "setting": {"width": WIDTH, "noise": EXTRA_NOISE, "tol": TOLERANCE, "dtype": "float64"},
        "cases": cases,
    }
    save("tail", content, quick=options.quick)


if __name__ == "__main__":
    main()
