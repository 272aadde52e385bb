"""attnreg itself, behind the interface of the peers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from benchmarks.peers.base import PlantedArrays, Recorder, Status, Trace

if TYPE_CHECKING:
    from attnreg import IterationRecord

NEVER = 10**9
UNLIMITED = 10**6


@dataclass(frozen=True)
class Ours:
    """`attnreg.fit` with its default model; the clock includes building the problem."""

    tol: float = 1e-10
    name: str = "attnreg"

    def solve(
        self,
        problem: PlantedArrays,
        X0: Tensor,
        Y0: Tensor,
        max_seconds: float,
        target_loss: float | None = None,
    ) -> Trace:
        """See `Method.solve`. The first point of the trace is the start, as for the peers."""
        import attnreg

        recorder = Recorder(max_seconds, None, NEVER)
        trace = recorder.trace

        def callback(record: IterationRecord) -> bool:
            trace.seconds.append(recorder.clock.seconds())
            trace.losses.append(record.loss)
            return target_loss is not None and record.loss <= target_loss

        def body() -> str:
            result = attnreg.fit(
                attnreg.AttentionProblem(problem.A, problem.B),
                init={"X": X0, "Y": Y0},
                tol=self.tol,
                max_iterations=UNLIMITED,
                max_seconds=max_seconds,
                callback=callback,
            )
            trace.X, trace.Y, trace.loss = result.X, result.Y, result.loss
            trace.derivatives = result.history[-1].passes if result.history else 0
            return result.status.name

        recorder.run(body)
        if trace.status is Status.CONVERGED:
            _relabel(trace, max_seconds, target_loss)
        return trace


def _relabel(trace: Trace, max_seconds: float, target_loss: float | None) -> None:
    """Says in the peers' words why `fit` ended; the note keeps its own."""
    if not math.isfinite(trace.loss):
        trace.status = Status.FAILED
    elif target_loss is not None and min(trace.losses, default=math.inf) <= target_loss:
        trace.status = Status.TARGET
    elif trace.total_seconds >= max_seconds:
        trace.status = Status.TIME
    elif trace.note != "CONVERGED":
        trace.status = Status.STALLED
