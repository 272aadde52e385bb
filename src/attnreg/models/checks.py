"""Checks of what a caller hands in to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnreg.problem import AttentionProblem

BIASES = ("query", "key", "value", "output")
"""Names of the biases of a layer."""


def as_bias(bias: bool | Sequence[str]) -> bool | tuple[str, ...]:
    """Checks which biases a layer has.

    Args:
        bias: True for all, False for none, or their names.

    Returns:
        True, False, or the names in the order of ``BIASES``.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(bias, bool):
        return bias
    if not isinstance(bias, list | tuple) or any(name not in BIASES for name in bias):
        raise ValueError(
            f"bias={bias!r} was given, True, False or a tuple of names out of {list(BIASES)} is "
            "expected"
        )
    names = tuple(name for name in BIASES if name in bias)
    return len(names) > 0 if len(names) in (0, len(BIASES)) else names


def checked(
    problem: AttentionProblem,
    parameters: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
) -> list[Tensor]:
    """Parameters in the order of ``shapes``, in the problem's dtype and on its device.

    Args:
        problem: Gives dtype and device.
        parameters: Named tensors or NumPy arrays.
        shapes: The names and shapes that are expected.

    Returns:
        One tensor per name.

    Raises:
        ValueError: If a name is missing or unknown, a shape differs, or a value is not finite.
    """
    unknown = sorted(set(parameters) - set(shapes))
    missing = sorted(set(shapes) - set(parameters))
    if unknown or missing:
        raise ValueError(
            f"parameters {sorted(parameters)} were given, {list(shapes)} are expected: "
            f"missing {missing}, unknown {unknown}"
        )
    result = []
    for name, shape in shapes.items():
        value = torch.as_tensor(parameters[name]).detach()
        if tuple(value.shape) != tuple(shape):
            raise ValueError(
                f"parameter {name} has shape {tuple(value.shape)}, {tuple(shape)} is expected"
            )
        value = value.to(device=problem.device, dtype=problem.dtype)
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"parameter {name} holds a value that is not finite")
        result.append(value)
    return result
