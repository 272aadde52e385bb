"""Conjugate gradients against a direct solve."""

import itertools

import pytest
import torch

from attnreg.linear_solve.cg import conjugate_gradients
from tests.twins import normal, relative

N = 12
EYE = torch.eye(N, dtype=torch.float64)


def matrix(eigenvalues, seed=0):
    q, _ = torch.linalg.qr(normal(N, N, seed=seed))
    return q @ torch.diag(eigenvalues) @ q.T


def positive():
    return matrix(torch.logspace(-2, 1, N, dtype=torch.float64))


def run(h, g, p, damping=0.0, tolerance=1e-13, max_iterations=200):
    """With the preconditioner ``p``, and the number of products checked."""
    calls = []

    def product(v):
        calls.append(v)
        return h @ v

    inverse = torch.linalg.inv(p)
    before = g.clone()
    solve = conjugate_gradients(
        product, g, lambda v: inverse @ v, damping, tolerance, max_iterations
    )
    assert solve.iterations == len(calls)
    assert torch.equal(g, before)
    d = solve.direction
    assert solve.model_change == pytest.approx(float(g @ d + d @ h @ d / 2), rel=1e-9, abs=1e-12)
    return solve


@pytest.mark.parametrize("damping", [0.0, 0.1, 100.0])
@pytest.mark.parametrize("preconditioner", ["none", "another", "the matrix"])
def test_solves(damping, preconditioner):
    h, g = positive(), normal(N, seed=1)
    p = {"none": EYE, "another": matrix(torch.arange(1.0, N + 1).double(), 4)}
    p["the matrix"] = h + damping * EYE
    solve = run(h, g, p[preconditioner], damping)
    assert solve.converged
    assert solve.negative is None
    assert solve.negative_curvature == 0.0
    assert relative(solve.direction, torch.linalg.solve(h + damping * EYE, -g)) < 1e-9
    if preconditioner == "the matrix":
        assert solve.iterations <= 2


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3])
def test_tolerance_is_met_and_not_before(tolerance):
    h, g, p = positive(), normal(N, seed=1), matrix(torch.linspace(1, 3, N).double(), 4)

    def residual(solve):
        r = g + h @ solve.direction
        return float((r @ torch.linalg.solve(p, r)) / (g @ torch.linalg.solve(p, g))) ** 0.5

    solve = run(h, g, p, tolerance=tolerance)
    assert solve.converged
    assert residual(solve) <= tolerance * (1 + 1e-9)
    before = run(h, g, p, tolerance=tolerance, max_iterations=solve.iterations - 1)
    assert not before.converged
    assert residual(before) > tolerance


def test_as_many_iterations_as_distinct_eigenvalues():
    values = torch.tensor([1.0, 5.0, 9.0]).double().repeat_interleave(4)
    assert run(matrix(values), normal(N, seed=1), EYE, tolerance=1e-10).iterations == 3


def test_each_product_lowers_the_model():
    h, g = positive(), normal(N, seed=1)
    changes = [run(h, g, EYE, max_iterations=k).model_change for k in range(8)]
    assert changes[0] == 0.0
    assert all(b < a for a, b in itertools.pairwise(changes))


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_negative_curvature_is_reported(damping):
    h = matrix(torch.linspace(-2, 5, N).double())
    solve = run(h, normal(N, seed=1), EYE, damping)
    p = solve.negative
    assert not solve.converged
    assert p is not None
    assert float(p @ h @ p + damping * p @ p) <= 0
    assert solve.negative_curvature == pytest.approx(float(p @ h @ p), rel=1e-9)
    assert solve.negative_curvature < 0


def test_negative_curvature_at_once_leaves_no_direction():
    g = normal(N, seed=1)
    solve = run(-EYE, g, EYE)
    assert solve.iterations == 1
    assert not solve.direction.any()
    assert torch.equal(solve.negative, -g)


def test_damping_above_the_negative_eigenvalue_hides_it():
    h, g = matrix(torch.linspace(-2, 5, N).double()), normal(N, seed=1)
    solve = run(h, g, EYE, damping=2.1)
    assert solve.converged
    assert solve.negative is None
    assert relative(solve.direction, torch.linalg.solve(h + 2.1 * EYE, -g)) < 1e-8


def test_directions_that_the_preconditioner_drops_stay_out():
    h, g = positive(), normal(N, seed=1)
    kept = torch.linalg.qr(normal(N, N - 3, seed=2))[0]
    solve = conjugate_gradients(lambda v: h @ v, g, lambda v: kept @ (kept.T @ v), 0.0, 1e-13, 99)
    expected = kept @ torch.linalg.solve(kept.T @ h @ kept, -kept.T @ g)
    assert solve.converged
    assert relative(solve.direction, expected) < 1e-9


@pytest.mark.parametrize("g", [torch.zeros(N).double(), EYE[0] * 1e-300], ids=["0", "underflow"])
def test_no_gradient_no_work(g):
    solve = run(positive(), g, EYE)
    assert solve.converged
    assert solve.iterations == 0
    assert not solve.direction.any()


def test_float32():
    h, g = positive().float(), normal(N, seed=1).float()
    solve = conjugate_gradients(lambda v: h @ v, g, torch.clone, 0.1, 1e-5, 100)
    assert solve.direction.dtype == torch.float32
    assert relative(solve.direction, torch.linalg.solve(h + 0.1 * EYE.float(), -g)) < 1e-4


@pytest.mark.parametrize("overhead", [0.0, 2.0, 30.0])
def test_a_solve_ends_where_another_product_gains_less_than_the_average(overhead):
    values = torch.logspace(0, -4, 30, dtype=torch.float64)
    gradient = normal(30, seed=5)

    def solve(iterations, overhead=None):
        args = (lambda v: values * v, gradient, lambda v: v, 0.0, 1e-12)
        return conjugate_gradients(*args, iterations, overhead=overhead)

    gains = [0.0] + [-solve(k).model_change for k in range(1, 30)]
    expected = next(
        (k for k in range(1, 30) if (gains[k] - gains[k - 1]) * (k + overhead) < gains[k]), 30
    )
    assert solve(200, overhead).iterations == expected
