r"""Lower bounds of a Hessian, and the Newton decrement, with rounding accounted for.

A symmetric matrix ``S`` is positive definite if the floating-point Cholesky factorisation of ``S -
c I`` runs to its end with ``c = (N + 2) u trace(S)`` and a little more: then its backward error is
smaller than ``c`` in the spectral norm (Demmel 1989; Rump 2006). ``S`` is the Hessian scaled to
unit diagonal by powers of 2, which is exact, less the bounds on the rounding of its blocks.

With ``H >= lambda_x (I (+) 0)`` and ``H >= lambda_y (0 (+) I)``, and ``z`` any approximate solution
of ``H z = g`` with residual ``q``, the Newton decrement ``lambda = ||g||_{H^-1}`` is at most::

    sqrt(z^T H z) + sqrt(2 (||q_x||^2 / lambda_x + ||q_y||^2 / lambda_y))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.certificate.curvature import Curvature
from attnreg.certificate.gradient import Gradient

UNIT = torch.finfo(torch.float64).eps / 2
SHARES = (0.9, 0.5, 0.1)
"""Parts of the estimated lower bounds that are tried, the largest first."""


@dataclass(frozen=True)
class LowerBounds:
    """What has been proven of a Hessian.

    Attributes:
        x: ``lambda_x``; infinite where there is no ``X'``.
        y: ``lambda_y``; infinite where there is no ``Y'``.
        decrement: Upper bound on ``||g||_{H^-1}``.
    """

    x: float
    y: float
    decrement: float


def lower_bounds(curvature: Curvature, gradient: Gradient) -> LowerBounds | None:
    """Proves that a Hessian is positive definite.

    Args:
        curvature: The Hessian and its rounding.
        gradient: The gradient and its rounding.

    Returns:
        The bounds, or None where the proof fails.
    """
    matrix, n = curvature.matrix, curvature.split
    lowered = matrix.clone()
    lowered.diagonal().sub_(_rounding(curvature))
    factor = _factor(lowered)
    if factor is None:
        return None
    scale, triangle = factor
    inverse = torch.cholesky_inverse(triangle)
    estimates = []
    for part in (slice(0, n), slice(n, None)):
        block = scale[part, None] * inverse[part, part] * scale[part]
        estimates.append(1 / _largest(block) if block.shape[0] else math.inf)
    bounds = []
    for part, estimate in zip((slice(0, n), slice(n, None)), estimates, strict=True):
        bound = estimate if math.isinf(estimate) else _proven(lowered, part, estimate)
        if bound is None:
            return None
        bounds.append(bound)
    right = torch.cat([gradient.x.reshape(-1), gradient.y.reshape(-1)])
    step = scale * torch.cholesky_solve((scale * right)[:, None], triangle)[:, 0]
    step += scale * torch.cholesky_solve((scale * (right - matrix @ step))[:, None], triangle)[:, 0]
    decrement = _decrement(curvature, gradient, right, step, bounds)
    return LowerBounds(bounds[0], bounds[1], decrement)


def smallest_curvature(matrix: Tensor) -> float:
    """Smallest eigenvalue of a Hessian scaled to unit diagonal: an estimate, for messages.

    Returns:
        The estimate; nan where the Hessian is not finite.
    """
    if not bool(matrix.isfinite().all()):
        return math.nan
    diagonal = matrix.diagonal().abs()
    floor = torch.finfo(torch.float64).eps * diagonal.max().clamp_min(1e-300)
    scale = diagonal.clamp_min(floor).rsqrt()
    return float(torch.linalg.eigvalsh(scale[:, None] * matrix * scale)[0])


def _rounding(curvature: Curvature) -> Tensor:
    """Diagonal that exceeds the error of the Hessian: ``2 |x E y| <= |E| (t x^2 + y^2 / t)``."""
    diagonal, n = curvature.matrix.diagonal(), curvature.split
    sizes = [
        float(part.abs().mean()) if len(part) else 1.0
        for part in diagonal.split([n, len(diagonal) - n])
    ]
    ratio = (sizes[0] / sizes[1]) ** 0.5 if min(sizes) > 0 else 1.0
    margin = torch.full_like(diagonal, curvature.yy + curvature.xy / ratio)
    margin[:n] = curvature.xx + curvature.xy * ratio
    return margin


def _scale(diagonal: Tensor) -> Tensor:
    """Powers of 2 that bring a positive diagonal to between 1/2 and 2."""
    exponent = torch.frexp(diagonal.clamp_min(torch.finfo(torch.float64).tiny))[1]
    return torch.ldexp(torch.ones_like(diagonal), -torch.div(exponent, 2, rounding_mode="floor"))


def _factor(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Scale and Cholesky factor where the matrix is proven positive definite."""
    diagonal = matrix.diagonal()
    if not bool((diagonal > 0).all()):
        return None
    scale = _scale(diagonal)
    scaled = scale[:, None] * matrix * scale
    size = len(diagonal)
    margin = (size + 2) * UNIT * float(scaled.trace()) * (1 + 1e-3)
    scaled.diagonal().sub_(2 * margin)  # twice: the subtraction itself is rounded
    triangle, info = torch.linalg.cholesky_ex(scaled)
    return (scale, triangle) if int(info) == 0 else None


def _proven(lowered: Tensor, part: slice, estimate: float) -> float | None:
    for share in SHARES:
        shifted = lowered.clone()
        shifted.diagonal()[part] -= share * estimate
        if _factor(shifted) is not None:
            return share * estimate * (1 - 1e-12)
    return None


def _largest(block: Tensor) -> float:
    return float(torch.linalg.eigvalsh(block)[-1])


def _decrement(
    curvature: Curvature, gradient: Gradient, right: Tensor, step: Tensor, bounds: list[float]
) -> float:
    n, matrix = curvature.split, curvature.matrix
    image = matrix @ step
    rounding = (len(step) + 4) * UNIT * (matrix.abs() @ step.abs() + right.abs())
    x, y = float(step[:n].norm()), float(step[n:].norm())
    square = float(step @ image) + float(step.abs() @ rounding)
    square += curvature.xx * x * x + 2 * curvature.xy * x * y + curvature.yy * y * y
    rest = right - image
    q_x = float(rest[:n].norm() + rounding[:n].norm()) + gradient.x_error
    q_y = float(rest[n:].norm() + rounding[n:].norm()) + gradient.y_error
    q_x += curvature.xx * x + curvature.xy * y
    q_y += curvature.xy * x + curvature.yy * y
    left_out = 2 * (q_x**2 / bounds[0] + q_y**2 / bounds[1])
    return (max(square, 0.0) ** 0.5 + left_out**0.5) * (1 + 1e-12)
