"""Checks of a problem's inputs against each other, once, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from attnreg.arrays import Array, Arrays, Structure, as_floats, as_sequences
from attnreg.batching import Sequences
from attnreg.masks import Mask, as_masks


def as_problem_sequences(
    A1: Arrays,
    B: Arrays,
    A2: Arrays | None,
    A3: Arrays | None,
    mask: Mask | None,
    weights: Arrays | None,
    device: torch.device | None,
) -> tuple[Structure, Sequences]:
    """Split the inputs into sequences and check them against A1.

    Args:
        A1: Query inputs.
        B: Targets.
        A2: Key inputs, or None for A1.
        A3: Value inputs, or None for A1.
        mask: The mask, or None.
        weights: Weights of the rows of B, or None for ones.
        device: Where to put everything; None leaves it where it is.

    Returns:
        How the sequences were given, and the sequences; an input that equals A1, or A3 that
        equals A2, is the same list. Memory may be shared with the inputs.

    Raises:
        ValueError: If an input is refused.
    """
    structure, a1 = as_sequences("A1", A1, 2, partial(as_floats, device=device))
    like = a1[0]
    _check_columns("A1", a1)

    def take(name: str, value: Arrays, row_dims: int = 2) -> list[Tensor]:
        convert = partial(as_floats, device=device, like=like)
        given, tensors = as_sequences(name, value, row_dims, convert)
        if given != structure or len(tensors) != len(a1):
            raise ValueError(
                f"{name} is {_describe(given, tensors)} and A1 is {_describe(structure, a1)}; "
                "expected the same for both"
            )
        if row_dims == 2:
            _check_columns(name, tensors)
        return tensors

    b = take("B", B)
    _check_rows("B", b, "A1", a1)
    a2 = a1 if A2 is None else _merge(take("A2", A2), a1)
    a3 = a1 if A3 is None else _merge(_merge(take("A3", A3), a2), a1)
    for queries, keys in zip(a1, a2, strict=True):
        if A3 is None and len(queries) != len(keys):
            raise ValueError(
                f"A3 is not given, and A1 (its default) has {len(queries)} row(s) where A2 has "
                f"{len(keys)}; give A3"
            )
    _check_rows("A3", a3, "A2", a2)
    w = [rows.new_ones(len(rows)) for rows in a1]
    if weights is not None:
        w = take("weights", weights, 1)
        _check_rows("weights", w, "A1", a1)
        _check_weights(w)
    lengths = [(len(queries), len(keys)) for queries, keys in zip(a1, a2, strict=True)]
    causal, window, masks = as_masks(mask, lengths, like)
    return structure, Sequences(a1, a2, a3, b, w, masks, causal, window)


def as_device(device: torch.device | str | None) -> torch.device | None:
    """A torch device, or None.

    Args:
        device: The device, its name, or None.

    Returns:
        The device, or None.

    Raises:
        ValueError: If torch knows no such device.
    """
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device is {device!r}; expected a torch device such as 'cpu' or 'cuda'"
        ) from None


def usable_device(device: torch.device | str) -> torch.device:
    """The device, once something was put there.

    Args:
        device: Or its name.

    Returns:
        The device.

    Raises:
        ValueError: If there is none, or torch cannot use it.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from error


def as_center(center: Mapping[str, Array] | None, like: Tensor) -> Mapping[str, Tensor]:
    """Copies of the parameters that the regulariser pulls towards; models check the shapes.

    Args:
        center: Parameters by name, or None.
        like: A tensor whose dtype they must share; they are put on its device.

    Returns:
        A mapping that cannot be changed.

    Raises:
        ValueError: If it is not such a mapping or a tensor is refused.
    """
    if center is not None and not isinstance(center, Mapping):
        raise ValueError(
            f"center is of type {type(center).__name__}; expected a mapping from parameter names "
            "to tensors"
        )
    tensors = {}
    for name, value in (center or {}).items():
        if not isinstance(name, str):
            raise ValueError(
                f"center has the name {name!r}; expected parameter names such as 'X' and 'Y'"
            )
        tensor = as_floats(f"center[{name!r}]", value, like.device, like)
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    return MappingProxyType(tensors)


def _check_columns(name: str, tensors: list[Tensor]) -> None:
    columns = sorted({tensor.shape[1] for tensor in tensors})
    if len(columns) > 1:
        raise ValueError(
            f"{name} has sequences of {' and '.join(map(str, columns))} columns; expected one "
            "number of columns"
        )


def _check_rows(name: str, tensors: list[Tensor], other: str, others: list[Tensor]) -> None:
    for i, (tensor, expected) in enumerate(zip(tensors, others, strict=True)):
        if len(tensor) != len(expected):
            raise ValueError(
                f"{name} has {len(tensor)} row(s) and {other} has {len(expected)} in sequence "
                f"{i}; expected equal numbers"
            )


def _check_weights(weights: list[Tensor]) -> None:
    lowest = min(float(w.min()) for w in weights)
    if lowest < 0:
        raise ValueError(f"weights holds {lowest:g}; expected numbers of at least 0")
    if not any(bool(w.any()) for w in weights):
        raise ValueError("weights holds only zeros; expected at least one number above 0")


def _merge(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """``others`` where the content is equal, so that it is stored and computed once."""
    pairs = zip(tensors, others, strict=True)
    return others if all(x is y or torch.equal(x, y) for x, y in pairs) else tensors


def _describe(structure: Structure, tensors: list[Tensor]) -> str:
    if structure == "single":
        return "one sequence"
    return f"a {structure} of {len(tensors)} sequence(s)"
