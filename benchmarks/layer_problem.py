"""The real layer that is converted to fewer key/value heads, and the error that is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg import MultiHead, pool_kv_heads
from attnreg.report.baselines import fused_layer
from benchmarks import minilm

LAYER, KV_HEADS, HEAD_DIM = 3, 4, 32
ORIGINAL = MultiHead(minilm.HEADS, head_dim=HEAD_DIM)
STUDENT = MultiHead(minilm.HEADS, KV_HEADS, HEAD_DIM)
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


def relative_error(weights: Mapping[str, Tensor], data: Data) -> float:
    """||prediction - B||_F / ||B - column mean||_F."""
    with torch.no_grad():
        loss = float((fused_layer(STUDENT, weights, data.A) - data.B).double().square().sum())
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
        outputs = fused_layer(ORIGINAL, weights, inputs)
    return Layer(
        train=Data(inputs[:sequences].clone(), outputs[:sequences].clone()),
        held_out=Data(inputs[sequences:].clone(), outputs[sequences:].clone()),
        pooled=pool_kv_heads(weights, minilm.HEADS, KV_HEADS),
    )
