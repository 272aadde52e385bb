"""torch-levenberg-marquardt: damped normal equations from a dense Jacobian.

The package differentiates sample by sample under vmap, so each query row is a sample that carries
the keys of its sequence (an expanded view, no copy). The Jacobian is built in slices, as the
package advises for large systems, and the normal equations are solved by Cholesky. Of its damping
matrices "fletcher" (the diagonal of J^T J) is left out: at Y = 0 that is zero for all of X.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.peers.base import Peer, PlantedArrays, Recorder, Weights

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Levenberg-Marquardt with one of the package's damping matrices."""

    damping: Literal["standard", "adaptive"]
    patience: int = 100

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return f"torch-levenberg-marquardt ({self.damping})"

    def solve(self, problem: PlantedArrays, start: Weights, recorder: Recorder) -> str:
        """See `Method.solve`."""
        problem.check_jacobian()
        from torch_levenberg_marquardt.damping import StandardDampingStrategy
        from torch_levenberg_marquardt.loss import Loss
        from torch_levenberg_marquardt.training import LevenbergMarquardtModule

        logging.getLogger("torch_levenberg_marquardt").setLevel(logging.ERROR)
        model = _Rows(start["X"], start["Y"])

        class SumOfSquares(Loss):
            """L itself, noted by the recorder each time the package computes it."""

            def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
                loss = (y_pred - y_true).square().sum()
                recorder.record(loss.item(), lambda: {"X": model.X, "Y": model.Y})
                return loss

            def residuals(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
                return y_pred - y_true

        module = LevenbergMarquardtModule(
            model,
            loss_fn=SumOfSquares(),
            damping_strategy=StandardDampingStrategy(
                min_value=1e-14, damping_mode=self.damping, conditional_stopping=True
            ),
            attempts_per_step=20,
            solve_method="cholesky",
            max_batch_size=ROWS_AT_ONCE,
        )
        inputs, targets = _samples(problem)
        while True:
            *_, stop, _ = module.training_step(inputs, targets)
            recorder.count_derivative()
            if stop:
                return "damping at its upper bound"


class _Rows(torch.nn.Module):
    """Attention of single query rows, each with its own keys."""

    def __init__(self, X0: Tensor, Y0: Tensor) -> None:
        super().__init__()
        self.X, self.Y = (torch.nn.Parameter(start.clone()) for start in (X0, Y0))

    def forward(self, *inputs: Any) -> Tensor:
        # The package unpacks a tuple of inputs in all calls but its first.
        rows, keys = inputs if len(inputs) == 2 else inputs[0]
        logits = (rows @ self.X)[:, None, :] @ keys.mT  # (rows, 1, n)
        return (torch.softmax(logits, -1) @ keys)[:, 0] @ self.Y


def _samples(problem: PlantedArrays) -> tuple[tuple[Tensor, Tensor], Tensor]:
    b, n, d = problem.A.shape
    keys = problem.A[:, None].expand(b, n, n, d).reshape(b * n, n, d)
    return (problem.A.reshape(b * n, d), keys), problem.B.reshape(b * n, -1)


PEERS = (
    Peer(
        "torch-levenberg-marquardt",
        (LevenbergMarquardt("standard"), LevenbergMarquardt("adaptive")),
        package="torch_levenberg_marquardt",
        why_no_layers="needs a dense Jacobian",
    ),
)
