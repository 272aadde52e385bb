r"""The joint Hessian in whitened coordinates, with a bound on its rounding.

With ``C_j = sum_i s_ji (w_i - mean)(k'_i - mean)^T``, ``D_j`` the same with ``v'`` for ``w``, and
``T_j = sum_i s_ji t_ji (k'_i - mean)(k'_i - mean)^T`` (no factor 1/2)::

    H_XX = 2 sum_j w_j (a' a'^T) (x) (C_j^T C_j + T_j)        + 2 ridge_x / scale^2 G1' (x) G2'
    H_YX = 2 sum_j w_j (p'_jk a'_p C_j[o, q] + D_j[k, q] a'_p r_jo)
    H_YY = 2 sum_j w_j p'_j p'_j^T (x) I                      + 2 ridge_y G3' (x) I

Softmax, ``t`` and residuals come from doubled arithmetic; the sums are float64. Their error is
bounded as usual by ``gamma`` times the same sums of norms, ``gamma = 2 (2 m + n + 2 d + 32) u``
for ``m`` keys, ``n`` rows and unit roundoff ``u`` (Higham 2002, section 3.1): for each block one
number that bounds the spectral norm of its error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.certificate.coordinates import Coordinates, Setting
from attnreg.certificate.doubled import about_mean, matmul
from attnreg.certificate.gradient import Rows

_PIECE = 1 << 19
"""Entries of the centred keys of some rows that are formed at a time."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """The joint Hessian at a point.

    Attributes:
        matrix: ``(r1 r2 + r3 d_out,)`` squared; ``X'`` row by row, then ``Y'`` row by row.
        split: ``r1 r2``.
        xx: Bound on the spectral norm of the error of the block of ``X'``.
        xy: The same of the block that couples ``X'`` and ``Y'``.
        yy: The same of the block of ``Y'``.
    """

    matrix: Tensor
    split: int
    xx: float
    xy: float
    yy: float


@dataclass(frozen=True, eq=False)
class _Keys:
    """Keys, values and outputs of a sequence about their means, and twice their largest norms."""

    k: Tensor
    v: Tensor
    w: Tensor
    sizes: tuple[float, float, float]


class CurvatureObserver:
    """Assembles the :class:`Curvature` from the rows of an evaluation.

    Args:
        setting: The problem and the point.
        coordinates: The coordinates.
    """

    def __init__(self, setting: Setting, coordinates: Coordinates) -> None:
        self._setting, self._coordinates = setting, coordinates
        self._r1, self._r2, self._r3 = coordinates.shape
        self._out = setting.y.shape[1]
        r1, r2, r3, out = self._r1, self._r2, self._r3, self._out
        self._xx = torch.zeros(r1 * r1, r2 * r2, dtype=torch.float64)
        self._slope = torch.zeros(r3 * r1, out * r2, dtype=torch.float64)
        self._residual_slope = torch.zeros(r3 * r2, out * r1, dtype=torch.float64)
        self._yy = torch.zeros(r3, r3, dtype=torch.float64)
        self._g1 = torch.zeros(r1, r1, dtype=torch.float64)
        self._errors = torch.zeros(3, dtype=torch.float64)
        self._index = -1
        self._keys: _Keys | None = None

    def __call__(self, rows: Rows) -> None:
        """Takes in a block of rows."""
        if rows.index != self._index:
            self._index, self._keys = rows.index, self._centred(rows.index)
        assert self._keys is not None
        features = rows.f.hi
        a, r, w = rows.a.hi, rows.r.hi, rows.w[:, None]
        k_size, v_size, w_size = self._keys.sizes
        a_size, r_size, f_size = (part.norm(dim=1) for part in (a, r, features))
        sums = (
            rows.w * a_size.square() * (w_size * k_size) * (w_size * k_size + r_size * k_size),
            rows.w * a_size * k_size * (f_size * w_size + v_size * r_size),
            rows.w * f_size.square(),
        )
        self._errors += torch.stack([part.sum() for part in sums])
        self._yy += features.mT @ (w * features)
        self._g1 += a.mT @ (w * a)
        step = max(1, _PIECE // max(1, rows.s.shape[1] * self._r2))
        for start in range(0, len(a), step):
            part = slice(start, start + step)
            change, values, right = self._moments(rows.s[part], rows.t[part])
            weighted = (w * a)[part]
            self._xx += _outer(a[part], weighted).mT @ right.flatten(1)
            self._slope += _outer(features[part], weighted).mT @ change.flatten(1)
            self._residual_slope += values.flatten(1).mT @ _outer(r[part], weighted)

    def result(self) -> Curvature:
        """The matrix once all rows have been seen."""
        setting, coordinates = self._setting, self._coordinates
        r1, r2, r3, out = self._r1, self._r2, self._r3, self._out
        longest = max(len(s.k) for s in setting.sequences)
        rows = sum(len(s.a) for s in setting.sequences)
        width = max(*setting.x.shape, *setting.y.shape)
        unit = torch.finfo(torch.float64).eps / 2
        gamma = 2 * (2 * longest + rows + 2 * width + 32) * unit
        xx = self._xx.view(r1, r1, r2, r2).permute(0, 2, 1, 3).reshape(r1 * r2, r1 * r2)
        yy, errors = self._yy, self._errors.clone()
        if setting.ridge_x > 0:
            keys = coordinates.keys(setting.keys).hi
            g2, strength = keys.mT @ keys, setting.ridge_x / setting.scale**2
            xx = xx + strength * torch.kron(self._g1, g2)
            errors[0] += strength * self._g1.norm() * g2.norm()
        if setting.ridge_y > 0:
            values = coordinates.values(setting.values).hi
            g3 = values.mT @ values
            yy = yy + setting.ridge_y * g3
            errors[2] += setting.ridge_y * g3.norm()
        slope = self._slope.view(r3, r1, out, r2).permute(0, 2, 1, 3)
        slope = slope + self._residual_slope.view(r3, r2, out, r1).permute(0, 2, 3, 1)
        yx = slope.reshape(r3 * out, r1 * r2)
        eye = torch.eye(out, dtype=torch.float64)
        matrix = torch.cat([torch.cat([xx, yx.mT], 1), torch.cat([yx, torch.kron(yy, eye)], 1)])
        bounds = [2 * gamma * float(error) for error in errors]
        return Curvature(matrix + matrix.mT, r1 * r2, *bounds)  # twice the symmetric part

    def _centred(self, index: int) -> _Keys:
        s = self._setting.sequences[index]
        k, v = self._coordinates.keys(s.k), self._coordinates.values(s.v)
        parts = (about_mean(k), about_mean(v), about_mean(matmul(s.v, self._setting.y)))
        sizes = [2 * float(part.norm(dim=1).max()) for part in parts]
        return _Keys(*parts, (sizes[0], sizes[1], sizes[2]))

    def _moments(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``C``, ``D`` and ``C^T C + T`` of some rows."""
        assert self._keys is not None
        keys = self._keys
        centred = keys.k - (s @ keys.k)[:, None, :]  # (R, m, r2)
        weighted = s[..., None] * centred
        change = torch.matmul(keys.w.mT, weighted)
        values = torch.matmul(keys.v.mT, weighted)
        third = torch.matmul((weighted * t[..., None]).mT, centred)
        return change, values, torch.matmul(change.mT, change) + third


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return (left[:, :, None] * right[:, None, :]).flatten(1)
