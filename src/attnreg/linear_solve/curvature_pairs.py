"""A preconditioner corrected by what earlier solves have learnt of the curvature.

Conjugate gradients multiply every direction ``s`` they take by the matrix, ``y = H s``. The next
point's matrix is close to this one's, so the last pairs say how a preconditioner ``P`` is wrong
along the directions that mattered. The limited-memory quasi-Newton formula (Nocedal 1980) with
``P^{-1}`` as its first matrix and the pairs as its updates gives a symmetric positive definite
operator that maps each newest ``y`` to its ``s``, at two dot products and two sums a pair and no
product (Morales and Nocedal 2000). It changes how many products a solve takes, not its solution.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from attnreg.linear_solve.solve import Operator

MOST = 8
"""Pairs kept: more save no more products (real layer with 300,000 parameters)."""

MOST_BYTES = 1 << 29
"""Fewer pairs are kept where they would take more memory than this."""


class CurvaturePairs:
    """The last directions with their products, oldest first.

    Args:
        like: Any vector of the size, dtype and device of the directions.
    """

    def __init__(self, like: Tensor) -> None:
        room = MOST_BYTES // max(1, 2 * like.numel() * like.element_size())
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=min(MOST, room))

    def add(self, direction: Tensor, product: Tensor) -> None:
        """Keeps a direction of positive curvature and its product with the undamped matrix."""
        if self._pairs.maxlen:
            self._pairs.append((direction.clone(), product.clone()))

    def corrected(self, precondition: Operator, damping: float) -> Operator:
        """The preconditioner with the pairs known now as updates.

        Args:
            precondition: ``v -> P^{-1} v``, symmetric positive semi-definite.
            damping: Multiple of the identity that is added to the matrix.

        Returns:
            The corrected map; pairs added later do not change it.
        """
        updates = []
        for s, product in self._pairs:
            y = product.add(s, alpha=damping)
            updates.append((s, y, 1.0 / float(torch.dot(s, y))))
        if not updates:
            return precondition

        def solve(vector: Tensor) -> Tensor:
            rest, shares = vector.clone(), []
            for s, y, inverse in reversed(updates):
                shares.append(inverse * float(torch.dot(s, rest)))
                rest.add_(y, alpha=-shares[-1])
            result = precondition(rest)
            for (s, y, inverse), share in zip(updates, reversed(shares), strict=True):
                result.add_(s, alpha=share - inverse * float(torch.dot(y, result)))
            return result

        return solve
