"""What the loop reports: a status that says what happened, and one record an iteration."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


class Status(enum.Enum):
    """Why a fit ended. ``text`` says the cause and what to try."""

    CONVERGED = "converged"
    CERTIFIED = "certified"
    MAX_ITERATIONS = "max_iterations"
    MAX_SECONDS = "max_seconds"
    STALLED = "stalled"
    INTERRUPTED = "interrupted"
    STOPPED = "stopped"
    DIVERGED = "diverged"
    VALIDATED = "validated"

    @property
    def text(self) -> str:
        """One sentence: the cause and what to try."""
        return _TEXTS[self]


_TEXTS = {
    Status.CONVERGED: "the dual norm of the reduced gradient is within the tolerance",
    Status.CERTIFIED: "a certificate bounds the gap to the minimiser by the tolerance",
    Status.MAX_ITERATIONS: (
        "the iteration limit was reached before the tolerance: raise max_iterations and continue "
        "with init=result, or loosen tol"
    ),
    Status.MAX_SECONDS: (
        "the time limit was reached before the tolerance: raise max_seconds and continue with "
        "init=result, or loosen tol"
    ),
    Status.STALLED: (
        "no step decreases the objective any further at this precision: the gradient is at the "
        "level of rounding; use float64, or loosen tol"
    ),
    Status.INTERRUPTED: (
        "interrupted from the keyboard: this is the best iterate so far; continue with init=result"
    ),
    Status.DIVERGED: (
        "the steps of the mini-batches left the range of numbers and this is the start: use "
        "solver='trust-region', or scale the problem"
    ),
    Status.VALIDATED: (
        "of the points that were looked at the one with the lowest error on the validation "
        "sequences was taken: it is the minimum of no loss"
    ),
    Status.STOPPED: "the callback asked to stop: this is the best iterate so far",
}


@dataclass(frozen=True)
class IterationRecord:
    """One iteration of the loop, rejected steps included.

    Attributes:
        iteration: Counted from 0, the start.
        seconds: Wall time since the fit began.
        loss: ``L`` alone, without ridges, at the current iterate.
        regularised: ``L`` plus the problem's ridges; of a validated fit plus that of the round.
        gradient_norm: Dual norm of the reduced gradient over ``||B - mean||_F^2``.
        damping: Multiple of the identity added to the curvature of the step that led here.
        path: Weight of the regularisation path on the readout; 0 at its end.
        inner_iterations: Products of the linear solve of this iteration.
        passes: Attention passes since the fit began.
        phase: ``"start"``, ``"search"`` (the best of many starts so far, iteration 0 still),
            ``"screening"`` (on to the start that won a race), ``"path"`` (on to the
            path's beginning; the loss may rise), ``"best"`` (back to the best point left), or
            the curvature of the step: ``"gauss-newton"`` or ``"newton"``; ``"stochastic"`` is an
            epoch of mini-batches, its loss and gradient those that its steps saw, and ``"lifted"``
            one of a layer with a key/value head for every query head, its loss that layer's with
            the readout given: the model's, which begins with another ``"start"``, may be far above.
        accepted: Whether the step was taken.
        operations: Floating-point operations since the fit began, by kind (see
            :mod:`attnreg.operations`); empty in files of older versions.
        rows_sampled: Query rows that entered the sketch of the curvature; None: there was none, all
            rows counted.
        rows_available: Those that could have.
    """

    iteration: int
    seconds: float
    loss: float
    regularised: float
    gradient_norm: float
    damping: float
    path: float
    inner_iterations: int
    passes: int
    phase: str
    accepted: bool
    operations: Mapping[str, int] = field(default_factory=dict)
    rows_sampled: int | None = None
    rows_available: int | None = None

    @property
    def rows(self) -> str:
        """``"204 of 2048"``, or ``"exact"`` where the curvature is not a sketch."""
        if self.rows_sampled is None:
            return "exact"
        return f"{self.rows_sampled} of {self.rows_available}"


@dataclass(frozen=True)
class Minima:
    """What a fit with many starts found.

    Attributes:
        starts: How many there were, the given one included.
        rounds: Rounds that followed, of as many reflections of the best minima or fresh starts.
        descents: All of them, those that were given up included.
        converged: Descents that converged; the others were dropped as hopeless or cut short.
        distinct: Distinct minima of those that converged: sorted by value, two neighbours are
            distinct where the values differ by more than 1e-4 of the lower one and
            1e-9 ``||B - mean||_F^2``.
        best: How many descents ended in the best of them.
    """

    starts: int
    rounds: int
    descents: int
    converged: int
    distinct: int
    best: int

    @property
    def text(self) -> str:
        """One line."""
        return (
            f"{self.distinct} distinct, the best found {self.best} times; {self.converged} of "
            f"{self.descents} descents converged ({self.starts} starts, {self.rounds} more rounds)"
        )


Callback = Callable[[IterationRecord], bool | None]
"""Called with each record; a true answer stops the run."""
