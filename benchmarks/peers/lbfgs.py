"""torch.optim.LBFGS with the strong Wolfe line search, full batch, joint variables.

One call of `step` with no limit on its iterations: a new call would evaluate the closure once more
than needed. Where the line search gives up, the memory is cleared and the method starts again from
the last point, until a restart gains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.base import Peer, Problem, Recorder, Weights, gradient, leaves

UNLIMITED = 10**9
HISTORIES = (10, 30, 100)


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS with a given number of stored pairs."""

    history: int
    patience: int = 1500

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return f"torch L-BFGS ({self.history})"

    def solve(self, problem: Problem, start: Weights, recorder: Recorder) -> str:
        """See `Method.solve`."""
        weights = leaves(start)

        def closure() -> Tensor:
            loss = problem.loss(weights)
            gradient(loss, weights)
            recorder.record(loss.item(), lambda: weights)
            return loss.detach()

        while True:
            before = recorder.trace.loss
            optimiser = torch.optim.LBFGS(
                list(weights.values()),
                history_size=self.history,
                line_search_fn="strong_wolfe",
                max_iter=UNLIMITED,
                max_eval=UNLIMITED,
                tolerance_grad=0.0,
                tolerance_change=0.0,
            )
            optimiser.step(closure)
            if not recorder.trace.loss < before:
                return "line search and restart gain nothing"


_SETTINGS = tuple(LBFGS(history) for history in HISTORIES)
PEERS = (Peer("torch L-BFGS", _SETTINGS, _SETTINGS),)
