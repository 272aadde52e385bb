"""GLOBAL: strong convexity of the reduced objective on the whole space, from the ridges alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnreg.certificate.bounds import C2, C3, SAFETY, Geometry, diameter
from attnreg.certificate.coordinates import Setting
from attnreg.certificate.doubled import matmul, subtract
from attnreg.certificate.gradient import Gradient


@dataclass(frozen=True)
class Convexity:
    """Whether the reduced objective is strongly convex on the whole space.

    Attributes:
        modulus: ``mu`` with reduced Hessian ``>= mu`` in ``||X'||_F``; certified where positive.
        needed: The smallest ``ridge_x`` that would be enough.
    """

    modulus: float
    needed: float


@dataclass(frozen=True)
class Level:
    """What is known of every point whose ``Y`` is optimal.

    Attributes:
        size: ``b``: bound on ``||R||``, and on ``sqrt(ridge_y) ||A3 (Y - Y0)||``.
        omega: ``omega0`` of each sequence: the diameter of ``Y0^T v``.
    """

    size: float
    omega: tuple[float, ...]

    @staticmethod
    def of(setting: Setting) -> Level:
        """Computes them in float64."""
        square, omega = 0.0, []
        for s in setting.sequences:
            mean = s.b.mean(0)
            outputs = subtract(matmul(s.v, setting.y_center), mean.expand(len(s.v), -1)).hi[s.seen]
            mode = "donot_use_mm_for_euclid_dist"
            farthest = torch.cdist(s.b - mean, outputs, compute_mode=mode).amax(1)
            square += float((s.w * farthest.square()).sum())
            omega.append(SAFETY * diameter(outputs))
        return Level(SAFETY * square**0.5, tuple(omega))


def gram_floors(gram_errors: Sequence[float]) -> list[float]:
    """Lower bounds on the eigenvalues of matrices at these distances from the identity.

    Returns:
        ``1 - error`` of each, 0 where the error is 1 or more: then nothing is known.
    """
    return [max(0.0, 1 - error) for error in gram_errors]


def convexity(
    setting: Setting, geometry: Geometry, gram_errors: Sequence[float], level: Level | None = None
) -> Convexity:
    r"""Strong convexity of the reduced objective from the ridges alone.

    At the optimal ``Y`` of any ``X`` the value is at most that at ``Y0``, so that ``||R||^2 +
    ridge_y ||A3 (Y - Y0)||^2 <= b^2`` with ``b^2 = sum_j w_j max_i ||Y0^T v_i - b_j||^2``. The
    second derivative in direction ``dX`` is the least joint one over ``dY``; without its square::

        2 [ridge_x / scale^2 - tau - nu^2 / ridge_y] x^2,    nu = delta K b sqrt(g1) / 4,
        tau = C3 alpha K^2 sqrt(g1) (omega0 b + delta b^2 / (2 sqrt(ridge_y)))

    with ``omega0`` the diameter of ``Y0^T v``. With ``Y0 = 0`` this is the statement for a ridge
    centred at 0; it needs a ridge so strong that it is of use for small moves from a centre only.

    Args:
        setting: The problem.
        geometry: Its sizes; those that depend on the point are not used.
        gram_errors: Bounds on ``||G' - I||`` of the whitened queries, keys and values.
        level: If it is known already.

    Returns:
        The modulus, minus infinity without ``ridge_y``, and the ridge needed.
    """
    scale, shares = setting.scale, gram_floors(gram_errors)
    ridge_y = setting.ridge_y * shares[2]
    if not min(ridge_y, shares[0], shares[1]) > 0:
        return Convexity(-math.inf, math.inf)
    level = Level.of(setting) if level is None else level
    b, root = level.size, geometry.queries**0.5
    nu = max(C2 * s.delta * s.K for s in geometry.sequences) * b * root
    tau = max(
        C3 * s.alpha * s.K**2 * root * (o * b + s.delta * b**2 / (2 * ridge_y**0.5))
        for s, o in zip(geometry.sequences, level.omega, strict=True)
    )
    need = SAFETY * (tau + nu**2 / ridge_y)
    share = shares[0] * shares[1]
    return Convexity(2 * (setting.ridge_x / scale**2 * share - need), need * scale**2 / share)


@dataclass(frozen=True)
class Global:
    """The global statement, on ``X`` in the natural metric."""

    gap: float
    distance: float
    mu: float


def global_statement(
    ridge_y: float, gradient: Gradient, geometry: Geometry, modulus: float
) -> Global:
    """Gap and distance where the reduced objective is strongly convex.

    With ``y = ||g_Y'|| / (2 ridge_y)`` the optimal ``Y`` is at most ``y`` away, which costs at most
    ``||g_Y'||^2 / (4 ridge_y)`` and moves the gradient by ``X`` by at most ``sqrt(g1) y [sigma
    omega K + ||R|| delta K + sigma delta K y] / 2``.

    Args:
        ridge_y: ``ridge_y``, less the error of the whitened Gram matrix.
        gradient: At the point.
        geometry: At the point.
        modulus: ``mu`` of the reduced objective, positive.

    Returns:
        The statement.
    """
    g_x = float(gradient.x.norm()) + gradient.x_error
    g_y = float(gradient.y.norm()) + gradient.y_error
    y = g_y / (2 * ridge_y)
    omega = max(s.omega * s.K for s in geometry.sequences)
    delta = max(s.delta * s.K for s in geometry.sequences)
    sigma, root = geometry.features, geometry.queries**0.5
    move = sigma * omega + gradient.loss**0.5 * (1 + 1e-9) * delta + sigma * delta * y
    g_x += 0.5 * root * y * move
    safety = 1 + 1e-9
    gap = safety * (g_y**2 / (4 * ridge_y) + g_x**2 / (2 * modulus))
    return Global(gap, safety * g_x / modulus, modulus)
