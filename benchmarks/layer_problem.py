"""The real layer that is converted to fewer key/value heads, and the error that is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import minilm

LAYER, KV_HEADS, HEAD_DIM = 3, 4, 32
WEIGHTS = tuple(f"{kind}_{name}" for name in "QKVO" for kind in "Wb")


@dataclass(frozen=True)
class Data:
    """Inputs and the original layer's outputs, (sequences, tokens, 384), float32."""

    A: Tensor
    B: Tensor

    @property
    def spread(self) -> float:
        """||B - column mean||_F^2."""
        rows = self.B.flatten(0, 1).double()
        return float((rows - rows.mean(0)).square().sum())


@dataclass(frozen=True)
class Layer:
    """Training and held-out data, and the mean-pooled start."""

    train: Data
    held_out: Data
    pooled: dict[str, Tensor]


def predict(weights: Mapping[str, Tensor], A: Tensor) -> Tensor:
    """Grouped-query attention with fused kernels, all maps as y = x @ W + b."""
    q, k, v = (
        (A @ weights[f"W_{x}"] + weights[f"b_{x}"]).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        for x in "QKV"
    )
    heads = scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    return heads.transpose(1, 2).flatten(2) @ weights["W_O"] + weights["b_O"]


def relative_error(weights: Mapping[str, Tensor], data: Data) -> float:
    """||prediction - B||_F / ||B - column mean||_F."""
    with torch.no_grad():
        loss = float((predict(weights, data.A) - data.B).double().square().sum())
    return (loss / data.spread) ** 0.5


def load_layer(sequences: int, held_out: int, tokens: int) -> Layer:
    """Captures the layer on `sequences` + `held_out` different sequences of text.

    Args:
        sequences: to fit on.
        held_out: to score on.
        tokens: of each sequence.
    """
    captured = minilm.capture(LAYER, sequences + held_out, tokens)
    inputs = captured.pop("inputs").float()
    weights = {name: captured[name].float() for name in WEIGHTS}
    with torch.no_grad():
        outputs = predict(weights, inputs)
    pooled = dict(weights)
    for name in ("W_K", "b_K", "W_V", "b_V"):
        heads = weights[name].unflatten(-1, (KV_HEADS, -1, HEAD_DIM))
        pooled[name] = heads.mean(-2).flatten(-2).contiguous()
    return Layer(
        train=Data(inputs[:sequences].clone(), outputs[:sequences].clone()),
        held_out=Data(inputs[sequences:].clone(), outputs[sequences:].clone()),
        pooled=pooled,
    )
