"""AdamW, torch's fused implementation, weight decay at its default 0.01."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.peers.base import Peer, Problem, Recorder, Weights
from benchmarks.peers.first_order import NEVER, PLANTED_RATES, descend, grid, label


@dataclass(frozen=True)
class AdamW:
    """AdamW with a given peak rate; `batch` sequences a step, None for all."""

    rate: float
    batch: int | None = None
    patience: int = NEVER

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return label("AdamW", self.rate, self.batch)

    def solve(self, problem: Problem, start: Weights, recorder: Recorder) -> None:
        """See `Method.solve`."""
        descend(
            problem,
            start,
            recorder,
            lambda weights: [torch.optim.AdamW(weights.values(), lr=self.rate, fused=True)],
            self.batch,
        )


PEERS = (Peer("AdamW", tuple(AdamW(rate) for rate in PLANTED_RATES), grid(AdamW), scheduled=True),)
