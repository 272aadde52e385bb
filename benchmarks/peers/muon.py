"""Muon as torch has it: matrices by Muon, everything else (biases) by AdamW at the same rate.

Its update is scaled as AdamW's is ("match_rms_adamw"), so that the two share a rate. torch
orthogonalises in bfloat16. A CPU without instructions for that takes 40 times as long for such a
product as for one in float32, and one with them a sixth: the same iteration is done in float32
where a trial says that it is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import _muon

from benchmarks.peers.base import Peer, Problem, Recorder, Weights
from benchmarks.peers.first_order import NEVER, PLANTED_RATES, Optimisers, descend, grid, label

SIDE = 256  # of the matrix of the trial, a layer of a small model
COEFFICIENTS = (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


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
        with _orthogonalisation(next(iter(start.values())).device):
            descend(problem, start, recorder, self._optimisers, self.batch)

    def _optimisers(self, weights: dict[str, Tensor]) -> Optimisers:
        matrices = [value for value in weights.values() if value.ndim == 2]
        others = [value for value in weights.values() if value.ndim != 2]
        muon = torch.optim.Muon(
            matrices, lr=self.rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        adam = [torch.optim.AdamW(others, lr=self.rate, fused=True)] if others else []
        return [muon, *adam]


def orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Newton-Schulz iterations towards the polar factor, as torch has them, in float32."""
    a, b, c = coefficients
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.mT).float()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def _orthogonalisation(device: torch.device) -> AbstractContextManager[object]:
    """Has torch's Muon orthogonalise in float32 on a CPU where that is faster."""
    if device.type != "cpu" or not float32_is_faster():
        return nullcontext()
    return patch("torch.optim._muon._zeropower_via_newtonschulz", orthogonalised)


@cache
def float32_is_faster() -> bool:
    """Whether a matrix of a layer's size takes longer in bfloat16 on this CPU; tried once."""
    matrix = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    in_float32, in_bfloat16 = orthogonalised, _muon._zeropower_via_newtonschulz
    return _seconds(in_float32, matrix) < _seconds(in_bfloat16, matrix)


def _seconds(orthogonalise: Callable[..., Tensor], matrix: Tensor) -> float:
    """The least of three, as Muon calls it: the first may be slow."""
    least = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        orthogonalise(matrix, COEFFICIENTS, _muon.DEFAULT_NS_STEPS, _muon.EPS)
        least = min(least, time.perf_counter() - began)
    return least


PEERS = (
    Peer("Muon", tuple(Muon(rate) for rate in PLANTED_RATES), grid(Muon, RATES), scheduled=True),
)
