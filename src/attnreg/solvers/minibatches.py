"""Mini-batches of sequences, the gradient on one, and the reduced objective over all.

Everything here holds the features of one mini-batch at a time: they stay in the processor's
caches, and memory does not grow with the data.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property

import torch
from torch import Tensor

from attnreg.batching import Batch
from attnreg.models import Features, Ridge
from attnreg.objective import Objective
from attnreg.operations import product
from attnreg.readout import scaled_inverse

BATCH_ROWS = 512
"""Rows of a mini-batch, about, padding included: whole sequences, one at least. Where a step reads
one row in ``k`` (:func:`stride`), it is cut from ``sqrt(k)`` times as many."""

ROWS = 3.0
"""Rows of a sequence that a step reads, in units of the root of its length. The rows of a sequence
are alike, and its keys cost the same for one as for all: with ``rho`` the correlation of their
gradients and a key at ``c`` of a row's cost, ``sqrt(c (1 - rho) / rho)`` has the least noise at a
time, 1.7 for ``rho = 0.05`` and ``c = 0.16``. In trials, not a benchmark (docs/theory.md): 32 rows
of 8 sequences of 128 led to the error of all rows of 4 in 0.73 of the time."""

EXPLAINED = 0.1
"""Share of the targets' spread that a near start explains. Mean-pooled heads explain about nothing,
on one sample a little more than that and on the next less, and have far to go."""

SAMPLE_ROWS = 8192
"""Rows from which a start is estimated, about."""

GRADIENT_ROWS = 2048
"""Rows from which a gradient is estimated that only its norm is wanted of, about."""

RESOLVED, SMALL = 8.0, 1e-3
"""Where sums in single precision do (:attr:`Pooled.single_will_do`). On real layers the smallest
eigenvalue is 1e-3 and more, and the loss was told to 2e-7 of it."""


def stride(length: int) -> int:
    """One in how many rows of a sequence a step reads."""
    return max(1, round(length**0.5 / ROWS))


def minibatches(batches: Sequence[Batch]) -> list[Batch]:
    """Parts with about as many rows as a step needs, of equal numbers of sequences in a batch."""
    parts = []
    for batch in batches:
        sequences, rows = batch.B.shape[:2]
        count = max(1, round(sequences * rows / (BATCH_ROWS * stride(rows) ** 0.5)))
        bounds = [sequences * i // count for i in range(count + 1)]
        parts += [batch.part(i, j) for i, j in itertools.pairwise(bounds) if j > i]
    return parts


def features_of(
    objective: Objective, batch: Batch, theta: Tensor, *, products: bool = True
) -> Features:
    """Features of one mini-batch; without ``products`` for their columns alone."""
    return Features(
        objective.problem,
        objective.model,
        theta,
        products=products,
        operations=objective.operations,
        batches=[batch],
    )


def partial_gradient(
    objective: Objective, batch: Batch, features: Features, readout: Tensor
) -> tuple[Tensor, float]:
    """Gradient of a mini-batch's loss by ``theta`` at a fixed readout, ``2 vjp(W r O_F^T)``.

    Returns:
        The gradient, and the loss.
    """
    columns, width = features.columns, objective.layout.features
    residual = columns @ readout - batch.B.flatten(0, 1)
    weighted = residual * batch.weights.reshape(-1, 1)
    gradient = features.vjp(weighted @ readout[:width].mT).mul_(2.0)
    objective.operations.projections += product(
        columns.shape[0], columns.shape[1] + width, residual.shape[1]
    )
    return gradient, float((weighted * residual).sum(dtype=torch.float64))


def spread(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """Mini-batches spread over all, with about so many rows in all; all if there are no more."""
    total = len(batches)
    ours = sum(batch.B.shape[0] * batch.B.shape[1] for batch in batches)
    count = min(total, max(1, round(total * rows / ours)))
    return [batches[i * total // count] for i in range(count)]


def sampled(objective: Objective, theta: Tensor) -> Pooled:
    """The reduced objective on about :data:`SAMPLE_ROWS` rows; on all where there are no more."""
    batches = spread(minibatches(objective.problem.batches), SAMPLE_ROWS)
    return Pooled(objective, batches, theta)


def over_all_rows(point: Pooled) -> Pooled:
    """A point over all rows: the same one where it is.

    Each mini-batch is summed in single precision where the sample says that this will do, and all
    again in double where the end says that it has not done.

    Args:
        point: The point, on a sample or on all rows.

    Returns:
        The point over all rows.
    """
    batches = minibatches(point.objective.problem.batches)
    if len(point.batches) == len(batches):
        return point
    whole = Pooled(point.objective, batches, point.theta, single=point.single_will_do)
    if whole.single and not whole.single_will_do:
        return Pooled(point.objective, batches, point.theta)
    return whole


class Pooled:
    """The reduced objective at one ``theta``, summed over mini-batches in one forward pass.

    What :class:`attnreg.objective.Point` is, without second derivatives: the readout and the loss
    come, in float64, from ``F^T W F``, ``F^T W B`` and ``||B||_W^2``, the gradient from a second
    pass over about :data:`GRADIENT_ROWS` rows. What is summed over some of the rows is scaled up to
    all, so that with all mini-batches readout and loss are exact, with some of them estimates; the
    gradient is exact where there are no more rows.

    Args:
        objective: What is minimised.
        batches: Mini-batches.
        theta: Flat non-linear parameters; kept as they are given.
        single: Whether the products of a mini-batch are in the data's precision, which takes a
            third of a pass's time less; mini-batches are added in float64 all the same.

    Attributes:
        batches: The mini-batches.
        single: As given.
        readout: The minimiser over the readout.
        rank: Rank of its normal equations.
        loss: ``L`` alone.
        value: ``L`` plus ridges.
        seconds: That its sums take; on a CPU by the median of a mini-batch, since the first may be
            slow, and the machine for a moment.
    """

    def __init__(
        self,
        objective: Objective,
        batches: Sequence[Batch],
        theta: Tensor,
        *,
        single: bool = False,
    ) -> None:
        self.objective, self.theta, self.batches, self.single = objective, theta, batches, single
        k = objective.layout.features + int(objective.layout.readout_bias)
        out = objective.problem.d_out
        both = torch.zeros(k, k + out, dtype=torch.float64, device=theta.device)
        square = both.new_zeros(())
        clock = [time.perf_counter()]
        for batch in batches:
            columns = features_of(objective, batch, theta, products=False).columns
            rows = torch.cat([columns, batch.B.flatten(0, 1)], dim=1)
            rows = rows if single else rows.double()
            left, targets = rows[:, :k], rows[:, k:]
            weighted = left if objective.weights is None else left * batch.weights.reshape(-1, 1)
            if single:
                both += weighted.mT @ rows
            else:
                both.addmm_(weighted.mT, rows)
            square += targets.double().square().sum(1) @ batch.weights.double().flatten()
            objective.operations.projections += product(len(rows), k, k + out)
            clock.append(time.perf_counter())
        objective.count_passes(1)
        scale = self._scale(batches)
        self._gram, self._right = (both * scale).split([k, out], dim=1)
        self._square = float(square) * scale
        if theta.device.type == "cpu":
            spent = [after - before for before, after in itertools.pairwise(clock)]
            self.seconds = len(spent) * statistics.median(spent)
        else:  # all batches are done here, and were only begun above
            self.seconds = time.perf_counter() - clock[0]
        self._settle()

    def under(self, objective: Objective, theta: Tensor | None = None) -> Pooled:
        """The same point, from the same sums, of an objective that differs in the ridge.

        Args:
            objective: The other.
            theta: What has the same features in it, where it differs in the model too.

        Returns:
            The point.
        """
        other = copy(self)
        for name in ("gradient", "single_will_do"):
            other.__dict__.pop(name, None)
        other.objective = objective
        other.theta = self.theta if theta is None else theta
        other._settle()
        return other

    def explains(self, readout: Tensor) -> bool:
        """Whether a readout explains :data:`EXPLAINED` of the targets' spread; not if it is NaN."""
        return self.loss_at(readout) <= (1 - EXPLAINED) * self.objective.target_norm_squared

    @cached_property
    def single_will_do(self) -> bool:
        r"""Whether products of mini-batches in single precision lead to the same readout and loss.

        With unit roundoff ``u`` they change ``S``, the Gram matrix scaled to unit diagonal, by a
        matrix of norm ``k u`` about (as a rule: no bound of the worst case), and the loss at the
        minimiser by some ``u ||B||_W^2`` and the square of the former over the smallest eigenvalue
        of ``S``. So they do where that is :data:`RESOLVED` times ``k u``, which tells the rank too,
        and the loss is not small beside ``||B||_W^2``: :data:`SMALL` times that.
        """
        if self.theta.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
            return False
        inverse, rank = scaled_inverse(self._gram, self.theta.dtype)
        k = len(inverse)
        if rank < k:
            return False
        size = self._gram.diagonal().sqrt()
        smallest = 1.0 / float((size[:, None] * inverse * size).norm())  # of S, or less
        roundoff = 0.5 * torch.finfo(self.theta.dtype).eps
        return smallest >= RESOLVED * k * roundoff and self.loss >= SMALL * self._square

    def loss_at(self, readout: Tensor) -> float:
        """``L`` alone with another readout."""
        readout = readout.double()
        change = readout * (self._gram @ readout - 2.0 * self._right)
        return self._square + float(change.sum())

    def readout_ridge(self, share: float, center: Tensor) -> Ridge:
        """A ridge on the readout alone.

        Args:
            share: Its strength, in units of the features' summed squares, mean over the features;
                the constant row has none.
            center: What it pulls towards, ``(features [+ 1], d_out)``.

        Returns:
            The ridge.
        """
        metric, width = torch.zeros_like(self._gram), self.objective.layout.features
        metric.diagonal()[:width] = share * self._gram.diagonal()[:width].mean()
        return Ridge(self.theta, (), center, metric)

    def ridged_readouts(self, shares: Iterable[float], center: Tensor) -> Iterator[Tensor]:
        """The minimisers under :meth:`readout_ridge`, by one eigendecomposition for all shares.

        The constant, which is free, is solved for first: what is left is ``F^T W F`` of centred
        features, ``Q diag(lambda) Q^T``, and ``O = Q (Q^T (F^T W B + c m O0) / (lambda + c m))``.

        Args:
            shares: Strengths, as there.
            center: What they pull towards.

        Yields:
            The readout of each, ``(features [+ 1], d_out)``.
        """
        width, with_constant = self.objective.layout.features, self.objective.layout.readout_bias
        mean = float(self._gram.diagonal()[:width].mean())
        sums, total = self._gram[:width, width:], self._gram[width:, width:]
        values, vectors, turned = self._centred
        pull = vectors.mT @ center[:width].double()
        cost, operations = product(width, width, pull.shape[1]), self.objective.operations
        operations.small += cost
        for share in shares:
            strength = share * mean
            scale = values + strength
            inverse = torch.where(scale > 0.0, 1.0 / scale, 0.0)[:, None]
            readout = vectors @ (inverse * (turned + strength * pull))
            operations.small += cost
            if with_constant:
                constant = (self._right[width:] - sums.mT @ readout) / total
                readout = torch.cat([readout, constant])
            yield readout.to(self.theta.dtype)

    @cached_property
    def _centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """``lambda``, ``Q`` and ``Q^T F^T W B`` of the centred features, ``lambda`` not below 0."""
        width = self.objective.layout.features
        gram, right = self._gram[:width, :width], self._right[:width]
        if self.objective.layout.readout_bias:
            sums, total = self._gram[:width, width:], self._gram[width:, width:]
            gram = gram - sums @ (sums.mT / total)
            right = right - sums @ (self._right[width:] / total)
        values, vectors = torch.linalg.eigh(gram)
        self.objective.operations.small += product(width, width, right.shape[1])
        return values.clamp_min(0.0), vectors, vectors.mT @ right

    @property
    def regularised(self) -> float:
        """Loss plus the problem's ridges."""
        return self.value

    @cached_property
    def gradient(self) -> Tensor:
        """By ``theta``, ridges included, flat."""
        objective, theta = self.objective, self.theta
        chosen = spread(self.batches, GRADIENT_ROWS)
        gradient = torch.zeros_like(theta)
        for batch in chosen:
            features = features_of(objective, batch, theta)
            gradient += partial_gradient(objective, batch, features, self.readout)[0]
        gradient *= self._scale(chosen)
        if objective.ridge is not None:
            objective.add_ridge_gradient(theta - objective.ridge.center, gradient)
        return gradient

    def _scale(self, batches: Sequence[Batch]) -> float:
        weight = sum(batch.weights.sum(dtype=torch.float64) for batch in batches)
        return self.objective.problem.total_weight / float(weight)

    def _settle(self) -> None:
        """The readout under the objective's ridge, and what the objective is there."""
        gram, right, ridge = self._gram, self._right, self.objective.ridge
        if ridge is not None:
            gram = gram + ridge.readout
            right = right + ridge.readout_right
        inverse, self.rank = scaled_inverse(gram, self.theta.dtype)
        self.objective.operations.small += product(gram.shape[0], gram.shape[0], right.shape[1])
        self.readout = (inverse @ right).to(self.theta.dtype)
        self.loss = self.loss_at(self.readout)
        self.value = self.loss + self.objective.ridge_value(self.theta, self.readout)
