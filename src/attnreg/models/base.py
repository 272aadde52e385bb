"""The interface of a model: attention features of a parameter vector, then a linear readout.

A model names its non-linear parameters (matrices stacked in one flat vector ``theta``), maps
them linearly to queries, keys and values, says what those go through head by head before the
attention (norms, rotation), and which Kronecker metric its ridge uses. The
readout ``O`` is linear in the prediction ``[F 1] O`` and never part of ``theta``: variable
projection eliminates it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from attnreg.kronecker import ParameterBlock
from attnreg.models.heads import HeadMap, Rows
from attnreg.problem import AttentionProblem, Batch

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Sizes of a model on a problem.

    Attributes:
        blocks: Non-linear parameters, in the order in which they are stacked.
        groups: Number of key/value heads.
        repeats: Query heads per key/value head.
        value_width: Width of one head's features.
        readout_bias: Whether the readout has a constant row.
        keys_move: Whether the keys depend on the parameters.
        values_move: Whether the values depend on the parameters.
        held: How many of the last blocks hold parameters that a fit leaves as they are.
        plain: Whether the attention sees the inputs times one matrix each, with no constant in the
            inputs of keys and values, so that moments of the inputs give the curvature.
    """

    blocks: tuple[ParameterBlock, ...]
    groups: int
    repeats: int
    value_width: int
    readout_bias: bool
    keys_move: bool
    values_move: bool
    held: int = 0
    plain: bool = True

    @property
    def size(self) -> int:
        """Number of non-linear parameters."""
        return sum(block.size for block in self.blocks)

    @property
    def features(self) -> int:
        """Number of features of one row, without the constant."""
        return self.groups * self.repeats * self.value_width

    @property
    def only_queries_move(self) -> bool:
        """Whether there is one head, with fixed keys and values, and no constant."""
        fixed = not (self.keys_move or self.values_move or self.readout_bias)
        return fixed and self.groups * self.repeats == 1


@dataclass(frozen=True)
class Ridge:
    """A quadratic pull towards a centre, one Kronecker operator per parameter block.

    Attributes:
        center: Flat parameter vector of the centre.
        right: Right factors, float64 ``(heads, width, width)``, strength included; the left
            ones are the model's input moments. Empty where only the readout is pulled, as
            mini-batches know it.
        readout_center: ``(features [+ 1], d_out)``.
        readout: ``(features [+ 1], features [+ 1])`` metric of the readout, strength included.
    """

    center: Tensor
    right: tuple[Tensor, ...]
    readout_center: Tensor
    readout: Tensor

    @cached_property
    def readout_right(self) -> Tensor:
        """What it adds to the right side of the readout's normal equations, float64."""
        return self.readout @ self.readout_center.double()


class Model(ABC):
    """Interface of everything that :func:`attnreg.fit` can fit."""

    @abstractmethod
    def layout(self, problem: AttentionProblem) -> Layout:
        """Sizes on this problem; raises ValueError where the two do not fit each other."""

    @abstractmethod
    def start(self, problem: AttentionProblem, seed: int) -> dict[str, Tensor]:
        """Parameters from which a fit without ``init`` begins."""

    @abstractmethod
    def split(self, problem: AttentionProblem, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Checks named parameters; returns flat ``theta`` and the readout matrix."""

    @abstractmethod
    def join(
        self, problem: AttentionProblem, theta: Tensor, readout: Tensor, template: Parameters
    ) -> dict[str, Tensor]:
        """Named parameters of ``theta`` and readout; gauge parameters come from ``template``."""

    @abstractmethod
    def logit_scale(self, problem: AttentionProblem) -> float:
        """The problem's logit scale, or the model's default where it has none."""

    def logit_size(self, problem: AttentionProblem) -> float:
        """Standard deviation of the logits that random entries of variance 1 in ``X`` make.

        Returns:
            A positive number: 1 where there are no logits. Keys are centred, because what all
            keys of a sequence share moves no softmax.
        """
        query = float(problem.gram_query.trace()) / problem.total_weight
        key = float(problem.gram_key_centered.trace()) / sum(m for _, m in problem.lengths)
        return self.logit_scale(problem) * (query * key) ** 0.5 or 1.0

    @abstractmethod
    def query_inputs(self, problem: AttentionProblem, batch: Batch) -> Tensor:
        """What the queries are linear in, with the logit scale: ``(b, n, rows of the block)``."""

    @abstractmethod
    def project(
        self, problem: AttentionProblem, batch: Batch, theta: list[Tensor], *, change: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Queries (with the logit scale), keys and values; with ``change`` None where fixed."""

    @abstractmethod
    def head_map(
        self, problem: AttentionProblem, batch: Batch, theta: list[Tensor], rows: Rows
    ) -> HeadMap | None:
        """What the ``rows`` of :meth:`project` go through next; None where it is nothing."""

    @abstractmethod
    def pull_back(
        self,
        problem: AttentionProblem,
        batch: Batch,
        gradients: tuple[Tensor, Tensor | None, Tensor | None],
        out: list[Tensor],
    ) -> None:
        """Adds the transpose of :meth:`project` to the parameter matrices ``out``."""

    @abstractmethod
    def input_moments(self, problem: AttentionProblem) -> tuple[Tensor, ...]:
        """Mean second moment of each parameter block's inputs, float64 ``(rows, rows)``."""

    @abstractmethod
    def natural_metric(
        self, problem: AttentionProblem, theta: Tensor, readout: Tensor
    ) -> tuple[Tensor, ...]:
        """Right factors of the metric: the size of the logits and outputs that a change makes.

        Float64 ``(heads, width, width)`` for each parameter block; the left factors are
        :meth:`input_moments`.
        """

    @abstractmethod
    def ridge(self, problem: AttentionProblem) -> Ridge | None:
        """The problem's regulariser for this model; None where both strengths are 0."""
