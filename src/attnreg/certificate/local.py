r"""LOCAL: a ball that holds exactly one minimiser, and the gap to it.

In the norm of the Hessian ``H`` at the point, ``||d||^2 = d^T H d``, let ``lambda =
||g||_{H^-1}``, ``r = 2 lambda``, and ``M`` a bound on the third derivative over the ball of radius
``r`` (with ``||d|| <= 1`` the parts of ``d`` are at most ``lambda_x^-1/2`` and ``lambda_y^-1/2``).

* On the ball the Hessian is at least ``(1 - M t) H`` at distance ``t``, so at least ``m H``, ``m =
  1 - M r``.
* The outward derivative on the sphere is at least ``r (1 - M r / 2) - lambda``.
* At distance ``t`` the objective is at least the centre's ``- lambda t + t^2 / 2 - M t^3 / 6``.

If ``2 M lambda < 1`` then ``m > 0`` and the outward derivative is positive: the ball holds exactly
one minimiser and no other stationary point. The gap is at most the largest value of ``lambda t -
t^2 / 2 + M t^3 / 6`` on it, taken at ``t = 2 lambda / (1 + sqrt(1 - 2 M lambda))``, which bounds
the distance of the minimiser too (the constants of Kantorovich's theorem).
"""

from __future__ import annotations

from dataclasses import dataclass

from attnreg.certificate.bounds import Geometry, third_derivative
from attnreg.certificate.spectrum import LowerBounds

BALL = 2.0
"""Radius of the ball over the Newton decrement; ``BALL M lambda < 1`` is asked."""

_SAFETY = 1 + 1e-12


@dataclass(frozen=True)
class Local:
    """The local statement, in the norm of the Hessian at the point.

    Attributes:
        decrement: ``lambda``.
        radius: ``2 lambda``: radius of the ball.
        lipschitz: ``M``: the Hessian's Lipschitz constant on the ball.
        mu: ``m``: strong convexity on the ball.
        gap: Bound on the value at the point less that at the minimiser.
        holds: Whether ``2 M lambda < 1``; otherwise gap and mu are those of no statement.
    """

    decrement: float
    radius: float
    lipschitz: float
    mu: float
    gap: float
    holds: bool


def local_statement(geometry: Geometry, bounds: LowerBounds) -> Local:
    """Puts the constants together.

    Args:
        geometry: Sizes at the point.
        bounds: Of the Hessian at the point.

    Returns:
        The statement, which may not hold.
    """
    decrement = bounds.decrement
    radius = BALL * decrement
    x, y = bounds.x**-0.5, bounds.y**-0.5
    ball = geometry.enlarged(radius * x, radius * y)
    lipschitz = third_derivative(ball, x, y)
    share = BALL * lipschitz * decrement * _SAFETY
    if not share < 1:
        return Local(decrement, radius, lipschitz, 0.0, float("inf"), holds=False)
    far = 2 * decrement / (1 + (1 - share) ** 0.5)
    gap = (decrement * far - far**2 / 2 + lipschitz * far**3 / 6) * (1 + 1e-9)
    return Local(decrement, radius, lipschitz, (1 - share) / _SAFETY, gap, holds=True)
