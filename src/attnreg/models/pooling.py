"""Starts with fewer key/value heads, and with more."""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg.models.base import Parameters


def pool_kv_heads(weights: Parameters, heads: int, kv_heads: int) -> dict[str, Tensor]:
    """Averages key/value heads over groups: the usual start of a conversion to fewer of them.

    Args:
        weights: ``W_K``, ``W_V`` (``d x (heads * width)``), optionally ``b_K`` and ``b_V``, and
            any others, which are kept.
        heads: Number of key/value heads in ``weights``.
        kv_heads: Number wanted; divides ``heads``.

    Returns:
        A new mapping with the pooled weights.

    Raises:
        ValueError: If ``kv_heads`` does not divide ``heads``, or a width is not a multiple of
            ``heads``.
    """
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"kv_heads={kv_heads} does not divide heads={heads}: choose a divisor of {heads}"
        )
    pooled = {name: torch.as_tensor(value) for name, value in weights.items()}
    for name in ("W_K", "b_K", "W_V", "b_V"):
        if name not in pooled:
            continue
        value = pooled[name]
        if value.shape[-1] % heads:
            raise ValueError(f"{name} has {value.shape[-1]} columns, no multiple of heads={heads}")
        groups = value.unflatten(-1, (kv_heads, heads // kv_heads, -1))
        pooled[name] = groups.mean(dim=-2).flatten(-2)
    return pooled


def repeat_kv_heads(weights: Parameters, kv_heads: int, times: int) -> dict[str, Tensor]:
    """Gives every key/value head so many copies, one after the other: the same layer.

    Args:
        weights: As in :func:`pool_kv_heads`.
        kv_heads: Number of key/value heads in ``weights``.
        times: Copies of each, of which every one serves its share of the query heads.

    Returns:
        A new mapping; weights that are no key's or value's are kept.
    """
    repeated = {name: torch.as_tensor(value) for name, value in weights.items()}
    for name in ("W_K", "b_K", "W_V", "b_V"):
        if name in repeated:
            width = repeated[name].shape[-1] // kv_heads
            repeated[name] = repeat_heads(repeated[name], width, times)
    return repeated


def repeat_heads(x: Tensor, width: int, times: int) -> Tensor:
    """Every head of ``(..., heads * width)`` so many times in a row."""
    return x.unflatten(-1, (-1, width)).repeat_interleave(times, dim=-2).flatten(-2)
