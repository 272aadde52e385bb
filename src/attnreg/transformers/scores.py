"""Sums over tokens and windows, from which the scores of two models are made.

All sums are float64, whatever the models compute in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

CHUNK = 2**22
"""Logits that are turned into float64 at a time."""


@dataclass
class TokenScores:
    """Sums over predicted tokens; ``p`` is the original's prediction and ``q`` the converted's.

    Attributes:
        count: Tokens predicted.
        nats: Negative log likelihood under the original and under the converted model.
        right: Tokens that each has as its first choice.
        kl: Sum of ``KL(p || q)`` in nats.
        agree: Tokens at which the two first choices are equal.
    """

    count: int = 0
    nats: list[float] = field(default_factory=lambda: [0.0, 0.0])
    right: list[int] = field(default_factory=lambda: [0, 0])
    kl: float = 0.0
    agree: int = 0

    def add(self, original: Tensor, converted: Tensor, wanted: Tensor) -> None:
        """Adds predictions.

        Args:
            original: Logits (n, vocabulary).
            converted: Logits (n, vocabulary).
            wanted: The true tokens (n,).

        Raises:
            ValueError: If a likelihood is not finite.
        """
        rows = max(1, CHUNK // original.shape[-1])
        for start in range(0, len(wanted), rows):
            part = slice(start, start + rows)
            self._add(original[part], converted[part], wanted[part])

    def _add(self, original: Tensor, converted: Tensor, wanted: Tensor) -> None:
        logs = [logits.double().log_softmax(-1) for logits in (original, converted)]
        for i, name in enumerate(("original", "converted")):
            loss = -logs[i].gather(-1, wanted[:, None]).sum().item()
            if not math.isfinite(loss):
                raise ValueError(
                    f"the {name} model's logits give a loss of {loss}; expected finite numbers: "
                    "its weights are damaged, or need another dtype"
                )
            self.nats[i] += loss
        first = [log.argmax(-1) for log in logs]
        for i in range(2):
            self.right[i] += int((first[i] == wanted).sum())
        self.agree += int((first[0] == first[1]).sum())
        p, q = logs
        self.kl += torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum().item()
        self.count += len(wanted)


@dataclass
class Cosines:
    """Cosines between the embeddings that two models give the same windows.

    An embedding is the mean of the last hidden states over a window's tokens.
    """

    values: list[float] = field(default_factory=list)

    def add(self, original: Tensor, converted: Tensor, mask: Tensor) -> None:
        """Adds windows.

        Args:
            original: Last hidden states (b, n, width).
            converted: Last hidden states (b, n, width).
            mask: 1 at tokens, 0 at padding (b, n).

        Raises:
            ValueError: If an embedding is not finite.
        """
        left, right = _pooled(original, mask), _pooled(converted, mask)
        for name, values in (("original", left), ("converted", right)):
            if not bool(values.isfinite().all()):
                raise ValueError(
                    f"the {name} model's hidden states are not finite; its weights are damaged, or "
                    "need another dtype"
                )
        self.values += torch.cosine_similarity(left, right, dim=-1).tolist()


def _pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    weight = mask[..., None].double()
    return (hidden.double() * weight).sum(1) / weight.sum(1)


@dataclass
class OutputError:
    """Sums for ``||converted - original||_F / ||original - its mean||_F`` over the rows seen.

    This is the relative error of :class:`attnreg.AttentionProblem`.
    """

    difference: float = 0.0
    square: float = 0.0
    total: Tensor | None = None
    count: int = 0

    def add(self, original: Tensor, converted: Tensor) -> None:
        """Adds rows (n, width) of outputs for the same inputs."""
        a, b = original.double(), converted.double()
        self.difference += (b - a).square().sum().item()
        self.square += a.square().sum().item()
        self.total = a.sum(0) if self.total is None else self.total + a.sum(0)
        self.count += len(a)

    @property
    def value(self) -> float:
        """The error; as for a problem, relative to ``||original||_F`` where that is constant."""
        spread = self.square
        if self.total is not None:
            spread -= self.total.square().sum().item() / self.count
        if spread <= 1e-12 * self.square:  # rounding of the difference
            spread = self.square
        return math.sqrt(self.difference / (spread or 1.0))
