"""Kronecker operators and the preconditioner built of them, against dense matrices."""

import pytest
import torch

from attnreg.curvature.preconditioner import BlockSolver, gauss_newton_estimate, natural_metric
from attnreg.kronecker import (
    KroneckerSolver,
    LeftFactor,
    ParameterBlock,
    apply_right,
    split_blocks,
)
from attnreg.objective import Objective, Point
from tests.cases import MODELS, twin
from tests.twins import normal, relative

ROWS, HEADS, WIDTH = 5, 3, 4


def semidefinite(size, rank, seed=0, heads=None):
    shape = (size, rank) if heads is None else (heads, size, rank)
    root = normal(*shape, seed=seed)
    return root @ root.mT


def dense(left, right):
    """``left (x) right_h`` on the row-major vectorisation of ``(rows, heads * width)``."""
    return torch.kron(left, torch.block_diag(*right))


@pytest.mark.parametrize("heads", [1, HEADS])
def test_apply_right(heads):
    matrix, right = normal(ROWS, heads * WIDTH), normal(heads, WIDTH, WIDTH, seed=1)
    parts = [matrix[:, h * WIDTH :][:, :WIDTH] @ right[h] for h in range(heads)]
    assert relative(apply_right(matrix, right), torch.cat(parts, 1)) < 1e-14


def test_split_blocks_are_views_in_order():
    blocks = (ParameterBlock("a", 2, 1, 3), ParameterBlock("b", 4, 2, 2))
    vector = torch.arange(22.0)
    a, b = split_blocks(vector, blocks)
    assert (a.shape, b.shape) == ((2, 3), (4, 4))
    assert [block.size for block in blocks] == [6, 16]
    b[0, 1] = -1
    assert vector[7] == -1


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("left_rank", [ROWS, 3])
@pytest.mark.parametrize("right_rank", [WIDTH, 2])
def test_solver(heads, left_rank, right_rank):
    moment = semidefinite(ROWS, left_rank)
    right = semidefinite(WIDTH, right_rank, seed=1, heads=heads)
    left = LeftFactor.of(moment, torch.float64)
    solver = KroneckerSolver.of(left, right)
    assert left.nullity == ROWS - left_rank
    assert solver.rank == left_rank * right_rank * heads
    operator = dense(moment, right)
    matrix = normal(ROWS, heads * WIDTH, seed=2)
    expected = torch.linalg.pinv(operator, rtol=1e-10, hermitian=True) @ matrix.flatten()
    assert relative(solver.solve(matrix, 0.0).flatten(), expected) < 1e-9
    assert solver.dual_norm_squared(matrix) == pytest.approx(float(matrix.flatten() @ expected))
    # With a shift the null directions of the left factor still stay out.
    range_left = dense(
        moment @ torch.linalg.pinv(moment, rtol=1e-10),
        torch.eye(WIDTH).double()[None].expand(heads, -1, -1),
    )
    shifted = operator + 0.7 * torch.eye(len(operator), dtype=torch.float64)
    expected = range_left @ torch.linalg.solve(shifted, matrix.flatten())
    assert relative(solver.solve(matrix, 0.7).flatten(), expected) < 1e-9


def test_zero_factors_solve_to_zero():
    left = LeftFactor.of(torch.zeros(ROWS, ROWS, dtype=torch.float64), torch.float64)
    right = torch.zeros(1, WIDTH, WIDTH, dtype=torch.float64)
    matrix = normal(ROWS, WIDTH)
    for factor in (left, LeftFactor.of(torch.eye(ROWS).double(), torch.float64)):
        solver = KroneckerSolver.of(factor, right)
        assert solver.rank == 0
        assert not solver.solve(matrix, 0.0).any()
        assert solver.dual_norm_squared(matrix) == 0.0
    assert left.nullity == ROWS


@pytest.mark.parametrize("size", [1e-16, 1e16])
def test_rank_does_not_depend_on_units(size):
    left = LeftFactor.of(size * semidefinite(ROWS, 3), torch.float64)
    assert left.nullity == 2
    solver = KroneckerSolver.of(left, size * semidefinite(WIDTH, 2, heads=1))
    assert solver.rank == 3 * 2


def test_rounded_float32_inputs_have_the_rank_of_the_exact_ones():
    data = normal(200, 3) @ normal(3, ROWS, seed=1)
    rounded = data.float().double()
    assert LeftFactor.of(rounded.T @ rounded, torch.float32).nullity == 2


# ---------------------------------------------------------------------- on a problem


def point_of(case, model):
    t = twin(case, model)
    objective = Objective(t.case.problem(t.center), t.model)
    theta, _ = t.model.split(objective.problem, t.random(7))
    return Point(objective, objective.features(theta), t.damping)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", ["batch", "ragged, causal, ridges"])
def test_block_solver(case, model):
    point = point_of(case, model)
    objective = point.objective
    blocks = objective.layout.blocks
    right = [semidefinite(b.width, b.width, seed=i, heads=b.heads) for i, b in enumerate(blocks)]
    solver = BlockSolver(objective, right)
    operator = torch.block_diag(
        *(dense(left.matrix, r) for left, r in zip(objective.left, right, strict=True))
    )
    size = len(operator)
    assert size == objective.layout.size == solver.rank
    assert solver.mean_eigenvalue == pytest.approx(float(operator.trace()) / size)
    v = normal(size)
    shifted = operator + 0.3 * torch.eye(size, dtype=torch.float64)
    assert relative(solver.inverse(0.3)(v), torch.linalg.solve(shifted, v)) < 1e-10
    expected = float(v @ torch.linalg.solve(operator, v)) ** 0.5
    assert solver.dual_norm(v) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("model", MODELS)
def test_estimate_has_the_mean_of_all_signs(model, monkeypatch):
    """The mean over signs is the sum over all unit cotangents."""
    point = point_of("ragged, causal, ridges", model)
    blocks = point.objective.layout.blocks
    shape = point.residual.shape
    expected = [torch.zeros(b.heads, b.width, b.width, dtype=torch.float64) for b in blocks]
    for k in range(shape.numel()):
        unit = torch.zeros(shape.numel(), dtype=torch.float64)
        unit[k] = 1.0
        rows = unit.view(shape) * point.objective.weights.sqrt()
        for gradients in point.features.row_gradients(point.project_out(rows) @ point.coupling.T):
            for total, c, block in zip(expected, gradients, blocks, strict=True):
                c = c.reshape(-1, block.heads, block.width)
                total += 2 * torch.einsum("rhv,rhw->hvw", c, c)
    found = []
    monkeypatch.setattr(
        "attnreg.curvature.preconditioner.BlockSolver", lambda _, right: found.extend(right)
    )
    generator = torch.Generator().manual_seed(0)
    gauss_newton_estimate(point, generator, samples=400)
    ridge = point.objective.ridge.right
    for right, mean, r in zip(found, expected, ridge, strict=True):
        assert relative(right, mean + 2 * r) < 0.1


@pytest.mark.parametrize("model", MODELS)
def test_estimate_preconditions(model):
    """The spectrum of K^-1 H is far narrower than that of H itself."""
    point = point_of("ragged, causal, ridges", model)
    size = point.theta.numel()
    h = torch.stack([point.gauss_newton(e) for e in torch.eye(size, dtype=torch.float64)])
    estimate = gauss_newton_estimate(point, torch.Generator().manual_seed(0), samples=20)
    k = torch.stack([estimate.inverse(0.0)(e) for e in torch.eye(size, dtype=torch.float64)])
    assert relative(k, k.T) < 1e-10
    root = torch.linalg.cholesky((k + k.T) / 2)
    values = torch.linalg.eigvalsh(root.T @ h @ root)
    spread = torch.linalg.eigvalsh(h)
    assert float(values[-1]) < 30
    assert float(values[-1] / values[0]) < float(spread[-1] / spread[0])


@pytest.mark.parametrize("model", MODELS)
def test_natural_metric_is_positive_on_its_rank(model):
    point = point_of("cross, additive masks, ridges", model)
    metric = natural_metric(point)
    assert metric.rank == point.theta.numel()
    assert metric.dual_norm(point.gradient) > 0
    assert metric.dual_norm(torch.zeros_like(point.gradient)) == 0.0
