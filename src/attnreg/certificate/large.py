r"""Certificates without the Hessian: products with it, Lanczos, and a failure probability.

For the bilinear model with too many parameters for a dense Hessian. Products with the joint Hessian
along ``(dX, dY)`` cost an attention pass forward and two back, in float64::

    dr = dF Y + F dY
    X:  2 vjp'(dX; W r Y^T, W (dr Y^T + r dY^T))     Y:  2 (F^T W dr + dF^T W r)

(no factor 1/2, plus the ridges), in the whitened coordinates. With ``D`` equal to 1 on ``X'`` and
to ``s`` on ``Y'``, chosen so that both blocks have about the same size, ``D H D >= mu I`` from
Lanczos gives ``lambda_x = mu`` and ``lambda_y = mu / s^2``. The Newton decrement is bounded from
conjugate gradients and their residual ``q`` in those coordinates: ``sqrt(z^T D H D z) + ||q|| /
sqrt(mu)``. Gradient and sizes are those of the dense case.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnreg.certificate.coordinates import Coordinates, Setting
from attnreg.certificate.gradient import Gradient
from attnreg.certificate.lanczos import Extremes, extremes, solve
from attnreg.certificate.spectrum import LowerBounds
from attnreg.models import Bilinear, Features
from attnreg.problem import AttentionProblem

STEPS, SOLVE_STEPS = 240, 600
PRODUCT_ERROR = 1e-11
"""Relative error of a product with the Hessian that is assumed."""

MATRIX_FREE = (
    "the Hessian is known by its products, in float64, each right to 1e-11 of the Hessian's norm",
    "its smallest eigenvalue is bounded by Lanczos from a random start, with the failure "
    "probability that is stated",
)


class JointHessian:
    """Products with the joint Hessian in whitened coordinates.

    Args:
        problem: The problem, in float64 on the CPU.
        parameters: ``X`` and ``Y``.
        setting: The same, as the certificate has it.
        coordinates: The coordinates.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        parameters: Mapping[str, Tensor],
        setting: Setting,
        coordinates: Coordinates,
    ) -> None:
        theta, self._readout = Bilinear().split(problem, parameters)
        self._features = Features(problem, Bilinear(), theta)
        self._coordinates, self._setting = coordinates, setting
        targets = torch.cat([batch.B.flatten(0, 1) for batch in problem.batches])
        weights = torch.cat([batch.weights.flatten() for batch in problem.batches])[:, None]
        self._weights = weights
        self._columns = self._features.columns
        self._residual = weights * (self._columns @ self._readout - targets)
        self._grams = (problem.gram_query, problem.gram_key, problem.gram_value)
        r1, r2, r3 = coordinates.shape
        self.split, self.size = r1 * r2, r1 * r2 + r3 * problem.d_out
        self.scale = torch.ones(self.size, dtype=torch.float64)
        self.scale[self.split :] = self._balance(problem.d_out)

    def scaled(self, vector: Tensor) -> Tensor:
        """``D H D v``."""
        return self.scale * self.product(self.scale * vector)

    def product(self, vector: Tensor) -> Tensor:
        """``H v``."""
        c, setting, features = self._coordinates, self._setting, self._features
        r1, r2, r3 = c.shape
        dx = c.t1 @ vector[: self.split].view(r1, r2) @ c.t2.mT
        dy = c.t3 @ vector[self.split :].view(r3, -1)
        flat = dx.reshape(-1)
        change = features.jvp(flat)
        moved = self._weights * (change @ self._readout + self._columns @ dy)  # W dr
        pull = self._residual @ self._readout.mT
        pull_change = moved @ self._readout.mT + self._residual @ dy.mT
        x = features.vjp_derivative(flat, pull, pull_change).view(dx.shape)
        y = self._columns.mT @ moved + change.mT @ self._residual
        g1, g2, g3 = self._grams
        x = x + setting.ridge_x * (g1 @ dx @ g2)
        y = y + setting.ridge_y * (g3 @ dy)
        return 2 * torch.cat([(c.t1.mT @ x @ c.t2).reshape(-1), (c.t3.mT @ y).reshape(-1)])

    def _balance(self, d_out: int) -> float:
        """Ratio of the sizes of the blocks of X and Y, from one random direction each."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.size, generator=generator, dtype=torch.float64)
        sizes = []
        for part in (slice(0, self.split), slice(self.split, None)):
            probe = torch.zeros_like(v)
            probe[part] = v[part]
            for _ in range(3):
                image = torch.zeros_like(v)
                image[part] = self.product(probe / probe.norm())[part]
                probe = image
            sizes.append(float(probe.norm()))
        return (sizes[0] / sizes[1]) ** 0.5 if min(sizes) > 0 else 1.0


def probable_bounds(
    hessian: JointHessian, gradient: Gradient, failure: float, seed: int
) -> tuple[LowerBounds | None, Extremes]:
    """Lower bounds of the Hessian and the Newton decrement, but for a failure probability.

    Args:
        hessian: Products with it.
        gradient: At the point.
        failure: Probability with which the bounds may be wrong.
        seed: Of the start of Lanczos.

    Returns:
        The bounds, or None where positive definiteness is not shown; and what Lanczos found.
    """
    found = extremes(hessian.scaled, hessian.size, STEPS, failure, seed)
    mu = found.floor - PRODUCT_ERROR * max(found.ceiling, 0.0)
    if not mu > 0:
        return None, found
    scale, n = hessian.scale, hessian.split
    right = scale * torch.cat([gradient.x.reshape(-1), gradient.y.reshape(-1)])
    z = solve(hessian.scaled, right, SOLVE_STEPS, 1e-8)
    image = hessian.scaled(z)
    error = PRODUCT_ERROR * found.ceiling * float(z.norm())
    square = float(z @ image) + error * float(z.norm())
    rest = float((right - image).norm()) + error
    rest += gradient.x_error + float(scale[-1]) * gradient.y_error
    decrement = max(square, 0.0) ** 0.5 + rest / mu**0.5
    y = mu / float(scale[-1]) ** 2 if n < hessian.size else float("inf")
    return LowerBounds(mu if n else float("inf"), y, decrement * (1 + 1e-12)), found
