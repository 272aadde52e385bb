"""Pooled second moments of inputs and targets, in float64 from float64 copies of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 16
"""Rows that are copied at a time."""


def gram(rows: Iterable[Tensor], weights: Iterable[Tensor] | None = None) -> Tensor:
    """``sum A^T diag(w) A`` over matrices A.

    Args:
        rows: Matrices (..., d), at least one; leading dimensions are flattened.
        weights: Weights (...) of their rows; ones if None.

    Returns:
        Gram matrix (d, d), float64.
    """
    total = torch.zeros(())
    for a, w in (
        zip(rows, weights, strict=True) if weights is not None else ((a, None) for a in rows)
    ):
        a = a.reshape(-1, a.shape[-1])
        if total.ndim == 0:
            total = a.new_zeros(a.shape[1], a.shape[1], dtype=torch.float64)
        for start in range(0, len(a), _BLOCK):
            part = a[start : start + _BLOCK].double()
            scaled = part if w is None else part * w.reshape(-1, 1)[start : start + _BLOCK]
            total.addmm_(part.mT, scaled)
    return total


def grams_about_means(sequences: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrices of sequences, each less its mean and as it is, and the sum, in one pass.

    The second is the first plus what the means add, a sum of positive semi-definite matrices, so
    that neither is a difference. A sequence of equal rows adds exactly 0 to the first.

    Args:
        sequences: Matrices (n, d), at least one.

    Returns:
        Gram matrix of the centred rows (d, d), Gram matrix (d, d), and sum (d,), float64.
    """
    centred, means, counts = torch.zeros(()), [], []
    for rows in sequences:
        if centred.ndim == 0:
            centred = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        # The mean of equal rows is rounded; deviations from one of them are exactly 0.
        first = rows[0].double()
        moved = rows.double() - first
        mean = moved.mean(0)
        centred.addmm_(moved.sub_(mean).mT, moved)
        means.append(first + mean)
        counts.append(len(rows))
    centre = torch.stack(means)
    sizes = centre.new_tensor(counts)
    return centred, centred + (centre.mT * sizes) @ centre, sizes @ centre


def sum_of_rows(rows: Iterable[Tensor], weights: Iterable[Tensor] | None = None) -> Tensor:
    """``sum A^T w`` over matrices A.

    Args:
        rows: Matrices (..., d), at least one; leading dimensions are flattened.
        weights: Weights (...) of their rows; ones if None.

    Returns:
        The sum (d,), float64.
    """
    if weights is None:
        parts = [a.reshape(-1, a.shape[-1]).sum(0, dtype=torch.float64) for a in rows]
    else:
        parts = [
            w.double().reshape(-1) @ a.double().reshape(-1, a.shape[-1])
            for a, w in zip(rows, weights, strict=True)
        ]
    return torch.stack(parts).sum(0)


def sum_of_squares(rows: Iterable[Tensor], weights: Iterable[Tensor] | None = None) -> float:
    """``sum_i w_i ||a_i||^2`` over the rows of matrices, in float64.

    Args:
        rows: Matrices (n, d), at least one.
        weights: Weights (n,) of their rows; ones if None.

    Returns:
        The sum.
    """
    sizes = [torch.linalg.vector_norm(a, dim=1, dtype=torch.float64).square() for a in rows]
    if weights is not None:
        sizes = [w.double() * size for w, size in zip(weights, sizes, strict=True)]
    return float(torch.cat(sizes).sum())


def spread_and_size(targets: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[float, float]:
    """``sum_j w_j ||b_j - mean||^2`` and ``sum_j w_j ||b_j||^2`` over all rows b_j.

    The mean is weighted. The first is exactly 0 where the rows of positive weight are equal.

    Args:
        targets: Matrices of rows (n, d).
        weights: Weights (n,) of their rows, not all 0.

    Returns:
        The two numbers.
    """
    pairs = list(zip(targets, weights, strict=True))
    # The mean of equal numbers is rounded; deviations from one of them are not.
    b, w = next((b, w) for b, w in pairs if bool(w.any()))
    origin = b[w > 0][0].double()
    total = sum(w.double().sum() for _, w in pairs)
    mean = sum(w.double() @ (b.double() - origin) for b, w in pairs) / total
    spread = sum(w.double() @ (b.double() - origin - mean).square().sum(1) for b, w in pairs)
    size = sum(w.double() @ b.double().square().sum(1) for b, w in pairs)
    return float(spread), float(size)
