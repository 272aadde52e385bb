"""Regularised attention regression problems whose ridge is a multiple of their own curvature.

    A = G diag(sigma) per sequence, G standard normal, sigma from 1 down to 10^-decades
    B = softmax(A X* A^T) A Y* + noise

as in `planted_problem`. The problem is given in whitened inputs: with the QR decomposition A = Q R
of all rows, it has Q in place of A, and X* becomes R X* R^T. The fit is the same, the condition
number 10^decades of A does not enter, and no A^T A is formed: its square would be beyond float64.

ridge_x is c times the top of the curvature, lambda_max(G^-1 K): K the reduced Gauss-Newton matrix
(halved, without the ridge of X) at X*, G the Kronecker product of the Gram matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg import AttentionProblem, Bilinear
from attnreg.objective import Objective, Point
from benchmarks.planted_problem import planted

LANCZOS_STEPS = 40


@dataclass(frozen=True)
class Ridged:
    """A problem, the planted X in its coordinates, and the top of its curvature there."""

    problem: AttentionProblem
    X: Tensor
    top: float

    def point(self) -> Point:
        """The reduced objective at the planted X."""
        objective = Objective(self.problem, Bilinear())
        return Point(objective, objective.features(self.X.flatten()))


def ridged(
    rows: int,
    width: int,
    *,
    ratio: float,
    ridge_y: float,
    sequences: int = 1,
    decades: float = 0.0,
    logit_std: float = 1.0,
    seed: int = 0,
) -> Ridged:
    """Makes a problem in float64 whose ridge_x is `ratio` times the top of its curvature."""
    made = planted(decades, seed, logit_std, sequences, rows, width)
    A = made.arrays.A
    Q, R = torch.linalg.qr(A.flatten(0, 1))
    Q = Q.view(A.shape) * (sequences * rows) ** 0.5
    R = R / (sequences * rows) ** 0.5
    X = R @ made.X @ R.mT
    problem = AttentionProblem(Q, made.arrays.B, ridge_y=ridge_y)
    bare = Ridged(problem, X, 0.0)
    top = curvature_top(bare.point())
    return Ridged(problem.replace(ridge_x=ratio * top), X, top)


def curvature_top(point: Point) -> float:
    """lambda_max(G^-1 K) by Lanczos, for whitened inputs: G is a multiple of the identity."""
    problem = point.objective.problem
    unit = float(problem.gram_query.diagonal().mean() * problem.gram_key.diagonal().mean())
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(point.theta.shape, generator=generator, dtype=torch.float64)
    vector /= vector.norm()
    previous, beta = torch.zeros_like(vector), 0.0
    diagonal, off = [], []
    basis = [vector]
    for _ in range(min(LANCZOS_STEPS, len(vector))):
        image = point.gauss_newton(vector) / (2.0 * unit)
        alpha = float(image @ vector)
        image -= alpha * vector + beta * previous
        for other in basis:  # orthogonal again: few steps, so all of them
            image -= (image @ other) * other
        diagonal.append(alpha)
        beta = float(image.norm())
        if beta <= 1e-12 * max(map(abs, diagonal)):
            break
        off.append(beta)
        previous, vector = vector, image / beta
        basis.append(vector)
    k = len(diagonal)
    tridiagonal = torch.diag(torch.tensor(diagonal))
    if k > 1:
        edge = torch.tensor(off[: k - 1])
        tridiagonal += torch.diag(edge, 1) + torch.diag(edge, -1)
    return float(torch.linalg.eigvalsh(tridiagonal.double())[-1])
