"""Regularised attention regression problems whose ridge is a multiple of their own curvature.

    A = G diag(sigma) per sequence, G standard normal, sigma from 1 down to 10^-decades
    B = softmax(A X* A^T) A Y* + noise

as in `planted_problem`. The ridges pull towards a random step from X* and Y*, of `DISTANCE` times
their size: a layer near the one that made the targets.

The problem is given in whitened inputs: with the QR decomposition A = Q R of all rows, it has Q in
place of A, and X* becomes R X* R^T. The fit is the same, the condition number 10^decades of A does
not enter, and no A^T A is formed: its square would be beyond float64.

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
DISTANCE = 0.3


@dataclass(frozen=True)
class Ridged:
    """A problem, the planted X in its coordinates, the ridges' centre, and its curvature's top."""

    problem: AttentionProblem
    X: Tensor
    center: dict[str, Tensor]
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
    Y = R @ made.Y
    center = {"X": moved(X, seed), "Y": moved(Y, seed + 1)}
    problem = AttentionProblem(Q, made.arrays.B, ridge_y=ridge_y, center=center)
    top = curvature_top(Ridged(problem, X, center, 0.0).point())
    return Ridged(problem.replace(ridge_x=ratio * top), X, center, top)


def moved(matrix: Tensor, seed: int) -> Tensor:
    """The matrix a random step of `DISTANCE` times its norm away."""
    generator = torch.Generator().manual_seed(10**5 + seed)
    step = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
    return matrix + DISTANCE * matrix.norm() / step.norm() * step


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
