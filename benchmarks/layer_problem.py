"""The real layer that is converted to fewer key/value heads, and the error that is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnreg import AttentionProblem, MultiHead, pool_kv_heads
from attnreg.report.baselines import fused_layer
from benchmarks import minilm

LAYER, KV_HEADS, HEAD_DIM = 3, 4, 32
ORIGINAL = MultiHead(minilm.HEADS, head_dim=HEAD_DIM)
STUDENT = MultiHead(minilm.HEADS, KV_HEADS, HEAD_DIM)
WEIGHTS = tuple(f"{kind}_{name}" for name in "QKVO" for kind in "Wb")


SEQUENCES_AT_ONCE = 64


@dataclass(frozen=True)
class Data:
    """Inputs and the original layer's outputs, (sequences, tokens, 384), float32.

    It is a `peers.base.Problem`: the loss is a sum of squares, by fused attention.
    """

    A: Tensor
    B: Tensor
    model: MultiHead = STUDENT

    def __len__(self) -> int:
        return len(self.A)

    def loss(self, weights: Mapping[str, Tensor], index: Tensor | None = None) -> Tensor:
        """See `peers.base.Problem.loss`."""
        A, B = (self.A, self.B) if index is None else (self.A[index], self.B[index])
        return (fused_layer(self.model, weights, A) - B).square().sum()

    def attention(self) -> AttentionProblem:
        """See `peers.base.Problem.attention`."""
        return AttentionProblem(self.A, self.B)

    def to(self, device: str) -> Data:
        """The same on another device."""
        return Data(self.A.to(device), self.B.to(device), self.model)

    @cached_property
    def spread(self) -> float:
        """||B - column mean||_F^2."""
        rows = self.B.flatten(0, 1).double()
        return float((rows - rows.mean(0)).square().sum())


@dataclass(frozen=True)
class Layer:
    """Training and held-out data, the mean-pooled start and the original's weights."""

    train: Data
    held_out: Data
    pooled: dict[str, Tensor]
    weights: dict[str, Tensor]

    def to(self, device: str) -> Layer:
        """The same on another device."""
        pooled, weights = (
            {name: value.to(device) for name, value in part.items()}
            for part in (self.pooled, self.weights)
        )
        return Layer(self.train.to(device), self.held_out.to(device), pooled, weights)


def relative_error(weights: Mapping[str, Tensor], data: Data) -> float:
    """||prediction - B||_F / ||B - column mean||_F."""
    pieces = torch.arange(len(data)).split(SEQUENCES_AT_ONCE)
    with torch.no_grad():
        loss = sum(float(data.loss(weights, piece).double()) for piece in pieces)
    return (loss / data.spread) ** 0.5


def load_layer(sequences: int, held_out: int, tokens: int, layer: int = LAYER) -> Layer:
    """Captures a layer on `sequences` + `held_out` different sequences of text.

    Args:
        sequences: to fit on.
        held_out: to score on.
        tokens: of each sequence.
        layer: which.
    """
    captured = minilm.capture(layer, sequences + held_out, tokens)
    inputs = captured.pop("inputs")
    return Layer(
        train=with_outputs(inputs[:sequences].clone(), captured),
        held_out=with_outputs(inputs[sequences:].clone(), captured),
        pooled=pool_kv_heads({name: captured[name] for name in WEIGHTS}, minilm.HEADS, KV_HEADS),
        weights=captured,
    )


def with_outputs(inputs: Tensor, weights: Mapping[str, Tensor]) -> Data:
    """Inputs with what the original layer makes of them."""
    with torch.no_grad():
        pieces = inputs.split(SEQUENCES_AT_ONCE)
        outputs = torch.cat([fused_layer(ORIGINAL, weights, piece) for piece in pieces])
    return Data(inputs, outputs)
