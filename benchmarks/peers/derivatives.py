"""Closed-form residuals, Jacobian and Jacobian products of the planted problem.

With S the softmax of row j, k_i the keys (rows of A), w_i = Y^T k_i and a the row of A:

    d residual[j, o] / d X[p, q] = a_p C_j[o, q],   C_j = sum_i s_i (w_i - w_bar) k_i^T
    d residual[j, o] / d Y[k, c] = (S A)[j, k] delta_oc

This is what a careful user would write for scipy. It is faster than torch.func.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.base import PlantedArrays, unflatten


class Evaluation:
    """Residuals at one (X, Y), with what the derivatives there share."""

    def __init__(self, problem: PlantedArrays, vector: Tensor) -> None:
        A = problem.A
        self._problem = problem
        weights = unflatten(vector, problem.shapes)
        self._X, self._Y = weights["X"], weights["Y"]
        self._S = torch.softmax((A @ self._X) @ A.mT, -1)  # (b, n, n)
        self._P = self._S @ A  # (b, n, d)
        self._W = A @ self._Y  # (b, n, d_out)
        self._fit = self._P @ self._Y
        self.residual = (self._fit - problem.B).reshape(-1)

    def jvp(self, direction: Tensor) -> Tensor:
        """J v, (rows * d_out,)."""
        A = self._problem.A
        dX, dY = unflatten(direction, self._problem.shapes).values()
        dZ = ((A @ dX) @ A.mT).mul_(self._S)
        change = dZ @ self._W - dZ.sum(-1, keepdim=True) * self._fit + self._P @ dY
        return change.reshape(-1)

    def vjp(self, cotangent: Tensor) -> Tensor:
        """J^T u, (parameters,)."""
        A = self._problem.A
        u = cotangent.view_as(self._fit)
        dS = (u @ self._W.mT).sub_((u * self._fit).sum(-1, keepdim=True)).mul_(self._S)
        gradient_X = torch.einsum("bnp,bnq->pq", A, dS @ A)
        gradient_Y = torch.einsum("bnk,bno->ko", self._P, u)
        return torch.cat([gradient_X.reshape(-1), gradient_Y.reshape(-1)])

    def jacobian(self, out: Tensor) -> Tensor:
        """The dense Jacobian (rows * d_out, parameters), written into `out`."""
        A = self._problem.A
        b, n, d = A.shape
        d_out = self._Y.shape[1]
        products = (self._W[..., None] * A[..., None, :]).reshape(b, n, d_out * d)
        C = (self._S @ products).view(b, n, d_out, d)
        C -= self._fit[..., None] * self._P[..., None, :]
        size = d * d
        block = out[:, :size].view(b, n, d_out, d, d)
        torch.mul(A[:, :, None, :, None], C[..., None, :], out=block)
        right = out[:, size:].view(b, n, d_out, d, d_out)
        right.zero_()
        right.diagonal(dim1=2, dim2=4).copy_(self._P[..., None].expand(b, n, d, d_out))
        return out
