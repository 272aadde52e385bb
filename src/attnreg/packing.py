"""A problem's sequences as arguments of its constructor, and as named tensors of a file.

One sequence and a batch are stored as they were given, so that other programs can read them. A
list is laid end to end, row after row (masks entry after entry), with its lengths in the metadata.
An input that is the same as another is not stored: ``"aliases"`` names the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg.arrays import Structure, join
from attnreg.batching import Sequences
from attnreg.masks import causal_argument

_CENTER = "center."  # prefix of the centres' names in a file
_INPUTS = ("A1", "B", "A2", "A3", "mask", "weights")
_SETTINGS = ("scale", "ridge_x", "ridge_y")


def as_arguments(structure: Structure, sequences: Sequences) -> dict[str, Any]:
    """The sequences as ``AttentionProblem`` takes them.

    Args:
        structure: How they were given.
        sequences: The sequences.

    Returns:
        A1, B, A2, A3, mask and weights; inputs that are the same are the same object, and weights
        that are all 1 are None.
    """
    s = sequences
    a1 = join(structure, s.A1)
    a2 = a1 if s.A2 is s.A1 else join(structure, s.A2)
    a3 = a1 if s.A3 is s.A1 else a2 if s.A3 is s.A2 else join(structure, s.A3)
    return {
        "A1": a1,
        "B": join(structure, s.B),
        "A2": a2,
        "A3": a3,
        "mask": as_mask_argument(structure, s),
        "weights": join(structure, s.weights) if s.weighted else None,
    }


def as_mask_argument(structure: Structure, sequences: Sequences) -> Any:
    """The mask as ``AttentionProblem`` takes it.

    Args:
        structure: How the sequences were given.
        sequences: The sequences.

    Returns:
        None, ``"causal"``, additive masks in the structure of the sequences or one for all,
        ``("causal", masks)``, or either with the window behind ``"causal"``.
    """
    masks = _join_masks(structure, sequences.masks)
    return causal_argument(sequences.window, masks) if sequences.causal else masks


def pack(
    structure: Structure,
    sequences: Sequences,
    center: Mapping[str, Tensor],
    settings: Mapping[str, float | None],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata for a file.

    Args:
        structure: How the sequences were given.
        sequences: The sequences.
        center: Centres of the regulariser by parameter name.
        settings: scale, ridge_x and ridge_y.

    Returns:
        The tensors by name, and JSON-able metadata.
    """
    inputs = as_arguments(structure, sequences)
    mask = _join_masks(structure, sequences.masks)
    inputs["mask"] = [m.reshape(-1) for m in mask] if isinstance(mask, list) else mask
    aliases = {}
    for name, other in (("A3", "A2"), ("A2", "A1")):
        if inputs[name] is inputs[other]:
            aliases[name] = other
            inputs[name] = None
    tensors = {
        name: torch.cat(value) if isinstance(value, list) else value
        for name, value in inputs.items()
        if value is not None
    }
    tensors |= {_CENTER + name: value for name, value in center.items()}
    # Only where there is one, so that the digests of other problems stay what they were.
    window = {} if sequences.window is None else {"window": sequences.window}
    return tensors, {
        "kind": "problem",
        "structure": structure,
        "lengths": [list(pair) for pair in sequences.lengths],
        "causal": sequences.causal,
        "aliases": aliases,
        **window,
        **settings,
    }


def unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``AttentionProblem`` from the content of a file.

    Args:
        tensors: The tensors by name.
        metadata: The metadata that :func:`pack` gave, or nothing for a file of another program.

    Returns:
        The arguments by name.

    Raises:
        ValueError: If the file holds something else.
    """
    if not metadata:
        if not {"A1", "B"} <= set(tensors) <= set(_INPUTS):
            named = f"tensors named {', '.join(sorted(tensors))}" if tensors else "no tensors"
            raise ValueError(
                f"holds {named}; expected A1 and B, and besides only A2, A3, mask and weights"
            )
        return dict(tensors)
    if metadata.get("kind") != "problem":
        raise ValueError(
            f"holds a {metadata.get('kind')}; expected a problem: give the file that "
            "AttentionProblem.save wrote"
        )
    inputs: dict[str, Any] = {name: tensors.get(name) for name in _INPUTS}
    if metadata["structure"] == "list":
        _split(inputs, metadata["lengths"])
    for name in ("A2", "A3"):  # A2 first: A3 may be the same as A2
        if name in metadata["aliases"]:
            inputs[name] = inputs[metadata["aliases"][name]]
    if metadata["causal"]:
        inputs["mask"] = causal_argument(metadata.get("window"), inputs["mask"])
    center = {
        name.removeprefix(_CENTER): value
        for name, value in tensors.items()
        if name.startswith(_CENTER)
    }
    return {**inputs, **{name: metadata[name] for name in _SETTINGS}, "center": center}


def _split(inputs: dict[str, Any], lengths: list[tuple[int, int]]) -> None:
    """Cut what was laid end to end into sequences, in place."""
    queries, keys = (list(sizes) for sizes in zip(*lengths, strict=True))
    rows = {"A1": queries, "B": queries, "A2": keys, "A3": keys, "weights": queries}
    for name, sizes in rows.items():
        if inputs[name] is not None:
            inputs[name] = list(inputs[name].split(sizes))
    mask = inputs["mask"]
    if mask is not None and mask.ndim == 1:  # a matrix holds for every sequence
        parts = mask.split([n * m for n, m in lengths])
        inputs["mask"] = [p.view(n, m) for p, (n, m) in zip(parts, lengths, strict=True)]


def _join_masks(structure: Structure, masks: list[Tensor] | None) -> Tensor | list[Tensor] | None:
    """Masks in the structure of the sequences, or the one for all."""
    if masks is None:
        return None
    return masks[0] if len(masks) == 1 else join(structure, masks)
