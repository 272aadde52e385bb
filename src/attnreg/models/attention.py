r"""Softmax attention of one batch and its first and second derivatives, in blocks.

Every model of this package is a linear map from its parameters to queries, keys and values,
followed by the same core. For one head of one sequence, with queries ``Q`` (already multiplied
by the logit scale), keys ``K`` and values ``V``::

    Z = Q K^T + mask        S = softmax_rows(Z)        F = S V

In the direction ``(dQ, dK, dV)``, writing ``o`` for the entrywise product::

    dZ = [dQ Q] [K dK]^T                                  one product for both terms
    dF = (S o dZ) V - rowsum(S o dZ) o F + S dV

For a cotangent ``U`` of ``F``::

    E  = S o (U V^T - rowsum(U o F))
    gQ = E K        gK = E^T Q        gV = S^T U

and the derivative of these three along ``(dQ, dK, dV)`` while ``U`` itself moves by ``dU``::

    T  = U V^T - rowsum(U o F)            dS = S o (dZ - rowsum(S o dZ))
    M  = (dZ - rowsum(S o dZ)) o T + dU V^T + U dV^T
    dE = S o (M - rowsum(S o M))
    hQ = dE K + E dK      hK = dE^T Q + E^T dQ      hV = dS^T U + S^T dU

Query heads that share a key/value head are stacked as extra query rows, so grouped key/value
heads need no copies. Work goes in blocks whose softmax matrix stays in cache (heuristic size,
measured); the matrices are kept between products where that is asked for and recomputed from the
saved log-normalisers otherwise, so memory does not grow with n^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.masks import hidden_keys
from attnreg.operations import Operations

BLOCK_BYTES = 2 << 20
"""Size of one block of the softmax matrix: measured best between 1 and 4 MiB on CPUs."""

CAUSAL_ROWS = 64
"""Rows of a block where it is causal: keys after its last row are left out. Measured: a gradient in
0.6 to 0.85 times the time of whole matrices, for 256 to 512 rows and heads 8 to 64 wide."""


@dataclass(frozen=True)
class Block:
    """Sequences ``b0:b1``, key/value heads ``g0:g1``, query rows ``n0:n1``, keys ``m0:m1``."""

    b0: int
    b1: int
    g0: int
    g1: int
    n0: int
    n1: int
    m1: int
    m0: int = 0

    @property
    def span(self) -> int:
        """Number of keys."""
        return self.m1 - self.m0


def plan_blocks(
    shape: tuple[int, int, int, int, int],
    itemsize: int,
    causal: bool,
    window: int | None = None,
) -> Iterator[Block]:
    """Cuts the softmax matrices of a batch into blocks of about ``BLOCK_BYTES``.

    Args:
        shape: Sequences, key/value heads, query heads per key/value head, queries, keys.
        itemsize: Bytes of one number.
        causal: Whether keys after the last query row of a block may be left out.
        window: Number of keys a row sees where it is causal, its own the last: those before the
            window of the first row may be left out too. None for all.

    Yields:
        The blocks, in the order in which they are worked on.
    """
    b, g, r, n, m = shape
    room = max(1, BLOCK_BYTES // itemsize)
    # A block of as many rows as the window is wide meets twice as many keys. Where it is causal it
    # has fewer rows.
    most = n if window is None or n <= 2 * window else max(16, window)
    if causal:
        most = min(most, CAUSAL_ROWS)
    span = m if most == n or window is None else min(m, most + window - 1)
    per_head = r * most * span
    sequences = max(1, min(b, room // (per_head * g)))
    heads = g if sequences > 1 else max(1, min(g, room // per_head))
    rows = most if heads > 1 or per_head <= room else max(16, room // (r * span))
    for b0 in range(0, b, sequences):
        for g0 in range(0, g, heads):
            for n0 in range(0, n, rows):
                n1 = min(n, n0 + rows)
                m1 = n1 if causal else m
                m0 = 0 if window is None else max(0, n0 - window + 1)
                yield Block(b0, min(b, b0 + sequences), g0, min(g, g0 + heads), n0, n1, m1, m0)


_Sides = tuple[Tensor, Tensor]
"""Two matrices whose product is the change of the logits."""


class Attention:
    """The attention core of one batch at fixed queries, keys and values.

    Args:
        queries: ``(b, n, g * r * e)``, multiplied by the logit scale; head ``i`` uses key/value
            head ``i // r``.
        keys: ``(b, m, g * e)``.
        values: ``(b, m, g * v)``.
        groups: Number ``g`` of key/value heads.
        repeats: Number ``r`` of query heads per key/value head.
        bias: Additive mask ``(b or 1, n or 1, m)``, or None.
        causal: Whether query ``j`` sees keys ``0 ... j`` only.
        window: Of these the last so many only; None for all.
        out: Where the features ``(b, n, g * r * v)`` are written.
        keep: Whether the softmax matrices are kept for the products that follow.
        operations: Where operations are counted; None counts for this attention alone.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        groups: int,
        repeats: int,
        bias: Tensor | None,
        causal: bool,
        out: Tensor,
        keep: bool,
        operations: Operations | None = None,
        window: int | None = None,
    ) -> None:
        b, n, _ = queries.shape
        m = keys.shape[1]
        self.groups, self.repeats = groups, repeats
        self.width = keys.shape[2] // groups
        self.bias, self.causal, self.window = bias, causal, window
        self.features = out
        self.values = _by_head(values, groups)
        self._queries = _by_head(queries, groups, repeats).contiguous()
        self._keys = _by_head(keys, groups)
        self._sides: _Sides | None = None
        e = self.width
        shape = (b, groups, repeats, n, m)
        self.blocks = list(plan_blocks(shape, queries.element_size(), causal, window))
        self._entries = sum(map(self._entries_of, self.blocks))
        self.operations = Operations() if operations is None else operations
        self._spend(e + self.values.shape[-1])
        self._softmax: list[Tensor] | None = [] if keep else None
        self._normalisers: list[Tensor] = []
        for block in self.blocks:
            self._forward(block)

    @property
    def kept(self) -> dict[str, list[Tensor]]:
        """What products read again: softmax matrices (or normalisers), queries, keys, values."""
        softmax = self._normalisers if self._softmax is None else self._softmax
        queries, keys = [self._queries], [self._keys]
        return {"softmax": softmax, "queries": queries, "keys": keys, "values": [self.values]}

    # ------------------------------------------------------------------ products

    def jvp(self, dq: Tensor, dk: Tensor | None, dv: Tensor | None, out: Tensor) -> None:
        """Writes the change of the features, ``(b, n, g * r * v)``, into ``out``."""
        widths = self.width, self.values.shape[-1]
        self._spend(widths[0] * (1 + (dk is not None)) + widths[1] * (1 + (dv is not None)))
        sides = self._beside(dq, dk)
        dv_heads = None if dv is None else _by_head(dv, self.groups)
        for i, block in enumerate(self.blocks):
            s = self._matrix(i)
            p, rho = self._logit_change(sides, block)
            p.mul_(s)
            torch.sum(p, dim=-1, keepdim=True, out=rho)
            change = torch.bmm(p, self._key_side(self.values, block))
            if dv_heads is not None:
                change.baddbmm_(s, self._key_side(dv_heads, block))
            change.addcmul_(rho, self._read(self.features, block), value=-1.0)
            self._write(out, block, change)

    def vjp(
        self, cotangent: Tensor, need_keys: bool, need_values: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients by queries, keys and values for a cotangent of the features.

        Args:
            cotangent: ``(b, n, g * r * v)``.
            need_keys: Whether the gradient by the keys is wanted.
            need_values: Whether the gradient by the values is wanted.

        Returns:
            ``(b, n, g * r * e)``, ``(b, m, g * e)`` or None, ``(b, m, g * v)`` or None.
        """
        e = self.width
        self._spend(
            (e + self.values.shape[-1]) + e * need_keys + self.values.shape[-1] * need_values
        )
        gq, gk, gv = self._gradient_buffers(need_keys, need_values)
        for i, block in enumerate(self.blocks):
            s = self._matrix(i)
            u = self._read(cotangent, block)
            t = self._centred(u, block).mul_(s)  # E
            self._write(gq, block, torch.bmm(t, self._key_side(self._keys, block)))
            if gk is not None:
                queries = self._query_side(self._queries, block)
                self._accumulate(gk, block, torch.bmm(t.mT, queries))
            if gv is not None:
                self._accumulate(gv, block, torch.bmm(s.mT, u))
        return gq, _rows(gk), _rows(gv)

    def vjp_derivative(
        self,
        dq: Tensor,
        dk: Tensor | None,
        dv: Tensor | None,
        cotangent: Tensor,
        cotangent_change: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Derivative of :meth:`vjp` along a direction of inputs and cotangent.

        Args:
            dq: Change of the queries, ``(b, n, g * r * e)``.
            dk: Change of the keys, ``(b, m, g * e)``, or None where they are fixed.
            dv: Change of the values, ``(b, m, g * v)``, or None where they are fixed.
            cotangent: ``(b, n, g * r * v)``.
            cotangent_change: Its change, of the same shape.

        Returns:
            Changes of the three gradients; None where the input is fixed.
        """
        e, v = self.width, self.values.shape[-1]
        self._spend(2 * (e + v) + 4 * e * (dk is not None) + 3 * v * (dv is not None))
        sides = self._beside(dq, dk)
        dv_heads = None if dv is None else _by_head(dv, self.groups)
        hq, hk, hv = self._gradient_buffers(dk is not None, dv is not None)
        for i, block in enumerate(self.blocks):
            s = self._matrix(i)
            u, du = self._read(cotangent, block), self._read(cotangent_change, block)
            values = self._key_side(self.values, block)
            dz, rho = self._logit_change(sides, block)
            torch.sum(s * dz, dim=-1, keepdim=True, out=rho)
            dz.sub_(rho)
            t = self._centred(u, block)
            m = torch.bmm(du, values.mT)
            if dv_heads is not None:
                m.baddbmm_(u, self._key_side(dv_heads, block).mT)
            m.addcmul_(dz, t)
            m.sub_((s * m).sum(-1, keepdim=True)).mul_(s)  # dE
            change = torch.bmm(m, self._key_side(self._keys, block))
            if hk is not None:
                t.mul_(s)  # E
                change.baddbmm_(t, self._key_side(sides[1], block)[..., e:])
                grad = torch.bmm(m.mT, self._query_side(self._queries, block))
                grad.baddbmm_(t.mT, self._query_side(sides[0], block)[..., :e])
                self._accumulate(hk, block, grad)
            if hv is not None:
                grad = torch.bmm(s.mT, du).baddbmm_(dz.mul_(s).mT, u)
                self._accumulate(hv, block, grad)
            self._write(hq, block, change)
        return hq, _rows(hk), _rows(hv)

    # ------------------------------------------------------------------ one block

    def _entries_of(self, block: Block) -> int:
        """Entries of the softmax matrix of a block."""
        heads = (block.b1 - block.b0) * (block.g1 - block.g0) * self.repeats
        return heads * (block.n1 - block.n0) * block.span

    def _spend(self, widths: int) -> None:
        """Counts products of all softmax matrices with ``widths`` columns or rows in all."""
        self.operations.attention += 2 * self._entries * widths

    def _forward(self, block: Block) -> None:
        z = self._logits(block)
        s = torch.softmax(z, dim=-1)  # in one pass: faster than logsumexp, subtraction and exp
        if self._softmax is None:
            # The largest weight is exp(largest logit - normaliser).
            largest = s.amax(dim=-1, keepdim=True).log_()
            self._normalisers.append(torch.sub(z.amax(dim=-1, keepdim=True), largest))
        else:
            self._softmax.append(s)
        self._write(self.features, block, torch.bmm(s, self._key_side(self.values, block)))

    def _matrix(self, index: int) -> Tensor:
        """The softmax matrix of a block, ``(heads, rows, keys)``: kept or recomputed."""
        if self._softmax is not None:
            return self._softmax[index]
        self.operations.attention += 2 * self._entries_of(self.blocks[index]) * self.width
        return self._logits(self.blocks[index]).sub_(self._normalisers[index]).exp_()

    def _logits(self, block: Block) -> Tensor:
        queries = self._query_side(self._queries, block)
        z = torch.bmm(queries, self._key_side(self._keys, block).mT)
        if self.bias is None and not self.causal:
            return z
        rows = block.n1 - block.n0
        full = z.view(block.b1 - block.b0, block.g1 - block.g0, self.repeats, rows, block.span)
        if self.bias is not None:
            bias = self.bias if self.bias.shape[0] == 1 else self.bias[block.b0 : block.b1]
            bias = bias if bias.shape[1] == 1 else bias[:, block.n0 : block.n1]
            full += bias[:, None, None, :, block.m0 : block.m1]
        if self.causal:
            query = torch.arange(block.n0, block.n1, device=z.device)
            key = torch.arange(block.m0, block.m1, device=z.device)
            full.masked_fill_(hidden_keys(query, key, self.window), float("-inf"))
        return z

    def _logit_change(self, sides: _Sides, block: Block) -> tuple[Tensor, Tensor]:
        queries, keys = self._query_side(sides[0], block), self._key_side(sides[1], block)
        dz = torch.bmm(queries, keys.mT)
        return dz, dz.new_empty((dz.shape[0], dz.shape[1], 1))

    def _centred(self, u: Tensor, block: Block) -> Tensor:
        """``U V^T - rowsum(U o F)``, ``(heads, rows, keys)``."""
        mean = (u * self._read(self.features, block)).sum(-1, keepdim=True)
        return torch.bmm(u, self._key_side(self.values, block).mT).sub_(mean)

    # ------------------------------------------------------------------ views

    def _beside(self, dq: Tensor, dk: Tensor | None) -> _Sides:
        """``[dQ Q]`` and ``[K dK]``; ``dQ`` and ``K`` where the keys are fixed."""
        change = _by_head(dq, self.groups, self.repeats)
        if dk is None:
            return change.contiguous(), self._keys
        e = self.width
        if self._sides is None:  # from now on queries and keys are halves of these
            queries, keys = (
                x.new_empty((*x.shape[:-1], 2 * e)) for x in (self._queries, self._keys)
            )
            self._queries, self._keys = (
                queries[..., e:].copy_(self._queries),
                keys[..., :e].copy_(self._keys),
            )
            self._sides = queries, keys
        queries, keys = self._sides
        queries[..., :e].copy_(change)
        keys[..., e:].copy_(_by_head(dk, self.groups))
        return queries, keys

    def _query_side(self, heads: Tensor, block: Block) -> Tensor:
        part = heads[block.b0 : block.b1, block.g0 : block.g1, :, block.n0 : block.n1]
        return part.reshape(-1, self.repeats * (block.n1 - block.n0), part.shape[-1])

    def _key_side(self, heads: Tensor, block: Block) -> Tensor:
        part = heads[block.b0 : block.b1, block.g0 : block.g1, block.m0 : block.m1]
        return part.reshape(-1, block.span, part.shape[-1])

    def _rows_view(self, rows: Tensor, block: Block) -> Tensor:
        """The block of ``(b, n, g * r * k)`` as a view ``(b, g, r, n, k)``."""
        b, n, width = rows.shape
        heads = rows.view(b, n, self.groups, self.repeats, width // (self.groups * self.repeats))
        part = heads[block.b0 : block.b1, block.n0 : block.n1, block.g0 : block.g1]
        return part.permute(0, 2, 3, 1, 4)

    def _read(self, rows: Tensor, block: Block) -> Tensor:
        part = self._rows_view(rows, block)
        return part.reshape(-1, self.repeats * (block.n1 - block.n0), part.shape[-1])

    def _write(self, rows: Tensor, block: Block, value: Tensor) -> None:
        part = self._rows_view(rows, block)
        part.copy_(value.view(part.shape))

    def _accumulate(self, heads: Tensor, block: Block, value: Tensor) -> None:
        part = heads[block.b0 : block.b1, block.g0 : block.g1, block.m0 : block.m1]
        part += value.view(part.shape)

    def _gradient_buffers(
        self, need_keys: bool, need_values: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        b, g, r, n, _ = self._queries.shape
        m = self._keys.shape[2]
        gq = self._queries.new_empty((b, n, g * r * self.width))
        gk = self._keys.new_zeros((b, g, m, self.width)) if need_keys else None
        gv = torch.zeros_like(self.values) if need_values else None
        return gq, gk, gv


def _by_head(rows: Tensor, groups: int, repeats: int | None = None) -> Tensor:
    """``(b, n, g * r * k)`` as ``(b, g, r, n, k)``; without ``repeats`` as ``(b, g, n, k)``."""
    b, n, width = rows.shape
    if repeats is None:
        return rows.view(b, n, groups, width // groups).transpose(1, 2).contiguous()
    heads = rows.view(b, n, groups, repeats, width // (groups * repeats))
    return heads.permute(0, 2, 3, 1, 4)


def _rows(heads: Tensor | None) -> Tensor | None:
    """``(b, g, m, k)`` as ``(b, m, g * k)``."""
    return None if heads is None else heads.transpose(1, 2).flatten(2)
