"""The interface of a method, the planted problem, and the recorder that all methods share.

A method is given a problem, a start and a recorder, and calls `Recorder.record` with each loss that
it computes anyway. The recorder notes the time, keeps the weights with its clock stopped, and ends
the run by raising `Stop` when the time is over, the target is reached or nothing improves any more.
So every method has the same clock, the same granularity (each evaluation) and the same stopping
rules, and packages that only have callbacks need no thread to hand out their trajectory.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from benchmarks.common import Clock

if TYPE_CHECKING:
    from attnreg import AttentionProblem, MultiHead

Weights = Mapping[str, Tensor]

MAX_JACOBIAN = 2 * 2**30
"""Bytes of a dense Jacobian above which the methods that need one are not run."""

# A run has stalled when this many evaluations together gain less than this fraction of the
# initial loss, four orders below the 1e-8 within which losses are called equal.
STALL_GAIN = 1e-12

MAX_FACTOR = 3e10
"""Rows times columns squared above which no QR or SVD is made: a step would outlast the run."""


class Status(Enum):
    """Why a run ended."""

    TARGET = "target loss reached"
    TIME = "time is over"
    STALLED = "no evaluation improves the loss any more"
    CONVERGED = "the method's own test of convergence"
    FAILED = "the method gave up or raised"


class Stop(BaseException):
    """Ends a run from inside an evaluation; not an Exception, so that no peer swallows it."""


class Problem(Protocol):
    """A sum of squares over sequences, as a function of named weights."""

    B: Tensor  # the outputs
    model: MultiHead | None  # None: the bilinear model

    def __len__(self) -> int:
        """Number of sequences."""

    def loss(self, weights: Weights, index: Tensor | None = None) -> Tensor:
        """L on all sequences, or on those of `index`; differentiable."""

    def attention(self) -> AttentionProblem:
        """The same for attnreg."""


@dataclass(frozen=True)
class PlantedArrays:
    """A planted problem: A (b, n, d) and B (b, n, d_out), float64.

    L(X, Y) = ||softmax_rows(A X A^T) A Y - B||_F^2        joint variables
    """

    A: Tensor
    B: Tensor
    model: None = None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of X and Y."""
        d = self.A.shape[-1]
        return {"X": (d, d), "Y": (d, self.B.shape[-1])}

    def __len__(self) -> int:
        return len(self.A)

    def loss(self, weights: Weights, index: Tensor | None = None) -> Tensor:
        """See `Problem.loss`."""
        part = self if index is None else PlantedArrays(self.A[index], self.B[index])
        return loss_of(part, weights["X"], weights["Y"])

    def attention(self) -> AttentionProblem:
        """See `Problem.attention`."""
        from attnreg import AttentionProblem

        return AttentionProblem(self.A, self.B)

    def check_jacobian(self, *, factored: bool = False) -> None:
        """Raises a MemoryError where a dense Jacobian, or its QR or SVD, is out of reach."""
        parameters = sum(rows * columns for rows, columns in self.shapes.values())
        size = self.B.numel() * parameters * self.B.element_size()
        if size > MAX_JACOBIAN:
            raise MemoryError(f"not run: its dense Jacobian takes {size / 2**30:.1f} GiB")
        work = self.B.numel() * parameters**2
        if factored and work > MAX_FACTOR:
            raise MemoryError(f"not run: a factor of its Jacobian takes {work:.0e} operations")


@dataclass
class Trace:
    """What one run of one method did: a point for each evaluation of the loss.

    `loss` and `weights` at the end are the best that the method evaluated; of mini-batches, whose
    losses are not comparable, the weights are the last.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    snapshots: list[tuple[float, dict[str, Tensor]]] = field(default_factory=list)
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

    def until(self, seconds: float) -> Trace:
        """The trace without the evaluations that ended later, and the best loss of the others."""
        kept = [i for i, at in enumerate(self.seconds) if at <= seconds]
        times, losses = ([values[i] for i in kept] for values in (self.seconds, self.losses))
        loss = min(losses, default=math.inf)
        return replace(self, seconds=times, losses=losses, loss=loss)


class Method(Protocol):
    """A method with one setting of its parameters."""

    patience: int  # evaluations after which a run that gained nothing has stalled

    @property
    def name(self) -> str:
        """Name in tables and files."""

    def solve(self, problem: Problem, start: Weights, recorder: Recorder) -> str | None:
        """Goes on from the start until the recorder ends it, or says why it ends by itself."""


@dataclass(frozen=True)
class Peer:
    """A row of the tables: a method with the settings that are tried, the best of them shown.

    Attributes:
        name: Of the row.
        planted: Settings tried on the planted problems.
        layers: Settings tried on real layers; none where it cannot be run there.
        package: Module that must be there.
        why_no_layers: The reason, where it cannot.
        scheduled: Whether its rate falls to zero at the end of the time, so that shorter times may
            do better.
    """

    name: str
    planted: tuple[Method, ...]
    layers: tuple[Method, ...] = ()
    package: str = "torch"
    why_no_layers: str = ""
    scheduled: bool = False

    @property
    def missing(self) -> str | None:
        """One line where its package is not installed."""
        if importlib.util.find_spec(self.package) is not None:
            return None
        return f"module {self.package} is missing: pip install 'attnreg[bench]'"


def run(
    method: Method,
    problem: Problem,
    start: Weights,
    max_seconds: float,
    target_loss: float | None = None,
    fractions: Sequence[float] = (),
) -> Trace:
    """One run. Snapshots of the weights are taken at fractions of the time, and at the end."""
    recorder = Recorder(max_seconds, target_loss, method.patience, fractions)
    return recorder.run(lambda: method.solve(problem, start, recorder))


class Recorder:
    """Clock, trace and stopping rules of one run.

    Args:
        max_seconds: Budget, measured by this recorder's clock from its construction.
        target_loss: Stop at a loss of at most this.
        patience: Evaluations after which a run that gained nothing has stalled.
        fractions: Of the time, at which the weights are kept.
    """

    def __init__(
        self,
        max_seconds: float,
        target_loss: float | None,
        patience: int,
        fractions: Sequence[float] = (),
    ) -> None:
        self.trace = Trace()
        self.stopped = False
        self.max_seconds = max_seconds
        self.target = -math.inf if target_loss is None else target_loss
        self._patience = patience
        self._due = [fraction * max_seconds for fraction in sorted(fractions)]
        self._latest: Callable[[], Weights] | None = None
        self._anchor = math.inf
        self._anchor_at = 0
        self.clock = Clock()

    def record(self, loss: float, variables: Callable[[], Weights], *, exact: bool = True) -> None:
        """Notes a loss; `variables` gives the weights, and is called only where they are kept.

        A loss that is not `exact`, of a mini-batch, ends nothing.
        """
        trace = self.trace
        seconds = self.clock.seconds()
        trace.seconds.append(seconds)
        trace.losses.append(loss)
        with self.clock.paused():
            if not exact:
                self._latest = variables
            elif loss < trace.loss:
                trace.loss, trace.weights = loss, _copy(variables())
            if self._due and seconds >= self._due[0]:
                self._due = [due for due in self._due if due > seconds]
                self._snapshot(seconds)
            if exact:
                self._check_progress(loss)
        self.check_time()

    def _check_progress(self, loss: float) -> None:
        if loss <= self.target:
            self.stop(Status.TARGET)
        trace, count = self.trace, len(self.trace.losses)
        if trace.loss < self._anchor - STALL_GAIN * trace.losses[0]:
            self._anchor, self._anchor_at = trace.loss, count
        elif count - self._anchor_at >= self._patience:
            self.stop(Status.STALLED)

    def _snapshot(self, seconds: float) -> None:
        if self._latest is not None:
            self.trace.weights = _copy(self._latest())
        if self.trace.weights:
            self.trace.snapshots.append((seconds, self.trace.weights))

    def count_derivative(self) -> None:
        """Counts a product or a Jacobian, and ends the run where the time is over."""
        self.trace.derivatives += 1
        self.check_time()

    def check_time(self) -> None:
        """Ends the run where the time is over."""
        if self.clock.seconds() >= self.max_seconds:
            self.stop(Status.TIME)

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
        self._snapshot(trace.total_seconds)
        return trace

    def stop(self, status: Status) -> None:
        """Ends the run."""
        self.trace.status, self.stopped = status, True
        raise Stop


def loss_of(problem: PlantedArrays, X: Tensor, Y: Tensor) -> Tensor:
    """L(X, Y), differentiable twice.

    Of the forms tried this is the fastest with its backward pass at the planted size, fused
    attention included: with A as the values no gradient by the values is computed.
    """
    scores = torch.softmax((problem.A @ X) @ problem.A.mT, -1)
    return torch.linalg.vector_norm((scores @ problem.A) @ Y - problem.B).square()


def flatten(weights: Weights) -> Tensor:
    """All weights in one vector, row by row."""
    return torch.cat([value.reshape(-1) for value in weights.values()])


def unflatten(vector: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Views of the vector as the weights."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    pieces = zip(shapes.items(), vector.split(sizes), strict=True)
    return {name: piece.view(*shape) for (name, shape), piece in pieces}


def leaves(start: Weights) -> dict[str, Tensor]:
    """Copies of the weights that gradients are taken by."""
    return {name: value.clone().requires_grad_() for name, value in start.items()}


def gradient(loss: Tensor, weights: Weights) -> None:
    """Puts the gradient of a loss into the weights."""
    gradients = torch.autograd.grad(loss, tuple(weights.values()))
    for weight, value in zip(weights.values(), gradients, strict=True):
        weight.grad = value


def _copy(weights: Weights) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in weights.items()}
