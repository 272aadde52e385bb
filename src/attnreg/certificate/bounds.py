r"""Proven constants of the objective: softmax cumulants, third derivative, spectrum.

All sizes are those of the whitened coordinates: ``x = ||X'||_F``, ``y = ||Y'||_F``; rows
``a'_j`` (with the logit scale), ``k'_i``, ``v'_i``; ``w_i = Y^T v_i``. ``K``, ``delta`` and
``omega`` are the diameters of the ``k'``, ``v'`` and ``w`` of a sequence, ``beta`` the largest
``||v'||``, ``alpha_j = ||a'_j||``, ``rho_j = ||r_j||``, ``g1`` the largest eigenvalue of ``sum_j
w_j a'_j a'_j^T`` (1 up to rounding), ``sigma`` the spectral norm of the weighted features.
``docs/theory.md`` has the proofs.

**Cumulants.** For a distribution on finitely many points and functions ``z`` of range ``R`` and
``w`` of diameter ``W``: ``|k2(w, z)| <= W R / 4``, ``|k3(w, z, z)| <= C3 W R^2``,
``|k4(w, z, z, z)| <= C4 W R^3``.

**Third derivative.** Along a line in direction ``(dX, dY)`` the logits of row ``j`` change at
constant rates of range ``R_j <= K p_j``, ``p_j = ||dX'^T a'_j||``, ``sum_j w_j p_j^2 <= g1 x^2``,
``p_j <= alpha_j x``. With ``f', f'', f'''`` the cumulants of the values, the third derivative is::

    sum_j w_j [2 <r, 3 dY^T f'' + Y^T f'''> + 6 <dY^T f + Y^T f', 2 dY^T f' + Y^T f''>]

and every term is bounded by the cumulants and Cauchy-Schwarz (:func:`third_derivative`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.certificate.coordinates import Coordinates, Setting
from attnreg.certificate.doubled import about_mean, matmul
from attnreg.certificate.gradient import Rows

C2 = 1 / 4
"""Bound on the second cumulant (Popoviciu)."""

C3 = 1 / (6 * math.sqrt(3))
"""Bound on the third one, attained."""

C4 = 0.1266
"""Bound on the fourth one; its supremum is 1/8, numerically."""

SAFETY = 1 + 1e-9
"""Sizes are enlarged by this. Rows are computed in doubled arithmetic about their means; what is
left is float64 sums of terms of one sign."""

_MANY = 4096
"""A sequence of more keys gets its diameter from the distances to one point, doubled."""


@dataclass(frozen=True)
class Sizes:
    """What the bounds need of one sequence at a point; see the module.

    Attributes:
        K: Diameter of the keys.
        delta: Diameter of the values.
        omega: Diameter of the ``w``.
        beta: Largest norm of a value.
        alpha: Largest norm of a query row.
        rho: Largest norm of a residual.
        rho_alpha: Largest product of the two.
    """

    K: float
    delta: float
    omega: float
    beta: float
    alpha: float
    rho: float
    rho_alpha: float

    def enlarged(self, x: float, y: float) -> Sizes:
        """Bounds that hold on the ball ``||X' - X'_0|| <= x``, ``||Y' - Y'_0|| <= y``.

        ``r_j`` moves by the features' move through ``Y``, at most ``omega K alpha_j x / 4``, and
        by the move of ``Y``, at most ``beta y``.

        Returns:
            The enlarged sizes.
        """
        move = C2 * self.omega * self.K * x
        return Sizes(
            K=self.K,
            delta=self.delta,
            omega=self.omega + self.delta * y,
            beta=self.beta,
            alpha=self.alpha,
            rho=self.rho + move * self.alpha + self.beta * y,
            rho_alpha=self.rho_alpha + move * self.alpha**2 + self.beta * y * self.alpha,
        )


@dataclass(frozen=True)
class Geometry:
    """The sizes of all sequences at a point.

    Attributes:
        sequences: One entry a sequence.
        features: ``sigma``, the spectral norm of the weighted whitened features.
        queries: ``g1``.
    """

    sequences: tuple[Sizes, ...]
    features: float
    queries: float

    def enlarged(self, x: float, y: float) -> Geometry:
        """Bounds that hold on a ball, as :meth:`Sizes.enlarged`."""
        spread = max(s.delta * s.K for s in self.sequences)
        features = self.features + C2 * spread * self.queries**0.5 * x
        return Geometry(tuple(s.enlarged(x, y) for s in self.sequences), features, self.queries)


def third_derivative(geometry: Geometry, x: float, y: float) -> float:
    """Bound on ``|D^3 F[d, d, d]|`` over directions of at most these sizes.

    Args:
        geometry: Sizes that hold where the derivative is taken (enlarged ones on a ball).
        x: Bound on ``||dX'||_F``.
        y: Bound on ``||dY'||_F``.

    Returns:
        The bound; by Banach's theorem it bounds the trilinear form too where ``x`` and ``y``
        bound the parts of the unit ball of a Hilbert norm.
    """
    g1, sigma = geometry.queries, geometry.features
    root = g1**0.5

    def top(term):  # type: ignore[no-untyped-def]
        return max(term(s) for s in geometry.sequences)

    yyx = 12 * C2 * sigma * root * top(lambda s: s.delta * s.K)
    yxx = (
        6 * C3 * g1 * top(lambda s: s.rho * s.delta * s.K**2)
        + 6 * C3 * sigma * root * top(lambda s: s.omega * s.K**2 * s.alpha)
        + 12 * C2**2 * g1 * top(lambda s: s.omega * s.delta * s.K**2)
    )
    xxx = 2 * C4 * g1 * top(lambda s: s.rho_alpha * s.omega * s.K**3) + 6 * C2 * C3 * g1 * top(
        lambda s: s.omega**2 * s.K**3 * s.alpha
    )
    return float(SAFETY * (yyx * y * y * x + yxx * y * x * x + xxx * x**3))


class GeometryObserver:
    """Collects a :class:`Geometry` from the rows of an evaluation.

    Args:
        setting: The problem and the point.
        coordinates: The coordinates.
    """

    def __init__(self, setting: Setting, coordinates: Coordinates) -> None:
        self._static = []
        for s in setting.sequences:
            values = coordinates.values(s.v)
            rows = (coordinates.keys(s.k), values, matmul(s.v, setting.y))
            beta = float(values.hi[s.seen].norm(dim=1).max())
            sizes = [diameter(about_mean(part)[s.seen]) for part in rows]
            self._static.append((*sizes, beta))
        self._rows = [[0.0, 0.0, 0.0] for _ in setting.sequences]
        r1, _, r3 = coordinates.shape
        self._queries = torch.zeros(r1, r1, dtype=torch.float64)
        self._features = torch.zeros(r3, r3, dtype=torch.float64)

    def __call__(self, rows: Rows) -> None:
        """Takes in a block of rows."""
        alpha, rho = rows.a.hi.norm(dim=1), rows.r.hi.norm(dim=1)
        found = [float(part.max()) for part in (alpha, rho, alpha * rho)]
        old = self._rows[rows.index]
        self._rows[rows.index] = [max(a, b) for a, b in zip(old, found, strict=True)]
        weights = rows.w[:, None]
        self._queries += rows.a.hi.mT @ (weights * rows.a.hi)
        features = rows.f.hi
        self._features += features.mT @ (weights * features)

    def result(self) -> Geometry:
        """The geometry once all rows have been seen."""
        sizes = []
        for (k, v, w, beta), (alpha, rho, both) in zip(self._static, self._rows, strict=True):
            values = (k, v, w, beta, alpha, rho, both)
            sizes.append(Sizes(*(SAFETY * value for value in values)))
        features = _largest(self._features) ** 0.5
        return Geometry(tuple(sizes), SAFETY * features, SAFETY * _largest(self._queries))


@dataclass(frozen=True)
class SpectrumBounds:
    """Constants that bound the reduced matrices relative to ``G = G1 (x) G2``.

    The reduced Gauss-Newton matrix lies between ``2 ridge_x G`` and ``2 (ridge_x + kappa) G``, the
    reduced Hessian between ``2 (ridge_x - tau - nu^2 / ridge_y) G`` and ``2 (ridge_x + kappa + tau)
    G``, at the point whose ``Y`` is optimal for its ``X``.

    Attributes:
        kappa: ``scale^2 max_j lambda_max(Cov_sj w) max_i s_ji``.
        tau: ``scale^2 max_j max_i |<w_i - w_mean_j, r_j>| max_i s_ji``.
        nu: ``nu^2 = scale^2 max_i sum_j w_j ||r_j||^2 s_ji max_l s_jl``.
    """

    kappa: float
    tau: float
    nu: float


class SpectrumObserver:
    """Collects the :class:`SpectrumBounds` from the rows of an evaluation.

    Args:
        setting: The problem and the point.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._outputs = [s.v @ setting.y for s in setting.sequences]
        self._loads = [torch.zeros(len(s.k), dtype=torch.float64) for s in setting.sequences]
        self._kappa = self._tau = 0.0

    def __call__(self, rows: Rows) -> None:
        """Takes in a block of rows."""
        w = self._outputs[rows.index]
        top = rows.s.amax(1)
        shifted = w - w.mean(0)
        mean = rows.s @ shifted
        second = torch.einsum("jm,mo,mp->jop", rows.s, shifted, shifted)
        covariance = second - mean[:, :, None] * mean[:, None, :]
        largest = torch.linalg.eigvalsh(covariance)[:, -1].clamp_min(0.0)
        self._kappa = max(self._kappa, float((largest * top).max()))
        seen = rows.s > 0  # a hidden key moves nothing
        deviation = (rows.t * seen).abs().amax(1)
        self._tau = max(self._tau, float((deviation * top).max()))
        weights = rows.w * rows.r.hi.square().sum(1) * top
        self._loads[rows.index] += weights @ rows.s

    def result(self) -> SpectrumBounds:
        """The constants once all rows have been seen."""
        factor = SAFETY * self._setting.scale**2
        load = max(float(load.max()) for load in self._loads)
        return SpectrumBounds(factor * self._kappa, factor * self._tau, (factor * load) ** 0.5)


def diameter(points: Tensor) -> float:
    """Largest distance of two rows; for many rows an upper bound at most twice as large."""
    if points.shape[1] == 0 or len(points) < 2:
        return 0.0
    if len(points) > _MANY:
        return 2 * float((points - points.mean(0)).norm(dim=1).max())
    mode = "donot_use_mm_for_euclid_dist"
    return max(
        float(torch.cdist(part, points, compute_mode=mode).max()) for part in points.split(256)
    )


def _largest(matrix: Tensor) -> float:
    if matrix.shape[0] == 0:
        return 0.0
    if not bool(matrix.isfinite().all()):
        return math.inf
    return max(0.0, float(torch.linalg.eigvalsh(matrix)[-1]))
