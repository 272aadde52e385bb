"""Preconditioners corrected by pairs, against the quasi-Newton formula written out as matrices."""

import pytest
import torch

from attnreg.linear_solve import curvature_pairs
from attnreg.linear_solve.cg import conjugate_gradients
from attnreg.linear_solve.curvature_pairs import CurvaturePairs
from tests.twins import normal, relative

N = 12


def positive(seed, low=-2.0):
    q, _ = torch.linalg.qr(normal(N, N, seed=seed))
    return q @ torch.diag(torch.logspace(low, 1, N, dtype=torch.float64)) @ q.T


def as_matrix(operator):
    return torch.stack([operator(e) for e in torch.eye(N, dtype=torch.float64)], dim=1)


def filled(h, count, seed=7):
    pairs = CurvaturePairs(h[0])
    directions = [normal(N, seed=seed + i) for i in range(count)]
    for s in directions:
        pairs.add(s, h @ s)
    return pairs, directions


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_corrected_is_the_quasi_newton_matrix(count, damping):
    h, first = positive(1), torch.linalg.inv(positive(2))
    pairs, directions = filled(h, count)
    damped, expected = h + damping * torch.eye(N, dtype=torch.float64), first
    for s in directions:  # H <- (I - s y^T / s^T y) H (I - y s^T / s^T y) + s s^T / s^T y
        y = damped @ s
        left = torch.eye(N, dtype=torch.float64) - torch.outer(s, y) / (s @ y)
        expected = left @ expected @ left.T + torch.outer(s, s) / (s @ y)
    found = as_matrix(pairs.corrected(lambda v: first @ v, damping))
    assert relative(found, expected) < 1e-10  # rounding times the condition, 1e3
    if directions:
        assert relative(found @ (damped @ directions[-1]), directions[-1]) < 1e-10


def test_only_the_last_pairs_are_kept(monkeypatch):
    monkeypatch.setattr(curvature_pairs, "MOST", 3)
    h, identity = positive(1), lambda v: v.clone()
    many, _ = filled(h, 8)
    few, _ = filled(h, 3, seed=7 + 5)
    expected = as_matrix(few.corrected(identity, 0.0))
    assert torch.equal(as_matrix(many.corrected(identity, 0.0)), expected)


def test_no_pair_is_kept_where_there_is_no_room(monkeypatch):
    monkeypatch.setattr(curvature_pairs, "MOST_BYTES", 2 * N * 8 - 1)
    h = positive(1)
    pairs, _ = filled(h, 2)
    identity = lambda v: v.clone()  # noqa: E731
    assert pairs.corrected(identity, 0.0) is identity


def test_pairs_added_later_do_not_change_an_operator():
    h = positive(1)
    pairs, _ = filled(h, 2)
    operator = pairs.corrected(lambda v: v.clone(), 0.0)
    before = as_matrix(operator)
    for i in range(20):
        pairs.add(normal(N, seed=50 + i), h @ normal(N, seed=50 + i))
    assert torch.equal(as_matrix(operator), before)


def test_the_next_solve_takes_fewer_products_and_gives_the_same(monkeypatch):
    monkeypatch.setattr(curvature_pairs, "MOST", 30)  # all directions of the first solve
    h, g = positive(1, low=-3.0), normal(N, seed=3)
    near = h + 1e-3 * positive(4)
    pairs = CurvaturePairs(g)

    def solve(matrix, vector, known):
        return conjugate_gradients(
            lambda v: matrix @ v, vector, lambda v: v.clone(), 0.0, 1e-8, 200, pairs=known
        )

    solve(h, g, pairs)
    cold, warm = solve(near, g, None), solve(near, g, pairs)
    assert warm.converged
    assert cold.converged
    assert 2 * warm.iterations <= cold.iterations
    # The tolerance is on the residual; the step is off by at most it times the condition, 1e4.
    assert relative(warm.direction, torch.linalg.solve(near, -g)) < 1e-4


def test_directions_of_negative_curvature_are_not_kept():
    h = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    g = torch.tensor([0.0, 1.0], dtype=torch.float64)
    pairs = CurvaturePairs(g)
    solve = conjugate_gradients(
        lambda v: h @ v, g, lambda v: v.clone(), 2.0, 1e-8, 10, pairs=pairs
    )  # positive with the damping, negative without
    assert solve.converged
    identity = lambda v: v  # noqa: E731
    assert pairs.corrected(identity, 2.0) is identity
