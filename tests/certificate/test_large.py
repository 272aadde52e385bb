"""Lanczos, certificates without a Hessian, and multi-head layers."""

import dataclasses
import importlib
import math

import pytest
import torch

from attnreg import AttentionProblem, Bilinear, Kind, MultiHead, fit, predict, verify
from attnreg.certificate.coordinates import Coordinates, Setting
from attnreg.certificate.curvature import CurvatureObserver
from attnreg.certificate.gradient import evaluate
from attnreg.certificate.lanczos import extremes, relative_error, solve
from attnreg.certificate.large import JointHessian
from tests.cases import CASES, moved, planted, twin
from tests.twins import normal, relative

verify_module = importlib.import_module("attnreg.certificate.verify")


# ------------------------------------------------------------------ Lanczos


@pytest.mark.parametrize("steps", [30, 60])
def test_bounds_hold_and_failures_are_no_more_frequent_than_stated(steps):
    """A spectrum with one eigenvalue far below the others, which few steps cannot see."""
    values = torch.linspace(1.0, 2.0, 500, dtype=torch.float64)
    values[0] = 0.98
    failures = 0
    for seed in range(200):
        found = extremes(lambda v: values * v, 500, steps, 0.1, seed)
        assert found.smallest >= 0.98 - 1e-12
        assert found.largest <= 2.0 + 1e-12
        failures += found.floor > 0.98 or found.ceiling < 2.0
    assert failures <= 0.1 * 200
    eps = relative_error(500, steps, 0.05)
    if eps < 0.25:
        assert found.floor == pytest.approx(
            found.smallest - eps / (1 - 2 * eps) * (found.largest - found.smallest), rel=1e-9
        )


def test_all_steps_give_the_eigenvalues():
    matrix = normal(12, 12)
    matrix = matrix + matrix.mT
    found = extremes(lambda v: matrix @ v, 12, 100, 1e-6, 0)
    values = torch.linalg.eigvalsh(matrix)
    assert found.steps == 12
    assert found.floor <= float(values[0]) <= found.smallest + 1e-10
    assert found.smallest - found.floor < 1e-9


def test_few_steps_say_nothing():
    found = extremes(lambda v: v * torch.arange(1.0, 101.0, dtype=torch.float64), 100, 3, 1e-9, 0)
    assert found.floor == -math.inf


def test_conjugate_gradients():
    matrix = normal(20, 20)
    matrix = matrix @ matrix.mT + torch.eye(20, dtype=torch.float64)
    right = normal(20, seed=1)
    found = solve(lambda v: matrix @ v, right, 100, 1e-12)
    assert float((matrix @ found - right).norm()) < 1e-10 * float(right.norm())


# ------------------------------------------------------------------ products


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_hessian(name):
    made = twin(name, "bilinear")
    problem, parameters = made.case.problem(center=made.center), made.random(3)
    setting = Setting.of(problem, parameters)
    coordinates = Coordinates.of(setting, problem.dtype)
    observer = CurvatureObserver(setting, coordinates)
    evaluate(setting, coordinates, observer)
    hessian = JointHessian(problem, parameters, setting, coordinates)
    columns = [hessian.product(row) for row in torch.eye(hessian.size, dtype=torch.float64)]
    assert relative(torch.stack(columns), observer.result().matrix) < 1e-13


@pytest.fixture
def small_limit(monkeypatch):
    """Every problem is too large for a dense Hessian."""
    monkeypatch.setattr(verify_module, "MAX_DENSE", 0)


def ridged(ridge_x=5.0, ridge_y=1.0, d=6):
    A = normal(2, 30, d)
    blank = AttentionProblem(A, torch.zeros_like(A), ridge_x=ridge_x, ridge_y=ridge_y)
    truth = {"X": 0.3 * normal(d, d, seed=1), "Y": normal(d, d, seed=2)}
    return blank.replace(B=predict(Bilinear(), truth, blank) + 0.1 * normal(2, 30, d, seed=3))


def test_matrix_free_agrees_with_dense(monkeypatch):
    problem = ridged()
    result = fit(problem, tol=1e-12)
    dense = verify(problem, result)
    monkeypatch.setattr(verify_module, "MAX_DENSE", 0)
    found = verify(problem, result, failure_probability=1e-4)
    assert found.kind is dense.kind is Kind.LOCAL
    assert found.method == "matrix-free"
    assert found.failure_probability == 1e-4
    assert any("Lanczos" in text for text in found.assumptions)
    # Conjugate gradients stop at 1e-8, and both bound the same decrement.
    assert found.gap == pytest.approx(dense.gap, rel=0.1)


@pytest.mark.usefixtures("small_limit")
def test_matrix_free_refuses_a_saddle():
    problem = ridged(1e-6, 1e-6)
    found = verify(problem, normal(6, 6, seed=5), normal(6, 6, seed=6))
    assert found.kind is Kind.NOT_CERTIFIED
    assert "negative curvature" in found.reason


@pytest.mark.usefixtures("small_limit")
def test_matrix_free_says_what_it_cannot_tell(monkeypatch):
    monkeypatch.setattr("attnreg.certificate.large.STEPS", 20)
    problem = ridged(1e-2, 1e-2)
    found = verify(problem, fit(problem, tol=1e-10))
    assert found.kind is Kind.STATIONARY
    assert "Lanczos" in found.reason


@pytest.mark.parametrize("probability", [0.0, 1.0, -1.0, float("nan")])
def test_failure_probability_is_one(probability):
    with pytest.raises(ValueError, match="failure_probability"):
        verify(ridged(), torch.zeros(6, 6), torch.zeros(6, 6), failure_probability=probability)


# ------------------------------------------------------------------ multi-head


@pytest.fixture(scope="module")
def layer():
    model = MultiHead(2, head_dim=2)
    case, parameters = planted(model, noise=0.1)
    problem = case.problem()
    return problem, model, fit(problem, model, init=parameters, tol=1e-9)


def test_layer_is_stationary_and_nothing_more(layer):
    problem, _, result = layer
    found = verify(problem, result)
    assert found.kind is Kind.STATIONARY
    assert (found.gap, found.radius, found.lipschitz) == (None,) * 3
    assert -1e-9 < found.mu <= 0  # zeros of the gauge
    assert found.loss == pytest.approx(result.loss, rel=1e-12)
    assert found.value == pytest.approx(result.regularised_loss, rel=1e-12)
    assert found.gradient_norm == pytest.approx(result.gradient_norm, rel=1e-3)
    found.check(verify(problem, result))


def test_gauge_changes_nothing(layer):
    problem, _, result = layer
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] += 0.5 * normal(2, 2, seed=4)
    p = dict(result.parameters)
    p["W_Q"], p["b_Q"] = p["W_Q"] @ turn, p["b_Q"] @ turn
    p["W_K"] = p["W_K"] @ torch.linalg.inv(turn).mT
    p["b_K"] = p["b_K"] @ torch.linalg.inv(turn).mT
    found = verify(problem, dataclasses.replace(result, parameters=p))
    assert found.kind is Kind.STATIONARY
    assert found.value == pytest.approx(result.regularised_loss, rel=1e-12)


def test_layer_away_from_a_minimiser(layer):
    problem, _, result = layer
    p = moved(dict(result.parameters), 0.3, seed=1)
    found = verify(problem, dataclasses.replace(result, parameters=p))
    assert found.kind is Kind.NOT_CERTIFIED
    assert "continue the fit" in found.reason


def test_layer_with_a_ridge(layer):
    problem, model, result = layer
    center = dict(result.parameters)
    pulled = problem.replace(ridge_x=0.1, ridge_y=0.1, center=moved(center, 0.05, seed=2))
    refit = fit(pulled, model, init=center, tol=1e-9)
    found = verify(pulled, refit)
    assert found.kind is Kind.STATIONARY
    assert found.value == pytest.approx(refit.regularised_loss, rel=1e-11)
    assert found.gradient_norm == pytest.approx(refit.gradient_norm, rel=1e-3)


def test_layer_with_a_bad_readout(layer):
    """The readout's part of the gradient counts: the reduced gradient would not see it."""
    problem, _, result = layer
    p = dict(result.parameters) | {"W_O": result.parameters["W_O"] * 1.01}
    found = verify(problem, dataclasses.replace(result, parameters=p))
    assert found.kind is Kind.NOT_CERTIFIED


def test_layer_is_not_for_ball_arithmetic(layer):
    problem, _, result = layer
    with pytest.raises(ValueError, match="multi-head"):
        verify(problem, result, rigorous=True)
