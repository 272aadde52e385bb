"""Attention features of a problem at fixed parameters, with Jacobian products.

All batches write into one matrix, so that every product with the readout is one matrix
multiplication. Its columns are ``[F 1 | dF]``: the features, the readout's constant where there
is one, and the last Jacobian product, side by side because the projection needs both at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnreg.kronecker import split_blocks
from attnreg.models.attention import CACHE_BYTES, Attention, Comoments
from attnreg.models.base import Model
from attnreg.problem import AttentionProblem, Batch


class Features:
    """Features of ``model`` on ``problem`` at ``theta``, linearised.

    Args:
        problem: The data.
        model: What is fitted.
        theta: Flat non-linear parameters.
        products: Whether Jacobian products will follow; without them nothing is kept.

    Attributes:
        columns: ``(rows, features [+ 1])``: ``[F 1]``; padded rows included.
        change: ``(rows, features)``: the last result of :meth:`jvp`.
        both: The two side by side, one contiguous matrix.
        passes: Attention passes made so far (one forward, Jacobian product or transpose each;
            a second derivative counts as two).
    """

    def __init__(
        self, problem: AttentionProblem, model: Model, theta: Tensor, *, products: bool = True
    ) -> None:
        self.problem, self.model, self.theta = problem, model, theta
        self.layout = layout = model.layout(problem)
        rows = sum(batch.B.shape[0] * batch.B.shape[1] for batch in problem.batches)
        width = layout.features
        constant = int(layout.readout_bias)
        self.both = theta.new_empty((rows, 2 * width + constant if products else width + constant))
        self.columns = self.both[:, : width + constant]
        self.change = self.both[:, width + constant :]
        if constant:
            self.columns[:, -1] = 1.0
        self.passes = 1
        keep = products and _softmax_bytes(problem, layout.groups * layout.repeats) <= CACHE_BYTES
        blocks = split_blocks(theta, layout.blocks)
        self._attention = []
        for batch, out in zip(
            problem.batches, self._by_batch(self.columns[:, :width]), strict=True
        ):
            queries, keys, values = model.project(problem, batch, blocks, change=False)
            assert keys is not None
            assert values is not None
            attention = Attention(
                queries,
                keys,
                values,
                groups=layout.groups,
                repeats=layout.repeats,
                bias=batch.bias,
                causal=batch.causal,
                out=out,
                keep=keep,
            )
            if products:
                self._attention.append(attention)

    def jvp(self, direction: Tensor) -> Tensor:
        """Change of the features along a flat direction: fills and returns ``change``."""
        self.passes += 1
        for batch, attention, out in self._batches(self.change):
            attention.jvp(*self._inputs_change(batch, direction), out)
        return self.change

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Flat gradient for a cotangent ``(rows, features)``."""
        self.passes += 1
        gradient = torch.zeros_like(self.theta)
        out = split_blocks(gradient, self.layout.blocks)
        for batch, attention, u in self._batches(cotangent):
            gradients = attention.vjp(u, self.layout.keys_move, self.layout.values_move)
            self.model.pull_back(self.problem, batch, gradients, out)
        return gradient

    def vjp_derivative(self, direction: Tensor, cotangent: Tensor, change: Tensor) -> Tensor:
        """Derivative of :meth:`vjp` along ``direction`` while the cotangent moves by ``change``."""
        self.passes += 2
        gradient = torch.zeros_like(self.theta)
        out = split_blocks(gradient, self.layout.blocks)
        changes = self._by_batch(change)
        for (batch, attention, u), du in zip(self._batches(cotangent), changes, strict=True):
            inputs = self._inputs_change(batch, direction)
            gradients = attention.vjp_derivative(*inputs, u, du)
            self.model.pull_back(self.problem, batch, gradients, out)
        return gradient

    def row_gradients(self, cotangent: Tensor) -> list[tuple[Tensor, ...]]:
        """Per batch the gradients by queries, keys and values, before they meet the inputs."""
        self.passes += 1
        result = []
        for _, attention, u in self._batches(cotangent):
            gradients = attention.vjp(u, self.layout.keys_move, self.layout.values_move)
            result.append(tuple(g for g in gradients if g is not None))
        return result

    def comoments(self, cotangent: Tensor | None) -> Iterator[tuple[Batch, int, Comoments]]:
        """Moments of ``A2`` and ``A3`` under the softmax of each row and head (see `Attention`).

        Args:
            cotangent: ``(rows, features)``, or None where the third ones are not wanted.

        Yields:
            The batch, the first of its rows in :attr:`columns`, and the moments of some rows.
        """
        self.passes += 1 if cotangent is None else 2
        parts = [None] * len(self._attention) if cotangent is None else self._by_batch(cotangent)
        first = 0
        for batch, attention, u in zip(self.problem.batches, self._attention, parts, strict=True):
            for moments in attention.comoments(batch.A2, batch.A3, u):
                yield batch, first, moments
            first += batch.B.shape[0] * batch.B.shape[1]

    def _inputs_change(self, batch, direction: Tensor):  # type: ignore[no-untyped-def]
        blocks = split_blocks(direction, self.layout.blocks)
        return self.model.project(self.problem, batch, blocks, change=True)

    def _batches(self, rows: Tensor):  # type: ignore[no-untyped-def]
        return zip(self.problem.batches, self._attention, self._by_batch(rows), strict=True)

    def _by_batch(self, rows: Tensor) -> list[Tensor]:
        """Views ``(b, n, k)`` of a matrix over the rows of all batches."""
        shapes = [batch.B.shape[:2] for batch in self.problem.batches]
        parts = rows.split([b * n for b, n in shapes])
        return [p.unflatten(0, tuple(shape)) for p, shape in zip(parts, shapes, strict=True)]


def _softmax_bytes(problem: AttentionProblem, heads: int) -> int:
    itemsize = torch.finfo(problem.dtype).bits // 8
    entries = sum(b.B.shape[0] * b.B.shape[1] * b.A2.shape[1] for b in problem.batches)
    return entries * heads * itemsize
