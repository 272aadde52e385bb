"""A problem's sequences as arguments of its constructor, and as named tensors of a file.

One sequence and a batch are stored as they were given, so that other programs can read them. A
list is laid end to end, row after row (masks entry after entry), with its lengths in the metadata.
An input that is the same as another is not stored: ``"aliases"`` names the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreg.arrays import Structure, join
from attnreg.batching import Sequences


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
    mask = None
    if s.masks is not None:
        mask = s.masks[0] if len(s.masks) == 1 else join(structure, s.masks)
    weighted = any(bool((w != 1).any()) for w in s.weights)
    return {
        "A1": a1,
        "B": join(structure, s.B),
        "A2": a2,
        "A3": a3,
        "mask": _with_causal(s.causal, mask),
        "weights": join(structure, s.weights) if weighted else None,
    }


def pack(structure: Structure, sequences: Sequences) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata for a file.

    Args:
        structure: How the sequences were given.
        sequences: The sequences.

    Returns:
        The tensors by name, and JSON-able metadata.
    """
    inputs = as_arguments(structure, sequences)
    mask = inputs["mask"]
    if sequences.causal:
        mask = None if mask == "causal" else mask[1]
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
    lengths = [list(pair) for pair in sequences.lengths]
    metadata = {"structure": structure, "lengths": lengths, "causal": sequences.causal}
    return tensors, {**metadata, "aliases": aliases}


def unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``AttentionProblem`` from what :func:`pack` gave.

    Args:
        tensors: The tensors by name; others are ignored.
        metadata: The metadata; other entries are ignored.

    Returns:
        A1, B, A2, A3, mask and weights.
    """
    inputs: dict[str, Any] = {}
    for name in ("A1", "B", "A2", "A3", "mask", "weights"):
        inputs[name] = tensors.get(name)
    if metadata["structure"] == "list":
        queries, keys = (list(sizes) for sizes in zip(*metadata["lengths"], strict=True))
        sizes = {"A1": queries, "B": queries, "A2": keys, "A3": keys, "weights": queries}
        for name, rows in sizes.items():
            if inputs[name] is not None:
                inputs[name] = list(inputs[name].split(rows))
        if inputs["mask"] is not None and inputs["mask"].ndim == 1:
            parts = inputs["mask"].split([math.prod(pair) for pair in metadata["lengths"]])
            pairs = zip(parts, metadata["lengths"], strict=True)
            inputs["mask"] = [part.view(n, m) for part, (n, m) in pairs]
    for name in ("A2", "A3"):  # A2 first: A3 may be the same as A2
        if name in metadata["aliases"]:
            inputs[name] = inputs[metadata["aliases"][name]]
    inputs["mask"] = _with_causal(metadata["causal"], inputs["mask"])
    return inputs


def _with_causal(causal: bool, mask: Any) -> Any:
    if not causal:
        return mask
    return "causal" if mask is None else ("causal", mask)
