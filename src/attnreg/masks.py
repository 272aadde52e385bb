"""Masks as users give them: boolean, additive, ``"causal"``, or causal and another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from attnreg.arrays import Arrays, as_sequences, as_tensor, check_like, dtype_name

Mask = Arrays | Literal["causal"] | tuple[Literal["causal"], Arrays]
"""What may be given for a mask."""


def as_masks(
    mask: Mask | None, lengths: Sequence[tuple[int, int]], like: Tensor
) -> tuple[bool, list[Tensor] | None]:
    """Check a mask and make it additive.

    ``"causal"`` stays a flag: it is never written out as a matrix.

    Args:
        mask: ``"causal"``, boolean (True: may attend) or additive (-inf: forbidden) arrays, a
            matrix for all sequences or one for each, or ``("causal", arrays)``.
        lengths: Numbers of queries and keys (n, m) of each sequence.
        like: The first input, whose dtype and device an additive mask must share.

    Returns:
        Whether it is causal, and the additive masks (n, m) besides: None where they would add
        nothing, one for all sequences, or one for each.

    Raises:
        ValueError: If it is none of these, a shape or dtype is wrong, it holds nan or +inf, or a
            row has no visible key.
    """
    causal, arrays = _parts(mask)
    if causal:
        for i, (n, m) in enumerate(lengths):
            if n != m:
                raise ValueError(
                    f"mask is 'causal', and sequence {i} has {n} queries and {m} keys; expected "
                    "equal numbers"
                )
    if arrays is None:
        return causal, None
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
        _check_rows(i, tensor, causal)
    return causal, masks if any(bool(tensor.any()) for tensor in masks) else None


def and_causal(mask: Any) -> Any:
    """A mask as users give it, made causal too."""
    if mask is None:
        return "causal"
    return mask if _parts(mask)[0] else ("causal", mask)


def _parts(mask: Mask | None) -> tuple[bool, Arrays | None]:
    """Take ``"causal"`` apart from the arrays."""
    parts: Sequence[object] = ()
    if isinstance(mask, str):
        parts = (mask,)
    elif isinstance(mask, list | tuple) and any(isinstance(part, str) for part in mask):
        parts = mask
    if not parts:
        return False, mask  # type: ignore[return-value]
    words = [part for part in parts if isinstance(part, str)]
    arrays = [part for part in parts if not isinstance(part, str)]
    if words != ["causal"] or len(arrays) > 1:
        given = [part if isinstance(part, str) else type(part).__name__ for part in parts]
        raise ValueError(
            f"mask is {mask if isinstance(mask, str) else given!r}; expected 'causal', an array, "
            "a list with one array for each sequence, or ('causal', array or list)"
        )
    return True, arrays[0] if arrays else None  # type: ignore[return-value]


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


def _check_rows(sequence: int, mask: Tensor, causal: bool) -> None:
    """Refuse a row without a visible key."""
    visible = mask > -math.inf
    sees = visible.any(1)
    if causal:
        first = visible.byte().argmax(1)  # argmax gives the first of equal maxima
        sees &= first <= torch.arange(len(mask), device=mask.device)
    if not bool(sees.all()):
        row = int((~sees).nonzero()[0])
        besides = " besides 'causal'" if causal else ""
        raise ValueError(
            f"mask{besides} forbids every key to row {row} of sequence {sequence}; expected at "
            "least one visible key: allow one or leave the row out"
        )
