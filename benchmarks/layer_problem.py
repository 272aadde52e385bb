"""The real layer that is converted to fewer key/value heads, and the error that is compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionProblem, MultiHead, pool_kv_heads
from attnreg.report.baselines import fused_layer
from benchmarks import minilm
from benchmarks.common import median

LAYER, KV_HEADS, HEAD_DIM = 3, 4, 32
ORIGINAL = MultiHead(minilm.HEADS, head_dim=HEAD_DIM)
STUDENT = MultiHead(minilm.HEADS, KV_HEADS, HEAD_DIM)
WEIGHTS = tuple(f"{kind}_{name}" for name in "QKVO" for kind in "Wb")


SEQUENCES_AT_ONCE = 64

Weights = Mapping[str, Tensor]
Errors = dict[str, float]


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

    def part(self, first: int, count: int) -> Data:
        """Some of the sequences, copied."""
        chosen = slice(first, first + count)
        return Data(self.A[chosen].clone(), self.B[chosen].clone(), self.model)

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


class Bed:
    """A start, the texts of a layer, and the errors of weights on them.

    Args:
        start: The student's weights to begin with.
        texts: Data by name, those that are fitted first; ``"validation"`` chooses.
    """

    def __init__(self, start: Weights, texts: Mapping[str, Data]) -> None:
        self.start, self._texts = start, texts
        self.fitted, self.judging = next(iter(texts.values())), texts["validation"]
        self._problem = self.fitted.attention()

    def errors(self, weights: Weights) -> Errors:
        """All errors, by text."""
        return {name: relative_error(weights, data) for name, data in self._texts.items()}

    def best_errors(self, weights: Weights) -> dict[str, Any]:
        """Errors of the weights, or with their readout solved where that validates better."""
        validation, readout, best = self._best(weights)
        if validation == math.inf:
            return dict.fromkeys(self._texts, math.inf) | {"readout": readout}
        return self.errors(best) | {"readout": readout}

    def validation(self, weights: Weights) -> float:
        """The validation error of :meth:`best_errors`."""
        return self._best(weights)[0]

    def _best(self, weights: Weights) -> tuple[float, str, Weights]:
        """Validation error, readout and weights of the better way; infinite where they are not."""
        if not finite(weights):
            return math.inf, "as it is", weights
        ways = {"as it is": weights, "solved": self._solved(weights)}
        errors = {readout: relative_error(way, self.judging) for readout, way in ways.items()}
        best = min(errors, key=lambda readout: errors[readout])
        return errors[best], best, ways[best]

    def _solved(self, weights: Weights) -> Weights:
        from attnreg.reduction.starts import solve_readout

        return solve_readout(self._problem, STUDENT, weights)[1]


def finite(weights: Weights) -> bool:
    """Whether all weights are."""
    return all(bool(value.isfinite().all()) for value in weights.values())


def medians(runs: Sequence[Mapping[str, Any]], names: Iterable[str]) -> Errors:
    """The median of each error over some runs."""
    middles = {name: median([errors[name] for errors in runs]) for name in names}
    return {name: math.inf if middle is None else middle for name, middle in middles.items()}


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


def third_text(layer: Layer, number: int, sequences: int, tokens: int) -> Data:
    """What the original layer makes of a text that neither fits nor chooses.

    Args:
        layer: Gives the weights.
        number: Of the layer.
        sequences: how many.
        tokens: of each.
    """
    chunks = minilm.third_text(tokens)[:sequences]
    return with_outputs(minilm.layer_inputs(minilm.load_model(), number, chunks), layer.weights)
