"""Preconditioned conjugate gradients for the damped Newton system.

Solves ``(H + damping I) d = -g`` from ``d = 0`` and stops when

* the residual's norm in the metric of the inverse preconditioner is at most ``tolerance`` times
  that of ``g`` (forcing, Dembo, Eisenstat and Steihaug 1982), or
* the last product lowered the model by less than the products so far did on average, their
  common ``overhead`` counted in, where that is asked for: from there on a new point, with a new
  model, is worth more than another product, or
* a direction of non-positive curvature is met; it is handed back to the caller (Steihaug 1983), or
* a direction's curvature cannot be told from zero beside the largest one met (null directions of
  the gauge, at the level of rounding), or
* the caller's clock has run out; the direction so far still decreases the model.

With ``pairs`` the preconditioner is corrected by the products of earlier solves, and those of this
one are kept (:mod:`.curvature_pairs`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnreg.linear_solve.curvature_pairs import CurvaturePairs
from attnreg.linear_solve.solve import Operator, Solve


def conjugate_gradients(
    product: Operator,
    gradient: Tensor,
    precondition: Operator,
    damping: float,
    tolerance: float,
    max_iterations: int,
    out_of_time: Callable[[], bool] | None = None,
    overhead: float | None = None,
    pairs: CurvaturePairs | None = None,
) -> Solve:
    """Solves ``(H + damping I) d = -gradient``.

    Args:
        product: ``v -> H v``.
        gradient: ``g``, flat.
        precondition: ``v -> P^{-1} v`` with ``P`` symmetric positive definite on the directions
            it keeps.
        damping: Non-negative multiple of the identity.
        tolerance: Relative tolerance in ``(0, 1)``.
        max_iterations: Bound on the products.
        out_of_time: Asked after each product; a true answer ends the solve.
        overhead: Cost of a new point in products, for the test of the average; None: no such test.
        pairs: Directions and products of earlier solves; those of this one are added.

    Returns:
        The direction with its statistics.
    """
    if pairs is not None:
        precondition = pairs.corrected(precondition, damping)
    direction = torch.zeros_like(gradient)
    residual = -gradient
    preconditioned = precondition(residual)
    rz = _dot(residual, preconditioned)
    target = tolerance**2 * rz
    p = preconditioned.clone()
    iterations, converged = 0, rz <= 0.0
    gained, top, flat = 0.0, 0.0, 64 * torch.finfo(gradient.dtype).eps
    while not converged and iterations < max_iterations:
        hp = product(p)
        iterations += 1
        undamped, square = _dot(p, hp), _dot(p, p)
        curvature = undamped + damping * square
        top = max(top, curvature / square) if square > 0.0 else top
        if abs(curvature) <= flat * top * square:
            break
        if not curvature > 0.0:
            negative = curvature - damping * square
            change = _model_change(gradient, direction, residual, damping)
            return Solve(direction, iterations, change, False, p, negative)
        if pairs is not None and undamped > flat * top * square:
            pairs.add(p, hp)
        hp.add_(p, alpha=damping)
        alpha = rz / curvature
        direction.add_(p, alpha=alpha)
        gain = 0.5 * alpha * rz
        gained += gain
        residual.add_(hp, alpha=-alpha)
        preconditioned = precondition(residual)
        rz, previous = _dot(residual, preconditioned), rz
        converged = rz <= target
        if overhead is not None and gain * (iterations + overhead) < gained:
            break
        p.mul_(rz / previous).add_(preconditioned)
        if out_of_time is not None and out_of_time():
            break
    change = _model_change(gradient, direction, residual, damping)
    return Solve(direction, iterations, change, converged)


def _model_change(gradient: Tensor, d: Tensor, residual: Tensor, damping: float) -> float:
    """``g . d + d . H d / 2`` from ``residual = -g - (H + damping I) d``."""
    slope = _dot(gradient, d)
    return 0.5 * (slope - _dot(residual, d) - damping * _dot(d, d))


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b))
