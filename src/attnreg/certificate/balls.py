r"""The joint objective, its gradient and its Hessian in ball arithmetic (python-flint).

Every number is a midpoint with a radius that encloses the exact one, so that no rounding has to be
assumed. The formulas are those of :mod:`attnreg.certificate.curvature`, written with uncentred
moments: 256 bits do not mind the cancellation. For small problems.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnreg.certificate.coordinates import Coordinates, Sequence, Setting

BITS = 256


@contextmanager
def working_precision(bits: int = BITS) -> Iterator[Any]:
    """The module ``flint`` at a precision, for the body.

    Args:
        bits: Of the midpoints.

    Yields:
        The module.

    Raises:
        ValueError: If python-flint is not installed.
    """
    try:
        import flint
    except ModuleNotFoundError as error:
        raise ValueError(
            "ball arithmetic needs python-flint: pip install 'attnreg[rigorous]'"
        ) from error
    old = flint.ctx.prec
    flint.ctx.prec = bits
    try:
        yield flint
    finally:
        flint.ctx.prec = old


def above(ball: Any) -> float:
    """A float64 number that is not below a ball; infinite where the ball is not finite."""
    value = float(ball.upper())
    return math.inf if math.isnan(value) else math.nextafter(value, math.inf)


def as_balls(flint: Any, matrix: Tensor) -> Any:
    """A float64 matrix, exactly."""
    rows, columns = matrix.shape
    return flint.arb_mat(rows, columns, [flint.arb(v) for v in matrix.reshape(-1).tolist()])


def square_norm(flint: Any, matrix: Any) -> Any:
    """Squared Frobenius norm."""
    return sum((e * e for e in matrix.entries()), flint.arb(0))


def spectral_bound(flint: Any, matrix: Any) -> Any:
    """Upper bound on the largest eigenvalue of a symmetric matrix, at most some per cent above.

    Returns:
        A ball above ``||A^32||_F^(1/32)``.
    """
    size = square_norm(flint, matrix).sqrt().upper()
    if not size > 0:
        return size
    power = matrix / size
    for _ in range(5):
        power = power * power
    return size * square_norm(flint, power).upper().root(64)


@dataclass(frozen=True, eq=False)
class Exact:
    """Enclosures at a point; matrices are ``arb_mat``.

    Attributes:
        loss: ``L``.
        value: ``L`` plus the ridges.
        gradient: In the coordinates, ``X'`` row by row, then ``Y'``: a column.
        hessian: Of the same order.
        residuals: ``||r_j||`` of every sequence.
        features: ``sum_j w_j p'_j p'_j^T``.
    """

    loss: Any
    value: Any
    gradient: Any
    hessian: Any
    residuals: list[list[Any]]
    features: Any


class Balls:
    """A problem in ball arithmetic; made and used within :func:`working_precision`.

    Args:
        flint: The module.
        setting: The problem and the point from which offsets are counted.
        coordinates: The coordinates.

    Attributes:
        queries: ``a'`` of every sequence, ``(n, r1)``.
        keys: ``k'`` of every sequence.
        values: ``v'`` of every sequence.
        grams: ``sum_j w_j a'_j a'_j^T``, and the Gram matrices of the ``k'`` and the ``v'``.
    """

    def __init__(self, flint: Any, setting: Setting, coordinates: Coordinates) -> None:
        self._flint, self._setting = flint, setting
        self._t = [as_balls(flint, t) for t in (coordinates.t1, coordinates.t2, coordinates.t3)]
        self.shape = coordinates.shape
        self.d_out = setting.y.shape[1]
        t1, t2, t3 = self._t
        self._data = [self._converted(s) for s in setting.sequences]
        self._scale = flint.arb(setting.scale)
        self._centre = [as_balls(flint, setting.x), as_balls(flint, setting.y)]
        hi_lo = [setting.x_shift, setting.y_shift]
        self._shift = [as_balls(flint, p.hi) + as_balls(flint, p.lo) for p in hi_lo]
        self.queries = [a * t1 * self._scale for a, *_ in self._data]
        self.keys = [k * t2 for _, k, *_ in self._data]
        self.values = [v * t3 for _, _, v, *_ in self._data]
        keys, values = as_balls(flint, setting.keys), as_balls(flint, setting.values)
        self._all = (keys, values)
        pairs = zip(self.queries, self._data, strict=True)
        g1 = self._sum(self._weighted(a, d[4]).transpose() * a for a, d in pairs)
        white = (keys * t2, values * t3)
        self.grams = (g1, *(rows.transpose() * rows for rows in white))
        self._white = white

    def evaluate(self, offset: Any | None = None) -> Exact:
        """Encloses value, gradient and Hessian at the centre plus an offset.

        Args:
            offset: Column of ``X'`` and ``Y'``; zero if None.

        Returns:
            The enclosures.
        """
        flint, (r1, r2, r3), out = self._flint, self.shape, self.d_out
        t1, t2, t3 = self._t
        x, y = self._centre
        shift_x, shift_y = self._shift
        if offset is not None:
            flat = offset.entries()
            move_x = t1 * flint.arb_mat(r1, r2, flat[: r1 * r2]) * t2.transpose()
            move_y = t3 * flint.arb_mat(r3, out, flat[r1 * r2 :])
            x, y, shift_x, shift_y = x + move_x, y + move_y, shift_x + move_x, shift_y + move_y
        sums = [self._rows(i, x, y) for i in range(len(self._data))]
        loss = sum((s.loss for s in sums), flint.arb(0))
        features = self._sum(s.features for s in sums)
        g_x = self._sum(s.g_x for s in sums)
        g_y = self._sum(s.g_y for s in sums)
        xx = self._sum(s.xx for s in sums)
        yx = self._sum(s.yx for s in sums)
        yy = features
        value = loss
        setting = self._setting
        if setting.ridge_x > 0:
            rho = flint.arb(setting.ridge_x)
            parts = zip(self._data, self.queries, strict=True)
            left = self._sum(a.transpose() * self._weighted(d[0] * shift_x, d[4]) for d, a in parts)
            right = self._all[0].transpose() * self._white[0]
            g_x += left * right * (rho / self._scale)
            xx += _kronecker(flint, self.grams[0], self.grams[1]) * (rho / self._scale**2)
            moved = (d[0] * shift_x * self._all[0].transpose() for d in self._data)
            squares = (
                w * e * e
                for rows, d in zip(moved, self._data, strict=True)
                for row, w in zip(rows.tolist(), d[4], strict=True)
                for e in row
            )
            value += rho * sum(squares, flint.arb(0))
        if setting.ridge_y > 0:
            rho = flint.arb(setting.ridge_y)
            moved_y = self._all[1] * shift_y
            g_y += self._white[1].transpose() * moved_y * rho
            yy += self.grams[2] * rho
            value += rho * square_norm(flint, moved_y)
        gradient = flint.arb_mat(
            r1 * r2 + r3 * out, 1, [2 * e for e in (*g_x.entries(), *g_y.entries())]
        )
        hessian = _joined(flint, xx, yx, yy, out)
        return Exact(loss, value, gradient, hessian, [s.residuals for s in sums], features)

    def outputs(self) -> list[Any]:
        """``Y^T v_i`` of every sequence at the centre."""
        return [v * self._centre[1] for _, _, v, *_ in self._data]

    def _converted(self, s: Sequence) -> tuple[Any, Any, Any, Any, list[Any], Any]:
        flint = self._flint
        rows = slice(0, len(s.a))
        bias = s.bias(rows)
        masks = None if bias is None else bias.expand(len(s.a), len(s.k)).tolist()
        parts = [as_balls(flint, part) for part in (s.a, s.k, s.v, s.b)]
        return (*parts, [flint.arb(w) for w in s.w.tolist()], masks)

    def _weighted(self, rows: Any, w: list[Any]) -> Any:
        entries = [u * e for row, u in zip(rows.tolist(), w, strict=True) for e in row]
        return self._flint.arb_mat(rows.nrows(), rows.ncols(), entries)

    def _sum(self, parts: Any) -> Any:
        parts = list(parts)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _softmax(self, index: int, x: Any) -> Any:
        flint, (a, k, _, _, _, masks) = self._flint, self._data[index]
        rows = []
        logits = (a * x * k.transpose() * self._scale).tolist()
        for j, row in enumerate(logits):
            bias = None if masks is None else masks[j]
            seen = [i for i in range(len(row)) if bias is None or bias[i] > -math.inf]
            z = [row[i] if bias is None else row[i] + bias[i] for i in seen]
            top = max(float(e.mid()) for e in z)
            e = [(entry - top).exp() for entry in z]
            mass = sum(e, flint.arb(0))
            line = [flint.arb(0)] * len(row)
            for i, entry in zip(seen, e, strict=True):
                line[i] = entry / mass
            rows += line
        return flint.arb_mat(a.nrows(), k.nrows(), rows)

    def _rows(self, index: int, x: Any, y: Any) -> _Sums:
        """Half the sums over the rows of one sequence."""
        flint, (_, _, v, b, weights, _) = self._flint, self._data[index]
        (r1, r2, r3), out = self.shape, self.d_out
        keys, values, queries = self.keys[index], self.values[index], self.queries[index]
        s = self._softmax(index, x)
        w = v * y
        r = s * w - b
        features = s * values
        cross = r * w.transpose()  # <w_i, r_j>
        mean = [
            sum((p * q for p, q in zip(a, c, strict=True)), flint.arb(0))
            for a, c in zip(s.tolist(), cross.tolist(), strict=True)
        ]
        st = flint.arb_mat(
            s.nrows(),
            s.ncols(),
            [
                p * (q - mu)
                for a, c, mu in zip(s.tolist(), cross.tolist(), mean, strict=True)
                for p, q in zip(a, c, strict=True)
            ],
        )
        pull, k_mean, w_mean = st * keys, s * keys, s * w
        changes = _centred(flint, s * _pairs(flint, w, keys), w_mean, k_mean)
        second = _centred(flint, s * _pairs(flint, values, keys), features, k_mean)
        third = st * _pairs(flint, keys, keys)
        right = []
        lines = zip(changes.tolist(), third.tolist(), pull.tolist(), k_mean.tolist(), strict=True)
        for c, t, q, mu in lines:
            matrix = flint.arb_mat(out, r2, c)
            square = matrix.transpose() * matrix + flint.arb_mat(r2, r2, t)
            outer = flint.arb_mat(r2, 1, q) * flint.arb_mat(1, r2, mu)
            right += (square - outer - outer.transpose()).entries()
        n = s.nrows()
        weighted = self._weighted(queries, weights)
        xx = _pairs(flint, queries, weighted).transpose() * flint.arb_mat(n, r2 * r2, right)
        slope = _pairs(flint, features, weighted).transpose() * changes
        other = second.transpose() * _pairs(flint, r, weighted)
        squares = [[e * e for e in row] for row in r.tolist()]
        norms = [sum(row, flint.arb(0)) for row in squares]
        loss = sum((u * e for u, e in zip(weights, norms, strict=True)), flint.arb(0))
        return _Sums(
            loss=loss,
            g_x=weighted.transpose() * pull,
            g_y=self._weighted(features, weights).transpose() * r,
            xx=_permuted(flint, xx, (r1, r1, r2, r2), (0, 2, 1, 3)),
            yx=_permuted(flint, slope, (r3, r1, out, r2), (0, 2, 1, 3))
            + _permuted(flint, other, (r3, r2, out, r1), (0, 2, 3, 1)),
            features=self._weighted(features, weights).transpose() * features,
            residuals=[e.sqrt() for e in norms],
        )


@dataclass(frozen=True, eq=False)
class _Sums:
    loss: Any
    g_x: Any
    g_y: Any
    xx: Any
    yx: Any
    features: Any
    residuals: list[Any]


def _pairs(flint: Any, left: Any, right: Any) -> Any:
    """All products of an entry of a row of ``left`` and one of the same row of ``right``."""
    entries = [
        p * q for a, b in zip(left.tolist(), right.tolist(), strict=True) for p in a for q in b
    ]
    return flint.arb_mat(left.nrows(), left.ncols() * right.ncols(), entries)


def _centred(flint: Any, moments: Any, left: Any, right: Any) -> Any:
    return moments - _pairs(flint, left, right)


def _permuted(
    flint: Any, matrix: Any, shape: tuple[int, int, int, int], order: tuple[int, int, int, int]
) -> Any:
    """A matrix over two pairs of indices, read as a tensor, permuted and paired anew."""
    flat = matrix.entries()
    strides = [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1]
    sizes, steps = [shape[i] for i in order], [strides[i] for i in order]
    entries = [
        flat[a * steps[0] + b * steps[1] + c * steps[2] + d * steps[3]]
        for a in range(sizes[0])
        for b in range(sizes[1])
        for c in range(sizes[2])
        for d in range(sizes[3])
    ]
    return flint.arb_mat(sizes[0] * sizes[1], sizes[2] * sizes[3], entries)


def _kronecker(flint: Any, left: Any, right: Any) -> Any:
    entries = [p * q for a in left.tolist() for b in right.tolist() for p in a for q in b]
    return flint.arb_mat(left.nrows() * right.nrows(), left.ncols() * right.ncols(), entries)


def _joined(flint: Any, xx: Any, yx: Any, yy: Any, out: int) -> Any:
    """Twice ``[[xx, yx^T], [yx, yy (x) I]]``."""
    rows_x, rows_yx, rows_xy = xx.tolist(), yx.tolist(), yx.transpose().tolist()
    eye = flint.arb_mat(out, out, [int(i == j) for i in range(out) for j in range(out)])
    rows_yy = _kronecker(flint, yy, eye).tolist()
    lines = [a + b for a, b in zip(rows_x, rows_xy, strict=True)]
    lines += [a + b for a, b in zip(rows_yx, rows_yy, strict=True)]
    return flint.arb_mat(len(lines), len(lines), [2 * e for line in lines for e in line])
