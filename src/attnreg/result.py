"""What a fit returns: parameters, a status that says what happened, and the history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnreg.models import Bilinear, Features, Model, MultiHead
from attnreg.problem import AttentionProblem
from attnreg.solvers.records import IterationRecord, Status
from attnreg.storage import read_tensors, write_tensors


@dataclass(frozen=True)
class FitResult:
    """Parameters found by :func:`attnreg.fit`, with what is needed to trust and reuse them.

    Attributes:
        parameters: Named tensors; ``X`` and ``Y`` for :class:`Bilinear`.
        model: The model that was fitted.
        loss: ``L`` alone.
        regularised_loss: ``L`` plus the problem's ridges: what was minimised.
        relative_error: ``||prediction - B||_F / ||B - mean||_F``.
        gradient_norm: Dual norm of the reduced gradient in the natural metric, over
            ``||B - mean||_F^2``: the number that ``tol`` bounds.
        tol: The tolerance that was asked for.
        status: Why the fit ended.
        history: One record an iteration.
        notes: Things a reader should know, such as dropped null directions.
        seed: Seed of the fit.
        scale: Logit scale of the problem (None: the model's own).
        problem_digest: Digest of the problem that was solved.
    """

    parameters: Mapping[str, Tensor]
    model: Model
    loss: float
    regularised_loss: float
    relative_error: float
    gradient_norm: float
    tol: float
    status: Status
    history: tuple[IterationRecord, ...]
    notes: tuple[str, ...]
    seed: int
    scale: float | None
    problem_digest: str

    @property
    def converged(self) -> bool:
        """Whether the stopping test was met."""
        return self.status is Status.CONVERGED

    @property
    def X(self) -> Tensor:
        """``W_Q W_K^T`` of a bilinear fit.

        Raises:
            AttributeError: For other models.
        """
        return self._named("X")

    @property
    def Y(self) -> Tensor:
        """``W_V`` of a bilinear fit.

        Raises:
            AttributeError: For other models.
        """
        return self._named("Y")
