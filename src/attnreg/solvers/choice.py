"""Which solver suits a problem: what ``solver="auto"`` takes."""

from __future__ import annotations

from attnreg.models import Bilinear, Model
from attnreg.problem import AttentionProblem

REDUNDANT = 20
"""Residuals a parameter from which mini-batches fit faster than curvature does: real layers with
130 were fitted sooner by mini-batches, one with 2.7 by curvature."""


def solver_for(residuals: int, weights: int) -> str:
    """``"stochastic"`` where there are many residuals a weight, else ``"trust-region"``."""
    return "stochastic" if residuals >= REDUNDANT * weights else "trust-region"


def chosen(problem: AttentionProblem, model: Model, weights: int) -> tuple[str, str]:
    """The solver for a problem.

    Args:
        problem: The data.
        model: What is fitted.
        weights: Number of its parameters.

    Returns:
        The solver's name, and why it was taken.
    """
    if isinstance(model, Bilinear):
        return "trust-region", "the bilinear model has curvature in closed form"
    residuals = problem.n_rows * problem.d_out
    name = solver_for(residuals, weights)
    sign = "at least" if name == "stochastic" else "less than"
    return name, f"{residuals / weights:.3g} residuals a parameter, {sign} {REDUNDANT}"
