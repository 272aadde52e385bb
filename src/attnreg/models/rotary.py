"""Rotary position embedding of queries and keys, and its transpose."""

from __future__ import annotations

from dataclasses import dataclass


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
