"""The assembled curvature against autograd of the slow twin, and the dense solve."""

import itertools

import pytest
import torch

from attnreg.curvature import jacobian
from attnreg.curvature.dense import (
    assemble_gauss_newton,
    assemble_hessian,
    assembly_cost,
)
from attnreg.fitting import fit
from attnreg.linear_solve.cg import conjugate_gradients
from attnreg.linear_solve.cholesky import DenseSolver
from attnreg.models import Bilinear, attention, features
from attnreg.solvers import trust_region
from tests.cases import CASES, MODELS, inputs, moved, planted, twin
from tests.test_objective import point_of
from tests.twins import Case, Twin, normal, relative


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_assembled_matrices_are_the_twins(case, model):
    t = twin(case, model)
    point = point_of(t)
    identity = torch.eye(point.theta.numel(), dtype=torch.float64)
    hessian = torch.stack([t.hessian_product(point.theta, e) for e in identity])
    assert relative(assemble_hessian(point), hessian) < 1e-10
    assert relative(assemble_gauss_newton(point), t.gauss_newton(point.theta)) < 1e-10


@pytest.mark.parametrize("widths", list(itertools.product((1, 2), repeat=4)))
def test_widths_of_one(widths):
    d_query, d_out, d_key, d_value = widths
    data = (inputs((6, 6), d, 9 * d) for d in (d_query, d_out, d_key, d_value))
    t = Twin(Case(*data), Bilinear())
    point = point_of(t)
    assert relative(assemble_gauss_newton(point), t.gauss_newton(point.theta)) < 1e-10


@pytest.mark.parametrize("model", ["bilinear", "grouped, narrow values"])
def test_blocks_of_rows_and_heads_change_nothing(monkeypatch, model):
    t = twin("ragged, causal, ridges", model)
    whole = assemble_hessian(point_of(t))
    monkeypatch.setattr(attention, "BLOCK_BYTES", 200)
    monkeypatch.setattr(features, "CACHE_BYTES", 0)
    monkeypatch.setattr(jacobian, "_CHUNK", 300)
    assert relative(assemble_hessian(point_of(t)), whole) < 1e-12


@pytest.mark.parametrize("model", ["bilinear", "heads 2"])
def test_a_fit_that_assembles_ends_where_products_end(monkeypatch, model):
    case, parameters = planted(MODELS[model], noise=0.1)
    init = moved(parameters, 0.1, 3)
    dense = fit(case.problem(), MODELS[model], init=init)
    assert all(record.inner_iterations == 0 for record in dense.history)
    monkeypatch.setattr(trust_region, "MAX_DENSE_SIZE", 0)
    products = fit(case.problem(), MODELS[model], init=init)
    assert any(record.inner_iterations > 0 for record in products.history)
    assert dense.converged
    assert products.converged
    # Both within 1e-8 of a gradient of zero: the losses differ by its square over the curvature.
    assert dense.loss == pytest.approx(products.loss, rel=1e-10)


def test_assembly_of_more_parameters_costs_more_products():
    small, large = twin("batch", "bilinear"), twin("batch", "grouped, narrow values")
    assert 0 < assembly_cost(point_of(small)) < assembly_cost(point_of(large))


def positive(size, seed=0):
    a = normal(size, size, seed=seed)
    return a @ a.T + 0.1 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_dense_solve_is_the_minimiser_and_agrees_with_cg(damping):
    matrix, gradient = positive(7), normal(7, seed=1)
    solve = DenseSolver(matrix).solve(gradient, damping)
    shifted = matrix + damping * torch.eye(7, dtype=torch.float64)
    expected = torch.linalg.solve(shifted, -gradient)
    assert relative(solve.direction, expected) < 1e-12
    assert solve.converged
    assert solve.negative is None
    by_hand = float(gradient @ expected + expected @ matrix @ expected / 2)
    assert solve.model_change == pytest.approx(by_hand, rel=1e-12)
    product, nothing = (lambda v: matrix @ v), (lambda v: v)
    iterative = conjugate_gradients(product, gradient, nothing, damping, 1e-12, 100)
    assert relative(solve.direction, iterative.direction) < 1e-9
    assert solve.model_change == pytest.approx(iterative.model_change, rel=1e-9)


def test_null_directions_are_left_out():
    basis = torch.linalg.qr(normal(6, 6)).Q[:, :4]
    scale = torch.logspace(0, -12, 6, dtype=torch.float64)  # also badly scaled
    matrix = scale[:, None] * (basis @ positive(4) @ basis.T) * scale
    gradient = matrix @ normal(6, seed=3)
    solve = DenseSolver(matrix).solve(gradient, 0.0)
    assert solve.converged
    assert solve.negative is None
    remainder = (matrix @ solve.direction + gradient) / scale
    assert float(remainder.norm()) < 1e-10 * float((gradient / scale).norm())
    assert solve.direction.isfinite().all()


def test_negative_curvature_is_handed_back_downhill():
    rotation = torch.linalg.qr(normal(5, 5)).Q
    matrix = rotation @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, -0.4]).double()) @ rotation.T
    gradient = normal(5, seed=4)
    solve = DenseSolver(matrix).solve(gradient, 0.1)
    p = solve.negative
    assert not solve.converged
    assert float(p @ matrix @ p) == pytest.approx(solve.negative_curvature, rel=1e-12)
    assert solve.negative_curvature < 0
    assert float(gradient @ p) <= 0
    assert solve.model_change < 0
    healed = DenseSolver(matrix).solve(gradient, 1.0)
    assert healed.negative is None


def test_zero_matrix_gives_no_step():
    solve = DenseSolver(torch.zeros(3, 3).double()).solve(normal(3), 0.0)
    assert not solve.direction.any()
    assert solve.model_change == 0.0
