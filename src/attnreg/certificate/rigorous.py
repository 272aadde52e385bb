r"""The statements in ball arithmetic: no model of rounding is assumed.

The Hessian is proven positive definite with any float64 matrix ``Q`` near ``H^{-1/2}``: if ``||Q^T
H Q - I||_F <= e < 1`` then ``H^{-1} <= Q Q^T / (1 - e)``, so that with the rows ``Q_x`` and ``Q_y``
of the two parts::

    1 / lambda_x <= ||Q_x Q_x^T|| / (1 - e)         decrement^2 <= ||Q^T g||^2 / (1 - e)

Norms and sizes are rounded upwards to float64; the few sums and products of them that follow are of
positive terms and enlarged by more than their rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnreg.certificate.balls import (
    Balls,
    Exact,
    above,
    as_balls,
    spectral_bound,
    square_norm,
    working_precision,
)
from attnreg.certificate.bounds import Geometry, Sizes
from attnreg.certificate.convexity import Level
from attnreg.certificate.coordinates import Coordinates, Setting
from attnreg.certificate.findings import Findings, not_definite
from attnreg.certificate.gradient import Gradient
from attnreg.certificate.spectrum import LowerBounds, smallest_curvature
from attnreg.problem import AttentionProblem

ENCLOSED = ("none of rounding: every number is enclosed in ball arithmetic (python-flint)",)
MAX_PARAMETERS, MAX_ENTRIES = 400, 1 << 18


def rigorous_findings(
    problem: AttentionProblem, setting: Setting, coordinates: Coordinates
) -> Findings:
    """What :func:`attnreg.verify` finds, in ball arithmetic.

    Args:
        problem: The problem.
        setting: The problem and the point.
        coordinates: The coordinates.

    Returns:
        The findings.

    Raises:
        ValueError: If the problem is too large, or python-flint is not installed.
    """
    r1, r2, r3 = coordinates.shape
    size = r1 * r2 + r3 * problem.d_out
    entries = sum(len(s.a) * len(s.k) for s in setting.sequences)
    if size > MAX_PARAMETERS or entries > MAX_ENTRIES:
        raise ValueError(
            f"rigorous was asked for {size} parameters and {entries} attention weights; it is for "
            f"at most {MAX_PARAMETERS} and {MAX_ENTRIES}: leave it out"
        )
    with working_precision() as flint:
        balls = Balls(flint, setting, coordinates)
        exact = balls.evaluate()
        gradient = _gradient(flint, exact, (r1, r2, r3, problem.d_out))
        geometry = _geometry(flint, setting, balls, exact)
        errors = _gram_errors(flint, balls)
        level = _level(flint, setting)
        hessian = _midpoints(exact.hessian, size)
        bounds = _lower_bounds(flint, exact, hessian, r1 * r2)
    known = bounds or not_definite(smallest_curvature(hessian))
    return Findings.of(problem, setting, gradient, geometry, errors, known, "rigorous", level)


def _gradient(flint: Any, exact: Exact, shape: tuple[int, int, int, int]) -> Gradient:
    r1, r2, r3, out = shape
    flat = exact.gradient.entries()
    mid = torch.tensor([float(e) for e in flat], dtype=torch.float64)
    rest = exact.gradient - as_balls(flint, mid[:, None])
    split = r1 * r2
    errors = []
    for part in (rest.entries()[:split], rest.entries()[split:]):
        square = sum((e * e for e in part), flint.arb(0))
        errors.append(above(square.abs_upper().sqrt()))
    return Gradient(
        x=mid[:split].view(r1, r2),
        y=mid[split:].view(r3, out),
        x_error=errors[0],
        y_error=errors[1],
        loss=float(exact.loss),
        value=float(exact.value),
    )


def _geometry(flint: Any, setting: Setting, balls: Balls, exact: Exact) -> Geometry:
    sizes = []
    outputs = balls.outputs()
    for i, s in enumerate(setting.sequences):
        seen = s.seen.nonzero()[:, 0].tolist()
        values = [balls.values[i].tolist()[j] for j in seen]
        alpha = [_norm(flint, row) for row in balls.queries[i].tolist()]
        rho = exact.residuals[i]
        products = (a * r for a, r in zip(alpha, rho, strict=True))
        sizes.append(
            Sizes(
                K=_diameter(flint, balls.keys[i], seen),
                delta=_diameter(flint, balls.values[i], seen),
                omega=_diameter(flint, outputs[i], seen),
                beta=max(above(_norm(flint, row)) for row in values),
                alpha=max(map(above, alpha)),
                rho=max(map(above, rho)),
                rho_alpha=max(map(above, products)),
            )
        )
    features = above(spectral_bound(flint, exact.features).sqrt())
    return Geometry(tuple(sizes), features, above(spectral_bound(flint, balls.grams[0])))


def _norm(flint: Any, row: list[Any]) -> Any:
    return sum((e * e for e in row), flint.arb(0)).abs_upper().sqrt()


def _diameter(flint: Any, rows: Any, seen: list[int]) -> float:
    points = [rows.tolist()[i] for i in seen]
    largest = 0.0
    for i, a in enumerate(points):
        for b in points[:i]:
            square = sum(((p - q) ** 2 for p, q in zip(a, b, strict=True)), flint.arb(0))
            largest = max(largest, above(square))
    return above(flint.arb(largest).sqrt())


def _gram_errors(flint: Any, balls: Balls) -> tuple[float, float, float]:
    errors = []
    for gram in balls.grams:
        size = gram.nrows()
        eye = flint.arb_mat(size, size, [int(i == j) for i in range(size) for j in range(size)])
        errors.append(above(square_norm(flint, gram - eye).abs_upper().sqrt()))
    return errors[0], errors[1], errors[2]


def _level(flint: Any, setting: Setting) -> Level:
    center = as_balls(flint, setting.y_center)
    square, omega = flint.arb(0), []
    for s in setting.sequences:
        seen = s.seen.nonzero()[:, 0].tolist()
        outputs = as_balls(flint, s.v) * center
        rows = [outputs.tolist()[i] for i in seen]
        for target, weight in zip(as_balls(flint, s.b).tolist(), s.w.tolist(), strict=True):
            distances = (
                sum(((p - q) ** 2 for p, q in zip(row, target, strict=True)), flint.arb(0))
                for row in rows
            )
            square += flint.arb(max(map(above, distances))) * weight
        omega.append(_diameter(flint, outputs, seen))
    return Level(above(square.sqrt()), tuple(omega))


def _midpoints(matrix: Any, size: int) -> Tensor:
    return torch.tensor([float(e) for e in matrix.entries()], dtype=torch.float64).view(size, size)


def _lower_bounds(flint: Any, exact: Exact, hessian: Tensor, split: int) -> LowerBounds | None:
    size = hessian.shape[0]
    if not bool(hessian.isfinite().all()) or not bool((hessian.diagonal() > 0).all()):
        return None
    scale = hessian.diagonal().rsqrt()
    triangle, info = torch.linalg.cholesky_ex(scale[:, None] * hessian * scale)
    if int(info):
        return None
    eye = torch.eye(size, dtype=torch.float64)
    root = scale[:, None] * torch.linalg.solve_triangular(triangle, eye, upper=False).mT
    q = as_balls(flint, root)
    ones = flint.arb_mat(size, size, [int(i == j) for i in range(size) for j in range(size)])
    error = square_norm(flint, q.transpose() * exact.hessian * q - ones).abs_upper().sqrt()
    if not error < 0.5:
        return None
    share = 1 - error
    bounds = []
    for part in (root[:split], root[split:]):
        if len(part) == 0:
            bounds.append(float("inf"))
            continue
        rows = as_balls(flint, part)
        inverse = spectral_bound(flint, rows * rows.transpose()) / share
        bounds.append(1 / above(inverse) * (1 - 1e-15))
    move = q.transpose() * exact.gradient
    decrement = (square_norm(flint, move).abs_upper() / share).sqrt()
    return LowerBounds(bounds[0], bounds[1], above(decrement))
