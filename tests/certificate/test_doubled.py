"""Doubled arithmetic against mpmath."""

import mpmath
import pytest
import torch

from attnreg.certificate.doubled import (
    UNDERFLOW,
    Doubled,
    add,
    divide,
    exponential,
    matmul,
    matmul_error,
    multiply,
    total,
)
from tests.certificate.exact import DIGITS
from tests.twins import normal


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(DIGITS):
        yield


def doubled(*shape, seed, spread=0.0):
    """Numbers with a random low part, and of sizes over ``2 spread`` decades."""
    hi = normal(*shape, seed=seed) * 10.0 ** (spread * normal(*shape, seed=seed + 1))
    return Doubled(hi, hi * 2.0**-54 * (2 * torch.sigmoid(normal(*shape, seed=seed + 2)) - 1))


def exact(a, *index):
    return mpmath.mpf(float(a.hi[index])) + mpmath.mpf(float(a.lo[index]))


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("add", add, lambda a, b: a + b),
        ("multiply", multiply, lambda a, b: a * b),
        ("divide", divide, lambda a, b: a / b),
    ],
)
def test_entrywise(name, ours, theirs):
    a, b = doubled(200, seed=1, spread=2.0), doubled(200, seed=11, spread=2.0)
    found = ours(a, b)
    for i in range(200):
        x, y = exact(a, i), exact(b, i)
        size = abs(x) + abs(y) if name == "add" else abs(theirs(x, y))
        assert abs(exact(found, i) - theirs(x, y)) <= 2.0**-100 * size


@pytest.mark.parametrize("inner", [1, 7, 300, 5000])
def test_product_is_within_its_error(inner):
    a, b = doubled(3, inner, seed=inner, spread=0.5), doubled(inner, 2, seed=inner + 20)
    found = matmul(a, b)
    worst = 0.0
    for i in range(3):
        for j in range(2):
            terms = (exact(a, i, k) * exact(b, k, j) for k in range(inner))
            worst = max(worst, float(abs(exact(found, i, j) - mpmath.fsum(terms))))
    assert worst <= matmul_error(a.hi, b.hi)
    assert matmul_error(a.hi, b.hi) < 1e-18 * float(a.hi.abs().max() * b.hi.abs().max())


def test_more_slices_lose_less():
    a, b = doubled(1, 40, seed=1), doubled(40, 1, seed=2)
    wanted = mpmath.fsum(exact(a, 0, k) * exact(b, k, 0) for k in range(40))
    few, many = (float(abs(exact(matmul(a, b, n), 0, 0) - wanted)) for n in (2, 5))
    assert many < 1e-29
    assert few > 1e-18


def test_cancelling_sum():
    a = torch.tensor([1e16, 1.0, -1e16], dtype=torch.float64)
    assert float(total(Doubled.of(a)).hi) == 1.0


def test_exponential():
    z = -UNDERFLOW * torch.sigmoid(2 * normal(2000, seed=3))
    z = Doubled(z, z * 2.0**-54 * torch.sigmoid(normal(2000, seed=4)))
    found = exponential(z)
    for i in range(0, 2000, 3):
        wanted = mpmath.exp(exact(z, i))
        assert abs(exact(found, i) - wanted) <= 2.0**-95 * wanted


def test_exponential_at_its_ends():
    z = torch.tensor([0.0, -0.0, -UNDERFLOW - 1, -1e300], dtype=torch.float64)
    found = exponential(Doubled.of(z))
    assert found.hi.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert found.lo.tolist() == [0.0] * 4
