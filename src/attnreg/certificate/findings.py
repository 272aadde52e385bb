"""What was computed of a point, before it is put into words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnreg.certificate.bounds import Geometry
from attnreg.certificate.convexity import Convexity, Level, convexity, gram_floors
from attnreg.certificate.coordinates import Setting
from attnreg.certificate.gradient import Gradient
from attnreg.certificate.local import Local, local_statement
from attnreg.certificate.spectrum import LowerBounds
from attnreg.problem import AttentionProblem


@dataclass(frozen=True)
class Findings:
    """Numbers from which the statements follow.

    Attributes:
        gradient: The gradient with its errors.
        gradient_norm: As in the certificate.
        geometry: Sizes at the point.
        local: The local statement; None where the Hessian is not proven positive definite.
        convexity: Of the reduced objective.
        obstacle: Why ``local`` is None.
        gram_errors: Bounds on ``||G' - I||`` of the whitened queries, keys and values.
        method: As in the certificate.
    """

    gradient: Gradient
    gradient_norm: float
    geometry: Geometry
    local: Local | None
    convexity: Convexity
    obstacle: str
    gram_errors: tuple[float, float, float]
    method: str

    @staticmethod
    def of(
        problem: AttentionProblem,
        setting: Setting,
        gradient: Gradient,
        geometry: Geometry,
        gram_errors: tuple[float, float, float],
        bounds: LowerBounds | str,
        method: str,
        level: Level | None = None,
    ) -> Findings:
        """Draws the consequences of what was computed.

        Args:
            problem: The problem.
            setting: The problem and the point.
            gradient: The gradient with its errors.
            geometry: Sizes at the point.
            gram_errors: As in the attributes.
            bounds: Of the Hessian, or why there are none.
            method: As in the attributes.
            level: As :func:`convexity` takes it.

        Returns:
            The findings.
        """
        return Findings(
            gradient=gradient,
            gradient_norm=dual_norm(problem, gradient, gram_errors),
            geometry=geometry,
            local=None if isinstance(bounds, str) else local_statement(geometry, bounds),
            convexity=convexity(setting, geometry, gram_errors, level),
            obstacle=bounds if isinstance(bounds, str) else "",
            gram_errors=gram_errors,
            method=method,
        )


def not_definite(smallest: float) -> str:
    """Why there is no local statement.

    Args:
        smallest: Estimate of the smallest curvature after scaling to unit diagonal.

    Returns:
        The reason and what to try.
    """
    if math.isnan(smallest):
        return "the Hessian has entries that are not finite: rescale the inputs"
    if smallest < -1e-8:
        return (
            f"the Hessian has negative curvature (-{-smallest:.1e} after scaling to unit "
            "diagonal): a saddle point or a point far from a minimiser; continue the fit"
        )
    return (
        f"the Hessian is singular to working precision (smallest curvature {abs(smallest):.1e} "
        "after scaling to unit diagonal): set ridge_x and ridge_y"
    )


def dual_norm(
    problem: AttentionProblem, gradient: Gradient, errors: tuple[float, float, float]
) -> float:
    """Dual norm of the joint gradient in the natural metric over ``||B - mean||^2``.

    The part of ``Y`` is measured in the root of that, so that the whole has no unit.

    Args:
        problem: Gives the targets.
        gradient: With its errors, which are added.
        errors: Bounds on ``||G' - I||``; used where ``G'`` is the metric.

    Returns:
        An upper bound; infinite where an error of 1 leaves none.
    """
    target = problem.target_norm_squared or 1.0
    x = float(gradient.x.norm()) + gradient.x_error
    y = float(gradient.y.norm()) + gradient.y_error
    share = gram_floors(errors)
    if not problem.ridge_x:
        share[1] = 1.0
    if not problem.ridge_y:
        share[2] = 1.0
    if not min(share) > 0:
        return math.inf
    return math.hypot(x / target / (share[0] * share[1]) ** 0.5, y / (target * share[2]) ** 0.5)
