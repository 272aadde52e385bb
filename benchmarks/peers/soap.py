"""SOAP of pytorch-optimizer, without weight decay, its eigenbases renewed every 10 steps."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.peers.base import Peer, Problem, Recorder, Weights
from benchmarks.peers.first_order import NEVER, PLANTED_RATES, descend, grid, label

RATES = (1e-3, 2e-3, 4e-3, 8e-3)


@dataclass(frozen=True)
class SOAP:
    """SOAP with a given peak rate; `batch` sequences a step, None for all."""

    rate: float
    batch: int | None = None
    patience: int = NEVER

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return label("SOAP", self.rate, self.batch)

    def solve(self, problem: Problem, start: Weights, recorder: Recorder) -> None:
        """See `Method.solve`."""
        with recorder.clock.paused():  # an import of seconds
            import pytorch_optimizer

        descend(
            problem,
            start,
            recorder,
            lambda weights: [
                pytorch_optimizer.SOAP(list(weights.values()), lr=self.rate, weight_decay=0.0)
            ],
            self.batch,
        )


PEERS = (
    Peer(
        "SOAP",
        tuple(SOAP(rate) for rate in PLANTED_RATES),
        grid(SOAP, RATES),
        package="pytorch_optimizer",
        scheduled=True,
    ),
)
