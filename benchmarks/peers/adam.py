"""Adam on the full batch, the rate following a cosine that ends with the time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.base import PlantedArrays, Recorder, Trace, loss_of

NEVER = 10**9


@dataclass(frozen=True)
class Adam:
    """Adam with a given peak rate."""

    rate: float

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return f"Adam ({self.rate:g})"

    def solve(
        self,
        problem: PlantedArrays,
        X0: Tensor,
        Y0: Tensor,
        max_seconds: float,
        target_loss: float | None = None,
    ) -> Trace:
        """See `Method.solve`."""
        recorder = Recorder(max_seconds, target_loss, NEVER)

        def body() -> None:
            X, Y = (start.clone().requires_grad_() for start in (X0, Y0))
            optimiser = torch.optim.Adam([X, Y], lr=self.rate, fused=True)
            while True:
                done = min(1.0, recorder.clock.seconds() / max_seconds)
                optimiser.param_groups[0]["lr"] = self.rate * 0.5 * (1 + math.cos(math.pi * done))
                loss = loss_of(problem, X, Y)
                X.grad, Y.grad = torch.autograd.grad(loss, (X, Y))
                recorder.record(loss.item(), lambda: (X, Y))
                optimiser.step()

        return recorder.run(body)
