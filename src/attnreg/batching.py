"""Sequences of different lengths as a few padded batches.

Sequences are sorted by length and grouped greedily, so that in each batch the padded area is at
most 1.25 times the true one, both in rows and in attention entries. Padding rows are zeros at the
end and have weight 0; padding keys are invisible to real rows; no row is without a visible key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnreg.masks import hidden_keys

MAX_PADDING = 1.25
"""Bound of padded over true area of a batch, in rows and in attention entries."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """Checked sequences without padding; an input that equals another is the same list.

    Attributes:
        A1: Query inputs, each (n, d_query).
        A2: Key inputs, each (m, d_key).
        A3: Value inputs, each (m, d_value).
        B: Targets, each (n, d_out).
        weights: Weights of the rows of B, each (n,).
        masks: None, one additive mask (n, m) for all sequences, or one for each.
        causal: Whether query i sees keys 0 to i only.
        window: Of these the last so many only; None for all.
    """

    A1: list[Tensor]
    A2: list[Tensor]
    A3: list[Tensor]
    B: list[Tensor]
    weights: list[Tensor]
    masks: list[Tensor] | None
    causal: bool
    window: int | None = None

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """Numbers of queries and keys of each sequence."""
        return tuple((len(a1), len(a2)) for a1, a2 in zip(self.A1, self.A2, strict=True))

    @property
    def weighted(self) -> bool:
        """Whether a weight is not 1."""
        return bool(torch.stack([(weights != 1).any() for weights in self.weights]).any())

    def take(self, indices: Sequence[int]) -> Sequences:
        """Some of the sequences.

        Args:
            indices: Their positions, in the order wanted.

        Returns:
            The sequences, as views.
        """

        def pick(tensors: list[Tensor]) -> list[Tensor]:
            return [tensors[i] for i in indices]

        masks = self.masks
        if masks is not None and len(masks) > 1:
            masks = pick(masks)
        a1 = pick(self.A1)
        a2 = a1 if self.A2 is self.A1 else pick(self.A2)
        a3 = a1 if self.A3 is self.A1 else a2 if self.A3 is self.A2 else pick(self.A3)
        return Sequences(
            a1, a2, a3, pick(self.B), pick(self.weights), masks, self.causal, self.window
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences padded to one length; inputs that are equal are the same tensor.

    Attributes:
        A1: Query inputs (b, n, d_query).
        A2: Key inputs (b, m, d_key).
        A3: Value inputs (b, m, d_value).
        B: Targets (b, n, d_out).
        weights: Weights of the rows of B (b, n); 0 on padding.
        bias: Additive mask (b or 1, n or 1, m), -inf where a key is invisible; None adds nothing.
        causal: Whether, besides, query i sees keys 0 to i only.
        index: Positions of the sequences in the problem.
        lengths: Numbers of queries and keys of each sequence without padding.
        window: How many keys a query sees where the mask is causal; None for all up to its own.
        rows: Positions of the queries in their sequences (n,); None: 0 to n - 1.
    """

    A1: Tensor
    A2: Tensor
    A3: Tensor
    B: Tensor
    weights: Tensor
    bias: Tensor | None
    causal: bool
    index: tuple[int, ...]
    lengths: tuple[tuple[int, int], ...]
    window: int | None = None
    rows: Tensor | None = None

    def part(self, first: int, last: int) -> Batch:
        """The sequences ``first:last`` of the batch, as views."""
        own = slice(first, last)
        a1 = self.A1[own]
        a2 = a1 if self.A2 is self.A1 else self.A2[own]
        a3 = a1 if self.A3 is self.A1 else a2 if self.A3 is self.A2 else self.A3[own]
        bias = self.bias if self.bias is None or self.bias.shape[0] == 1 else self.bias[own]
        return replace(
            self,
            A1=a1,
            A2=a2,
            A3=a3,
            B=self.B[own],
            weights=self.weights[own],
            bias=bias,
            index=self.index[own],
            lengths=self.lengths[own],
        )

    def every(self, step: int, first: int) -> Batch:
        """Every ``step``-th query of a batch that has all of them, with all keys.

        Weights are ``step`` times as large: over a random ``first`` the mean is the whole batch.

        Args:
            step: 1 gives the batch itself.
            first: The first query, below ``step``.

        Returns:
            The queries as views; a causal mask is written out.
        """
        if step == 1:
            return self
        own = slice(first, None, step)
        bias = self.bias if self.bias is None or self.bias.shape[1] == 1 else self.bias[:, own]
        rows = torch.arange(self.A1.shape[1], device=self.A1.device)[own]
        if self.causal:
            keys = torch.arange(self.A2.shape[1], device=self.A1.device)
            hidden = hidden_keys(rows, keys, self.window)
            unseen = self.A1.new_zeros(1, *hidden.shape).masked_fill_(hidden, -math.inf)
            bias = unseen if bias is None else bias + unseen
        return replace(
            self,
            A1=self.A1[:, own],
            B=self.B[:, own],
            weights=self.weights[:, own] * step,
            bias=bias,
            causal=False,
            window=None,
            lengths=tuple((len(range(first, n, step)), m) for n, m in self.lengths),
            rows=rows,
        )


def make_batches(sequences: Sequences) -> tuple[tuple[Batch, ...], Sequences]:
    """Copy sequences into padded batches.

    Args:
        sequences: Checked sequences.

    Returns:
        The batches (one, in order, where all lengths are equal), and the sequences again as views
        of the batches, so that the data are held once.
    """
    lengths = sequences.lengths
    groups = group_by_length(lengths)
    batches = tuple(_make_batch(sequences, group, [lengths[i] for i in group]) for group in groups)
    return batches, _views(sequences, batches)


def group_by_length(lengths: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Group sequences so that little is padded.

    Args:
        lengths: Numbers of queries and keys of each sequence.

    Returns:
        Positions of the sequences, group by group, shortest first.
    """
    groups: list[list[int]] = []
    rows = entries = widest = 0  # of the last group
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        n, m = lengths[i]
        rows, entries, widest = rows + n, entries + n * m, max(widest, m)
        size = len(groups[-1]) + 1 if groups else 1
        fits = size * n <= MAX_PADDING * rows and size * n * widest <= MAX_PADDING * entries
        if groups and fits:
            groups[-1].append(i)
        else:
            groups.append([i])
            rows, entries, widest = n, n * m, m
    return groups


def _make_batch(s: Sequences, group: list[int], lengths: list[tuple[int, int]]) -> Batch:
    n, m = (max(sizes) for sizes in zip(*lengths, strict=True))

    def pad(tensors: list[Tensor], length: int) -> Tensor:
        return _pad([tensors[i] for i in group], length)

    a1 = pad(s.A1, n)
    a2 = a1 if s.A2 is s.A1 else pad(s.A2, m)
    a3 = a1 if s.A3 is s.A1 else a2 if s.A3 is s.A2 else pad(s.A3, m)
    if s.masks is not None:
        masks = s.masks if len(s.masks) == 1 else [s.masks[i] for i in group]
        bias: Tensor | None = _mask_bias(masks, n, m)
    elif s.causal:
        bias = None  # padding comes last, so that no real row sees any of it
    else:
        bias = _padding_bias(lengths, m, a1)
    b, weights = pad(s.B, n), pad(s.weights, n)
    shape = tuple(group), tuple(lengths)
    return Batch(a1, a2, a3, b, weights, bias, s.causal, *shape, s.window)


def _pad(tensors: list[Tensor], length: int) -> Tensor:
    """Copies of tensors (n_i, ...) as (b, length, ...), zeros at the end of each."""
    if all(len(tensor) == length for tensor in tensors):
        return torch.stack(tensors)
    out = tensors[0].new_zeros(len(tensors), length, *tensors[0].shape[1:])
    for row, tensor in zip(out, tensors, strict=True):
        row[: len(tensor)] = tensor
    return out


def _mask_bias(masks: list[Tensor], n: int, m: int) -> Tensor:
    """Masks (n_i, m_i) as (b, n, m); padding keys are invisible, save to padding rows."""
    bias = masks[0].new_zeros(len(masks), n, m)
    for row, mask in zip(bias, masks, strict=True):
        queries, keys = mask.shape
        row[:queries, :keys] = mask
        row[:queries, keys:] = -math.inf
    return bias


def _padding_bias(lengths: list[tuple[int, int]], m: int, like: Tensor) -> Tensor | None:
    """Additive mask (b, 1, m) that hides padding keys, or None where there is none."""
    if all(keys == m for _, keys in lengths):
        return None
    bias = like.new_zeros(len(lengths), 1, m)
    for row, (_, keys) in zip(bias, lengths, strict=True):
        row[:, keys:] = -math.inf
    return bias


def _views(s: Sequences, batches: tuple[Batch, ...]) -> Sequences:
    """The sequences ``s`` as views of the batches they were copied into."""
    places = {i: (batch, row) for batch in batches for row, i in enumerate(batch.index)}

    def view(name: str, axis: int) -> list[Tensor]:
        found = (places[i] for i in range(len(places)))
        return [getattr(batch, name)[row, : batch.lengths[row][axis]] for batch, row in found]

    a1 = view("A1", 0)
    a2 = a1 if s.A2 is s.A1 else view("A2", 1)
    a3 = a1 if s.A3 is s.A1 else a2 if s.A3 is s.A2 else view("A3", 1)
    masks, bias = s.masks, batches[0].bias
    if masks is not None and bias is not None:
        cut = zip(view("bias", 0), s.lengths, strict=True) if len(masks) > 1 else ()
        masks = [row[:, :m] for row, (_, m) in cut] or [bias[0]]
    return Sequences(a1, a2, a3, view("B", 0), view("weights", 0), masks, s.causal, s.window)
