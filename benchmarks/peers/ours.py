"""attnreg itself, behind the interface of the peers."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.common import Clock
from benchmarks.peers.base import Problem, Recorder, Status, Trace, Weights

if TYPE_CHECKING:
    from attnreg import FitResult, IterationRecord

UNLIMITED = 10**6


@dataclass(frozen=True)
class Ours:
    """`attnreg.fit`; the clock includes building the problem.

    `fit` bounds the wall's seconds, which are never fewer than the processor's on one thread: where
    those are measured it is given twice the time, and the callback ends it. That is called once the
    search among many starts is over, so that no point of the trace is earlier.
    """

    tol: float = 1e-10
    patience: int = 10**9
    starts: int = 1

    @property
    def name(self) -> str:
        """With its number of starts."""
        return "attnreg" if self.starts == 1 else f"attnreg, {self.starts} starts"

    def solve(self, problem: Problem, start: Weights, recorder: Recorder) -> str:
        """See `Method.solve`. The first point of one start is the start, as of peers."""
        import attnreg

        trace = recorder.trace

        def callback(record: IterationRecord) -> bool:
            if record.phase == "lifted":  # the loss is that of another layer
                return recorder.clock.seconds() >= recorder.max_seconds
            trace.seconds.append(recorder.clock.seconds())
            trace.losses.append(record.loss)
            over = recorder.clock.seconds() >= recorder.max_seconds
            return over or record.loss <= recorder.target

        data = problem.attention()
        left = recorder.max_seconds - recorder.clock.seconds()
        result = attnreg.fit(
            data,
            problem.model,
            solver="auto",
            init=start,
            starts=self.starts,
            tol=self.tol,
            max_iterations=UNLIMITED,
            max_seconds=max(left, 1e-3) * (1 if Clock.timer is time.perf_counter else 2),
            callback=callback,
        )
        trace.note = _kept(result, trace)
        status = _status(trace, recorder)
        if status is not Status.CONVERGED:
            recorder.stop(status)
        return trace.note


def _kept(result: FitResult, trace: Trace) -> str:
    """Puts the end of a fit into the trace; the name of its status is the note."""
    trace.weights, trace.loss = dict(result.parameters), result.loss
    trace.derivatives = result.history[-1].passes if result.history else 0
    return result.status.name


def _status(trace: Trace, recorder: Recorder) -> Status:
    """Why `fit` ended in the peers' words; the note keeps its own."""
    if not math.isfinite(trace.loss):
        return Status.FAILED
    if min(trace.losses, default=math.inf) <= recorder.target:
        return Status.TARGET
    if recorder.clock.seconds() >= recorder.max_seconds:
        return Status.TIME
    return Status.CONVERGED if trace.note == "CONVERGED" else Status.STALLED


@dataclass(frozen=True)
class Validated:
    """`attnreg.fit_validated`; the clock includes building the problems and all that is judged.

    Attributes:
        judging: The sequences that say how far to go.
    """

    judging: Problem
    patience: int = 10**9
    name: str = "attnreg, validated"

    def solve(self, problem: Problem, start: Weights, recorder: Recorder) -> str:
        """See `Method.solve`."""
        import attnreg

        assert problem.model is not None
        data, judging = problem.attention(), self.judging.attention()
        result = attnreg.fit_validated(
            data,
            judging,
            problem.model,
            init=start,
            max_iterations=UNLIMITED,
            max_seconds=max(recorder.max_seconds - recorder.clock.seconds(), 1e-3),
        )
        return _kept(result, recorder.trace)


OURS = Ours()
PLANTED = (OURS, Ours(starts=16), Ours(starts=64))
