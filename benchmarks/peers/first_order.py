"""What the first-order peers share: mini-batches, gradients and the cosine.

The rate follows a cosine that ends with the time. Whole sequences are drawn, each once an epoch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.peers.base import Problem, Recorder, Weights, gradient, leaves

NEVER = 10**9
PLANTED_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
LAYER_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
LAYER_BATCHES = (4, 16)  # sequences

Optimisers = Sequence[torch.optim.Optimizer]


def descend(
    problem: Problem,
    start: Weights,
    recorder: Recorder,
    make: Callable[[dict[str, Tensor]], Optimisers],
    batch: int | None,
) -> None:
    """Steps of some optimisers together until the recorder ends them.

    Args:
        problem: What is minimised.
        start: Weights to begin with.
        recorder: Ends the run.
        make: Makes the optimisers of the weights, at their peak rates.
        batch: Sequences of a step; None for all.
    """
    weights = leaves(start)
    groups = [
        (optimiser, [group["lr"] for group in optimiser.param_groups])
        for optimiser in make(weights)
    ]
    whole = batch is None or batch >= len(problem)
    for index in itertools.repeat(None) if whole else _indices(len(problem), batch):
        done = min(1.0, recorder.clock.seconds() / recorder.max_seconds)
        loss = problem.loss(weights, index)
        gradient(loss, weights)
        recorder.record(loss.item(), lambda: weights, exact=whole)
        for optimiser, peaks in groups:
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * done))
            optimiser.step()


def label(name: str, rate: float, batch: int | None) -> str:
    """Name of a setting."""
    return f"{name} ({rate:g})" if batch is None else f"{name} ({rate:g}, batch {batch})"


def grid(
    method: Callable[[float, int | None], object], rates: Sequence[float] = LAYER_RATES
) -> tuple[object, ...]:
    """All rates with all mini-batches, for real layers."""
    return tuple(method(rate, batch) for batch in LAYER_BATCHES for rate in rates)


def _indices(count: int, size: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)
