"""The paper's model: ``softmax(scale A1 X A2^T) A3 Y`` with free matrices ``X`` and ``Y``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.kronecker import ParameterBlock
from attnreg.models.base import Layout, Model, Parameters, Ridge
from attnreg.models.checks import checked
from attnreg.models.heads import HeadMap, Rows
from attnreg.problem import AttentionProblem, Batch

START_LOGITS = 0.01
"""Standard deviation of the logits of a start: small, so that the data decide."""


@dataclass(frozen=True)
class Bilinear(Model):
    """Fits ``X`` (``d_query x d_key``) and ``Y`` (``d_value x d_out``).

    The features are ``softmax(scale A1 X A2^T + mask) A3`` and the readout is ``Y``. A problem
    with ``scale=None`` is solved with scale 1 (the paper's).
    """

    def layout(self, problem: AttentionProblem) -> Layout:
        """Sizes on this problem."""
        block = ParameterBlock("X", problem.d_query, 1, problem.d_key, "A1")
        return Layout((block,), 1, 1, problem.d_value, False, keys_move=False, values_move=False)

    def start(self, problem: AttentionProblem, seed: int) -> dict[str, Tensor]:
        """A random ``X`` whose logits have the size ``START_LOGITS``, and ``Y = 0``."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(problem.d_query, problem.d_key, generator=generator, dtype=torch.float64)
        x *= START_LOGITS / self.logit_size(problem)
        y = torch.zeros(problem.d_value, problem.d_out, dtype=problem.dtype)
        return {"X": x.to(problem.dtype).to(problem.device), "Y": y.to(problem.device)}

    def split(self, problem: AttentionProblem, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Checks the parameters.

        Returns:
            ``X`` flattened row by row, and ``Y``.

        Raises:
            ValueError: If a matrix is missing, has another shape, or is not finite.
        """
        x, y = checked(problem, parameters, self._shapes(problem))
        return x.reshape(-1).clone(), y

    def join(
        self, problem: AttentionProblem, theta: Tensor, readout: Tensor, template: Parameters
    ) -> dict[str, Tensor]:
        """``{"X": ..., "Y": ...}``."""
        return {"X": theta.view(problem.d_query, problem.d_key).clone(), "Y": readout.clone()}

    def logit_scale(self, problem: AttentionProblem) -> float:
        """The problem's scale; 1 where it has none."""
        return 1.0 if problem.scale is None else problem.scale

    def query_inputs(self, problem: AttentionProblem, batch: Batch) -> Tensor:
        """``scale A1``."""
        return batch.A1 * self.logit_scale(problem)

    def project(
        self, problem: AttentionProblem, batch: Batch, theta: list[Tensor], *, change: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``scale A1 X``, ``A2`` and ``A3``."""
        queries = batch.A1 @ (theta[0] * self.logit_scale(problem))
        return (queries, None, None) if change else (queries, batch.A2, batch.A3)

    def head_map(
        self, problem: AttentionProblem, batch: Batch, theta: list[Tensor], rows: Rows
    ) -> HeadMap | None:
        """Nothing."""
        return None

    def pull_back(
        self,
        problem: AttentionProblem,
        batch: Batch,
        gradients: tuple[Tensor, Tensor | None, Tensor | None],
        out: list[Tensor],
    ) -> None:
        """Adds ``scale A1^T gQ``."""
        a1, gq = batch.A1.flatten(0, 1), gradients[0].flatten(0, 1)
        out[0].addmm_(a1.mT, gq, alpha=self.logit_scale(problem))

    def input_moments(self, problem: AttentionProblem) -> tuple[Tensor, ...]:
        """Mean of ``scale^2 a a^T`` over the rows of ``A1``, weighted."""
        return (problem.gram_query * (self.logit_scale(problem) ** 2 / problem.total_weight),)

    def natural_metric(
        self, problem: AttentionProblem, theta: Tensor, readout: Tensor
    ) -> tuple[Tensor, ...]:
        """``scale^2 G1 (x) G2``.

        Without a ridge the keys in ``G2`` are centred: a shift of all keys of a sequence moves
        no softmax (the gauge), so such directions carry no gradient and no size. With a ridge
        they do carry one, and ``G2`` is the ridge's own.

        Returns:
            The right factor of the one block.
        """
        keys = problem.gram_key if problem.ridge_x > 0 else problem.gram_key_centered
        return (problem.total_weight * keys[None],)

    def ridge(self, problem: AttentionProblem) -> Ridge | None:
        """``ridge_x <X - X0, G1 (X - X0) G2> + ridge_y <Y - Y0, G3 (Y - Y0)>``."""
        if problem.ridge_x == 0 and problem.ridge_y == 0:
            return None
        shapes = self._shapes(problem)
        zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
        x0, y0 = checked(problem, zeros | dict(problem.center), shapes)
        strength = problem.ridge_x * problem.total_weight / self.logit_scale(problem) ** 2
        right = strength * problem.gram_key[None]
        return Ridge(x0.reshape(-1), (right,), y0, problem.ridge_y * problem.gram_value)

    def _shapes(self, problem: AttentionProblem) -> dict[str, tuple[int, int]]:
        return {
            "X": (problem.d_query, problem.d_key),
            "Y": (problem.d_value, problem.d_out),
        }
