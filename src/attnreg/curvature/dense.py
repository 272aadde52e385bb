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

import torch
from torch import Tensor

from attnreg.curvature.jacobian import jacobian_sums
from attnreg.objective import Point


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
    product = rows * heads * keys * 2 * moving * (e + v)
    product += rows * (3 * width * d_out + 2 * inputs * heads * e * moving)
    return (moments + sums + schur) / product


def assemble_gauss_newton(point: Point) -> Tensor:
    """The reduced Gauss-Newton matrix, ``(size, size)``."""
    return _assemble(point, exact=False)


def assemble_hessian(point: Point) -> Tensor:
    """The reduced exact Hessian, ``(size, size)``."""
    return _assemble(point, exact=True)


def _assemble(point: Point, *, exact: bool) -> Tensor:
    objective = point.objective
    sums = query_sums if objective.layout.only_queries_move else jacobian_sums
    matrix, slope = sums(point, exact=exact)
    projected = point.apply_readout_inverse(slope.flatten(1))
    shape = (-1, slope.shape[2])
    matrix.addmm_(slope.view(shape).mT, projected.view(shape), alpha=-1.0)
    matrix = matrix + matrix.mT  # twice the symmetric part
    if objective.ridge is not None:
        start = 0
        for left, right in zip(objective.left, objective.ridge.right, strict=True):
            heads = torch.block_diag(*right.to(matrix.dtype))
            end = start + left.matrix.shape[0] * heads.shape[0]
            matrix[start:end, start:end] += 2.0 * torch.kron(left.matrix, heads)
            start = end
    return matrix


def query_sums(point: Point, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Sums over the rows where only the queries move; see :func:`.jacobian.jacobian_sums`."""
    objective, features = point.objective, point.features
    layout, theta = objective.layout, point.theta
    d, e = layout.blocks[0].rows, layout.blocks[0].width
    v, d_out = point.coupling.shape
    upper_d, upper_e = _Upper(d, theta.device), _Upper(e, theta.device)
    kron = theta.new_zeros((upper_d.count, upper_e.count))
    slope = theta.new_zeros((v * d, d_out * e))
    residual_slope = theta.new_zeros((v * e, d_out * d))
    cotangent = point.cotangent if exact else None  # weighted, and T is linear in it
    scale = objective.model.logit_scale(objective.problem)
    for batch, first, moments in features.comoments(cotangent):
        block, second, third = moments.block, moments.second, moments.third
        n = batch.A1.shape[1]
        sequences = torch.arange(block.b0, block.b1, device=theta.device)[:, None]
        rows = torch.arange(block.n0, block.n1, device=theta.device)
        index = (first + sequences * n + rows).flatten()
        inputs = batch.A1[block.b0 : block.b1, block.n0 : block.n1].flatten(0, 1) * scale
        second = second.flatten(0, 1)
        change = point.coupling.mT @ second  # C
        right, weighted = change.mT @ change, inputs
        if objective.weights is not None:
            weights = objective.weights[index]
            right, weighted = right * weights[..., None], inputs * weights
        if third is not None:
            right += third.flatten(0, 1)
        squares = upper_d.pack(inputs[:, :, None] * inputs[:, None, :])
        kron.addmm_(squares.mT, upper_e.pack(right))
        columns = features.columns[index, :v]
        slope.addmm_(_outer(columns, weighted).mT, change.flatten(1))
        if exact:
            pairs = _outer(point.residual[index], weighted)
            residual_slope.addmm_(second.flatten(1).mT, pairs)
    full = kron[upper_d.position][:, upper_e.position].view(d, d, e, e)
    matrix = full.permute(0, 2, 1, 3).reshape(d * e, d * e)
    slope = slope.view(v, d, d_out, e).permute(0, 2, 1, 3)
    if exact:
        slope = slope + residual_slope.view(v, e, d_out, d).permute(0, 2, 3, 1)
    return matrix, slope.reshape(v, d_out, d * e)


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
