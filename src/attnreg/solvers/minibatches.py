"""Mini-batches of whole sequences, the gradient on one, and the reduced objective over all.

Everything here holds the features of one mini-batch at a time: they stay in the processor's
caches, and memory does not grow with the data.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from attnreg.batching import Batch
from attnreg.models import Features
from attnreg.objective import Objective
from attnreg.operations import product
from attnreg.readout import gram64, scaled_inverse

BATCH_ROWS = 768
"""Rows of a mini-batch, about: padding included, whole sequences, one at least."""


def minibatches(batches: Sequence[Batch]) -> list[Batch]:
    """Parts of about :data:`BATCH_ROWS` rows, of equal numbers of sequences within a batch."""
    parts = []
    for batch in batches:
        sequences, rows = batch.B.shape[:2]
        count = max(1, round(sequences * rows / BATCH_ROWS))
        bounds = [sequences * i // count for i in range(count + 1)]
        parts += [batch.part(i, j) for i, j in itertools.pairwise(bounds) if j > i]
    return parts


def features_of(
    objective: Objective, batch: Batch, theta: Tensor, *, products: bool = True
) -> Features:
    """Features of one mini-batch."""
    return Features(
        objective.problem,
        objective.model,
        theta,
        products=products,
        operations=objective.operations,
        batches=[batch],
    )


def joint_gradient(
    objective: Objective, batch: Batch, theta: Tensor, readout: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Gradients of a mini-batch's loss, ``theta: 2 vjp(W r O_F^T)`` and ``O: 2 F^T W r``.

    Returns:
        The gradient by ``theta``, that by the readout, and the loss.
    """
    features = features_of(objective, batch, theta)
    columns, width = features.columns, objective.layout.features
    residual = columns @ readout - batch.B.flatten(0, 1)
    weighted = residual * batch.weights.reshape(-1, 1)
    gradient = features.vjp(weighted @ readout[:width].mT).mul_(2.0)
    slope = (columns.mT @ weighted).mul_(2.0)
    objective.operations.projections += 3 * product(
        columns.shape[0], columns.shape[1], residual.shape[1]
    )
    loss = float((weighted * residual).sum(dtype=torch.float64))
    return gradient, slope, loss


class Pooled:
    """The reduced objective and its gradient at one ``theta``, summed over mini-batches.

    What :class:`attnreg.objective.Point` is, without second derivatives.

    Args:
        objective: What is minimised.
        batches: All rows, in mini-batches.
        theta: Flat non-linear parameters; kept as they are given.

    Attributes:
        readout: The minimiser over the readout, normal equations in float64.
        rank: Rank of these.
        loss: ``L`` alone.
        value: ``L`` plus ridges.
        gradient: By ``theta``, ridges included, flat.
    """

    def __init__(self, objective: Objective, batches: Sequence[Batch], theta: Tensor) -> None:
        self.objective, self.theta = objective, theta
        self.readout, self.rank = self._solved(batches)
        self.gradient, self.loss = torch.zeros_like(theta), 0.0
        for batch in batches:
            gradient, _, loss = joint_gradient(objective, batch, theta, self.readout)
            self.gradient += gradient
            self.loss += loss
        objective.count_passes(3)
        if objective.ridge is not None:
            objective.add_ridge_gradient(theta - objective.ridge.center, self.gradient)
        self.value = self.loss + objective.ridge_value(theta, self.readout)

    @property
    def regularised(self) -> float:
        """Loss plus the problem's ridges."""
        return self.value

    def _solved(self, batches: Sequence[Batch]) -> tuple[Tensor, int]:
        objective, k = self.objective, self.objective.layout.features
        k += int(objective.layout.readout_bias)
        out = objective.problem.d_out
        gram = torch.zeros(k, k, dtype=torch.float64, device=self.theta.device)
        right = gram.new_zeros(k, out)
        for batch in batches:
            columns = features_of(objective, batch, self.theta, products=False).columns
            left = columns * batch.weights.reshape(-1, 1)
            gram += gram64(left, columns)
            right += gram64(left, batch.B.flatten(0, 1))
            objective.operations.projections += product(columns.shape[0], k, k + out)
        if objective.ridge is not None:
            gram += objective.ridge.readout
            right += objective.ridge.readout @ objective.ridge.readout_center.double()
        inverse, rank = scaled_inverse(gram, self.theta.dtype)
        objective.operations.small += product(k, k, out)
        return (inverse @ right).to(self.theta.dtype), rank
