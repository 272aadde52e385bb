"""The answer of a linear solve, whichever way it was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Operator = Callable[[Tensor], Tensor]
"""A linear map of flat vectors."""


@dataclass(frozen=True)
class Solve:
    """Result of one linear solve.

    Attributes:
        direction: ``d``, flat.
        iterations: Products with the matrix that were spent.
        model_change: ``g . d + d . H d / 2``: the model's change without the damping.
        converged: Whether the residual test was met.
        negative: A direction ``p`` with ``p . (H + damping I) p <= 0``, or None.
        negative_curvature: ``p . H p`` of it (undamped), 0 where there is none.
    """

    direction: Tensor
    iterations: int
    model_change: float
    converged: bool
    negative: Tensor | None = None
    negative_curvature: float = 0.0
