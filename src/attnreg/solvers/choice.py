"""Which solver suits a problem: what ``solver="auto"`` takes."""

from __future__ import annotations

from attnreg.models import Bilinear, Model
from attnreg.problem import AttentionProblem

REDUNDANT = 10
"""Residuals a parameter from which mini-batches fit faster than curvature does: real layers with
12 and more ended lower with mini-batches, with 6 and less with curvature, at equal time."""

ENOUGH = 40
"""Residuals a parameter from which little is learnt by heart: least squares needs no ridge, and
directions in which the inputs vary little may move faster than others."""


def residuals_a_weight(problem: AttentionProblem, weights: int) -> float:
    """Rows times outputs over a number of parameters."""
    return problem.n_rows * problem.d_out / weights


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
    residuals = residuals_a_weight(problem, weights)
    name = "stochastic" if residuals >= REDUNDANT else "trust-region"
    sign = "at least" if name == "stochastic" else "less than"
    return name, f"{residuals:.3g} residuals a parameter, {sign} {REDUNDANT}"
