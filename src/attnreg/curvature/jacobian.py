r"""The parts of the dense curvature for layers whose queries, keys and values all move.

For one row and head write ``x`` for the input of the queries, ``q = x W_Q``, ``O`` for the head's
rows of the readout, ``mean``, ``P`` and ``N`` for the moments of ``A3`` and ``A2`` under the
softmax (``AttentionMoments.comoments``) and ``u`` for the cotangent of the features. The change of
the outputs and the second derivative of ``<u, features>`` are, in blocks::

    d out = (O^T W_V^T P W_K) (dW_Q^T x) + (O^T W_V^T P) (dW_K q) + O^T (dW_V^T mean)

    query, query   (x x^T) (x) (W_K^T N W_K)        query, value   x (x) (P W_K) (x) u
    key, key       N (x) (q q^T)                    key, value     P (x) q (x) u
    query, key     x (x) (W_K^T N) (x) q + x (x) (P^T W_V u) (x) I

The first is formed row by row, so that the sum over the rows is one matrix product; the others
are one product each, of head with itself. Cost: ``O(n (m d^2 heads + d_out size^2))`` for ``n``
rows and ``m`` keys a sequence; memory: ``n heads d^2`` numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg.kronecker import split_blocks
from attnreg.objective import Point
from attnreg.operations import product

_CHUNK = 1 << 22
"""Numbers of the Jacobian that are formed at a time."""


def jacobian_sums(point: Point, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Sums over the rows that the dense curvature is made of.

    Args:
        point: Where; its layer has queries, keys and values that move.
        exact: Whether the terms of the exact Hessian beyond Gauss-Newton are added.

    Returns:
        ``sum w J^T J`` (with the second derivative), whose symmetric part counts, ``(size, size)``,
        and ``sum w f J`` (with ``w dF^T r``), ``(features [+ 1], d_out, size)``.

    Raises:
        ValueError: If heads are rotated or normalised, or a key or value bias is fitted.
    """
    if not point.objective.layout.plain:
        raise ValueError(
            f"{point.objective.model!r} was given; the dense curvature is for layers without "
            "rotation, norms and fitted biases of keys and values: use products with vectors"
        )
    sums = _Sums(point)
    rows, size = sums.inputs.shape[0], point.theta.shape[0]
    step = max(1, _CHUNK // (size * point.residual.shape[1]))
    moments = _gather_moments(point, exact)
    for start in range(0, rows, step):
        chunk = slice(start, min(rows, start + step))
        sums.add(chunk, *[m[chunk] for m in moments[:2]])
        if exact:
            sums.add_second_order(chunk, *[m[chunk] for m in moments])
    return sums.matrix, sums.slope


def _gather_moments(point: Point, exact: bool) -> list[Tensor]:
    """``mean``, ``P`` and, with ``exact``, ``N``: ``(rows, groups, repeats, ...)`` each."""
    layout, problem = point.objective.layout, point.objective.problem
    d_key, d_value = problem.d_key, problem.d_value
    shapes = [(d_value,), (d_value, d_key)] + ([(d_key, d_key)] if exact else [])
    heads = (point.residual.shape[0], layout.groups, layout.repeats)
    moments = [point.theta.new_empty((*heads, *shape)) for shape in shapes]
    for found in point.features.comoments(point.cotangent if exact else None):
        for moment, part in zip(moments, (found.mean, found.second, found.third), strict=False):
            assert part is not None
            moment[found.index, found.groups] = part
    return moments


class _Sums:
    """The sums so far.

    Letters of the contractions: ``n`` row, ``o`` output, ``g r`` head, ``x k y`` the inputs of
    queries, keys and values, ``e c`` the widths of a head's keys and values.
    """

    def __init__(self, point: Point) -> None:
        self._point, objective = point, point.objective
        layout, problem, model = objective.layout, objective.problem, objective.model
        query, key, value = split_blocks(point.theta, layout.blocks)
        inputs = [model.query_inputs(problem, batch).flatten(0, 1) for batch in problem.batches]
        self.inputs = torch.cat(inputs)
        self._heads = (layout.groups, layout.repeats)
        self._queries = (self.inputs @ query).unflatten(1, (*self._heads, -1))
        objective.operations.projections += product(len(self.inputs), *query.shape)
        self._w_k = key.unflatten(1, (layout.groups, -1))
        self._w_v = value.unflatten(1, (layout.groups, -1))
        self._readout = point.coupling.unflatten(0, (*self._heads, -1))
        size, width, d_out = layout.size, point.features.columns.shape[1], point.residual.shape[1]
        self.matrix = point.theta.new_zeros((size, size))
        self.slope = point.theta.new_zeros((width, d_out, size))
        shapes = [
            (query.shape[0], *self._heads, layout.blocks[0].width),
            (*self._w_k.shape,),
            (*self._w_v.shape,),
        ]
        self._residual = objective.weighted(point.residual)
        index = torch.arange(size, device=point.theta.device)
        parts = index.split([block.size for block in layout.blocks])
        # Where each head's parameters are in the flat vector.
        self._query_at, self._key_at, self._value_at = (
            part.view(shape) for part, shape in zip(parts, shapes, strict=True)
        )

    def add(self, chunk: slice, mean: Tensor, second: Tensor) -> None:
        """Adds the outputs' Jacobian of some rows."""
        point, objective = self._point, self._point.objective
        inputs, queries = self.inputs[chunk], self._queries[chunk]
        by_key = torch.einsum("grco,ygc,ngryk->nogrk", self._readout, self._w_v, second)
        by_query = torch.einsum("nogrk,kge->nogre", by_key, self._w_k)
        jacobian = torch.cat(
            [
                torch.einsum("nx,nogre->noxgre", inputs, by_query).flatten(2),
                torch.einsum("nogrk,ngre->nokge", by_key, queries).flatten(2),
                torch.einsum("ngry,grco->noygc", mean, self._readout).flatten(2),
            ],
            dim=2,
        )
        weighted = jacobian
        if objective.weights is not None:
            weighted = jacobian * objective.weights[chunk, :, None]
        self.matrix.addmm_(jacobian.flatten(0, 1).mT, weighted.flatten(0, 1))
        self.slope.view(self.slope.shape[0], -1).addmm_(
            point.features.columns[chunk].mT, weighted.flatten(1)
        )
        (n, d_out, size), width = jacobian.shape, self.slope.shape[0]
        rows = n * d_out * self._heads[0] * self._heads[1]
        spent, (d_key, _, e) = objective.operations, self._w_k.shape
        spent.row_products += product(rows, mean.shape[-1], d_key) + product(rows, d_key, e)
        spent.row_sums += product(size, n * d_out, size) + product(width, n, d_out * size)

    def add_second_order(self, chunk: slice, mean: Tensor, second: Tensor, third: Tensor) -> None:
        """Adds ``w dF^T r`` and the second derivative of ``<cotangent, F>`` of some rows."""
        point = self._point
        inputs = self.inputs[chunk]
        residual = self._residual[chunk]
        cotangents = point.cotangent[chunk].unflatten(1, (*self._heads, -1))
        slope = self.slope[: point.coupling.shape[0]].unflatten(0, (*self._heads, -1))
        self._count_second_order(inputs.shape[0])
        for g in range(self._heads[0]):
            w_k, w_v = self._w_k[:, g], self._w_v[:, g]
            at_key, at_value = self._key_at[:, g], self._value_at[:, g]
            for r in range(self._heads[1]):
                at_query = self._query_at[:, g, r]
                q, u, p = self._queries[chunk, g, r], cotangents[:, g, r], second[:, g, r]
                by_key = w_v.mT @ p  # (n, c, k)
                by_query = by_key @ w_k

                own = slope[g, r]  # (c, o, size)
                own[..., at_query] += torch.einsum("no,nx,nce->coxe", residual, inputs, by_query)
                own[..., at_key] += torch.einsum("no,nck,ne->coke", residual, by_key, q)
                own_value = torch.einsum("no,ny->oy", residual, mean[:, g, r])
                for c in range(own.shape[0]):
                    own[c][:, at_value[:, c]] += own_value

                n_key = third[:, g, r] @ w_k  # (n, k, e)
                by_value = p @ w_k  # (n, y, e)
                lifted = torch.einsum("nck,nc->nk", by_key, u)  # P^T W_V u
                mixed = torch.einsum("nx,nke,nf->xekf", inputs, n_key, q)
                mixed.diagonal(dim1=1, dim2=3).add_((inputs.mT @ lifted)[..., None])
                self._put(at_query, at_key, 2 * mixed)
                block = torch.einsum("nx,nz,nef->xezf", inputs, inputs, w_k.mT @ n_key)
                self._put(at_query, at_query, block)
                block = torch.einsum("nkl,ne,nf->kelf", third[:, g, r], q, q)
                self._put(at_key, at_key, block)
                block = torch.einsum("nx,nye,nc->xeyc", inputs, by_value, u)
                self._put(at_query, at_value, 2 * block)
                block = torch.einsum("nyk,ne,nc->keyc", p, q, u)
                self._put(at_key, at_value, 2 * block)

    def _count_second_order(self, rows: int) -> None:
        (d_key, _, e), (d_value, _, v) = self._w_k.shape, self._w_v.shape
        d_query, d_out = self.inputs.shape[1], self._residual.shape[1]
        heads, spent = self._heads[0] * self._heads[1], self._point.objective.operations
        products = product(v, d_value, d_key) + product(v + d_key + d_value, d_key, e)
        spent.row_products += heads * rows * (products + product(e, d_key, e))
        columns = (
            d_out * (d_query * v * e + v * d_key * e + d_value),
            d_query * d_key * (e**2 + 1) + (d_query * e) ** 2 + (d_key * e) ** 2,
            d_value * e * v * (d_query + d_key),
        )
        spent.row_sums += heads * product(1, rows, sum(columns))

    def _put(self, rows: Tensor, columns: Tensor, block: Tensor) -> None:
        """Adds a block; one off the diagonal is given twice, as only the symmetric part counts."""
        shape = (rows.numel(), columns.numel())
        self.matrix[rows.flatten()[:, None], columns.flatten()] += block.reshape(shape)
