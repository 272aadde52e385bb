r"""The readout of mini-batches, from normal equations that forget.

After each mini-batch, with features ``F_b``, targets ``B_b`` and weights ``W_b``::

    G <- keep G + F_b^T W_b F_b,    H <- keep H + F_b^T W_b B_b,    keep = 1 - rows_b / window

and every :data:`EVERY` steps ``(G + R + c mean(diag G) I) O = H + R O0``, where the ridge
``R`` counts in the share of the rows that ``G`` holds (recursive least squares with forgetting). A
short window follows the features as they move and a long one has less noise: it holds
:data:`WINDOW` rows a column, and more as the rate falls, up to all rows. The damping ``c``,
:data:`DAMPING` times the share of the rate, keeps that noise from the directions that the features
hardly have (it matters where the rows of a sequence are alike), and is gone at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg.batching import Batch
from attnreg.objective import Objective
from attnreg.operations import product

WINDOW, LONGEST = 33, 50.0
"""Rows a column in the window at the full rate, and how many times more at the end at most."""

DAMPING = 3e-2
EVERY = 6


def window_rows(columns: int, rate: float) -> float:
    """Rows that a readout of so many columns remembers at a share of the full rate."""
    return WINDOW * columns / max(rate, 1 / LONGEST)


class RunningReadout:
    """The readout that suits the last mini-batches.

    Args:
        objective: Gives the ridge and the number of rows.
        readout: To begin with; changed in place.
    """

    def __init__(self, objective: Objective, readout: Tensor) -> None:
        self._objective, self.value = objective, readout
        k = readout.shape[0]
        self._gram = readout.new_zeros(k, k)
        self._right = torch.zeros_like(readout)
        self._rows, self._added = 0.0, 0
        self._weight = torch.zeros((), dtype=torch.float64, device=readout.device)

    def add(self, columns: Tensor, batch: Batch, rate: float) -> None:
        """Takes a mini-batch in, and solves anew every few steps once the window is half full.

        Args:
            columns: ``F_b`` ``(rows, k)``.
            batch: Gives ``B_b`` and ``W_b``.
            rate: Share of the full rate that the parameters move at.
        """
        targets, weights = batch.B.flatten(0, 1), batch.weights.reshape(-1, 1)
        rows, k = columns.shape
        window = min(window_rows(k, rate), self._objective.targets.shape[0])
        keep = max(0.0, 1.0 - rows / window)
        weighted = columns * weights
        self._gram.mul_(keep).addmm_(weighted.mT, columns)
        self._right.mul_(keep).addmm_(weighted.mT, targets)
        self._rows = keep * self._rows + rows
        self._weight = keep * self._weight + weights.sum(dtype=torch.float64)
        self._objective.operations.projections += product(rows, k, k + targets.shape[1])
        if self._added % EVERY == 0 and 2 * self._rows >= window:
            self._solve(DAMPING * rate)
        self._added += 1

    def _solve(self, damping: float) -> None:
        gram, right, ridge = self._gram.clone(), self._right, self._objective.ridge
        width = self._objective.layout.features
        shift = damping * gram.diagonal()[:width].mean()
        if ridge is not None:
            share = self._weight / self._objective.problem.total_weight
            gram += (share * ridge.readout).to(gram.dtype)
            right = right + (share * ridge.readout_right).to(gram.dtype)
        gram.diagonal()[:width] += shift
        factor, info = torch.linalg.cholesky_ex(gram)
        # Not positive definite where all features are zero: the readout is as good as any.
        solved = torch.cholesky_solve(right, factor)
        self.value.copy_(torch.where(info == 0, solved, self.value))
        self._objective.operations.small += product(len(gram), len(gram), right.shape[1])
