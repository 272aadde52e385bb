r"""LOCAL: a ball that holds exactly one minimiser, and the gap to it.

In the norm of the Hessian ``H`` at the point, ``||d||^2 = d^T H d``, let ``lambda =
||g||_{H^-1}``, ``r = 4 lambda``, and ``M`` a bound on the third derivative over the ball of radius
``r`` (with ``||d|| <= 1`` the parts of ``d`` are at most ``lambda_x^-1/2`` and ``lambda_y^-1/2``).
On the ball the Hessian is at least ``m H``, ``m = 1 - M r``; on the sphere the objective exceeds
the centre's by at least ``r^2 / 2 - lambda r - M r^3 / 6``. If ``8 M lambda < 1`` then ``m > 1/2``
and the latter is positive: the ball holds exactly one minimiser and no other stationary point, at
a distance of at most ``lambda / m`` from the centre, and the gap is at most ``lambda^2 / (2 m)``.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnreg.certificate.bounds import Geometry, third_derivative
from attnreg.certificate.spectrum import LowerBounds

BALL = 4.0
"""Radius of the ball over the Newton decrement."""

ROOM = 8.0
"""``ROOM M lambda < 1`` is asked."""


@dataclass(frozen=True)
class Local:
    """The local statement, in the norm of the Hessian at the point.

    Attributes:
        decrement: ``lambda``.
        radius: ``4 lambda``: radius of the ball.
        lipschitz: ``M``: the Hessian's Lipschitz constant on the ball.
        mu: ``m``: strong convexity on the ball.
        gap: Bound on the value at the point less that at the minimiser.
        holds: Whether ``8 M lambda < 1``; otherwise gap and mu are those of no statement.
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
    mu = (1 - lipschitz * radius) * (1 - 1e-12)
    holds = ROOM * lipschitz * decrement * (1 + 1e-12) < 1
    gap = decrement**2 / (2 * mu) * (1 + 1e-12) if holds else float("inf")
    return Local(decrement, radius, lipschitz, mu, gap, holds)
