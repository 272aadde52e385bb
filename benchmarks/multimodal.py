"""Noise-free planted problems with many local minima: who finds the solution.

    A (64, d) standard normal, X* and Y* normal with variance 1/d
    B = softmax(A X* A^T) A Y*

One sequence, no ridge, scale 1. A method has found the solution when its loss is below 1e-9 of
||B - mean||_F^2. Ours is `fit(problem, starts=...)`, with the time that the peer took as its
limit (where the peer did not run, its median time elsewhere). The peer is torch L-BFGS with the
strong Wolfe line search from 100 starts of the size of the planted matrices, one after the other,
X and Y jointly; its seconds are those of all 100. There is no L-BFGS for batches with a line search
for each. What one could gain is bounded beside: the seconds of as many evaluations where those of
all starts are made in one batch and nothing else costs anything.

    python -m benchmarks.multimodal --quick
    python -m benchmarks.multimodal --widths 8 --instances 5
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import command_line, console, machine, median, parse, print_table, save, show

ROWS, FOUND = 64, 1e-9
STARTS = {4: 64, 8: 128}  # ours, by width
PEER_STARTS = 100
LBFGS = {
    "history_size": 50,
    "max_iter": 500,
    "max_eval": 750,
    "tolerance_grad": 1e-10,
    "tolerance_change": 1e-13,
    "line_search_fn": "strong_wolfe",
}


def instance(width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of one problem."""
    generator = torch.Generator().manual_seed(1000 * width + seed)
    shapes = ((ROWS, width), (width, width), (width, width))
    A, X, Y = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    X, Y = X / width**0.5, Y / width**0.5
    return A, torch.softmax(A @ X @ A.mT, -1) @ A @ Y


def case(
    width: int, seed: int, starts: int, peer_starts: int, seconds: float | None = None
) -> dict[str, Any]:
    """Both methods on one problem, or ours alone within some seconds."""
    A, B = instance(width, seed)
    unit = float((B - B.mean(0)).square().sum())
    peer = lbfgs(A, B, unit, peer_starts, seed) if seconds is None else None
    limit = seconds if peer is None else peer["seconds"]
    return {"seed": seed, "peer": peer, "ours": ours(A, B, unit, starts, seed, limit)}


def ours(
    A: Tensor, B: Tensor, unit: float, starts: int, seed: int, max_seconds: float | None
) -> dict[str, Any]:
    """`fit` with many starts."""
    import attnreg

    begin = time.perf_counter()
    problem = attnreg.AttentionProblem(A, B, scale=1.0)
    result = attnreg.fit(problem, starts=starts, seed=seed, max_seconds=max_seconds)
    seconds = time.perf_counter() - begin
    assert result.minima is not None
    return {
        "relative_loss": result.loss / unit,
        "found": result.loss < FOUND * unit,
        "seconds": seconds,
        "status": result.status.name,
        "minima": vars(result.minima),
    }


def lbfgs(A: Tensor, B: Tensor, unit: float, starts: int, seed: int) -> dict[str, Any]:
    """All starts, each to its own end."""
    generator = torch.Generator().manual_seed(10**6 + seed)  # not the seed of the inputs
    width = A.shape[1]
    normal = torch.randn(starts, 2, width, width, generator=generator, dtype=torch.float64)
    losses, evaluations, first = [], 0, None
    begin = time.perf_counter()
    for start in normal / width**0.5:
        X, Y = (matrix.clone().requires_grad_() for matrix in start)
        optimiser = torch.optim.LBFGS([X, Y], **LBFGS)

        def closure(X: Tensor = X, Y: Tensor = Y) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            loss = loss_of(A, B, X, Y)
            X.grad, Y.grad = torch.autograd.grad(loss, (X, Y))
            return loss.detach()

        optimiser.step(closure)
        with torch.no_grad():
            losses.append(float(loss_of(A, B, X, Y)) / unit)
        if first is None and losses[-1] < FOUND:
            first = time.perf_counter() - begin
    return {
        "relative_loss": min(losses),
        "found": min(losses) < FOUND,
        "starts_that_found": sum(loss < FOUND for loss in losses),
        "seconds": time.perf_counter() - begin,
        "seconds_to_first": first,
        "evaluations": evaluations,
        "seconds_batched_bound": evaluations / starts * batched_seconds(A, B, normal),
    }


def loss_of(A: Tensor, B: Tensor, X: Tensor, Y: Tensor) -> Tensor:
    """The loss of one start, or the sum over a batch of them."""
    return (torch.softmax(A @ X @ A.mT, -1) @ (A @ Y) - B).square().sum()


def batched_seconds(A: Tensor, B: Tensor, starts: Tensor, repeats: int = 5) -> float:
    """Seconds of one evaluation with gradient of all starts in one batch."""
    X, Y = (starts[:, i].clone().requires_grad_() for i in range(2))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        torch.autograd.grad(loss_of(A, B, X, Y), (X, Y))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def summary(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Success and median seconds of both."""
    peers = [case["peer"] for case in cases if case["peer"] is not None]
    result = {name: _shared(runs) for name, runs in _by_method(cases).items()}
    result["peer"] |= {
        "median_seconds_batched_bound": median(run["seconds_batched_bound"] for run in peers),
        "starts_that_found": sum(run["starts_that_found"] for run in peers),
    }
    return result


def _by_method(cases: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {who: [c[who] for c in cases if c[who] is not None] for who in ("ours", "peer")}


def _shared(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "instances": len(runs),
        "found": sum(run["found"] for run in runs),
        "median_seconds": median(run["seconds"] for run in runs),
        "most_seconds": max(run["seconds"] for run in runs),
    }


def print_cases(width: int, cases: Sequence[dict[str, Any]]) -> None:
    """One row an instance."""
    rows = []
    for found in cases:
        mine, peer = found["ours"], found["peer"] or {}
        rows.append(
            (
                str(found["seed"]),
                show(mine["relative_loss"]),
                show(mine["seconds"]),
                str(mine["minima"]["descents"]),
                str(mine["minima"]["best"]),
                *(show(peer.get(name)) for name in ("relative_loss", "seconds")),
                str(peer.get("starts_that_found", "-")),
            )
        )
    columns = ("seed", "loss", "s", "descents", "best found", "peer's loss", "s", "found")
    print_table(f"d = {width}: attnreg and L-BFGS from many starts", columns, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = command_line("multimodal", __doc__, quick="two problems of four dimensions, 10 starts")
    parser.add_argument("--widths", type=int, nargs="+", choices=tuple(STARTS), help="d (4 8)")
    parser.add_argument("--instances", type=int, help="problems of each width (20)")
    parser.add_argument("--peer-instances", type=int, help="of these with the peer (all)")
    options = parse(parser, arguments, threads=1)
    widths = options.widths or ([4] if options.quick else list(STARTS))
    instances = options.instances or (2 if options.quick else 20)
    peered = instances if options.peer_instances is None else max(1, options.peer_instances)
    peer_starts = 10 if options.quick else PEER_STARTS
    case(4, 10**5, 2, 2)  # imports and first calls outside the timed runs
    content: dict[str, Any] = {
        "machine": machine(),
        "setting": {
            "rows": ROWS,
            "found": FOUND,
            "starts": STARTS,
            "peer_starts": peer_starts,
            "peer": LBFGS,
        },
        "widths": {},
    }
    for width in widths:
        cases: list[dict[str, Any]] = []
        for seed in range(instances):
            limit = None
            if seed >= peered:  # what the peer takes elsewhere
                limit = median(found["peer"]["seconds"] for found in cases[:peered])
            cases.append(case(width, seed, STARTS[width], peer_starts, limit))
            console.print(f"[dim]d = {width}, instance {seed + 1} of {instances}[/dim]")
        print_cases(width, cases)
        content["widths"][str(width)] = {"summary": summary(cases), "cases": cases}
        save("multimodal", content, quick=options.quick)


if __name__ == "__main__":
    main()
