r"""The reduced objective of many matrices ``X`` at once, in one leading dimension.

For the bilinear model on problems whose curvature is small enough to be formed. All starts share
the inputs, so that logits, features and co-moments of all of them are one matrix product a
sequence. Symbols as in :mod:`attnreg.objective` and :mod:`.dense`: row ``j`` has the query input
``a`` (logit scale inside), the features ``f``, the central co-moment ``D`` of values and keys,
``C = Y^T D`` and the residual ``r``; ``W`` are the row weights, ``R`` the ridge of the readout
with the damping of the path. With ``M = F^T W F + R`` and ``L`` the ridge's left factor::

    gradient      2 sum_j w a (C^T r)^T + 2 L (X - X0) right
    Gauss-Newton  2 sum_j w (a a^T) (x) (C^T C) - 2 E^T M^{-1} E + 2 L (x) right
    E             sum_j w f (a (x) C)

Values are taken in an orthonormal basis of the directions that carry data, so that ``M`` of a
start is singular only where its softmax is degenerate; there the objective counts as infinite.
Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from attnreg.kronecker import LeftFactor
from attnreg.masks import hidden_keys
from attnreg.objective import Objective
from attnreg.problem import Batch

CHUNK = 1 << 23
"""Numbers that are formed at a time: a few starts where each needs many."""


@dataclass(frozen=True)
class Derivatives:
    """The objective and its derivatives at ``s`` starts.

    Attributes:
        value: Loss, ridges and damping term, ``(s,)``; infinite where there is no readout.
        gradient: By ``X``, ``(s, size)``.
        curvature: Reduced Gauss-Newton matrix, ``(s, size, size)``.
    """

    value: Tensor
    gradient: Tensor
    curvature: Tensor

    def where(self, chosen: Tensor, other: Derivatives) -> Derivatives:
        """Those of the chosen starts, and the other ones elsewhere."""
        return Derivatives(
            torch.where(chosen, self.value, other.value),
            torch.where(chosen[:, None], self.gradient, other.gradient),
            torch.where(chosen[:, None, None], self.curvature, other.curvature),
        )

    def take(self, kept: Tensor) -> Derivatives:
        """Those of some starts."""
        return Derivatives(*(getattr(self, field.name)[kept] for field in fields(self)))


class Stack:
    """A problem of the bilinear model as the derivatives of many starts need it.

    Args:
        objective: What is minimised; only queries may move. The passes spent are added to its.

    Attributes:
        shape: ``(d_query, d_key)``.
    """

    def __init__(self, objective: Objective) -> None:
        problem, model = objective.problem, objective.model
        self._objective = objective
        self.shape = (problem.d_query, problem.d_key)
        basis = LeftFactor.of(problem.gram_value, problem.dtype).vectors.double()
        queries = [model.query_inputs(problem, batch).double() for batch in problem.batches]
        self._parts = [_Part(b, q, basis) for b, q in zip(problem.batches, queries, strict=True)]
        self._inputs = torch.cat([part.queries for part in self._parts])
        self._squares = _outer(self._inputs, self._inputs)
        weights = torch.cat([batch.weights.flatten() for batch in problem.batches])
        self._root = weights.double().sqrt()[:, None]
        self._targets = objective.targets.double() * self._root
        self._add_ridge(objective, basis)
        self._at_a_time = max(1, CHUNK // numbers_per_start(objective))

    def _add_ridge(self, objective: Objective, basis: Tensor) -> None:
        ridge, (width, d_out) = objective.ridge, (basis.shape[1], self._targets.shape[1])
        self._readout_ridge = basis.new_zeros(width, width)
        self._readout_center = basis.new_zeros(width, d_out)
        self._ridge: tuple[Tensor, Tensor, Tensor] | None = None
        if ridge is not None:
            left, right = objective.left[0].matrix.double(), ridge.right[0][0].double()
            self._ridge = (left, right, ridge.center.double().view(self.shape))
            self._readout_ridge = basis.mT @ ridge.readout.double() @ basis
            self._readout_center = basis.mT @ ridge.readout_center.double()

    def power(self, x: Tensor) -> Tensor:
        """Mean squared norm of a feature column of each start: the unit of the path."""
        parts = [self._features(chunk)[0].square().sum((1, 2)) for chunk in self._chunks(x)]
        return torch.cat(parts) / max(1, len(self._readout_ridge))

    def derivatives(self, x: Tensor, damping: Tensor) -> Derivatives:
        """Objective and derivatives.

        Args:
            x: ``(s, d_query, d_key)``, float64.
            damping: Extra ridge ``damping ||Y||^2`` of each start, ``(s,)``.

        Returns:
            Of every start.
        """
        chunks = self._chunks(x)
        sizes = [len(chunk) for chunk in chunks]
        found = [self._derivatives(*p) for p in zip(chunks, damping.split(sizes), strict=True)]
        return Derivatives(
            *(torch.cat([getattr(part, f.name) for part in found]) for f in fields(Derivatives))
        )

    def _chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        self._objective.count_passes(2 * len(x))
        return x.split(self._at_a_time)

    def _derivatives(self, x: Tensor, damping: Tensor) -> Derivatives:
        features, second = self._features(x)  # W^{1/2} f and W^{1/2} D
        factor, readout, value = self._project(features, damping)
        residual = features @ readout - self._targets
        value = value + residual.square().sum((1, 2))
        change = readout.mT[:, None] @ second  # (s, rows, d_out, d_key)
        slope = (residual[:, :, None] @ change)[:, :, 0]
        gradient = 2 * (self._inputs.mT @ slope)
        curvature = 2 * self._curvature(features, change, factor)
        if self._ridge is not None:
            left, right, center = self._ridge
            move = x - center
            pull = left @ move @ right
            value = value + (move * pull).sum((1, 2))
            gradient = gradient + 2 * pull
            curvature += 2 * torch.kron(left, right)
        value = torch.where(value.isfinite(), value, torch.inf)
        return Derivatives(value, gradient.flatten(1), curvature)

    def _project(self, features: Tensor, damping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cholesky factor of ``M``, the readout, and what it adds to the objective."""
        normal = features.mT @ features + self._readout_ridge
        normal.diagonal(dim1=1, dim2=2).add_(damping[:, None])
        right = features.mT @ self._targets + self._readout_ridge @ self._readout_center
        factor, info = torch.linalg.cholesky_ex(normal)
        readout = torch.cholesky_solve(right, factor)
        move = readout - self._readout_center
        value = (move * (self._readout_ridge @ move)).sum((1, 2))
        value += damping * readout.square().sum((1, 2))
        return factor, readout, torch.where(info == 0, value, torch.inf)

    def _curvature(self, features: Tensor, change: Tensor, factor: Tensor) -> Tensor:
        """Half the Gauss-Newton matrix without the ridge."""
        (s, _, v), (d, e), d_out = features.shape, self.shape, change.shape[2]
        own = self._squares.mT @ (change.mT @ change).flatten(2)
        own = own.view(s, d, d, e, e).transpose(2, 3).reshape(s, d * e, d * e)
        pairs = (features[..., None] * self._inputs[:, None]).flatten(2)
        slope = (pairs.mT @ change.flatten(2)).view(s, v, d * d_out * e)
        part = torch.linalg.solve_triangular(factor, slope, upper=False)
        part = part.view(s, v, d, d_out, e).transpose(2, 3).reshape(s, v * d_out, d * e)
        return torch.baddbmm(own, part.mT, part, alpha=-1.0)

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``W^{1/2} f`` ``(s, rows, v)`` and ``W^{1/2} D`` ``(s, rows, v, d_key)``."""
        moments = [part.moments(x) for part in self._parts]
        mean, keys, raw = (torch.cat(parts, dim=1) for parts in zip(*moments, strict=True))
        second = raw.unflatten(2, (mean.shape[2], keys.shape[2]))
        second.sub_(mean[..., None] * keys[:, :, None]).mul_(self._root[..., None])
        return mean * self._root, second


def numbers_per_start(objective: Objective) -> int:
    """How many numbers the derivatives of one start need at a time."""
    problem, (rows, out) = objective.problem, objective.targets.shape
    d, e, v = problem.d_query, problem.d_key, problem.d_value
    softmax = sum(b.A1[..., 0].numel() * b.A2.shape[1] for b in problem.batches)
    return softmax + rows * ((v + out + e) * e + v * d) + (d + v * out) * d * e**2


class _Part:
    """The sequences of one batch."""

    def __init__(self, batch: Batch, queries: Tensor, basis: Tensor) -> None:
        self.queries = queries.flatten(0, 1)
        self._keys, values = batch.A2.double(), batch.A3.double() @ basis
        pairs = (values[..., None] * self._keys[..., None, :]).flatten(2)
        self._moved = torch.cat([values, self._keys, pairs], dim=2)
        self._widths = [values.shape[2], self._keys.shape[2], pairs.shape[2]]
        self._bias = _bias(batch)

    def moments(self, x: Tensor) -> list[Tensor]:
        """Means of values, keys and their products: ``(s, rows, width)`` each."""
        (s, _, e), b = x.shape, self._keys.shape[0]
        moved = (self.queries @ x).view(s, b, -1, e).transpose(0, 1)  # (b, s, n, d_key)
        logits = moved.reshape(b, -1, e) @ self._keys.mT  # (b, s n, m)
        if self._bias is not None:
            logits.view(b, s, -1, logits.shape[2]).add_(self._bias[:, None])
        found = torch.softmax(logits, dim=-1) @ self._moved
        found = found.view(b, s, -1, found.shape[2]).transpose(0, 1).flatten(1, 2)
        return [part.contiguous() for part in found.split(self._widths, dim=2)]


def _bias(batch: Batch) -> Tensor | None:
    """The additive mask with the causal one in it: ``(b or 1, n or 1, m)``."""
    bias = None if batch.bias is None else batch.bias.double()
    if not batch.causal:
        return bias
    rows, keys = (torch.arange(a.shape[1], device=a.device) for a in (batch.A1, batch.A2))
    hidden = batch.A1.new_zeros((len(rows), len(keys)), dtype=torch.float64)
    hidden.masked_fill_(hidden_keys(rows, keys, batch.window), -torch.inf)
    return hidden[None] if bias is None else bias + hidden


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return (left[:, :, None] * right[:, None, :]).flatten(1)
