r"""Doubled (double-double) arithmetic on float64 tensors: about 100 bits, without a loop.

A number is the unevaluated sum of two float64 numbers, ``hi + lo`` with ``|lo| <= ulp(hi) / 2``.
Sums and products use the error-free transformations of Knuth and Dekker. A matrix product cuts
its factors into slices of so few bits that every product of two slices is exact in float64,
whatever the order of its additions (Ozaki, Ogita, Oishi and Rump 2012), and adds the exact
products up in doubled arithmetic. With ``SLICES`` slices of ``b = (53 - ceil(log2 k)) // 2`` bits
and inner dimension ``k``, what is left out of a product is at most::

    k (SLICES + 1) 2^(-b SLICES) max_row |left| max_column |right|

that is ``2^-80`` of that size for ``k`` up to 1024 and 4 slices. The exponential reduces its
argument to ``z = q ln(2) / 1024 + t``, takes ``2^(q / 1024)`` from a table made by ``decimal``,
and adds the series of ``exp(t)``; its relative error is below ``2^-95``. Results below
``exp(-UNDERFLOW)`` are returned as 0.
"""

from __future__ import annotations

import decimal
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

SLICES = 4
"""Slices of each factor of a matrix product."""

UNDERFLOW = 200.0
"""Below minus this the exponential is 0: ``exp(-200)`` is ``1e-87``."""

_TABLE = 1024
_SPLITTER = 134217729.0  # 2^27 + 1


class Doubled(NamedTuple):
    """The numbers ``hi + lo``."""

    hi: Tensor
    lo: Tensor

    @staticmethod
    def of(value: Tensor) -> Doubled:
        """A float64 tensor, exactly."""
        return Doubled(value, torch.zeros_like(value))

    @property
    def mT(self) -> Doubled:
        """The transpose."""
        return Doubled(self.hi.mT, self.lo.mT)

    def __neg__(self) -> Doubled:
        return Doubled(-self.hi, -self.lo)

    def rows(self, chosen: slice) -> Doubled:
        """Some of the rows."""
        return Doubled(self.hi[chosen], self.lo[chosen])


Number = Doubled | Tensor


def add(a: Doubled, b: Number) -> Doubled:
    """``a + b``."""
    if isinstance(b, Tensor):
        s, e = _two_sum(a.hi, b)
        return Doubled(*_fast_two_sum(s, e + a.lo))
    s, e = _two_sum(a.hi, b.hi)
    t, f = _two_sum(a.lo, b.lo)
    s, e = _fast_two_sum(s, e + t)
    return Doubled(*_fast_two_sum(s, e + f))


def subtract(a: Doubled, b: Number) -> Doubled:
    """``a - b``."""
    return add(a, -b)


def multiply(a: Doubled, b: Number) -> Doubled:
    """``a b``, entry by entry."""
    if isinstance(b, Tensor):
        p, e = _two_product(a.hi, b)
        return Doubled(*_fast_two_sum(p, e + a.lo * b))
    p, e = _two_product(a.hi, b.hi)
    return Doubled(*_fast_two_sum(p, e + (a.hi * b.lo + a.lo * b.hi)))


def divide(a: Doubled, b: Doubled) -> Doubled:
    """``a / b``, entry by entry."""
    first = a.hi / b.hi
    rest = subtract(a, multiply(b, first))
    second = rest.hi / b.hi
    rest = subtract(rest, multiply(b, second))
    return add(Doubled(*_fast_two_sum(first, second)), rest.hi / b.hi)


def total(a: Doubled) -> Doubled:
    """Sum of all entries, as a doubled scalar."""
    flat = Doubled(a.hi.reshape(-1, 1), a.lo.reshape(-1, 1))
    ones = torch.ones_like(flat.hi)
    return Doubled(*(part[0, 0] for part in matmul(flat.mT, ones)))


def matmul(left: Number, right: Number, slices: int = SLICES) -> Doubled:
    """``left @ right`` of two matrices.

    Args:
        left: ``(n, k)``.
        right: ``(k, m)``.
        slices: Slices of each factor: more of them, less is left out (see the module).

    Returns:
        ``(n, m)``.
    """
    a = Doubled.of(left) if isinstance(left, Tensor) else left
    b = Doubled.of(right) if isinstance(right, Tensor) else right
    inner = a.hi.shape[1]
    bits = (53 - math.ceil(math.log2(max(inner, 1)))) // 2
    lefts, rights = _slices(a, 1, bits, slices), _slices(b, 0, bits, slices)
    hi = a.hi.new_zeros((a.hi.shape[0], b.hi.shape[1]))
    lo = torch.zeros_like(hi)
    for level in reversed(range(slices)):  # the smallest first
        for i in range(level + 1):
            s, e = _two_sum(hi, lefts[i] @ rights[level - i])
            hi, lo = _fast_two_sum(s, lo + e)
    return Doubled(hi, lo)


def matmul_error(left: Tensor, right: Tensor, slices: int = SLICES) -> float:
    """Bound on the size of an entry that :func:`matmul` leaves out.

    Returns:
        A number of the size of ``2^-80 max |left| max |right|``.
    """
    inner = left.shape[1]
    bits = (53 - math.ceil(math.log2(max(inner, 1)))) // 2
    if left.numel() == 0 or right.numel() == 0:
        return 0.0
    size = float(left.abs().max()) * float(right.abs().max())
    return inner * (slices + 1) * 2.0 ** (-bits * slices) * size


def exponential(z: Doubled) -> Doubled:
    """``exp(z)`` of numbers that are at most 0; exactly 0 below ``-UNDERFLOW``."""
    steps, high, low = _table()
    small = z.hi < -UNDERFLOW
    hi = z.hi.masked_fill(small, 0.0)
    lo = z.lo.masked_fill(small, 0.0)
    q = (hi * (_TABLE / math.log(2.0))).round_()
    t = Doubled(hi, lo)
    for step in steps:
        t = add(t, q * -step)  # exact products: q has 19 bits, the first steps 30 each
    x = t.hi
    tail = x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040)))
    inner = add(_constant(x, 1, 6), tail)
    inner = add(multiply(inner, t), torch.full_like(x, 0.5))
    growth = add(multiply(multiply(t, t), inner), t)  # exp(t) - 1
    whole = q.long()
    index = whole.remainder(_TABLE)
    base = Doubled(high[index], low[index])
    result = add(base, multiply(growth, base))
    power = torch.ldexp(torch.ones_like(x), (whole - index) // _TABLE)
    return Doubled(
        (result.hi * power).masked_fill_(small, 0.0), (result.lo * power).masked_fill_(small, 0.0)
    )


def _slices(a: Doubled, dim: int, bits: int, count: int) -> list[Tensor]:
    """Cuts matrices into slices of ``bits`` bits below the largest entry along ``dim``."""
    hi, lo = a
    found = []
    for i in range(count):
        exponent = torch.frexp(hi.abs().amax(dim, keepdim=True))[1]
        grid = torch.ldexp(torch.full_like(exponent, 1.5, dtype=hi.dtype), exponent + (52 - bits))
        part = (hi + grid) - grid
        found.append(part)
        if i < count - 1:
            hi, lo = _two_sum(hi - part, lo)
    return found


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _fast_two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = a + b
    return s, b - (s - a)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    p = a * b
    a1, a2 = _halves(a)
    b1, b2 = _halves(b)
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    c = a * _SPLITTER
    high = c - (c - a)
    return high, a - high


def _constant(like: Tensor, numerator: int, denominator: int) -> Doubled:
    with decimal.localcontext(prec=50):
        value = decimal.Decimal(numerator) / decimal.Decimal(denominator)
        high = float(value)
        low = float(value - decimal.Decimal(high))
    return Doubled(torch.full_like(like, high), torch.full_like(like, low))


@functools.cache
def _table() -> tuple[tuple[float, ...], Tensor, Tensor]:
    """``ln(2) / 1024`` in three parts, and ``2^(i / 1024)`` as two float64 tables."""
    with decimal.localcontext(prec=50):
        step = decimal.Decimal(2).ln() / _TABLE
        steps = []
        for bits in (40, 70):  # multiples of 2^-40 and 2^-70: 30 bits each
            unit = decimal.Decimal(2) ** bits
            steps.append(float((step * unit).to_integral_value() / unit))
            step -= decimal.Decimal(steps[-1])
        steps.append(float(step))
        powers = [(decimal.Decimal(2).ln() * i / _TABLE).exp() for i in range(_TABLE)]
        high = [float(power) for power in powers]
        low = [float(p - decimal.Decimal(h)) for p, h in zip(powers, high, strict=True)]
    dtype = torch.float64
    return tuple(steps), torch.tensor(high, dtype=dtype), torch.tensor(low, dtype=dtype)
