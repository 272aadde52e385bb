r"""The reduced curvature as a dense matrix.

It is ``2 (K - E^T (M^{-1} (x) I) E)`` plus the ridge, where ``K`` sums ``w J^T J`` over the rows,
``J`` the Jacobian of a row's outputs at a fixed readout, and ``E`` sums ``w f J`` with the row's
features ``f``; the exact Hessian adds the second derivative of the outputs to ``K`` and
``w dF^T r`` to ``E``.

Where only the queries move all of these are sums of Kronecker products. With inputs ``a`` (a row of
``scale A1``), co-moments ``D`` and ``T`` of values and keys under the softmax of the row,
``C = O^T D``, residual ``r`` and weight ``w``::

    K = sum w (a a^T) (x) (C^T C + T)
    E[(k, o), (p, q)] = sum w a_p (f_k C[o, q] + D[k, q] r_o)

Each sum over the rows is one matrix product; in the first both factors are symmetric, so only their
upper triangles enter. The cost is ``O(n^2 d^2 + n d^4 + d^6)`` for ``n`` rows, once a point, where
a product costs ``O(n^2 d + n d^2)``. Other layers: :mod:`.jacobian`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attnreg.curvature.jacobian import jacobian_sums
from attnreg.models.features import RowMoments
from attnreg.objective import Point
from attnreg.operations import product
from attnreg.readout import gram64


def assembly_cost(point: Point) -> float:
    """Operations of :func:`assemble_hessian` over those of a Gauss-Newton product."""
    objective = point.objective
    layout, problem = objective.layout, objective.problem
    rows, d_out = objective.targets.shape
    keys = max(length for _, length in problem.lengths)
    heads, width = layout.groups * layout.repeats, layout.features
    inputs, e, v = layout.blocks[0].rows, layout.blocks[0].width, layout.value_width
    moments = rows * heads * keys * problem.d_key * (problem.d_value + problem.d_key)
    if layout.only_queries_move:
        sums = rows * layout.size * (layout.size / 4 + 2 * v * d_out)
    else:
        sums = rows * d_out * layout.size * (layout.size + width)
        sums += rows * layout.size**2 / heads  # of heads with themselves
    schur = width * d_out * layout.size**2
    moving = 2 if layout.keys_move else 1
    one = rows * heads * keys * 2 * moving * (e + v)
    one += rows * (3 * width * d_out + 2 * inputs * heads * e * moving)
    return (moments + sums + schur) / one


class RowSelection(Protocol):
    """Some of the rows, each with a factor, in place of all of them.

    Attributes:
        candidates: Increasing positions of the rows whose co-moments are wanted; None means all.
    """

    candidates: Tensor | None

    def keep(self, index: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses among candidates by what is known of them now.

        Args:
            index: Positions of the rows, ``(k,)``.
            change: ``C`` of each, ``(k, d_out, e)``.

        Returns:
            Places within ``index`` of the rows kept, and their factors.
        """


def assemble_gauss_newton(point: Point, selection: RowSelection | None = None) -> Tensor:
    """The reduced Gauss-Newton matrix, ``(size, size)``, of all rows or of some.

    With a selection each sum over the rows, those in ``M`` too, is that of the rows kept times
    their factors: the Schur complement of the joint matrix of those rows. The ridge stays whole.

    Returns:
        The matrix, ridge included.
    """
    return _assemble(point, exact=False, selection=selection)


def assemble_hessian(point: Point) -> Tensor:
    """The reduced exact Hessian, ``(size, size)``."""
    return _assemble(point, exact=True)


def _assemble(point: Point, *, exact: bool, selection: RowSelection | None = None) -> Tensor:
    objective = point.objective
    if objective.layout.only_queries_move:
        matrix, slope, normal = _query_sums(point, exact, selection)
    else:
        assert selection is None
        matrix, slope = jacobian_sums(point, exact=exact)
        normal = None
    if normal is None:
        projected = point.apply_readout_inverse(slope.flatten(1))
    else:
        projected = point.readout_inverse_of(normal) @ slope.flatten(1)
    width, d_out, size = slope.shape
    spent = objective.operations
    spent.dense += product(width, width, d_out * size) + product(size, width * d_out, size)
    shape = (width * d_out, size)
    matrix.addmm_(slope.reshape(shape).mT, projected.reshape(shape), alpha=-1.0)
    matrix = matrix + matrix.mT  # twice the symmetric part
    if objective.ridge is not None:
        start = 0
        for left, right in zip(objective.left, objective.ridge.right, strict=True):
            heads = torch.block_diag(*right.to(matrix.dtype))
            end = start + left.matrix.shape[0] * heads.shape[0]
            matrix[start:end, start:end] += 2.0 * torch.kron(left.matrix, heads)
            start = end
    return matrix


def _query_sums(
    point: Point, exact: bool, selection: RowSelection | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`.jacobian.jacobian_sums`, where only the queries move.

    Returns:
        The two sums and, of a selection of the rows, ``sum w f f^T``.
    """
    objective, features = point.objective, point.features
    layout, theta = objective.layout, point.theta
    d, e = layout.blocks[0].rows, layout.blocks[0].width
    v, d_out = point.coupling.shape
    upper_d, upper_e = _Upper(d, theta.device), _Upper(e, theta.device)
    kron = theta.new_zeros((upper_d.count, upper_e.count))
    slope = theta.new_zeros((v * d, d_out * e))
    residual_slope = theta.new_zeros((v * e, d_out * d))
    normal = torch.zeros((v, v), dtype=torch.float64, device=theta.device)
    cotangent = point.cotangent if exact else None  # weighted, and T is linear in it
    scale = objective.model.logit_scale(objective.problem)
    candidates = None if selection is None else selection.candidates
    spent = objective.operations
    for found in features.comoments(cotangent, candidates):
        rows = _Rows.of(found)
        change = point.coupling.mT @ rows.second  # C
        spent.row_products += product(len(change) * d_out, v, e)
        weights = None if objective.weights is None else objective.weights[rows.index]
        if selection is not None:
            kept, factors = selection.keep(rows.index, change)
            rows, change = rows.take(kept), change[kept]
            weights = factors[:, None] if weights is None else factors[:, None] * weights[kept]
        inputs = rows.inputs * scale
        columns = features.columns[rows.index, :v]
        right, weighted = change.mT @ change, inputs
        spent.row_products += product(len(change) * e, d_out, e)
        spent.row_sums += product(upper_d.count, len(change), upper_e.count)
        spent.row_sums += (2 if exact else 1) * product(v * d, len(change), d_out * e)
        if weights is not None:
            right, weighted = right * weights[..., None], inputs * weights
        if rows.third is not None:
            right += rows.third
        squares = upper_d.pack(inputs[:, :, None] * inputs[:, None, :])
        kron.addmm_(squares.mT, upper_e.pack(right))
        slope.addmm_(_outer(columns, weighted).mT, change.flatten(1))
        if exact:
            pairs = _outer(point.residual[rows.index], weighted)
            residual_slope.addmm_(rows.second.flatten(1).mT, pairs)
        if selection is not None and weights is not None:
            normal += gram64(columns * weights, columns)
            spent.projections += product(v, len(change), v)
    full = kron[upper_d.position][:, upper_e.position].view(d, d, e, e)
    matrix = full.permute(0, 2, 1, 3).reshape(d * e, d * e)
    slope = slope.view(v, d, d_out, e).permute(0, 2, 1, 3)
    if exact:
        slope = slope + residual_slope.view(v, e, d_out, d).permute(0, 2, 3, 1)
    slope = slope.reshape(v, d_out, d * e)
    return matrix, slope, None if selection is None else normal


@dataclass(frozen=True)
class _Rows:
    """Moments of some rows of a layer of one head."""

    index: Tensor
    inputs: Tensor
    second: Tensor
    third: Tensor | None

    @staticmethod
    def of(found: RowMoments) -> _Rows:
        third = None if found.third is None else found.third.flatten(0, 2)
        return _Rows(found.index, found.inputs, found.second.flatten(0, 2), third)

    def take(self, kept: Tensor) -> _Rows:
        third = None if self.third is None else self.third[kept]
        return _Rows(self.index[kept], self.inputs[kept], self.second[kept], third)


class _Upper:
    """Symmetric ``(size, size)`` matrices packed as their upper triangles.

    Attributes:
        count: Entries of a packed matrix.
        position: Where each entry of the full matrix, row by row, is in the packed one.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        rows, columns = torch.triu_indices(size, size, device=device)
        self._flat, self.count = rows * size + columns, rows.shape[0]
        position = torch.empty((size, size), dtype=torch.long, device=device)
        position[rows, columns] = torch.arange(self.count, device=device)
        position[columns, rows] = position[rows, columns]
        self.position = position.flatten()

    def pack(self, matrices: Tensor) -> Tensor:
        """``(rows, size, size)`` as ``(rows, count)``."""
        return matrices.flatten(1).index_select(1, self._flat)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return (left[:, :, None] * right[:, None, :]).flatten(1)
