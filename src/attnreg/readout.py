"""The linear least-squares problem of the readout, solved once per point and reused.

``M = F^T W F + R + damping I`` is assembled in float64 whatever the dtype of the features (the
condition number of ``F`` enters squared) and scaled to unit diagonal. A Cholesky factorisation
gives its inverse; where a pivot shows that ``M`` is singular to working precision, an
eigendecomposition gives the minimum-norm solution instead, null directions are dropped, and
``rank`` says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg.operations import product

_CHUNK = 1 << 16


class NormalEquations:
    """``M O = F^T W B + R O0``.

    Args:
        left: ``W F``, ``(rows, k)``.
        columns: ``F``, ``(rows, k)``.
        ridge: ``R``, float64 ``(k, k)``, or None.
        damping: Added to the first ``damped`` diagonal entries.
        damped: Number of columns that are damped; a constant column after them is not.

    Attributes:
        rank: Numerical rank of ``M``.
        spent_on_rows: Operations of products in which the rows take part.
        spent_on_columns: Operations of the others.
    """

    def __init__(
        self, left: Tensor, columns: Tensor, ridge: Tensor | None, damping: float, damped: int
    ) -> None:
        self._left, self._columns, self._ridge = left, columns, ridge
        self._damping, self._damped = damping, damped
        inverse, self.rank = self._inverted(gram64(left, columns))
        rows, k = columns.shape
        self.spent_on_rows, self.spent_on_columns = product(k, rows, k), 0
        self._inverse64 = inverse
        self._inverse = inverse.to(columns.dtype)

    def apply_inverse(self, matrix: Tensor) -> Tensor:
        """``M^{-1} matrix`` (on the directions kept)."""
        return self._inverse @ matrix

    def inverse_of(self, gram: Tensor) -> Tensor:
        """The inverse with ``gram`` in place of ``F^T W F``: float64 ``(k, k)``, overwritten."""
        return self._inverted(gram)[0].to(self._columns.dtype)

    def _inverted(self, gram: Tensor) -> tuple[Tensor, int]:
        if self._ridge is not None:
            gram += self._ridge
        gram.diagonal()[: self._damped] += self._damping
        return scaled_inverse(gram, self._columns.dtype)

    def solve(self, targets: Tensor, center: Tensor | None) -> tuple[Tensor, Tensor]:
        """Readout and residual ``F O - B``.

        In float64 one step of iterative refinement follows, so that the error is that of a
        backward stable solver as long as the condition number of ``F`` stays below about 1e7.

        Returns:
            ``O`` ``(k, d_out)`` and the residual ``(rows, d_out)``.
        """
        right = gram64(self._left, targets)
        rows, k = self._columns.shape
        steps = 2 if self._columns.dtype == torch.float64 else 1
        self.spent_on_rows += 2 * steps * product(rows, k, targets.shape[1])
        solves = steps * (1 if center is None or self._ridge is None else 2)
        self.spent_on_columns += solves * product(k, k, targets.shape[1])
        if center is not None and self._ridge is not None:
            right += self._ridge @ center.double()
        readout = (self._inverse64 @ right).to(self._columns.dtype)
        residual = torch.addmm(targets, self._columns, readout, beta=-1.0)
        if self._columns.dtype == torch.float64:
            slope = self._left.mT @ residual
            if center is not None and self._ridge is not None:
                slope += self._ridge @ (readout - center)
            slope[: self._damped] += self._damping * readout[: self._damped]
            step = self._inverse64 @ slope
            readout -= step
            # Anew, not updated: the residual of the readout that is handed out, rounded as it is.
            torch.addmm(targets, self._columns, readout, beta=-1.0, out=residual)
        return readout, residual


def gram64(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right`` accumulated in float64."""
    if left.dtype == torch.float64:
        return left.mT @ right
    result = torch.zeros((left.shape[1], right.shape[1]), dtype=torch.float64, device=left.device)
    for i in range(0, left.shape[0], _CHUNK):
        part = left[i : i + _CHUNK].double()
        result.addmm_(part.mT, part if right is left else right[i : i + _CHUNK].double())
    return result


def scaled_inverse(matrix: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, int]:
    """Inverse (or pseudo-inverse) of a positive semi-definite matrix, and its rank.

    The matrix is first scaled to unit diagonal; columns that are exactly zero are dropped.

    Args:
        matrix: Float64 ``(k, k)``.
        dtype: Dtype of the data behind it: directions below its rounding are dropped.

    Returns:
        The symmetric inverse on the directions kept, and their number.
    """
    k = matrix.shape[0]
    diagonal = matrix.diagonal().clamp_min(0.0).sqrt()
    scale = torch.where(diagonal > 0, diagonal.reciprocal(), torch.zeros_like(diagonal))
    scaled = scale[:, None] * matrix * scale
    factor, info = torch.linalg.cholesky_ex(scaled)
    data = (8 * k**0.5 * torch.finfo(dtype).eps) ** 2
    floor = max(data, 8 * k * torch.finfo(torch.float64).eps)
    if int(info) == 0 and float(factor.diagonal().min()) ** 2 > floor:
        inverse, rank = torch.cholesky_inverse(factor), k
    else:
        values, vectors = torch.linalg.eigh(scaled)
        kept = values > floor * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
        rank = int(kept.sum())
        basis = vectors[:, kept]
        inverse = (basis / values[kept]) @ basis.mT
    return scale[:, None] * inverse * scale, rank
