"""``verify``: from a problem and parameters to a certificate, without any solver.

The statement is about the *joint* objective in ``(X, Y)`` with the problem's ridges, at the
parameters as they are given: whether ``Y`` is optimal for ``X`` does not matter. Numbers are
promoted to float64, exactly. See the modules of this package for the mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from attnreg.certificate.bounds import GeometryObserver
from attnreg.certificate.certificate import Certificate, Kind, parameters_digest
from attnreg.certificate.convexity import global_statement, gram_floors
from attnreg.certificate.coordinates import Coordinates, Setting
from attnreg.certificate.curvature import CurvatureObserver
from attnreg.certificate.findings import Findings, not_definite
from attnreg.certificate.gradient import evaluate
from attnreg.certificate.large import MATRIX_FREE, JointHessian, probable_bounds
from attnreg.certificate.multihead import layer_certificate
from attnreg.certificate.rigorous import ENCLOSED, rigorous_findings
from attnreg.certificate.spectrum import LowerBounds, lower_bounds, smallest_curvature
from attnreg.models import Bilinear, Model
from attnreg.problem import AttentionProblem

MAX_DENSE = 4096
"""Largest number of parameters for which the joint Hessian is formed."""

DOUBLED = (
    "sums in doubled arithmetic (about 100 bits) have a relative error of at most 2^-72 of the "
    "sums of absolute values, more where they have over 400 terms",
    "float64 sums of the Hessian obey the usual rounding bounds (2^-53 for every operation)",
)


@runtime_checkable
class Fitted(Protocol):
    """A model with its parameters, such as the result of a fit."""

    @property
    def model(self) -> Model:
        """What was fitted."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Named tensors."""


def verify(
    problem: AttentionProblem,
    X: Tensor | Fitted,
    Y: Tensor | None = None,
    *,
    tolerance: float = 1e-8,
    rigorous: bool = False,
    failure_probability: float = 1e-6,
    seed: int = 0,
) -> Certificate:
    """Says what can be proven of parameters: nothing of how they were found is used.

    Args:
        problem: Inputs, outputs, mask, weights, scale and ridges.
        X: ``X`` of the bilinear model, or a result of :func:`attnreg.fit`.
        Y: ``Y`` of the bilinear model; left out where a result is given.
        tolerance: ``STATIONARY`` is stated where the dual norm of the joint gradient in the natural
            metric is at most ``tolerance ||B - mean||_F^2``.
        rigorous: Whether everything is computed in ball arithmetic, so that no model of rounding
            is assumed; for small problems, and needs the extra ``attnreg[rigorous]``.
        failure_probability: With which the bounds of Lanczos may be wrong, where it is used: for
            more than 4,096 parameters and for multi-head layers.
        seed: Of the start of Lanczos.

    Returns:
        The strongest certificate that holds.

    Raises:
        ValueError: If the parameters do not fit the problem, or an argument is out of range.
    """
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance={tolerance} was given, a positive number is expected")
    if not 0 < failure_probability < 1:
        raise ValueError(
            f"failure_probability={failure_probability} was given, a number between 0 and 1 is "
            "expected"
        )
    parameters = _parameters(X, Y)
    model = X.model if isinstance(X, Fitted) else Bilinear()
    digests = (problem.digest(), parameters_digest(parameters, repr(model)))
    if not isinstance(model, Bilinear):
        if rigorous:
            raise ValueError("rigorous was asked for a multi-head layer; it is for X and Y only")
        return layer_certificate(
            problem, model, parameters, tolerance, failure_probability, seed, digests
        )
    setting = Setting.of(problem, parameters)
    coordinates = Coordinates.of(setting, problem.dtype)
    r1, r2, r3 = coordinates.shape
    failure, assumptions = 0.0, tuple[str, ...]()
    if rigorous:
        found, assumptions = rigorous_findings(problem, setting, coordinates), ENCLOSED
    elif r1 * r2 + r3 * problem.d_out <= MAX_DENSE:
        found, assumptions = _findings(problem, setting, coordinates), DOUBLED
    else:
        failure = failure_probability
        found = _large_findings(problem, setting, coordinates, failure, seed)
        assumptions = (DOUBLED[0], *MATRIX_FREE)
    assumptions = (*assumptions, *_held(coordinates))
    return _certificate(problem, found, assumptions, (tolerance, failure), digests)


def _parameters(X: Tensor | Fitted, Y: Tensor | None) -> Mapping[str, Tensor]:
    if not isinstance(X, Fitted):
        if Y is None:
            raise ValueError("X was given without Y; give both, or the result of a fit")
        return {"X": torch.as_tensor(X), "Y": torch.as_tensor(Y)}
    if Y is not None:
        raise ValueError("a result and Y were given; a result has its own Y: leave Y out")
    return X.parameters


def _findings(problem: AttentionProblem, setting: Setting, coordinates: Coordinates) -> Findings:
    """The pass over the data and the statements that follow from it."""
    geometry_of = GeometryObserver(setting, coordinates)
    curvature_of = CurvatureObserver(setting, coordinates)

    def observe(rows):  # type: ignore[no-untyped-def]
        geometry_of(rows)
        curvature_of(rows)

    gradient = evaluate(setting, coordinates, observe)
    geometry, curvature = geometry_of.result(), curvature_of.result()
    errors = _gram_errors(setting, coordinates)
    finite = bool(curvature.matrix.isfinite().all())
    bounds = lower_bounds(curvature, gradient) if finite else None
    return Findings.of(
        problem,
        setting,
        gradient,
        geometry,
        errors,
        bounds or not_definite(smallest_curvature(curvature.matrix)),
        "doubled",
    )


def _large_findings(
    problem: AttentionProblem,
    setting: Setting,
    coordinates: Coordinates,
    failure: float,
    seed: int,
) -> Findings:
    """The same without the Hessian."""
    geometry_of = GeometryObserver(setting, coordinates)
    gradient = evaluate(setting, coordinates, geometry_of)
    geometry, errors = geometry_of.result(), _gram_errors(setting, coordinates)
    wide = problem.to(torch.float64, "cpu")
    hessian = JointHessian(wide, {"X": setting.x, "Y": setting.y}, setting, coordinates)
    bounds, found = probable_bounds(hessian, gradient, failure, seed)
    if bounds is not None:
        known: LowerBounds | str = bounds
    elif found.smallest < -1e-8 * found.largest:
        known = not_definite(found.smallest / found.largest)
    else:
        known = (
            f"the smallest curvature is at most {found.smallest / found.largest:.1e} of the "
            "largest, which Lanczos cannot tell from zero in the steps it is given: set stronger "
            "ridges"
        )
    return Findings.of(problem, setting, gradient, geometry, errors, known, "matrix-free")


def _gram_errors(setting: Setting, coordinates: Coordinates) -> tuple[float, float, float]:
    """Distances of the whitened Gram matrices from the identity."""
    weighted = [
        s.w.sqrt()[:, None] * coordinates.queries(s.a, setting.scale).hi for s in setting.sequences
    ]
    parts = (
        torch.cat(weighted),
        coordinates.keys(setting.keys).hi,
        coordinates.values(setting.values).hi,
    )
    errors = []
    for rows in parts:
        gram = rows.mT @ rows
        gram.diagonal().sub_(1.0)
        errors.append(float(gram.norm()) * (1 + 1e-6) + 1e-13)
    return errors[0], errors[1], errors[2]


def _held(coordinates: Coordinates) -> tuple[str, ...]:
    """Directions along which nothing is stated."""
    return tuple(
        f"{count} direction(s) of the {name} without data (singular values below {floor:.0e} of "
        "the largest) are held at the given parameters"
        for name, count, floor in zip(
            ("queries", "keys", "values"), coordinates.held, coordinates.floor, strict=True
        )
        if count
    )


def _certificate(
    problem: AttentionProblem,
    found: Findings,
    assumptions: tuple[str, ...],
    settings: tuple[float, float],
    digests: tuple[str, str],
) -> Certificate:
    """The strongest statement that the findings allow."""
    tolerance, failure = settings
    kind, gap, radius, mu, lipschitz, norm = Kind.NOT_CERTIFIED, None, None, None, None, "none"
    local, modulus = found.local, found.convexity.modulus
    if local is not None and local.holds:
        kind, norm = Kind.LOCAL, "hessian"
        gap, radius, mu, lipschitz = local.gap, local.radius, local.mu, local.lipschitz
        reason = (
            "the Hessian is positive definite and 2 lipschitz * decrement is "
            f"{2 * local.lipschitz * local.decrement:.1e}, below 1; GLOBAL needs ridge_x above "
            f"{found.convexity.needed:.1e} at this ridge_y"
        )
    elif local is not None:
        reason = (
            "the Hessian is positive definite, but the gradient is too large for a ball: 2 "
            f"lipschitz * decrement is {2 * local.lipschitz * local.decrement:.1e}, below 1 is "
            "needed; continue the fit with a smaller tol, or in float64"
        )
    else:
        reason = found.obstacle
    if modulus > 0 and math.isfinite(found.gradient_norm):
        ridge_y = problem.ridge_y * gram_floors(found.gram_errors)[2]
        statement = global_statement(ridge_y, found.gradient, found.geometry, modulus)
        kind, norm, lipschitz = Kind.GLOBAL, "natural", None
        gap = statement.gap if gap is None else min(gap, statement.gap)
        radius, mu = statement.distance, statement.mu
        reason = (
            f"ridge_x is above {found.convexity.needed:.1e}, from where on the reduced objective "
            "is strongly convex on the whole space"
        )
    if kind is Kind.NOT_CERTIFIED and found.gradient_norm <= tolerance:
        kind = Kind.STATIONARY
    return Certificate(
        kind=kind,
        gap=gap,
        radius=radius,
        mu=mu,
        lipschitz=lipschitz,
        tolerance=tolerance,
        assumptions=assumptions,
        reason=reason,
        gradient_norm=_finite(found.gradient_norm),
        norm=norm,
        loss=_finite(found.gradient.loss),
        value=_finite(found.gradient.value),
        method=found.method,
        failure_probability=failure,
        problem_digest=digests[0],
        parameters_digest=digests[1],
    )


def _finite(value: float) -> float:
    """A number that overflowed is infinite, whatever it became."""
    return value if math.isfinite(value) else math.inf
