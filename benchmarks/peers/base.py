"""The interface of a method on the planted problem, and the recorder that all of them share.

    L(X, Y) = ||softmax_rows(A X A^T) A Y - B||_F^2        joint variables, float64, CPU

A method calls `Recorder.record` with each loss that it computes anyway. The recorder notes the
time, keeps the best variables with its clock stopped, and ends the run by raising `Stop` when the
time is over, the target is reached or nothing improves any more. So every method has the same
clock, the same granularity (each evaluation) and the same stopping rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.common import Clock

# A run has stalled when this many evaluations together gain less than this fraction of the
# initial loss, four orders below the 1e-8 within which losses are called equal.
STALL_GAIN = 1e-12


class Status(Enum):
    """Why a run ended."""

    TARGET = "target loss reached"
    TIME = "time is over"
    STALLED = "no evaluation improves the loss any more"
    CONVERGED = "the method's own test of convergence"
    FAILED = "the method gave up or raised"


class Stop(BaseException):
    """Ends a run from inside an evaluation; not an Exception, so that no peer swallows it."""


@dataclass(frozen=True)
class PlantedArrays:
    """A planted problem: A (b, n, d) and B (b, n, d_out), float64."""

    A: Tensor
    B: Tensor

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of X and Y."""
        d = self.A.shape[-1]
        return (d, d), (d, self.B.shape[-1])


@dataclass
class Trace:
    """What one run of one method did: a point for each evaluation of the loss.

    `loss`, `X` and `Y` at the end are the best that the method evaluated.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    X: Tensor | None = None
    Y: Tensor | None = None
    loss: float = math.inf
    status: Status = Status.FAILED
    note: str = ""
    total_seconds: float = 0.0
    derivatives: int = 0  # products or Jacobians beside the evaluations, where counted

    def seconds_to(self, target: float) -> float | None:
        """Seconds until the first evaluation with a loss of at most `target`; None for never."""
        for seconds, loss in zip(self.seconds, self.losses, strict=True):
            if loss <= target:
                return seconds
        return None


class Method(Protocol):
    """A named way to solve the planted problem."""

    @property
    def name(self) -> str:
        """Name in tables and files."""

    def solve(
        self,
        problem: PlantedArrays,
        X0: Tensor,
        Y0: Tensor,
        max_seconds: float,
        target_loss: float | None = None,
    ) -> Trace:
        """Runs until the time is over, the target is reached or nothing is gained."""


class Recorder:
    """Clock, trace and stopping rules of one run.

    Args:
        max_seconds: Budget, measured by this recorder's clock from its construction.
        target_loss: Stop at a loss of at most this.
        patience: Evaluations after which a run that gained nothing has stalled.
    """

    def __init__(self, max_seconds: float, target_loss: float | None, patience: int) -> None:
        self.trace = Trace()
        self.stopped = False
        self._max_seconds = max_seconds
        self._target = -math.inf if target_loss is None else target_loss
        self._patience = patience
        self._anchor = math.inf
        self._anchor_at = 0
        self.clock = Clock()

    def record(self, loss: float, variables: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Notes a loss; `variables` gives X and Y, and is called only for a new best."""
        trace = self.trace
        trace.seconds.append(self.clock.seconds())
        trace.losses.append(loss)
        with self.clock.paused():
            if loss < trace.loss:
                trace.loss = loss
                trace.X, trace.Y = (matrix.detach().clone() for matrix in variables())
            if loss <= self._target:
                self._stop(Status.TARGET)
            count = len(trace.losses)
            if trace.loss < self._anchor - STALL_GAIN * trace.losses[0]:
                self._anchor, self._anchor_at = trace.loss, count
            elif count - self._anchor_at >= self._patience:
                self._stop(Status.STALLED)
        self.check_time()

    def count_derivative(self) -> None:
        """Counts a product or a Jacobian, and ends the run where the time is over."""
        self.trace.derivatives += 1
        self.check_time()

    def check_time(self) -> None:
        """Ends the run where the time is over."""
        if self.clock.seconds() >= self._max_seconds:
            self._stop(Status.TIME)

    def run(self, body: Callable[[], str | None]) -> Trace:
        """Runs a method. `body` returns a note on why it ended by itself, None for no reason.

        A method that raises has failed, with what it evaluated before. TorchScript turns a Stop
        raised inside it into a RuntimeError, which is told apart by the flag.
        """
        trace = self.trace
        try:
            trace.note = body() or ""
            trace.status = Status.CONVERGED
        except Stop:
            pass
        except Exception as error:
            if not self.stopped:
                trace.status, trace.note = Status.FAILED, f"{type(error).__name__}: {error}"[:300]
        trace.total_seconds = self.clock.seconds()
        return trace

    def _stop(self, status: Status) -> None:
        self.trace.status, self.stopped = status, True
        raise Stop


def loss_of(problem: PlantedArrays, X: Tensor, Y: Tensor) -> Tensor:
    """L(X, Y), differentiable twice.

    Of the forms tried this is the fastest with its backward pass at the planted size, fused
    attention included: with A as the values no gradient by the values is computed.
    """
    scores = torch.softmax((problem.A @ X) @ problem.A.mT, -1)
    return torch.linalg.vector_norm((scores @ problem.A) @ Y - problem.B).square()


def flatten(X: Tensor, Y: Tensor) -> Tensor:
    """X and Y in one vector, row by row."""
    return torch.cat([X.reshape(-1), Y.reshape(-1)])


def unflatten(problem: PlantedArrays, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the vector as X and Y."""
    (rows, columns), shape = problem.shapes
    size = rows * columns
    return vector[:size].view(rows, columns), vector[size:].view(shape)
