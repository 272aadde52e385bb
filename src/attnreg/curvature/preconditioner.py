r"""Kronecker estimate of the reduced Gauss-Newton matrix.

For one parameter block with input rows ``a_i`` and gradient rows ``c_i`` (the gradient of a
random combination ``u . F`` of the outputs by the block's own outputs), the Gauss-Newton block
is ``2 sum_i (a_i a_i^T) (x) E[c_i c_i^T]``, the expectation over ``u`` with independent entries
of variance 1. Its Kronecker estimate is::

    2 (sum_i a_i a_i^T) (x) (sum_i c_i c_i^T) / sum_i 1

(Martens and Grosse 2015). The left factor is exact; the right one takes one vector-Jacobian
product per sample ``u``, drawn as random signs and with what the readout can take up projected
out. It is a preconditioner: the solution does not depend on it, only the number of iterations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnreg.kronecker import KroneckerSolver, split_blocks
from attnreg.objective import Iterate, Objective, Point


class BlockSolver:
    """One :class:`KroneckerSolver` per parameter block, acting on flat vectors.

    Args:
        objective: Gives the blocks and their left factors.
        right: Right factors, float64 ``(heads, width, width)``.
    """

    def __init__(self, objective: Objective, right: list[Tensor] | tuple[Tensor, ...]) -> None:
        self._blocks, self._operations = objective.layout.blocks, objective.operations
        pairs = zip(objective.left, right, strict=True)
        self._solvers = [KroneckerSolver.of(left, factor) for left, factor in pairs]
        traces = [float(s.values.double().sum()) for s in self._solvers]
        self.mean_eigenvalue = sum(traces) / objective.layout.size
        self.rank = sum(solver.rank for solver in self._solvers)

    def inverse(self, shift: float) -> Callable[[Tensor], Tensor]:
        """The map ``v -> (K + shift I)^{-1} v``; null directions of the inputs are left out."""

        def solve(vector: Tensor) -> Tensor:
            parts = zip(self._solvers, split_blocks(vector, self._blocks), strict=True)
            self._operations.small += sum(solver.operations for solver in self._solvers)
            return torch.cat([solver.solve(m, shift).reshape(-1) for solver, m in parts])

        return solve

    def dual_norm(self, vector: Tensor) -> float:
        """``sqrt(<v, K^+ v>)``."""
        parts = zip(self._solvers, split_blocks(vector, self._blocks), strict=True)
        return float(sum(solver.dual_norm_squared(m) for solver, m in parts)) ** 0.5


def natural_metric(point: Iterate) -> BlockSolver:
    """The metric of the stopping test at a point (see ``Model.natural_metric``)."""
    objective = point.objective
    right = objective.model.natural_metric(objective.measured, point.theta, point.readout)
    return BlockSolver(objective, right)


def gauss_newton_estimate(
    point: Point, generator: torch.Generator, samples: int = 1
) -> BlockSolver:
    """Kronecker estimate of the reduced Gauss-Newton matrix, ridge included.

    Args:
        point: Where the curvature is estimated.
        generator: Source of the random signs.
        samples: Vector-Jacobian products spent.

    Returns:
        The estimate, ready for solves.
    """
    objective = point.objective
    blocks = objective.layout.blocks
    right = [
        torch.zeros((b.heads, b.width, b.width), dtype=torch.float64, device=point.theta.device)
        for b in blocks
    ]
    for _ in range(samples):
        signs = torch.randint(0, 2, point.residual.shape, generator=generator, dtype=torch.int8)
        rows = signs.to(point.residual).mul_(2.0).sub_(1.0)
        if objective.weights is not None:
            rows *= objective.weights.sqrt()
        cotangent = point.project_out(rows) @ point.coupling.mT
        objective.operations.projections += 2 * rows.numel() * point.coupling.shape[0]
        sizes = zip(point.features.row_counts, blocks, strict=False)
        objective.operations.projections += sum(2 * n * b.heads * b.width**2 for n, b in sizes)
        for gradients in point.features.row_gradients(cotangent):
            for total, gradient, block in zip(right, gradients, blocks, strict=False):
                per_head = gradient.flatten(0, 1).unflatten(1, (block.heads, -1)).transpose(0, 1)
                total += torch.bmm(per_head.mT, per_head)
    # Blocks of parameters that are held come last: they have no gradients, and stay 0.
    right = [factor * (2.0 / samples) for factor in right]
    if objective.ridge is not None:
        right = [f + 2.0 * r for f, r in zip(right, objective.ridge.right, strict=True)]
    return BlockSolver(objective, right)
