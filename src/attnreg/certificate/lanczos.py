r"""Extreme eigenvalues of a symmetric operator by Lanczos from a random start.

After ``k`` steps from a uniformly random direction in ``N`` dimensions the largest Ritz value
``theta_1`` and the smallest ``theta_N`` satisfy, each with probability at least ``1 - delta``::

    lambda_1 - theta_1 <= eps (lambda_1 - lambda_N),      theta_N - lambda_N <= the same,
    eps = (ln(1.648 sqrt(N) / delta) / (2 k - 1))^2

(Kuczynski and Wozniakowski 1992, theorem 4.2, applied to ``A - lambda_N I`` and ``lambda_1 I -
A``: Lanczos does not see a shift). So ``lambda_N >= theta_N - eps (theta_1 - theta_N) / (1 - 2
eps)`` with probability at least ``1 - 2 delta``. Products are taken to be exact to rounding; the
basis is orthogonalised in full, twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 1e-12


@dataclass(frozen=True)
class Extremes:
    """What Lanczos says of a spectrum.

    Attributes:
        smallest: Smallest Ritz value: an upper bound on the smallest eigenvalue.
        largest: Largest Ritz value: a lower bound on the largest eigenvalue.
        floor: Lower bound on the smallest eigenvalue, but for the failure probability.
        ceiling: Upper bound on the largest one, likewise.
        steps: Products that were made.
    """

    smallest: float
    largest: float
    floor: float
    ceiling: float
    steps: int


def extremes(
    product: Callable[[Tensor], Tensor], size: int, steps: int, failure: float, seed: int
) -> Extremes:
    """Bounds the spectrum of a symmetric operator.

    Args:
        product: ``v -> A v`` on flat float64 vectors.
        size: Their length.
        steps: Largest number of products.
        failure: Probability with which the bounds may be wrong, together.
        seed: Of the start.

    Returns:
        The bounds.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(size, generator=generator, dtype=torch.float64)
    steps = min(steps, size)
    basis = torch.empty(steps, size, dtype=torch.float64)
    basis[0] = v / v.norm()
    tridiagonal = torch.zeros(steps, steps, dtype=torch.float64)
    exhausted = False
    for k in range(steps):
        w = product(basis[k])
        tridiagonal[k, k] = w @ basis[k]
        for _ in range(2):
            w = w - basis[: k + 1].mT @ (basis[: k + 1] @ w)
        beta = float(w.norm())
        scale = float(tridiagonal[: k + 1, : k + 1].abs().max())
        if beta <= 1e-12 * scale or k + 1 == size:
            steps, exhausted = k + 1, True  # an invariant subspace: the Ritz values are eigenvalues
            break
        if k + 1 < steps:
            tridiagonal[k, k + 1] = tridiagonal[k + 1, k] = beta
            basis[k + 1] = w / beta
    ritz = torch.linalg.eigvalsh(tridiagonal[:steps, :steps])
    smallest, largest = float(ritz[0]), float(ritz[-1])
    eps = 0.0 if exhausted else relative_error(size, steps, failure / 2)
    if eps >= 0.25:
        return Extremes(smallest, largest, -math.inf, math.inf, steps)
    margin = eps / (1 - 2 * eps) * (largest - smallest) + _ROUNDING * max(largest, -smallest)
    return Extremes(smallest, largest, smallest - margin, largest + margin, steps)


def relative_error(size: int, steps: int, failure: float) -> float:
    """``eps`` of the theorem.

    Returns:
        The error relative to the width of the spectrum.
    """
    return (math.log(1.648 * size**0.5 / failure) / (2 * steps - 1)) ** 2


def solve(
    product: Callable[[Tensor], Tensor], right: Tensor, steps: int, tolerance: float
) -> Tensor:
    """Conjugate gradients from 0, for a positive definite operator.

    Args:
        product: ``v -> A v``.
        right: Right-hand side.
        steps: Largest number of products.
        tolerance: Relative residual at which to stop.

    Returns:
        An approximate solution; how good it is, its residual tells.
    """
    x, r = torch.zeros_like(right), right.clone()
    p, square = r.clone(), float(right @ right)
    target = tolerance**2 * square
    for _ in range(steps):
        if square <= target:
            break
        image = product(p)
        curvature = float(p @ image)
        if not curvature > 0:
            break
        x += (square / curvature) * p
        r -= (square / curvature) * image
        new = float(r @ r)
        p = r + (new / square) * p
        square = new
    return x
