r"""The joint objective and its gradient in doubled arithmetic.

At a point ``(X, Y)``, row ``j`` of a sequence has logits ``z_ji = scale a_j^T X k_i + mask_ji``,
softmax ``s_j``, features ``p_j = sum_i s_ji v_i`` and residual ``r_j = Y^T p_j - b_j``. With
``t_ji = <Y^T (v_i - p_j), r_j>`` the gradient in the coordinates of
:mod:`attnreg.certificate.coordinates` is (no factor 1/2)::

    g_X' = 2 sum_j w_j a'_j (sum_i s_ji t_ji k'_i)^T + 2 ridge_x T1^T G1 (X - X0) G2 T2
    g_Y' = 2 sum_j w_j (T3^T p_j) r_j^T              + 2 ridge_y T3^T G3 (Y - Y0)

At a minimiser the sums cancel, and what float64 leaves of them is rounding: a certificate from it
would bound the rounding, not the gap. Here every product carries about 80 bits. The error is
bounded by ``unit`` times the same sums over absolute values, with ``unit`` at least ``2^-72``:
that is the model of rounding which a certificate in doubled arithmetic assumes, and states; its
tests compare with 50 digits. Ball arithmetic (:mod:`attnreg.certificate.rigorous`) does without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.certificate.coordinates import WHITENING_SLICES, Coordinates, Sequence, Setting
from attnreg.certificate.doubled import (
    SLICES,
    Doubled,
    add,
    divide,
    exponential,
    matmul,
    matmul_error,
    multiply,
    subtract,
    total,
)

UNIT = 2.0**-72
"""Relative error that is assumed of sums in doubled arithmetic, at least."""

HIDDEN = -1e300
"""Logit of a key that is masked: its exponential is 0."""

BLOCK = 1 << 17
"""Entries of the softmax matrix that are worked on at a time."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of one sequence at the point.

    Attributes:
        index: Which sequence.
        chosen: Which of its rows.
        w: Weights, ``(R,)``.
        a: ``a'``, ``(R, r1)``.
        s: Softmax, ``(R, m)``, float64.
        f: Features ``S A3 T3``, ``(R, r3)``.
        r: Residuals, ``(R, d_out)``.
        t: ``<Y^T (v_i - p_j), r_j>``, ``(R, m)``, float64.
        pull: ``sum_i s_ji t_ji k'_i``, ``(R, r2)``.
    """

    index: int
    chosen: slice
    w: Tensor
    a: Doubled
    s: Tensor
    f: Doubled
    r: Doubled
    t: Tensor
    pull: Doubled


@dataclass(frozen=True)
class Gradient:
    """The objective and its gradient at the point, in the coordinates.

    Attributes:
        x: ``g_X'``, ``(r1, r2)``, rounded to float64.
        y: ``g_Y'``, ``(r3, d_out)``.
        x_error: Bound on the Frobenius norm of the error of ``x``.
        y_error: The same of ``y``.
        loss: ``L`` alone.
        value: ``L`` plus the ridges.
    """

    x: Tensor
    y: Tensor
    x_error: float
    y_error: float
    loss: float
    value: float


def evaluate(
    setting: Setting, coordinates: Coordinates, observe: Callable[[Rows], None] | None = None
) -> Gradient:
    """The gradient, in one pass over the rows.

    Args:
        setting: The problem and the point.
        coordinates: In which the gradient is wanted.
        observe: Called with every block of rows, for what else is computed from them.

    Returns:
        The gradient with its bounds.
    """
    r1, r2, r3 = coordinates.shape
    d_out = setting.y.shape[1]
    x, y = _zero(r1, r2), _zero(r3, d_out)
    loss = _zero(1, 1)
    for index, sequence in enumerate(setting.sequences):
        for rows in row_blocks(setting, coordinates, index, sequence):
            if observe is not None:
                observe(rows)
            weights = rows.w[:, None]
            x = add(x, matmul(rows.a.mT, _weighted(rows.pull, weights)))
            residual = _weighted(rows.r, weights)
            y = add(y, matmul(rows.f.mT, residual))
            square = total(multiply(rows.r, residual))
            loss = add(loss, Doubled(square.hi[None, None], square.lo[None, None]))
    ridge_x, ridge_y, ridge = _ridges(setting, coordinates)
    x, y = add(x, ridge_x), add(y, ridge_y)
    x_error, y_error = _errors(setting, coordinates)
    rounding = torch.finfo(torch.float64).eps
    return Gradient(
        x=2.0 * x.hi,
        y=2.0 * y.hi,
        x_error=x_error + rounding * float(x.hi.norm()),
        y_error=y_error + rounding * float(y.hi.norm()),
        loss=float(loss.hi),
        value=float(add(loss, ridge).hi),
    )


def row_blocks(
    setting: Setting, coordinates: Coordinates, index: int, sequence: Sequence
) -> Iterator[Rows]:
    """The rows of a sequence at the point, block by block.

    Args:
        setting: The problem and the point.
        coordinates: For ``a'`` and ``pull``.
        index: Which sequence it is.
        sequence: The sequence.

    Yields:
        The blocks in order.
    """
    n, m = len(sequence.a), len(sequence.k)
    keys = coordinates.keys(sequence.k)
    all_queries = _weighted(matmul(sequence.a, setting.x), setting.scale)
    ones = sequence.k.new_ones(m, 1)
    step = max(1, BLOCK // m)
    for start in range(0, n, step):
        chosen = slice(start, min(n, start + step))
        z = matmul(all_queries.rows(chosen), sequence.k.mT)
        bias = sequence.bias(chosen)
        if bias is None:
            top = z.hi.amax(1, keepdim=True)
            z = subtract(z, top.expand_as(z.hi))
        else:
            hidden = (bias == -torch.inf).expand_as(z.hi)
            z = add(z, bias.expand_as(z.hi).masked_fill(hidden, 0.0))
            top = z.hi.masked_fill(hidden, -torch.inf).amax(1, keepdim=True)
            z = subtract(z, top.expand_as(z.hi))
            z = Doubled(z.hi.masked_fill(hidden, HIDDEN), z.lo.masked_fill(hidden, 0.0))
        e = exponential(z)
        mass = matmul(e, ones)
        p = divide(matmul(e, sequence.v), mass)
        r = subtract(matmul(p, setting.y), sequence.b[chosen])
        back = matmul(r, setting.y.mT)
        mean = _row_sums(multiply(back, p))
        t = subtract(matmul(back, sequence.v.mT), _wide(mean, m))
        pull = divide(matmul(multiply(e, t), keys), mass)
        yield Rows(
            index=index,
            chosen=chosen,
            w=sequence.w[chosen],
            a=coordinates.queries(sequence.a[chosen], setting.scale),
            s=e.hi / mass.hi,
            f=coordinates.values(p),
            r=r,
            t=t.hi,
            pull=pull,
        )


def _ridges(setting: Setting, coordinates: Coordinates) -> tuple[Doubled, Doubled, Doubled]:
    """Half the gradients of the two ridges, and their value."""
    scale, keys, values = setting.scale, setting.keys, setting.values
    x, y = _zero(*coordinates.shape[:2]), _zero(coordinates.shape[2], setting.y.shape[1])
    value = _zero(1, 1)
    if setting.ridge_x > 0:
        left = _zero(coordinates.shape[0], setting.x.shape[1])
        square = _zero(setting.x.shape[1], setting.x.shape[1])
        for s in setting.sequences:
            move = matmul(s.a, setting.x_shift)
            weighted = _weighted(move, s.w[:, None])
            left = add(left, matmul(coordinates.queries(s.a, scale).mT, weighted))
            square = add(square, matmul(move.mT, weighted))
        right = matmul(keys.mT, coordinates.keys(keys))
        x = _weighted(matmul(left, right), setting.ridge_x)
        x = divide(x, Doubled.of(torch.full_like(x.hi, scale)))
        value = _plus(value, multiply(square, matmul(keys.mT, keys)), setting.ridge_x)
    if setting.ridge_y > 0:
        move = matmul(values, setting.y_shift)
        y = _weighted(matmul(coordinates.values(values).mT, move), setting.ridge_y)
        value = _plus(value, multiply(move, move), setting.ridge_y)
    return x, y, value


def _errors(setting: Setting, coordinates: Coordinates) -> tuple[float, float]:
    """``unit`` times the sums of the gradient over absolute values."""
    scale = setting.scale
    x_error = y_error = 0.0
    size_x, size_y = setting.x.abs(), setting.y.abs()
    root = coordinates.shape[0] ** 0.5
    for s in setting.sequences:
        unit = unit_for(max(len(s.k), *s.a.shape, *s.v.shape, setting.y.shape[1]))
        a = coordinates.queries(s.a, scale).hi
        k, v = coordinates.keys(s.k).hi, coordinates.values(s.v).hi
        logits = scale * float((s.a.abs() @ size_x @ s.k.abs().amax(0)).max())
        outputs = float((s.v.abs() @ size_y).norm(dim=1).max())
        residuals = outputs + s.b.norm(dim=1)
        factor = 16 * unit * (1 + logits)
        k_size, v_size = float(k.norm(dim=1).max()), float(v.norm(dim=1).max())
        a_error = scale * root * matmul_error(s.a, coordinates.t1, WHITENING_SLICES)
        k_error = root * matmul_error(s.k, coordinates.t2, WHITENING_SLICES)
        v_error = root * matmul_error(s.v, coordinates.t3, WHITENING_SLICES)
        pull = s.w * residuals * outputs
        sizes = a.norm(dim=1)
        x_error += factor * float((pull * sizes).sum()) * k_size
        x_error += 4 * float((pull * (a_error * k_size + sizes * k_error)).sum())
        y_error += (factor * v_size + 4 * v_error) * float((s.w * residuals).sum())
        if setting.ridge_x > 0:
            left = a.abs().mT @ (s.w[:, None] * (s.a.abs() @ setting.x_shift.hi.abs()))
            keys = setting.keys
            right = keys.abs().mT @ coordinates.keys(keys).hi.abs()
            unit = unit_for(max(len(keys), len(s.a)))
            x_error += 32 * unit * setting.ridge_x / scale * float((left @ right).norm())
    if setting.ridge_y > 0:
        values = setting.values
        left = coordinates.values(values).hi.abs().mT @ values.abs()
        size = float((left @ setting.y_shift.hi.abs()).norm())
        y_error += 32 * unit_for(len(values)) * setting.ridge_y * size
    return x_error, y_error


def unit_for(inner: int) -> float:
    """Relative error that is assumed of a sum of ``inner`` products in doubled arithmetic."""
    bits = (53 - math.ceil(math.log2(max(inner, 2)))) // 2
    return max(UNIT, 4 * (SLICES + 1) * inner * 2.0 ** (-bits * SLICES))


def _zero(rows: int, columns: int) -> Doubled:
    return Doubled.of(torch.zeros(rows, columns, dtype=torch.float64))


def _weighted(a: Doubled, factor: Tensor | float) -> Doubled:
    wide = torch.as_tensor(factor, dtype=torch.float64).expand_as(a.hi)
    return multiply(a, wide)


def _wide(column: Doubled, width: int) -> Doubled:
    shape = (column.hi.shape[0], width)
    return Doubled(column.hi.expand(shape), column.lo.expand(shape))


def _row_sums(a: Doubled) -> Doubled:
    return matmul(a, torch.ones(a.hi.shape[1], 1, dtype=torch.float64))


def _plus(value: Doubled, terms: Doubled, factor: float) -> Doubled:
    sum_ = total(terms)
    return add(value, _weighted(Doubled(sum_.hi[None, None], sum_.lo[None, None]), factor))
