"""torch L-BFGS and mini-batch Adam on the real layer, all weights and biases free.

Both use fused attention. The clock stands still while errors are evaluated that a user would not
compute: every second or so, on all training and all held-out sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnreg.report.baselines import fused_layer
from benchmarks.common import Clock
from benchmarks.layer_problem import STUDENT, Data, Layer, relative_error

UNLIMITED = 10**9
EVALUATION_INTERVAL = 1.0  # seconds


class TimeIsOver(Exception):
    """Ends L-BFGS inside its closure."""


@dataclass
class LayerTrace:
    """Errors against time, and the errors at the end."""

    seconds: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    held_out: list[float | None] = field(default_factory=list)
    steps: int = 0
    note: str = ""

    def seconds_to(self, error: float) -> float | None:
        """Seconds until the first training error of at most `error`; None for never."""
        for seconds, value in zip(self.seconds, self.train, strict=True):
            if value <= error:
                return seconds
        return None

    def at(self, seconds: float) -> float:
        """The last training error noted by then; the first where there is none."""
        noted = [e for s, e in zip(self.seconds, self.train, strict=True) if s <= seconds]
        return noted[-1] if noted else self.train[0]

    def summary(self, budget: float) -> dict[str, Any]:
        """For JSON. Training error within the budget; the held-out one is that of the end.

        A method that looks at the clock between iterations only may end later than `budget`.
        """
        return {
            "train": self.at(budget * 1.02),  # a step of Adam begun in time counts
            "train_at_end": self.train[-1],
            "held_out": self.held_out[-1],
            "seconds": self.seconds[-1],
            "steps": self.steps,
            "note": self.note,
            "curve": list(zip(self.seconds, self.train, self.held_out, strict=True)),
        }


class Watch:
    """Evaluates the errors at intervals with the clock stopped."""

    def __init__(self, layer: Layer, max_seconds: float) -> None:
        self.trace = LayerTrace()
        self.clock = Clock()
        self._layer, self._max_seconds = layer, max_seconds
        self._next = 0.0

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return self.clock.seconds() >= self._max_seconds

    def look(self, weights: dict[str, Tensor], last: bool = False) -> None:
        """Notes the errors of `weights` if it is time to."""
        seconds = self.clock.seconds()
        if seconds < self._next and not last:
            return
        with self.clock.paused():
            self.trace.seconds.append(seconds)
            self.trace.train.append(relative_error(weights, self._layer.train))
            self.trace.held_out.append(relative_error(weights, self._layer.held_out))
            self._next = seconds + min(EVALUATION_INTERVAL, self._max_seconds / 20)


@dataclass(frozen=True)
class LayerAdam:
    """Mini-batch Adam whose rate follows a cosine that ends with the time."""

    batch: int
    rate: float

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return f"Adam (batch {self.batch}, rate {self.rate:g})"

    def solve(self, layer: Layer, max_seconds: float) -> LayerTrace:
        """Runs from the pooled start until the time is over."""
        weights = _variables(layer)
        batches = _batches(layer.train, self.batch)
        optimiser = torch.optim.Adam(weights.values(), lr=self.rate, fused=True)
        watch = Watch(layer, max_seconds)
        watch.look(weights)
        while not watch.over:
            done = min(1.0, watch.clock.seconds() / max_seconds)
            optimiser.param_groups[0]["lr"] = self.rate * 0.5 * (1 + math.cos(math.pi * done))
            batch = next(batches)
            loss = (fused_layer(STUDENT, weights, batch.A) - batch.B).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            watch.trace.steps += 1
            watch.look(weights)
        watch.look(weights, last=True)
        return watch.trace


@dataclass(frozen=True)
class LayerLBFGS:
    """Full-batch L-BFGS with the strong Wolfe line search, restarted where that gives up."""

    history: int

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return f"torch L-BFGS ({self.history})"

    def solve(self, layer: Layer, max_seconds: float) -> LayerTrace:
        """Runs from the pooled start until the time is over or a restart gains nothing."""
        weights = _variables(layer)
        data, spread = layer.train, layer.train.spread
        best: tuple[float, dict[str, Tensor]] = (math.inf, {})
        watch = Watch(layer, max_seconds)

        def closure() -> Tensor:
            nonlocal best
            loss = (fused_layer(STUDENT, weights, data.A) - data.B).square().sum() / spread
            gradients = torch.autograd.grad(loss, tuple(weights.values()))
            for weight, gradient in zip(weights.values(), gradients, strict=True):
                weight.grad = gradient
            watch.trace.steps += 1
            value = loss.item()
            with watch.clock.paused():
                if value < best[0]:
                    best = value, {name: w.detach().clone() for name, w in weights.items()}
            watch.look(best[1])
            if watch.over:
                raise TimeIsOver
            return loss.detach()

        try:
            before = math.inf
            while best[0] < before or not best[1]:
                before = best[0]
                _lbfgs(weights, self.history).step(closure)
            watch.trace.note = "line search and restart gain nothing"
        except TimeIsOver:
            pass
        watch.look(best[1], last=True)
        return watch.trace


def _lbfgs(weights: dict[str, Tensor], history: int) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(
        list(weights.values()),
        history_size=history,
        line_search_fn="strong_wolfe",
        max_iter=UNLIMITED,
        max_eval=UNLIMITED,
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )


def _variables(layer: Layer) -> dict[str, Tensor]:
    return {name: value.clone().requires_grad_() for name, value in layer.pooled.items()}


def _batches(data: Data, size: int) -> Iterator[Data]:
    """Whole sequences, each once an epoch, in an order drawn anew for each."""
    generator = torch.Generator().manual_seed(0)
    count = data.A.shape[0]
    while True:
        order = torch.randperm(count, generator=generator)
        for indices in order.split(size):
            yield Data(data.A[indices], data.B[indices])
