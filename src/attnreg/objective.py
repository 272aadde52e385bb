r"""The reduced objective: variable projection of the linear readout.

With features ``F(theta)`` (constant column included where the readout has a bias), row weights
``W``, and the ridges of the problem, the joint objective is::

    V(theta, O) = ||F O - B||_W^2 + <O - O0, R (O - O0)> + damping ||O||^2 + ridge(theta)

and the reduced one is its minimum over ``O``, reached where ``M O = F^T W B + R O0`` with
``M = F^T W F + R + damping I`` (the constant row is not damped). ``damping`` belongs to the
regularisation path of the solver and is 0 in the problem's own objective. At that ``O``, with
the residual ``r = F O - B`` and ``O_F`` the readout without its constant row::

    gradient       2 vjp(W r O_F^T) + ridge gradient
    Gauss-Newton   2 vjp(W (dF O_F + F dO) O_F^T),       M dO = -F^T W dF O_F
    Hessian        2 vjp(W (dr O_F^T + r dO_F^T)) + 2 vjp'[d](W r O_F^T),
                   M dO = -(F^T W dF O_F + dF^T W r),    dr = dF O_F + F dO

Both second-order products are Schur complements of the joint matrices (Golub and Pereyra 1973
for the projection; the Gauss-Newton one is exact for the joint Gauss-Newton matrix, not
Kaufman's approximation). No factor 1/2 anywhere.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from attnreg.kronecker import LeftFactor, apply_right, split_blocks
from attnreg.models import Features, Model, Ridge
from attnreg.operations import Operations, product
from attnreg.problem import AttentionProblem
from attnreg.readout import NormalEquations


class Objective:
    """The reduced objective of a model on a problem.

    Args:
        problem: The data.
        model: What is fitted.
        measured: Whose inputs' second moments stand for those of ``problem``: some of its
            sequences, which will do for coordinates and norms where there are no ridges. All
            sequences if None.

    Attributes:
        layout: Sizes of the model on the problem.
        ridge: That of the problem, or the one given to :meth:`with_ridge`; or None.
        targets: ``(rows, d_out)``, the rows of all batches, padding included.
        weights: ``(rows, 1)``, or None where every row has weight 1.
        target_norm_squared: ``||B - mean||_F^2``; 1 where that is 0.
        operations: Operations of everything done with this objective.
    """

    def __init__(
        self, problem: AttentionProblem, model: Model, measured: AttentionProblem | None = None
    ) -> None:
        self.problem, self.model = problem, model
        self.measured = problem if measured is None else measured
        self.layout = model.layout(problem)
        self.ridge = model.ridge(problem)
        targets = [batch.B.flatten(0, 1) for batch in problem.batches]
        self.targets = targets[0] if len(targets) == 1 else torch.cat(targets)
        weights = torch.cat([batch.weights.flatten() for batch in problem.batches])[:, None]
        self.weights = None if bool((weights == 1).all()) else weights
        self.target_norm_squared = problem.target_norm_squared or 1.0
        self.operations = Operations()
        self._points: list[Features] = []
        self._passes = 0

    @cached_property
    def left(self) -> list[LeftFactor]:
        """Mean second moments of the inputs of the parameter blocks, decomposed."""
        moments = self.model.input_moments(self.measured)
        return [LeftFactor.of(moment, self.problem.dtype) for moment in moments]

    @property
    def passes(self) -> int:
        """Attention passes of all features made so far."""
        return self._passes + sum(features.passes for features in self._points)

    def count_passes(self, passes: int) -> None:
        """Adds passes that were made outside the features."""
        self._passes += passes

    def with_ridge(self, ridge: Ridge | None) -> Objective:
        """The same with another ridge; operations are counted together, passes go on from here."""
        other = copy.copy(self)
        other.left = self.left  # made once for both
        other.ridge, other._passes, other._points = ridge, self.passes, []
        return other

    def with_model(self, model: Model) -> Objective:
        """The same of another model; operations are counted together, passes go on from here."""
        other = copy.copy(self)
        other.__dict__.pop("left", None)
        other.model, other.layout = model, model.layout(self.problem)
        other.ridge = model.ridge(self.problem)
        other._passes, other._points = self.passes, []
        return other

    def measured_whole(self) -> Objective:
        """The same with the second moments of all sequences; counts as with another model."""
        if self.measured is self.problem:
            return self
        other = copy.copy(self)
        other.__dict__.pop("left", None)
        other.measured, other._passes, other._points = self.problem, self.passes, []
        return other

    def features(self, theta: Tensor) -> Features:
        """Features at ``theta``, one attention pass."""
        features = Features(self.problem, self.model, theta, operations=self.operations)
        # Only the last two can still be in use: the current point and a trial.
        while len(self._points) > 1:
            self._passes += self._points.pop(0).passes
        self._points.append(features)
        return features

    def add_ridge_gradient(self, move: Tensor, out: Tensor) -> None:
        """Adds the gradient of the ridge of ``theta`` at a distance ``move`` from its centre."""
        ridge = self.ridge
        assert ridge is not None
        if not ridge.right:
            return
        matrices = split_blocks(move, self.layout.blocks)
        targets = split_blocks(out, self.layout.blocks)
        for left, right, matrix, target in zip(
            self.left, ridge.right, matrices, targets, strict=True
        ):
            spent = product(matrix.shape[0], matrix.shape[0], matrix.shape[1])
            self.operations.small += spent + product(
                matrix.shape[0], matrix.shape[1], right.shape[-1]
            )
            target.add_(apply_right(left.matrix @ matrix, right.to(matrix.dtype)), alpha=2.0)

    def ridge_value(self, theta: Tensor, readout: Tensor) -> float:
        """The ridges' value; 0 where there is none."""
        ridge = self.ridge
        if ridge is None:
            return 0.0
        distance = theta - ridge.center
        doubled = torch.zeros_like(distance)
        self.add_ridge_gradient(distance, doubled)
        readout_distance = (readout - ridge.readout_center).double()
        readout_part = (readout_distance * (ridge.readout @ readout_distance)).sum()
        return 0.5 * float(distance.double() @ doubled.double()) + float(readout_part)

    def weighted(self, rows: Tensor) -> Tensor:
        """``W rows``; the same tensor where all weights are 1."""
        return rows if self.weights is None else rows * self.weights


class Iterate(Protocol):
    """A ``theta`` with its readout solved, as :class:`Point` describes it."""

    @property
    def objective(self) -> Objective:
        """What is minimised."""

    @property
    def theta(self) -> Tensor:
        """Flat non-linear parameters."""

    @property
    def readout(self) -> Tensor:
        """The minimiser over the readout."""

    @property
    def rank(self) -> int:
        """Rank of the normal equations of the readout."""

    @property
    def loss(self) -> float:
        """Loss alone."""

    @property
    def regularised(self) -> float:
        """Loss plus the problem's ridges."""

    @property
    def gradient(self) -> Tensor:
        """Gradient by ``theta``, flat."""


class Point:
    """The reduced objective and its derivatives at one ``theta``.

    Args:
        objective: What is minimised.
        features: Features at ``theta``.
        damping: Extra ridge ``damping ||O||^2`` of the regularisation path.

    Attributes:
        readout: ``(features [+ 1], d_out)``: the minimiser over ``O``.
        residual: ``(rows, d_out)``, ``F O - B``.
        loss: ``||F O - B||_W^2``, float64.
        value: Loss plus ridges plus damping term: what the solver minimises.
        rank: Rank of the normal equations of the readout.
    """

    def __init__(self, objective: Objective, features: Features, damping: float = 0.0) -> None:
        self.objective, self.features, self.damping = objective, features, damping
        self.theta = features.theta
        columns = features.columns
        self._left = objective.weighted(columns)  # W [F 1]
        ridge = objective.ridge
        width = objective.layout.features
        self._normal = NormalEquations(
            self._left, columns, None if ridge is None else ridge.readout, damping, width
        )
        center = None if ridge is None else ridge.readout_center
        self.readout, self.residual = self._normal.solve(objective.targets, center)
        self.rank = self._normal.rank
        spent = objective.operations
        spent.projections += self._normal.spent_on_rows
        spent.small += self._normal.spent_on_columns
        self.coupling = self.readout[:width]  # O_F
        self.loss = _weighted_square(self.residual, objective.weights)
        self.value = self.loss + objective.ridge_value(self.theta, self.readout)
        self.value += damping * _square(self.coupling)

    # ------------------------------------------------------------------ first order

    @cached_property
    def cotangent(self) -> Tensor:
        """``W r O_F^T``, ``(rows, features)``: half the gradient by the features."""
        self._spend(self.coupling.shape[1])
        return self.objective.weighted(self.residual) @ self.coupling.mT

    @cached_property
    def gradient(self) -> Tensor:
        """Gradient by ``theta``, flat."""
        gradient = self.features.vjp(self.cotangent).mul_(2.0)
        if self.objective.ridge is not None:
            self.objective.add_ridge_gradient(self.theta - self.objective.ridge.center, gradient)
        return gradient

    # ------------------------------------------------------------------ second order

    def gauss_newton(self, direction: Tensor) -> Tensor:
        """Product of the reduced Gauss-Newton matrix with a flat direction."""
        change = self.features.jvp(direction)  # dF
        k, width = self.readout.shape[0], change.shape[1]
        self._spend(2 * k + width)
        self._spend_on_mixing()
        slope = self._left.mT @ change
        readout_change = self._normal.apply_inverse(slope @ self.coupling).neg_()
        cotangent = self.features.both @ self._mixing(readout_change)
        return self._finish(direction, self.features.vjp(self._weigh(cotangent)))

    def hessian(self, direction: Tensor) -> Tensor:
        """Product of the reduced exact Hessian with a flat direction."""
        change = self.features.jvp(direction)
        k, width = self.readout.shape[0], change.shape[1]
        self._spend(2 * (k + self.coupling.shape[1]) + width)
        self._spend_on_mixing()
        slope = (self._left.mT @ change) @ self.coupling
        weighted_residual = self.objective.weighted(self.residual)
        slope[: change.shape[1]] += change.mT @ weighted_residual
        readout_change = self._normal.apply_inverse(slope).neg_()
        cotangent_change = self._weigh(self.features.both @ self._mixing(readout_change))
        cotangent_change.addmm_(weighted_residual, readout_change[: self.coupling.shape[0]].mT)
        product = self.features.vjp_derivative(direction, self.cotangent, cotangent_change)
        return self._finish(direction, product)

    def project_out(self, rows: Tensor) -> Tensor:
        """``rows - W F M^{-1} F^T rows``: the part that no readout can take up.

        For rows ``W^{1/2} u`` with independent unit entries of ``u`` the result has the second
        moment ``W - W F M^{-1} F^T W`` of the reduced Gauss-Newton matrix (without ridge).

        Returns:
            ``(rows, d_out)``.
        """
        spent, k = self.objective.operations, self.readout.shape[0]
        spent.projections += 4 * rows.numel() * k
        spent.small += product(k, k, rows.shape[1])
        return rows - self._left @ self._normal.apply_inverse(self.features.columns.mT @ rows)

    def apply_readout_inverse(self, matrix: Tensor) -> Tensor:
        """``M^{-1} matrix`` with the readout's normal matrix ``M``."""
        return self._normal.apply_inverse(matrix)

    def readout_inverse_of(self, gram: Tensor) -> Tensor:
        """``M^{-1}`` with ``gram`` in place of ``F^T W F``: float64 ``(k, k)``, overwritten."""
        return self._normal.inverse_of(gram)

    @property
    def regularised(self) -> float:
        """Loss plus the problem's ridges, without the path's damping."""
        return self.value - self.damping * _square(self.coupling)

    # ------------------------------------------------------------------ pieces

    def _spend(self, widths: int) -> None:
        """Counts products of matrices of the features' shape with ``widths`` columns in all."""
        rows, width = self.objective.targets.shape[0], self.coupling.shape[0]
        self.objective.operations.projections += product(rows, width, widths)

    def _spend_on_mixing(self) -> None:
        """Counts the products of a second-order product that no row enters."""
        (width, out), k = self.coupling.shape, self.readout.shape[0]
        inner = product(k, width, out) + product(k, k, out) + product(k + width, out, width)
        self.objective.operations.small += inner

    def _mixing(self, readout_change: Tensor) -> Tensor:
        """Maps ``[F 1 | dF]`` to ``(dF O_F + F dO) O_F^T`` in one product."""
        return torch.cat([readout_change, self.coupling]) @ self.coupling.mT

    def _weigh(self, rows: Tensor) -> Tensor:
        weights = self.objective.weights
        return rows if weights is None else rows.mul_(weights)

    def _finish(self, direction: Tensor, product: Tensor) -> Tensor:
        product.mul_(2.0)
        if self.objective.ridge is not None:
            self.objective.add_ridge_gradient(direction, product)
        return product


def _square(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def _weighted_square(rows: Tensor, weights: Tensor | None) -> float:
    if weights is None:
        return _square(rows)
    return float((weights.double() * rows.double().square()).sum())
