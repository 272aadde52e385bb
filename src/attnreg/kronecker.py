"""Kronecker-product operators on the blocks of a parameter vector.

A parameter block is a matrix ``(rows, heads * width)``. On each head the operators here act as
``V -> left V right_h`` with symmetric positive semi-definite factors, that is as the Kronecker
product ``left (x) right_h`` on the row-major vectorisation. Ridges, the natural metric and the
preconditioner of one block all share the left factor, the mean second moment of the block's
inputs; it is decomposed once. With it, a solve with any multiple of the identity added is four
small matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ParameterBlock:
    """A named matrix ``(rows, heads * width)`` inside a flat parameter vector.

    ``inputs`` names the field of a :class:`attnreg.batching.Batch` that the first rows are the
    coefficients of; one row more belongs to a constant. None where there is none.
    """

    name: str
    rows: int
    heads: int
    width: int
    inputs: str | None = None

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.rows * self.heads * self.width


def split_blocks(vector: Tensor, blocks: Sequence[ParameterBlock]) -> list[Tensor]:
    """Views of a flat vector as the matrices ``(rows, heads * width)`` of its blocks."""
    parts = vector.split([block.size for block in blocks])
    return [p.view(b.rows, b.heads * b.width) for p, b in zip(parts, blocks, strict=True)]


@dataclass(frozen=True)
class LeftFactor:
    """The left factor of a block with its eigendecomposition; null directions are dropped.

    Attributes:
        matrix: ``(rows, rows)``, symmetric positive semi-definite.
        vectors: Orthonormal eigenvectors of the directions kept, ``(rows, rank)``.
        values: Their eigenvalues, ``(rank,)``.
    """

    matrix: Tensor
    vectors: Tensor
    values: Tensor

    @staticmethod
    def of(moment: Tensor, dtype: torch.dtype) -> LeftFactor:
        """Decomposes a float64 moment of data that was given in ``dtype``.

        A singular value of the data below ``8 sqrt(rows) eps`` of the largest cannot be told
        from rounding; the moment's eigenvalues are their squares, and have a floor of their own.

        Returns:
            The factor in ``dtype``.
        """
        values, vectors = torch.linalg.eigh(moment)
        rows = moment.shape[0]
        relative = (8 * rows**0.5 * torch.finfo(dtype).eps) ** 2
        floor = max(relative, 4 * rows * torch.finfo(torch.float64).eps)
        kept = values > floor * values[-1].clamp_min(0.0)
        return LeftFactor(moment.to(dtype), vectors[:, kept].to(dtype), values[kept].to(dtype))

    @property
    def nullity(self) -> int:
        """Number of directions dropped."""
        return self.matrix.shape[0] - self.values.shape[0]


@dataclass(frozen=True)
class KroneckerSolver:
    """Solves with ``left (x) right_h + shift I`` on one parameter block.

    Attributes:
        left: The left factor.
        vectors: Eigenvectors of the right factors, ``(heads, width, width)``.
        values: Eigenvalues in the eigenbasis, ``(rank, heads * width)``; 0 on null directions.
    """

    left: LeftFactor
    vectors: Tensor
    values: Tensor

    @staticmethod
    def of(left: LeftFactor, right: Tensor) -> KroneckerSolver:
        """Decomposes the right factors, float64 ``(heads, width, width)``."""
        values, vectors = torch.linalg.eigh(right)
        floor = 4 * right.shape[-1] * torch.finfo(torch.float64).eps
        largest = values.amax(dim=-1, keepdim=True).clamp_min(0.0)
        values = torch.where(values > floor * largest, values, torch.zeros_like(values))
        products = left.values.double()[:, None] * values.flatten()[None, :]
        dtype = left.matrix.dtype
        return KroneckerSolver(left, vectors.to(dtype), products.to(dtype))

    @property
    def rank(self) -> int:
        """Number of directions with a positive eigenvalue."""
        return int((self.values > 0).sum())

    @property
    def operations(self) -> int:
        """Floating-point operations of a solve: four products in the eigenbases."""
        rows, (rank, width) = self.left.matrix.shape[0], self.values.shape
        return 4 * (rows * rank * width + rank * width * self.vectors.shape[-1])

    def solve(self, matrix: Tensor, shift: float) -> Tensor:
        """``V`` with ``left V right_h + shift V = matrix``, null directions left out."""
        rotated = apply_right(self.left.vectors.mT @ matrix, self.vectors)
        rotated *= self._inverse(shift)
        return self.left.vectors @ apply_right(rotated, self.vectors.mT)

    def dual_norm_squared(self, matrix: Tensor) -> float:
        """``<matrix, K^+ matrix>``: the squared dual norm, on the directions that are kept."""
        rotated = apply_right(self.left.vectors.mT @ matrix, self.vectors)
        return float((rotated.double().square() * self._inverse(0.0).double()).sum())

    def _inverse(self, shift: float) -> Tensor:
        shifted = self.values + shift
        return torch.where(shifted > 0, shifted.reciprocal(), torch.zeros_like(shifted))


def apply_right(matrix: Tensor, right: Tensor) -> Tensor:
    """Multiplies the columns of each head by its own ``right_h``.

    Args:
        matrix: ``(rows, heads * width)``.
        right: ``(heads, width, width)``.

    Returns:
        ``(rows, heads * width)``.
    """
    heads, width, _ = right.shape
    if heads == 1:
        return matrix @ right[0]
    rows = matrix.shape[0]
    per_head = matrix.view(rows, heads, width).transpose(0, 1)
    return torch.bmm(per_head, right).transpose(0, 1).reshape(rows, heads * width)
