"""Moments of the rows of an attention, for curvature that is assembled from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnreg.masks import hidden_keys
from attnreg.models import attention
from attnreg.models.attention import Attention, Block

PIECE = 16
"""Second moments of the rows may take this many times the size of a block."""


@dataclass(frozen=True)
class Comoments:
    """Moments of some rows, see :meth:`AttentionMoments.comoments`.

    Attributes:
        block: Which rows; the leading dimensions are its sequences times its key/value heads, and
            query heads of one key/value head times its rows.
        mean: ``(..., q)``.
        second: ``(..., q, p)``.
        third: ``(..., p, p)``, or None.
    """

    block: Block
    mean: Tensor
    second: Tensor
    third: Tensor | None


class AttentionMoments(Attention):
    """The attention core with the moments of values and keys under the softmax of each row."""

    def comoments(
        self, keys: Tensor, values: Tensor, cotangent: Tensor | None
    ) -> Iterator[Comoments]:
        """Means and central co-moments under the softmax of each row and head, block by block.

        With the softmax ``s`` of a row, ``t_i = s_i <V_i - F, u>`` for its cotangent ``u``, and
        rows ``a_i`` of ``keys`` and ``c_i`` of ``values``::

            mean = sum_i s_i c_i
            second = sum_i s_i (c_i - mean) (a_i - sum_l s_l a_l)^T
            third = sum_i t_i (a_i - sum_l s_l a_l) (a_i - sum_l s_l a_l)^T

        Args:
            keys: ``(b, m, p)``: the core's own keys, or what they are linear in.
            values: ``(b, m, q)``, likewise.
            cotangent: ``(b, n, g * r * v)``, or None where the third ones are not wanted.

        Yields:
            The moments of some rows.
        """
        p, q = keys.shape[2], values.shape[2]
        self._spend(p + q if cotangent is None else 2 * p + q + self.values.shape[-1])
        more = p * q if cotangent is None else p * q + p * p
        self.operations.comoments += 2 * self._entries * more
        held, a, c = None, keys, values
        for block, s in self._pieces(p * max(p, q)):
            # Moments about the mean over all keys: less is lost when the row's own mean goes.
            if held != (block.b0, block.b1, block.g0, block.g1):  # else those before serve again
                held = (block.b0, block.b1, block.g0, block.g1)
                every = replace(block, m0=0, m1=keys.shape[1])
                a, c = self._for_heads(keys, every), self._for_heads(values, every)
                a, shift = a - a.mean(1, keepdim=True), c.mean(1, keepdim=True)
                c = c - shift
                products = (c[..., None] * a[..., None, :]).flatten(2)
            seen = a[:, block.m0 : block.m1]
            key_mean, value_mean = torch.bmm(s, seen), torch.bmm(s, c[:, block.m0 : block.m1])
            second = torch.bmm(s, products[:, block.m0 : block.m1]).unflatten(2, (q, p))
            second.sub_(value_mean[..., None] * key_mean[..., None, :])
            third = None
            if cotangent is not None:
                t = self._centred(self._read(cotangent, block), block).mul_(s)  # rows sum to 0
                squares = (seen[..., None] * seen[..., None, :]).flatten(2)
                third = torch.bmm(t, squares).unflatten(2, (p, p))
                cross = torch.bmm(t, seen)[..., None] * key_mean[..., None, :]
                third.sub_(cross).sub_(cross.mT)
            yield Comoments(block, value_mean.add_(shift), second, third)

    def _pieces(self, size: int) -> Iterator[tuple[Block, Tensor]]:
        """Blocks and softmax matrices, cut for ``size`` more numbers in each row."""
        room = max(1, attention.BLOCK_BYTES // self.values.element_size()) * PIECE
        for i, block in enumerate(self.blocks):
            heads = block.g1 - block.g0
            s = self._matrix(i).unflatten(0, (-1, heads))
            step = max(1, room // (heads * s.shape[2] * size))
            for b0 in range(block.b0, block.b1, step):
                b1 = min(block.b1, b0 + step)
                piece = s[b0 - block.b0 : b1 - block.b0].flatten(0, 1)
                yield replace(block, b0=b0, b1=b1), piece

    def _for_heads(self, rows: Tensor, block: Block) -> Tensor:
        """The block's keys of ``(b, m, k)``, the same for each of its key/value heads."""
        part = rows[block.b0 : block.b1, None, block.m0 : block.m1]
        return part.expand(-1, block.g1 - block.g0, -1, -1).flatten(0, 1)

    def peaks(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Largest softmax weight of each row, and the softmax mean of a number a key.

        For one head only.

        Args:
            sizes: ``(b, m)``.

        Returns:
            Two tensors ``(b, n)``.
        """
        self._spend(1)
        b, n, _ = self.features.shape
        both = self.features.new_empty((b, n, 2))
        columns = sizes[:, None, :, None]  # as heads of width 1
        for i, block in enumerate(self.blocks):
            s = self._matrix(i)
            mean = torch.bmm(s, self._key_side(columns, block))
            self._write(both, block, torch.cat([s.amax(-1, keepdim=True), mean], -1))
        return both[..., 0], both[..., 1]

    def select(self, sequence: int, rows: Tensor) -> AttentionMoments:
        """The attention of some query rows of one sequence, as one of its own.

        For one head only.

        Args:
            sequence: Position in the batch.
            rows: Increasing positions of query rows.

        Returns:
            One sequence of ``len(rows)`` queries; its softmax matrix is not kept.
        """
        m1 = int(rows[-1]) + 1 if self.causal else self._keys.shape[2]
        queries = self._queries[sequence, :, 0].index_select(1, rows)
        bias = None
        if self.bias is not None:
            bias = self.bias[sequence : sequence + 1] if self.bias.shape[0] > 1 else self.bias
            bias = (bias if bias.shape[1] == 1 else bias.index_select(1, rows))[..., :m1]
        if self.causal:
            hidden = torch.zeros((1, len(rows), m1), dtype=queries.dtype, device=queries.device)
            unseen = hidden_keys(rows, torch.arange(m1, device=rows.device), self.window)
            hidden.masked_fill_(unseen, float("-inf"))
            bias = hidden if bias is None else bias + hidden
        out = queries.new_empty((1, len(rows), self.values.shape[-1]))
        keys, values = self._keys[sequence, :, :m1], self.values[sequence, :, :m1]
        return AttentionMoments(
            queries,
            keys,
            values,
            groups=1,
            repeats=1,
            bias=bias,
            causal=False,
            out=out,
            keep=False,
            operations=self.operations,
        )
