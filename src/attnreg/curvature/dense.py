r"""The reduced curvature as a dense matrix, for models in which only the queries move.

With inputs ``a`` (a row of ``scale A1``), co-moments ``D`` and ``T`` of values and keys under the
softmax of the row, ``C = O^T D``, features ``f``, residual ``r`` and weight ``w``::

    K = sum w (a a^T) (x) (C^T C + T)
    E[(k, o), (p, q)] = sum w a_p (f_k C[o, q] + D[k, q] r_o)
    Hessian = 2 K - 2 E^T (M^{-1} (x) I) E  + ridge

and Gauss-Newton without ``T`` and without the second term of ``E``. Each sum over the rows is one
matrix product; in the first both factors are symmetric, so only their upper triangles enter.
The cost is ``O(n^2 d^2 + n d^4 + d^6)`` for ``n`` rows, once a point, where a product costs
``O(n^2 d + n d^2)``.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from attnreg.objective import Point
from attnreg.operations import product
from attnreg.readout import gram64


def assembly_cost(point: Point) -> float:
    """Operations of :func:`assemble_hessian` over those of a Gauss-Newton product."""
    objective = point.objective
    rows, d_out = objective.targets.shape
    d, e = objective.layout.blocks[0].rows, objective.layout.blocks[0].width
    v = objective.layout.features
    keys = max(length for _, length in objective.problem.lengths)
    moments = rows * keys * e * (v + e)
    sums = rows * d * e * (d * e / 4 + 2 * v * d_out)
    schur = v * d_out * (d * e) ** 2
    product = rows * keys * 2 * (e + v) + rows * (3 * v * d_out + 2 * d * e)
    return (moments + sums + schur) / product


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
    for rows in features.comoments(cotangent, candidates):
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
    slope = slope.reshape(v, d_out * d * e)
    if selection is None:
        projected = point.apply_readout_inverse(slope)
    else:
        projected = point.readout_inverse_of(normal) @ slope
    shape = (v * d_out, d * e)
    spent.dense += product(v, v, d_out * d * e) + product(d * e, v * d_out, d * e)
    matrix.addmm_(slope.view(shape).mT, projected.view(shape), alpha=-1.0)
    matrix = matrix + matrix.mT  # twice the symmetric part
    if objective.ridge is not None:
        ridge = objective.ridge.right[0][0].to(theta.dtype)
        matrix += 2.0 * torch.kron(objective.left[0].matrix, ridge)
    return matrix


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
