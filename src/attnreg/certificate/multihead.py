r"""What is stated of a multi-head layer: stationarity, and no negative curvature.

Its parameters have a gauge (``W_Q M, W_K M^-T`` for every head, values likewise), along which the
objective is constant, so that no ball holds exactly one minimiser and nothing of the kind is said.
At the given parameters, in float64:

* the joint gradient, by the non-linear parameters and by the readout, in the natural metric;
* the smallest curvature of the *reduced* objective in that metric, bounded by Lanczos from a random
  start. The gauge contributes zeros at a stationary point; a floor of about minus the accuracy of
  Lanczos says that no direction has more negative curvature than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from attnreg.certificate.certificate import Certificate, Kind
from attnreg.certificate.lanczos import extremes
from attnreg.kronecker import KroneckerSolver, apply_right, split_blocks
from attnreg.models import Model
from attnreg.objective import Objective, Point
from attnreg.problem import AttentionProblem
from attnreg.readout import scaled_inverse

STEPS = 100
NEGATIVE = 1e-6
"""Curvature below minus this, over the largest, is negative and not rounding."""

STATED = (
    "gradient and products with the Hessian are float64 and are taken to be exact to rounding",
    "curvature is bounded by Lanczos from a random start, with the failure probability that is "
    "stated",
    "nothing is stated of a minimiser: the layer's gauge leaves the objective constant",
)
HELD = ("the gains of the norms of queries and keys are held at the given parameters",)


class Whitened:
    """The natural metric at a point as coordinates: Euclidean there, null directions left out.

    Args:
        objective: Gives blocks and left factors.
        theta: The point.
        readout: Its readout.
    """

    def __init__(self, objective: Objective, theta: Tensor, readout: Tensor) -> None:
        self._blocks = objective.layout.blocks
        right = objective.model.natural_metric(objective.problem, theta, readout)
        pairs = zip(objective.left, right, strict=True)
        self._solvers = [KroneckerSolver.of(left, factor) for left, factor in pairs]
        self._roots = [
            torch.where(s.values > 0, s.values, torch.inf).rsqrt() for s in self._solvers
        ]
        self._shapes = [root.shape for root in self._roots]
        self.size = sum(root.numel() for root in self._roots)

    def direction(self, flat: Tensor) -> Tensor:
        """The parameters' change of a vector of coordinates."""
        parts = flat.split([root.numel() for root in self._roots])
        found = []
        for part, root, solver in zip(parts, self._roots, self._solvers, strict=True):
            inner = apply_right(part.view(root.shape) * root, solver.vectors.mT)
            found.append((solver.left.vectors @ inner).reshape(-1))
        return torch.cat(found)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The transpose of :meth:`direction`."""
        found = []
        parts = split_blocks(gradient, self._blocks)
        for part, root, solver in zip(parts, self._roots, self._solvers, strict=True):
            inner = apply_right(solver.left.vectors.mT @ part, solver.vectors)
            found.append((inner * root).reshape(-1))
        return torch.cat(found)


def layer_certificate(
    problem: AttentionProblem,
    model: Model,
    parameters: Mapping[str, Tensor],
    tolerance: float,
    failure: float,
    seed: int,
    digests: tuple[str, str],
) -> Certificate:
    """Certifies the parameters of a multi-head layer.

    Args:
        problem: The problem.
        model: The layer.
        parameters: Its named parameters.
        tolerance: Of the gradient.
        failure: Probability with which the bound on the curvature may be wrong.
        seed: Of the start of Lanczos.
        digests: Of the problem and the parameters.

    Returns:
        ``STATIONARY`` or ``NOT_CERTIFIED``; ``mu`` is the lower bound on the curvature over the
        largest curvature.
    """
    wide = problem.to(torch.float64, "cpu")
    exact = {name: torch.as_tensor(value).double().cpu() for name, value in parameters.items()}
    theta, readout = model.split(wide, exact)
    objective = Objective(wide, model)
    point = Point(objective, objective.features(theta))
    coordinates = Whitened(objective, theta, readout)
    gradient_norm, loss, value = _joint(objective, point, readout, coordinates)
    found = extremes(
        lambda v: coordinates.pull_back(point.hessian(coordinates.direction(v))),
        coordinates.size,
        STEPS,
        failure,
        seed,
    )
    floor = found.floor / found.largest if found.largest > 0 else -math.inf
    negative = found.smallest < -NEGATIVE * found.largest
    kind = Kind.STATIONARY if gradient_norm <= tolerance and not negative else Kind.NOT_CERTIFIED
    if negative:
        reason = (
            f"there is negative curvature (-{-found.smallest / found.largest:.1e} of the largest): "
            "a saddle point, or a point far from a minimiser; continue the fit"
        )
    elif kind is Kind.NOT_CERTIFIED:
        reason = (
            f"the gradient norm {gradient_norm:.1e} is above the tolerance; continue the fit "
            "with a smaller tol, or in float64"
        )
    else:
        reason = (
            "the gradient is within the tolerance and no negative curvature was found; the gauge "
            "of a multi-head layer admits no stronger statement"
        )
    return Certificate(
        kind=kind,
        gap=None,
        radius=None,
        mu=floor if math.isfinite(floor) else None,
        lipschitz=None,
        tolerance=tolerance,
        assumptions=STATED + HELD if objective.layout.held else STATED,
        reason=reason,
        gradient_norm=gradient_norm,
        norm="natural",
        loss=loss,
        value=value,
        method="matrix-free",
        failure_probability=failure,
        problem_digest=digests[0],
        parameters_digest=digests[1],
    )


def _joint(
    objective: Objective, point: Point, readout: Tensor, coordinates: Whitened
) -> tuple[float, float, float]:
    """Dual norm of the joint gradient at the given readout over the targets', loss and value."""
    features = point.features
    columns, width = features.columns, objective.layout.features
    residual = columns @ readout - objective.targets
    weighted = objective.weighted(residual)
    by_theta = 2 * features.vjp(weighted @ readout[:width].mT)
    by_readout = 2 * columns.mT @ weighted
    gram = columns.mT @ objective.weighted(columns)
    loss = float((residual * weighted).sum())
    value, ridge = loss, objective.ridge
    if ridge is not None:
        move = readout - ridge.readout_center
        by_readout += 2 * ridge.readout @ move
        gram = gram + ridge.readout
        value += float((move * (ridge.readout @ move)).sum())
        distance, pull = point.theta - ridge.center, torch.zeros_like(point.theta)
        objective.add_ridge_gradient(distance, pull)
        by_theta = by_theta + pull
        value += 0.5 * float(distance @ pull)
    target = objective.target_norm_squared
    inverse, _ = scaled_inverse(gram)
    y_square = float((by_readout * (inverse @ by_readout)).sum())
    x = float(coordinates.pull_back(by_theta).norm())
    return math.hypot(x / target, (max(y_square, 0.0) / target) ** 0.5), loss, value
