"""NumPy arrays and torch tensors, one sequence or many, as lists of checked tensors.

Every refusal is a ValueError of one line: what was given, what was expected, what to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray
"""What may be given for a tensor."""

Arrays = Array | Sequence[Array]
"""What may be given for sequences: one, a batch of equal lengths, or a list."""

Structure = Literal["single", "batch", "list"]
"""How sequences were given: one matrix, one tensor with a dimension more, or a list."""


def as_tensor(name: str, value: object, device: torch.device | None = None) -> Tensor:
    """A detached dense tensor for a NumPy array or torch tensor; memory may be shared.

    Args:
        name: What to call it in an error.
        value: The array or tensor, of any dtype.
        device: Where to put it; None leaves it where it is.

    Returns:
        The tensor, of the same dtype.

    Raises:
        ValueError: If it is neither, is masked or sparse, or has no element.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{name} is a NumPy masked array; expected a plain one: fill it first")
    if isinstance(value, np.ndarray):
        native = value.dtype.newbyteorder("=")
        try:
            value = torch.from_numpy(np.require(value, native, ["C", "A", "W", "E"]))
        except TypeError:
            raise ValueError(
                f"{name} has dtype {value.dtype}; expected float32 or float64: convert it first"
            ) from None
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} is of type {type(value).__name__}; expected a NumPy array or torch tensor"
        )
    if value.layout != torch.strided or value.is_meta:
        raise ValueError(f"{name} is sparse or on the meta device; expected a dense tensor")
    if value.numel() == 0:
        raise ValueError(
            f"{name} is empty: its shape is {tuple(value.shape)}; expected at least one row and "
            "column"
        )
    return value.detach().to(device)


def as_floats(
    name: str, value: object, device: torch.device | None = None, like: Tensor | None = None
) -> Tensor:
    """A finite float32 or float64 tensor for a NumPy array or torch tensor.

    Args:
        name: What to call it in an error.
        value: The array or tensor.
        device: Where to put it; None leaves it where it is.
        like: A tensor whose dtype and device it must share; None for the first input.

    Returns:
        The tensor; memory may be shared with the input.

    Raises:
        ValueError: If :func:`as_tensor` refuses it, the dtype or device is another, or a value
            is not finite.
    """
    tensor = as_tensor(name, value, device)
    check_like(name, tensor, like)
    # The sum of finite numbers is finite unless it overflows; one that is not never makes it so.
    if not tensor.sum().isfinite() and not (finite := torch.isfinite(tensor)).all():
        bad = (~finite).nonzero()
        first = tuple(bad[0].tolist())
        raise ValueError(
            f"{name} holds {len(bad)} non-finite value(s), the first {tensor[first].item()} at "
            f"{list(first)}; expected finite numbers: remove or replace them"
        )
    return tensor


def check_like(name: str, tensor: Tensor, like: Tensor | None) -> None:
    """Refuse another dtype than float32 and float64, or than the first input's, or its device.

    Args:
        name: What to call it in an error.
        tensor: The tensor to check.
        like: The first input, called A1 in an error; None if this is the first.

    Raises:
        ValueError: If dtype or device are not as expected.
    """
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} has dtype {dtype_name(tensor.dtype)}; expected float32 or float64: convert "
            "it first"
        )
    if like is None:
        return
    if tensor.dtype != like.dtype:
        raise ValueError(
            f"{name} has dtype {dtype_name(tensor.dtype)} and A1 has {dtype_name(like.dtype)}; "
            "expected one dtype: convert one of them"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device} and A1 is on {like.device}; expected one device: move "
            "one of them or give device="
        )


def as_sequences(
    name: str, value: object, row_dims: int, convert: Callable[[str, object], Tensor]
) -> tuple[Structure, list[Tensor]]:
    """Split what was given into sequences; :func:`join` is the inverse.

    Args:
        name: What to call it in an error.
        value: An array of ``row_dims`` dimensions (one sequence) or one more (a batch), or a
            list of sequences.
        row_dims: Dimensions of one sequence.
        convert: Checks one array, given its name and value, and makes it a tensor.

    Returns:
        How the sequences were given, and each of them.

    Raises:
        ValueError: If there is no sequence, the number of dimensions is wrong, or ``convert``
            refuses an array.
    """
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{name} is an empty list; expected at least one sequence")
        tensors = [convert(f"{name}[{i}]", item) for i, item in enumerate(value)]
        for i, tensor in enumerate(tensors):
            if tensor.ndim != row_dims:
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(tensor.shape)}; expected {row_dims} "
                    "dimension(s), as it is one sequence of a list"
                )
        return "list", tensors
    tensor = convert(name, value)
    if tensor.ndim == row_dims:
        return "single", [tensor]
    if tensor.ndim == row_dims + 1:
        return "batch", list(tensor.unbind(0))
    raise ValueError(
        f"{name} has shape {tuple(tensor.shape)}; expected {row_dims} dimension(s) for one "
        f"sequence, {row_dims + 1} for a batch, or a list of sequences"
    )


def join(structure: Structure, sequences: list[Tensor]) -> Tensor | list[Tensor]:
    """Sequences in the structure they were given in.

    Args:
        structure: How they were given.
        sequences: Tensors, of one shape unless the structure is a list.

    Returns:
        The only sequence, the stacked sequences, or the list. Several sequences of ``"single"``
        structure make a batch. Memory may be shared: what lies side by side is not copied.
    """
    if structure == "list":
        return sequences
    if structure == "single" and len(sequences) == 1:
        return sequences[0]
    return _side_by_side(sequences)


def _side_by_side(sequences: list[Tensor]) -> Tensor:
    """``torch.stack``, without a copy where the sequences follow each other in memory."""
    first = sequences[0]
    memory, offset, size = first.untyped_storage().data_ptr(), first.storage_offset(), first.numel()
    for i, tensor in enumerate(sequences):
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        alike = tensor.is_contiguous() and tensor.shape == first.shape
        if not alike or place != (memory, offset + i * size):
            return torch.stack(sequences)
    return first.as_strided((len(sequences), *first.shape), (size, *first.stride()))


def as_number(name: str, value: object, *, positive: bool = False) -> float:
    """A finite real number, non-negative or positive.

    Args:
        name: What to call it in an error.
        value: The number.
        positive: Whether zero is refused too.

    Returns:
        The number as a float.

    Raises:
        ValueError: If it is not such a number.
    """
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and (number > 0 or (number == 0 and not positive))):
        bound = "above 0" if positive else "of at least 0"
        raise ValueError(f"{name} is {value!r}; expected a finite number {bound}")
    return number


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
