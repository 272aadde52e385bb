"""Muon as torch has it: matrices by Muon, everything else (biases) by AdamW at the same rate.

Its update is scaled as AdamW's is ("match_rms_adamw"), so that the two share a rate. torch
orthogonalises in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.base import Peer, Problem, Recorder, Weights
from benchmarks.peers.first_order import NEVER, PLANTED_RATES, Optimisers, descend, grid, label

RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)


@dataclass(frozen=True)
class Muon:
    """Muon with a given peak rate; `batch` sequences a step, None for all."""

    rate: float
    batch: int | None = None
    patience: int = NEVER

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return label("Muon", self.rate, self.batch)

    def solve(self, problem: Problem, start: Weights, recorder: Recorder) -> None:
        """See `Method.solve`."""
        descend(problem, start, recorder, self._optimisers, self.batch)

    def _optimisers(self, weights: dict[str, Tensor]) -> Optimisers:
        matrices = [value for value in weights.values() if value.ndim == 2]
        others = [value for value in weights.values() if value.ndim != 2]
        muon = torch.optim.Muon(
            matrices, lr=self.rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        adam = [torch.optim.AdamW(others, lr=self.rate, fused=True)] if others else []
        return [muon, *adam]


PEERS = (
    Peer("Muon", tuple(Muon(rate) for rate in PLANTED_RATES), grid(Muon, RATES), scheduled=True),
)
