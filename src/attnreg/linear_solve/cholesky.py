"""Dense solves of the damped Newton system, with the answer of the conjugate gradients.

The matrix is scaled to unit diagonal and factored by Cholesky. Where that meets a pivot that is
not safely positive, an eigendecomposition decides: directions whose curvature is zero at the
level of rounding are left out, and negative curvature is handed back to the caller.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnreg.linear_solve.solve import Solve
from attnreg.operations import Operations, cholesky, product


class DenseSolver:
    """Solves ``(H + damping I) d = -g`` for any number of dampings.

    Args:
        matrix: ``H``, symmetric, ``(size, size)``.
        operations: Where operations are counted; None counts for this solver alone.
    """

    def __init__(self, matrix: Tensor, operations: Operations | None = None) -> None:
        self._matrix = matrix
        self.operations = Operations() if operations is None else operations

    def inverse(self, damping: float = 0.0) -> Callable[[Tensor], Tensor]:
        """The map ``v -> (H + damping I)^{-1} v`` on directions of positive curvature."""
        return self._factored(damping)[0]

    def solve(self, gradient: Tensor, damping: float) -> Solve:
        """The minimiser of ``g . d + d . (H + damping I) d / 2`` where there is one.

        Args:
            gradient: ``g``, flat.
            damping: Non-negative multiple of the identity.

        Returns:
            The direction; with negative curvature the minimiser over the other directions, and
            the most negative one beside it.
        """
        inverse, negative = self._factored(damping)
        if negative is not None and float(gradient @ negative) > 0.0:
            negative = -negative
        self.operations.dense += product(len(gradient), len(gradient), 1)
        return self._answer(gradient, inverse(-gradient), negative)

    def _factored(self, damping: float) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        """The inverse on directions of positive curvature, and the most negative one, if any."""
        shifted = self._matrix.clone()
        shifted.diagonal().add_(damping)
        size = shifted.shape[0]
        diagonal = shifted.diagonal().clamp_min(0.0).sqrt()
        scale = torch.where(diagonal > 0.0, diagonal.reciprocal(), torch.ones_like(diagonal))
        scaled = shifted.mul_(scale).mul_(scale[:, None])
        floor = 8 * size * torch.finfo(shifted.dtype).eps
        factor, info = torch.linalg.cholesky_ex(scaled)
        self.operations.dense += cholesky(size)
        if int(info) == 0 and float(factor.diagonal().min()) ** 2 > floor:

            def by_factor(vector: Tensor) -> Tensor:
                self.operations.dense += product(size, size, 1)
                return scale * torch.cholesky_solve((scale * vector)[:, None], factor)[:, 0]

            return by_factor, None
        values, vectors = torch.linalg.eigh(scaled)
        largest = float(values.abs().max())
        kept = values > floor * largest
        basis, inverses = vectors[:, kept], values[kept].reciprocal()

        def by_basis(vector: Tensor) -> Tensor:
            self.operations.dense += product(size, size, 1)
            return scale * (basis @ (inverses * (basis.mT @ (scale * vector))))

        negative = scale * vectors[:, 0] if float(values[0]) < -floor * largest else None
        return by_basis, negative

    def _answer(self, gradient: Tensor, direction: Tensor, negative: Tensor | None = None) -> Solve:
        change = float(gradient @ direction) + 0.5 * float(direction @ (self._matrix @ direction))
        if negative is None:
            return Solve(direction, 0, change, converged=True)
        curvature = float(negative @ (self._matrix @ negative))
        return Solve(direction, 0, change, False, negative, curvature)
