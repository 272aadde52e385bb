r"""Rotary position embedding of queries and keys, and its transpose.

At position ``p`` a head's coordinates ``x`` become ``R_p x = c_p o x + s_p o J x``: ``c_p`` and
``s_p`` hold the cosine and the sine of ``p f`` at both coordinates of the pair of frequency ``f``
(1 and 0 where nothing turns), ``J`` maps a pair ``(a, b)`` to ``(-b, a)``, and ``o`` is the
entrywise product (Su et al. 2021). It is linear, so changes are turned alike and gradients by the
transpose, ``c_p o x - s_p o J x``.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding of queries and keys, as data.

    Position ``p`` turns the pair of coordinates of frequency ``f`` by the angle ``p f``. Every
    variant of the field (linear, dynamic at its trained length, YaRN, Llama 3) is a set of
    frequencies and a factor.

    Attributes:
        frequencies: Radians per position, one for each pair of coordinates that turns; fewer than
            ``head_dim / 2`` of them where only the first coordinates turn.
        interleaved: Whether pair ``i`` is coordinates ``2 i, 2 i + 1`` (GPT-J); else ``i`` and
            ``i + len(frequencies)`` (Llama).
        factor: What cosines and sines are multiplied by; 1 but for YaRN.
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False
    factor: float = 1.0

    def __post_init__(self) -> None:
        """Checks the numbers; a list of frequencies becomes a tuple.

        Raises:
            ValueError: If there is no frequency, or a number is not finite.
        """
        frequencies = tuple(float(f) for f in self.frequencies)
        if not frequencies or not all(map(math.isfinite, frequencies)):
            raise ValueError(
                f"frequencies={self.frequencies!r} was given, finite numbers are expected, one for "
                "each pair of coordinates that turns: pass rotary=None where nothing turns"
            )
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ValueError(f"factor={self.factor!r} was given, a positive number is expected")
        object.__setattr__(self, "frequencies", frequencies)

    @property
    def width(self) -> int:
        """Number of coordinates that turn."""
        return 2 * len(self.frequencies)


class Rotation:
    """The rotation of heads of one width at positions ``0 ... length - 1``.

    Args:
        rotary: What turns.
        length: Number of positions.
        dtype: Of the rows that are turned; angles are float64.
        device: Where they are.
    """

    def __init__(
        self, rotary: Rotary, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._width, self._interleaved = rotary.width, rotary.interleaved
        position = torch.arange(length, dtype=torch.float64)
        angle = position[:, None] * torch.tensor(rotary.frequencies, dtype=torch.float64)
        cosine, sine = (rotary.factor * table[:, None] for table in (angle.cos(), angle.sin()))
        self._cosine = cosine.to(device, dtype)  # (length, 1, pairs)
        self._sine = sine.to(device, dtype)

    def at(self, positions: Tensor) -> Rotation:
        """The rotation at some of the positions, ``(n,)``."""
        some = copy.copy(self)
        some._cosine, some._sine = self._cosine[positions], self._sine[positions]
        return some

    def apply(self, rows: Tensor, width: int) -> Tensor:
        """``R_p x`` for every head.

        Args:
            rows: ``(b, length, heads * width)``.
            width: Of a head.

        Returns:
            A new tensor of the same shape.
        """
        return self._turned(rows, width, 1.0)

    def transpose(self, rows: Tensor, width: int) -> Tensor:
        """``R_p^T x``, as :meth:`apply`."""
        return self._turned(rows, width, -1.0)

    def _turned(self, rows: Tensor, width: int, sign: float) -> Tensor:
        out = torch.empty_like(rows)
        heads, turned = rows.unflatten(2, (-1, width)), out.unflatten(2, (-1, width))
        (a, b), (new_a, new_b) = self._pairs(heads), self._pairs(turned)
        torch.mul(a, self._cosine, out=new_a).addcmul_(b, self._sine, value=-sign)
        torch.mul(b, self._cosine, out=new_b).addcmul_(a, self._sine, value=sign)
        if self._width < width:
            turned[..., self._width :] = heads[..., self._width :]
        return out

    def _pairs(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """First and second coordinates of the pairs, as views."""
        if self._interleaved:
            return heads[..., 0 : self._width : 2], heads[..., 1 : self._width : 2]
        half = self._width // 2
        return heads[..., :half], heads[..., half : self._width]


@functools.lru_cache(maxsize=64)
def rotation(rotary: Rotary, length: int, dtype: torch.dtype, device: torch.device) -> Rotation:
    """The rotation of a batch; those of the last lengths are kept."""
    return Rotation(rotary, length, dtype, device)


class MeanRotation:
    """Second moments of heads under rotation, averaged over the positions of given sequences.

    Args:
        rotary: What turns.
        lengths: Lengths of the sequences.
        width: Of a head.
    """

    def __init__(self, rotary: Rotary, lengths: Sequence[int], width: int) -> None:
        count = torch.zeros(max(lengths), dtype=torch.float64)
        for length in lengths:
            count[:length] += 1.0
        share = count / count.sum()
        pairs, turning = len(rotary.frequencies), rotary.width
        angle = torch.arange(len(count), dtype=torch.float64)[:, None] * torch.tensor(
            rotary.frequencies, dtype=torch.float64
        )
        if rotary.interleaved:
            first = torch.arange(0, turning, 2)
            second = first + 1
        else:
            first = torch.arange(pairs)
            second = first + pairs
        cosine = torch.ones(len(count), width, dtype=torch.float64)
        sine = torch.zeros_like(cosine)
        for place in (first, second):
            cosine[:, place] = rotary.factor * angle.cos()
            sine[:, place] = rotary.factor * angle.sin()
        turn = torch.zeros(width, width, dtype=torch.float64)  # J
        turn[first, second], turn[second, first] = -1.0, 1.0
        self._turn = turn
        both = (cosine, sine)
        self._tables = tuple(a.mT @ (share[:, None] * b) for a in both for b in both)
        self._mean = torch.diag(share @ cosine) + (share @ sine)[:, None] * turn

    def forward(self, moments: Tensor) -> Tensor:
        """Mean of ``R_p M R_p^T`` over the positions: ``(..., width, width)``, float64."""
        return self._averaged(moments, 1.0)

    def backward(self, moments: Tensor) -> Tensor:
        """Mean of ``R_p^T M R_p``."""
        return self._averaged(moments, -1.0)

    def of_mean(self, moments: Tensor) -> Tensor:
        """``R M R^T`` with the mean ``R`` of the rotations."""
        mean = self._mean.to(moments.device)
        return mean @ moments @ mean.mT

    def _averaged(self, m: Tensor, sign: float) -> Tensor:
        turn = self._turn.to(m.device)
        cc, cs, sc, ss = (table.to(m.device) for table in self._tables)
        mixed = cs * (m @ turn.mT) + sc * (turn @ m)
        return cc * m + sign * mixed + ss * (turn @ m @ turn.mT)
