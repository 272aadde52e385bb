"""Masks as users give them: boolean, additive, causal (with or without a window), or both."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from attnreg.arrays import Arrays, as_sequences, as_tensor, check_like, dtype_name

Mask = (
    Arrays
    | Literal["causal"]
    | tuple[Literal["causal"], Arrays | int]
    | tuple[Literal["causal"], int, Arrays]
)
"""What may be given for a mask."""


def as_masks(
    mask: Mask | None, lengths: Sequence[tuple[int, int]], like: Tensor
) -> tuple[bool, int | None, list[Tensor] | None]:
    """Check a mask and make it additive.

    ``"causal"`` and its window stay numbers: they are never written out as a matrix.

    Args:
        mask: ``"causal"``, boolean (True: may attend) or additive (-inf: forbidden) arrays, a
            matrix for all sequences or one for each, ``("causal", w)`` with an int for a window of
            the last ``w`` keys, ``("causal", arrays)``, or ``("causal", w, arrays)``.
        lengths: Numbers of queries and keys (n, m) of each sequence.
        like: The first input, whose dtype and device an additive mask must share.

    Returns:
        Whether it is causal, its window or None, and the additive masks (n, m) besides: None where
        they would add nothing, one for all sequences, or one for each.

    Raises:
        ValueError: If it is none of these, a shape or dtype is wrong, it holds nan or +inf, or a
            row has no visible key.
    """
    causal, window, arrays = _parts(mask)
    if causal:
        for i, (n, m) in enumerate(lengths):
            if n != m:
                raise ValueError(
                    f"mask is 'causal', and sequence {i} has {n} queries and {m} keys; expected "
                    "equal numbers"
                )
    if arrays is None:
        return causal, window, None
    structure, masks = as_sequences("mask", arrays, 2, partial(_additive, like=like))
    shared = structure == "single"
    if not shared and len(masks) != len(lengths):
        raise ValueError(
            f"mask is given for {len(masks)} sequence(s); expected {len(lengths)}, or one matrix "
            "for all"
        )
    for i, size in enumerate(lengths):
        given = tuple(masks[0 if shared else i].shape)
        if given != size:
            raise ValueError(
                f"mask has shape {given} for sequence {i}; expected (queries, keys) = {size}"
            )
    for i, tensor in enumerate(masks):
        _check_rows(i, tensor, causal, window)
    return causal, window, masks if any(bool(tensor.any()) for tensor in masks) else None


def and_causal(mask: Any, window: int | None = None) -> Any:
    """A mask as users give it, made causal too, in a window where it has none of its own."""
    _, own, arrays = _parts(mask)
    return causal_argument(own if own is not None else window, arrays)


def causal_argument(window: int | None, arrays: Any) -> Any:
    """A causal mask as users give it."""
    parts = [part for part in (window, arrays) if part is not None]
    return ("causal", *parts) if parts else "causal"


def hidden_keys(rows: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys a causal mask hides.

    Args:
        rows: Positions of the queries, ``(n,)``.
        keys: Positions of the keys, ``(m,)``.
        window: How many keys a query sees, its own included; None for all up to its own.

    Returns:
        Boolean ``(n, m)``, True where a key is hidden.
    """
    hidden = keys > rows[:, None]
    return hidden if window is None else hidden | (keys <= rows[:, None] - window)


def _parts(mask: Mask | None) -> tuple[bool, int | None, Arrays | None]:
    """Take ``"causal"`` and a window apart from the arrays."""
    parts: Sequence[object] = ()
    if isinstance(mask, str):
        parts = (mask,)
    elif isinstance(mask, list | tuple) and any(isinstance(part, str) for part in mask):
        parts = mask
    if not parts:
        return False, None, mask  # type: ignore[return-value]
    words = [part for part in parts if isinstance(part, str)]
    windows = [int(part) for part in parts if _is_window(part)]
    arrays = [part for part in parts if not (isinstance(part, str) or _is_window(part))]
    if words != ["causal"] or len(windows) > 1 or len(arrays) > 1:
        given = [part if isinstance(part, str | int) else type(part).__name__ for part in parts]
        raise ValueError(
            f"mask is {mask if isinstance(mask, str) else given!r}; expected 'causal', an array, "
            "a list with one array for each sequence, ('causal', array or list), or ('causal', w) "
            "with an int w for a window of w keys, before an array or list where there is one"
        )
    if windows and windows[0] < 1:
        raise ValueError(
            f"mask is causal with a window of {windows[0]} key(s); expected at least 1: a query "
            "sees its own key and the w - 1 before it"
        )
    return True, windows[0] if windows else None, arrays[0] if arrays else None  # type: ignore


def _is_window(part: Any) -> TypeGuard[int]:
    return isinstance(part, numbers.Integral) and not isinstance(part, bool)


def _additive(name: str, value: object, like: Tensor) -> Tensor:
    """One mask as 0 and -inf, or as it is if it is additive already."""
    mask = as_tensor(name, value, like.device)
    if mask.dtype == torch.bool:
        return like.new_zeros(mask.shape).masked_fill_(~mask, -math.inf)
    if not mask.dtype.is_floating_point:
        raise ValueError(
            f"{name} has dtype {dtype_name(mask.dtype)}; expected bool, "
            f"{dtype_name(like.dtype)}, or 'causal': True where a row may attend, or -inf where "
            "it may not"
        )
    check_like(name, mask, like)
    if not bool((mask < math.inf).all()):
        raise ValueError(
            f"{name} holds nan or +inf; expected finite numbers, and -inf where a key is forbidden"
        )
    return mask


def _check_rows(sequence: int, mask: Tensor, causal: bool, window: int | None) -> None:
    """Refuse a row without a visible key."""
    visible = mask > -math.inf
    if window is not None:
        visible = visible.tril().triu(1 - window)
    sees = visible.any(1)
    if causal:
        first = visible.byte().argmax(1)  # argmax gives the first of equal maxima
        sees &= first <= torch.arange(len(mask), device=mask.device)
    if not bool(sees.all()):
        row = int((~sees).nonzero()[0])
        besides = " besides 'causal'" if causal else ""
        besides += "" if window is None else f" and its window of {window} key(s)"
        raise ValueError(
            f"mask{besides} forbids every key to row {row} of sequence {sequence}; expected at "
            "least one visible key: allow one or leave the row out"
        )
