"""Attention features of a problem at fixed parameters, with Jacobian products.

All batches write into one matrix, so that every product with the readout is one matrix
multiplication. Its columns are ``[F 1 | dF]``: the features, the readout's constant where there
is one, and the last Jacobian product, side by side because the projection needs both at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.kronecker import split_blocks
from attnreg.models.attention import Attention
from attnreg.models.base import Model
from attnreg.models.comoments import AttentionMoments, Comoments
from attnreg.models.heads import HeadMap, Rows
from attnreg.operations import Operations, product
from attnreg.problem import AttentionProblem, Batch

CACHE_BYTES = 10**9
"""Softmax matrices are kept between products up to this many bytes in all."""


@dataclass(frozen=True)
class RowMoments:
    """Moments of ``A3`` and ``A2`` of some rows and heads (see :meth:`AttentionMoments.comoments`).

    Attributes:
        index: Positions of the rows in :attr:`Features.columns`, ``(k,)``.
        inputs: Their rows of ``A1``, ``(k, d_query)``.
        groups: The key/value heads.
        mean: ``(k, groups, repeats, d_value)``.
        second: ``(k, groups, repeats, d_value, d_key)``.
        third: ``(k, groups, repeats, d_key, d_key)``, or None.
    """

    index: Tensor
    inputs: Tensor
    groups: slice
    mean: Tensor
    second: Tensor
    third: Tensor | None

    @staticmethod
    def of(index: Tensor, inputs: Tensor, found: Comoments) -> RowMoments:
        """Brings the moments of rows ``(sequences, n)`` into the order of the rows."""
        groups = slice(found.block.g0, found.block.g1)
        heads = (index.shape[0], groups.stop - groups.start, -1, index.shape[1])

        def ordered(moments: Tensor) -> Tensor:
            tail = moments.shape[2:]
            moments = moments.reshape(*heads, *tail).permute(0, 3, 1, 2, *range(4, 4 + len(tail)))
            return moments.flatten(0, 1)

        return RowMoments(
            index.flatten(),
            inputs.flatten(0, 1),
            groups,
            ordered(found.mean),
            ordered(found.second),
            None if found.third is None else ordered(found.third),
        )


class Features:
    """Features of ``model`` on ``problem`` at ``theta``, linearised.

    Args:
        problem: The data.
        model: What is fitted.
        theta: Flat non-linear parameters.
        products: Whether Jacobian products will follow; without them nothing is kept.
        operations: Where operations are counted; None counts for these features alone.
        batches: Some of the problem's batches, or parts of them; None means all.

    Attributes:
        columns: ``(rows, features [+ 1])``: ``[F 1]``; padded rows included.
        change: ``(rows, features)``: the last result of :meth:`jvp`.
        both: The two side by side, one contiguous matrix.
        passes: Attention passes made so far (one forward, Jacobian product or transpose each;
            a second derivative counts as two).
    """

    def __init__(
        self,
        problem: AttentionProblem,
        model: Model,
        theta: Tensor,
        *,
        products: bool = True,
        operations: Operations | None = None,
        batches: Sequence[Batch] | None = None,
    ) -> None:
        self.problem, self.model, self.theta = problem, model, theta
        self.batches = problem.batches if batches is None else batches
        self.layout = layout = model.layout(problem)
        rows = sum(batch.B.shape[0] * batch.B.shape[1] for batch in self.batches)
        width = layout.features
        constant = int(layout.readout_bias)
        self.both = theta.new_empty((rows, 2 * width + constant if products else width + constant))
        self.columns = self.both[:, : width + constant]
        self.change = self.both[:, width + constant :]
        if constant:
            self.columns[:, -1] = 1.0
        self.passes = 1
        self.operations = Operations() if operations is None else operations
        self._count_projection()
        keep = products and self._softmax_bytes <= CACHE_BYTES
        blocks = split_blocks(theta, layout.blocks)
        self._attention: list[AttentionMoments] = []
        self._head_maps: list[HeadMap | None] = []
        for batch, out in zip(self.batches, self._by_batch(self.columns[:, :width]), strict=True):
            projected = model.project(problem, batch, blocks, change=False)
            head_map = model.head_map(problem, batch, blocks, projected)
            queries, keys, values = projected if head_map is None else head_map.apply(projected)
            assert keys is not None
            assert values is not None
            attention = AttentionMoments(
                queries,
                keys,
                values,
                groups=layout.groups,
                repeats=layout.repeats,
                bias=batch.bias,
                causal=batch.causal,
                out=out,
                keep=keep,
                operations=self.operations,
                window=batch.window,
            )
            if products:
                self._attention.append(attention)
                self._head_maps.append(head_map)

    def jvp(self, direction: Tensor) -> Tensor:
        """Change of the features along a flat direction: fills and returns ``change``."""
        self.passes += 1
        self._count_projection()
        for batch, attention, head_map, out in self._batches(self.change):
            attention.jvp(*_moved(head_map, self._inputs_change(batch, direction)), out)
        return self.change

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Flat gradient for a cotangent ``(rows, features)``."""
        self.passes += 1
        self._count_projection()
        gradient = torch.zeros_like(self.theta)
        out = split_blocks(gradient, self.layout.blocks)
        for batch, attention, head_map, u in self._batches(cotangent):
            gradients = self._attention_vjp(attention, u)
            gradients = gradients if head_map is None else head_map.vjp(gradients)
            self.model.pull_back(self.problem, batch, gradients, out)
        return gradient

    def vjp_derivative(self, direction: Tensor, cotangent: Tensor, change: Tensor) -> Tensor:
        """Derivative of :meth:`vjp` along ``direction`` while the cotangent moves by ``change``.

        A head map that is not linear needs the gradients themselves too: one more pass.

        Returns:
            As :meth:`vjp`.
        """
        curved = any(m is not None and m.curved for m in self._head_maps)
        self.passes += 3 if curved else 2
        self._count_projection()
        self._count_projection()
        gradient = torch.zeros_like(self.theta)
        out = split_blocks(gradient, self.layout.blocks)
        changes = self._by_batch(change)
        for (batch, attention, head_map, u), du in zip(
            self._batches(cotangent), changes, strict=True
        ):
            inputs = self._inputs_change(batch, direction)
            moved = attention.vjp_derivative(*_moved(head_map, inputs), u, du)
            if head_map is not None:
                gradients = self._attention_vjp(attention, u) if head_map.curved else None
                moved = head_map.vjp_derivative(inputs, gradients, moved)
            self.model.pull_back(self.problem, batch, moved, out)
        return gradient

    def row_gradients(self, cotangent: Tensor) -> list[tuple[Tensor, ...]]:
        """Per batch the gradients by what ``Model.project`` gave, before they meet the inputs."""
        self.passes += 1
        result = []
        for _, attention, head_map, u in self._batches(cotangent):
            gradients = self._attention_vjp(attention, u)
            gradients = gradients if head_map is None else head_map.vjp(gradients)
            result.append(tuple(g for g in gradients if g is not None))
        return result

    def peaks(self, sizes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What :meth:`AttentionMoments.peaks` gives for a number a key ``(b, m)`` of each batch.

        Returns:
            Largest softmax weight and softmax mean of the numbers, each ``(rows,)``.
        """
        self.passes += 1
        pairs = [a.peaks(size) for a, size in zip(self._attention, sizes, strict=True)]
        largest, mean = (
            torch.cat([p.flatten() for p in parts]) for parts in zip(*pairs, strict=True)
        )
        return largest, mean

    def comoments(
        self, cotangent: Tensor | None, chosen: Tensor | None = None
    ) -> Iterator[RowMoments]:
        """Moments of ``A2`` and ``A3`` under the softmax, see :meth:`AttentionMoments.comoments`.

        Args:
            cotangent: ``(rows, features)``, or None where the third ones are not wanted.
            chosen: Increasing positions of the rows that are wanted; None means all. Some, of
                one head only.

        Yields:
            Some of the rows at a time.
        """
        self.passes += 1 if cotangent is None else 2
        first = 0
        for batch, attention in zip(self.batches, self._attention, strict=True):
            sequences, n = batch.B.shape[:2]
            rows = torch.arange(first, first + sequences * n, device=batch.B.device)
            u = None if cotangent is None else cotangent[first : first + sequences * n]
            u = None if u is None else u.unflatten(0, (sequences, n))
            rows, inputs = rows.view(sequences, n), batch.A1
            if chosen is None:
                for found in attention.comoments(batch.A2, batch.A3, u):
                    block = found.block
                    part = (slice(block.b0, block.b1), slice(block.n0, block.n1))
                    yield RowMoments.of(rows[part], inputs[part], found)
            else:
                inside = chosen[(chosen >= first) & (chosen < first + sequences * n)] - first
                for b in torch.unique_consecutive(inside // n).tolist():
                    own = inside[inside // n == b] - b * n
                    few = attention.select(b, own)
                    change = None if u is None else u[b, own][None]
                    for found in few.comoments(batch.A2[b : b + 1], batch.A3[b : b + 1], change):
                        part = own[found.block.n0 : found.block.n1]
                        yield RowMoments.of(rows[b, part][None], inputs[b, part][None], found)
            first += sequences * n

    @property
    def kept(self) -> dict[str, list[Tensor]]:
        """What :attr:`Attention.kept` names, of all batches."""
        names = ("softmax", "queries", "keys", "values")
        return {name: [t for a in self._attention for t in a.kept[name]] for name in names}

    @property
    def row_counts(self) -> tuple[int, int, int]:
        """Rows of queries, keys and values over all batches, padded ones included."""
        keys = sum(b.A2.shape[0] * b.A2.shape[1] for b in self.batches)
        return self.both.shape[0], keys, keys

    def _count_projection(self) -> None:
        """Counts the products of the inputs with all parameter blocks, or their transposes.

        A constant behind the inputs takes no part in a product.
        """
        problem = self.problem
        widths = (problem.d_query, problem.d_key, problem.d_value)
        for rows, width, block in zip(self.row_counts, widths, self.layout.blocks, strict=False):
            self.operations.projections += product(rows, width, block.heads * block.width)

    def _attention_vjp(self, attention: Attention, cotangent: Tensor) -> Rows:
        return attention.vjp(cotangent, self.layout.keys_move, self.layout.values_move)

    def _inputs_change(self, batch: Batch, direction: Tensor) -> Rows:
        blocks = split_blocks(direction, self.layout.blocks)
        return self.model.project(self.problem, batch, blocks, change=True)

    def _batches(
        self, rows: Tensor
    ) -> Iterator[tuple[Batch, AttentionMoments, HeadMap | None, Tensor]]:
        return zip(
            self.batches,
            self._attention,
            self._head_maps,
            self._by_batch(rows),
            strict=True,
        )

    @property
    def _softmax_bytes(self) -> int:
        entries = sum(b.B.shape[0] * b.B.shape[1] * b.A2.shape[1] for b in self.batches)
        heads = self.layout.groups * self.layout.repeats
        return entries * heads * self.theta.element_size()

    def _by_batch(self, rows: Tensor) -> list[Tensor]:
        """Views ``(b, n, k)`` of a matrix over the rows of all batches."""
        shapes = [batch.B.shape[:2] for batch in self.batches]
        parts = rows.split([b * n for b, n in shapes])
        return [p.unflatten(0, tuple(shape)) for p, shape in zip(parts, shapes, strict=True)]


def _moved(head_map: HeadMap | None, change: Rows) -> Rows:
    return change if head_map is None else head_map.jvp(change)
