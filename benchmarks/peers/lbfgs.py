"""torch.optim.LBFGS with the strong Wolfe line search, full batch, joint variables.

One call of `step` with no limit on its iterations: a new call would evaluate the closure once more
than needed. Where the line search gives up, the memory is cleared and the method starts again from
the last point, until a restart gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.base import PlantedArrays, Recorder, Trace, loss_of

UNLIMITED = 10**9
PATIENCE = 1500


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS with a given number of stored pairs."""

    history: int

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return f"torch L-BFGS ({self.history})"

    def solve(
        self,
        problem: PlantedArrays,
        X0: Tensor,
        Y0: Tensor,
        max_seconds: float,
        target_loss: float | None = None,
    ) -> Trace:
        """See `Method.solve`."""
        recorder = Recorder(max_seconds, target_loss, PATIENCE)

        def body() -> str:
            X, Y = (start.clone().requires_grad_() for start in (X0, Y0))

            def closure() -> Tensor:
                loss = loss_of(problem, X, Y)
                X.grad, Y.grad = torch.autograd.grad(loss, (X, Y))
                recorder.record(loss.item(), lambda: (X, Y))
                return loss.detach()

            return _restarted(recorder, [X, Y], self.history, closure)

        return recorder.run(body)


def _restarted(
    recorder: Recorder, variables: list[Tensor], history: int, closure: Callable[[], Tensor]
) -> str:
    while True:
        before = recorder.trace.loss
        optimiser = torch.optim.LBFGS(
            variables,
            history_size=history,
            line_search_fn="strong_wolfe",
            max_iter=UNLIMITED,
            max_eval=UNLIMITED,
            tolerance_grad=0.0,
            tolerance_change=0.0,
        )
        optimiser.step(closure)
        if not recorder.trace.loss < before:
            return "line search and restart gain nothing"
