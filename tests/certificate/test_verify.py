"""``verify``: what it states of which points."""

import importlib
import math

import pytest
import torch

from attnreg import AttentionProblem, Bilinear, Certificate, Kind, fit, predict, verify
from tests.twins import normal

verify_module = importlib.import_module("attnreg.certificate.verify")  # the function hides it


def noisy(n=20, d=3, sequences=2, noise=0.1, seed=0, **settings):
    A = normal(sequences, n, d, seed=seed)
    blank = AttentionProblem(A, torch.zeros_like(A), **settings)
    truth = {"X": 0.5 * normal(d, d, seed=seed + 1), "Y": normal(d, d, seed=seed + 2)}
    target = predict(Bilinear(), truth, blank)
    return blank.replace(B=target + noise * normal(sequences, n, d, seed=seed + 3))


@pytest.fixture(scope="module")
def ridged():
    problem = noisy(ridge_x=0.05, ridge_y=0.05)
    return problem, fit(problem, tol=1e-12)


def test_local_at_a_fit(ridged):
    problem, result = ridged
    found = verify(problem, result)
    assert found.kind is Kind.LOCAL
    assert found.norm == "hessian"
    assert 0 < found.gap < 1e-20 * found.loss
    assert 0.5 < found.mu <= 1
    assert found.loss == pytest.approx(result.loss, rel=1e-12)
    assert found.value == pytest.approx(result.regularised_loss, rel=1e-12)
    assert found.problem_digest == problem.digest()


def test_parameters_by_themselves_are_the_same(ridged):
    problem, result = ridged
    assert verify(problem, result.X, result.Y) == verify(problem, result)


def test_the_gap_is_one(ridged):
    """A step away the gap bounds the value that is lost, and is not far above it."""
    problem, result = ridged
    best = verify(problem, result).value
    for seed in range(5):
        x = result.X + 1e-6 * normal(3, 3, seed=seed)
        y = result.Y + 1e-6 * normal(3, 3, seed=seed + 50)
        found = verify(problem, x, y)
        assert found.kind is Kind.LOCAL
        assert found.value - best <= found.gap <= 3 * (found.value - best)


@pytest.mark.parametrize("errors", [(3.0, 3.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 2.0)])
def test_failed_whitening_states_nothing_in_the_natural_metric(monkeypatch, errors):
    problem = noisy(ridge_x=1e4, ridge_y=10.0)
    result = fit(problem, tol=1e-10)
    assert verify(problem, result).kind is Kind.GLOBAL
    monkeypatch.setattr(verify_module, "_gram_errors", lambda *_: errors)
    found = verify(problem, result)
    assert found.kind is Kind.LOCAL  # in the Hessian's norm, which needs no metric
    assert found.gradient_norm == math.inf


def test_a_step_too_far(ridged):
    problem, result = ridged
    found = verify(problem, result.X + 0.3, result.Y)
    assert found.kind is Kind.NOT_CERTIFIED
    assert "continue the fit" in found.reason


def test_negative_curvature():
    problem = noisy(ridge_x=1e-6, ridge_y=1e-6)
    found = verify(problem, normal(3, 3, seed=5), normal(3, 3, seed=6))
    assert found.kind is Kind.NOT_CERTIFIED
    assert "negative curvature" in found.reason


def test_saddle_point_is_at_most_stationary():
    """Without ridges and logits ``X = Y = 0`` is stationary where the targets sum to 0."""
    A = normal(1, 10, 2)
    B = normal(1, 10, 2, seed=4)
    problem = AttentionProblem(A, B - B.mean(1, keepdim=True), ridge_y=0.1)
    found = verify(problem, torch.zeros(2, 2), torch.zeros(2, 2))
    assert found.kind is Kind.STATIONARY
    assert found.gap is None


def test_without_ridges_the_gauge_is_held():
    """One sequence: keys are centred, and post-norm rows lie on a hyperplane."""
    A = normal(1, 40, 3, seed=3)
    A = A - A.mean(-1, keepdim=True)
    blank = AttentionProblem(A, torch.zeros(1, 40, 2, dtype=torch.float64))
    truth = {"X": normal(3, 3, seed=1), "Y": normal(3, 2, seed=2)}
    problem = blank.replace(B=predict(Bilinear(), truth, blank))
    problem = problem.replace(B=problem.batches[0].B + 0.05 * normal(1, 40, 2, seed=9))
    found = verify(problem, fit(problem, init=truth, tol=1e-13))
    assert found.kind is Kind.LOCAL
    held = [text for text in found.assumptions if "held" in text]
    assert len(held) == 3
    assert "1 direction(s) of the keys" in held[1]


def test_singular_hessian_is_said():
    """Two sequences whose queries and keys use different directions leave part of X free."""
    a, b = normal(6, 2, seed=1), normal(6, 2, seed=2)
    zero = torch.zeros_like(a)
    A = torch.stack([torch.cat([a, zero], 1), torch.cat([zero, b], 1)])
    blank = AttentionProblem(A, torch.zeros(2, 6, 2, dtype=torch.float64))
    truth = {"X": normal(4, 4, seed=3), "Y": normal(4, 2, seed=4)}
    problem = blank.replace(B=predict(Bilinear(), truth, blank))
    found = verify(problem, truth["X"], truth["Y"])
    assert found.kind is Kind.STATIONARY
    assert "singular" in found.reason


def test_global_with_a_strong_ridge():
    problem = noisy(ridge_x=1e4, ridge_y=1.0)
    result = fit(problem, tol=1e-12)
    found = verify(problem, result)
    assert found.kind is Kind.GLOBAL
    assert found.norm == "natural"
    assert found.gap <= 1e-15 * found.loss
    away = verify(problem, result.X + 1e-3, result.Y + 0.1)
    assert away.kind is Kind.GLOBAL
    assert away.value - found.value <= away.gap


def test_global_around_given_weights():
    center = {"X": normal(3, 3, seed=1), "Y": normal(3, 3, seed=2)}
    problem = noisy(ridge_x=3e3, ridge_y=1.0).replace(center=center)
    found = verify(problem, fit(problem, init=center, tol=1e-12))
    assert found.kind is Kind.GLOBAL


@pytest.mark.parametrize("rigorous", [False, True])
def test_float32_is_promoted_exactly(rigorous):
    problem = noisy(ridge_x=0.05, ridge_y=0.05).to(torch.float32)
    result = fit(problem, tol=1e-6)
    found = verify(problem, result, rigorous=rigorous)
    wide = verify(problem.to(torch.float64), result.X, result.Y, rigorous=rigorous)
    assert found.kind is Kind.LOCAL
    assert (found.gap, found.value) == (wide.gap, wide.value)


def test_rigorous_agrees(ridged):
    problem, result = ridged
    found, proven = verify(problem, result), verify(problem, result, rigorous=True)
    assert proven.kind is Kind.LOCAL
    assert proven.method == "rigorous"
    assert proven.gap <= found.gap * (1 + 1e-6)
    assert proven.lipschitz == pytest.approx(found.lipschitz, rel=0.3)  # other shares of the bounds
    assert proven.value == pytest.approx(found.value, rel=1e-14)
    assert any("ball arithmetic" in text for text in proven.assumptions)


def test_rigorous_is_for_small_problems():
    A = normal(1, 600, 2)
    problem = AttentionProblem(A, A, ridge_x=1.0, ridge_y=1.0)
    with pytest.raises(ValueError, match="leave it out"):
        verify(problem, torch.zeros(2, 2), torch.zeros(2, 2), rigorous=True)


def test_weights_are_repeated_rows(ridged):
    problem, result = ridged
    batch = problem.batches[0]
    doubled = problem.replace(
        A1=torch.cat([batch.A1, batch.A1[:, :3]], 1),
        B=torch.cat([batch.B, batch.B[:, :3]], 1),
        A2=batch.A2,
        A3=batch.A3,
    )
    weights = torch.ones(2, 20, dtype=torch.float64)
    weights[:, :3] = 2.0
    weighted = problem.replace(weights=weights)
    one, two = (verify(p, result.X, result.Y) for p in (doubled, weighted))
    assert one.value == pytest.approx(two.value, rel=1e-14)
    assert one.gradient_norm * doubled.target_norm_squared == pytest.approx(
        two.gradient_norm * weighted.target_norm_squared, rel=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 3),), "without Y"),
        ((torch.zeros(3, 2), torch.zeros(3, 3)), "has shape"),
        ((torch.full((3, 3), torch.nan), torch.zeros(3, 3)), "not finite"),
    ],
)
def test_refusals(ridged, arguments, message):
    with pytest.raises(ValueError, match=message):
        verify(ridged[0], *arguments)


def test_a_result_has_its_own_readout(ridged):
    with pytest.raises(ValueError, match="leave Y out"):
        verify(*ridged, torch.zeros(3, 3))


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_tolerance_is_positive(ridged, tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        verify(*ridged, tolerance=tolerance)


A, B = normal(8, 3), normal(8, 2, seed=1)
RIDGES = {"ridge_x": 1.0, "ridge_y": 1.0}
DEGENERATE = {
    "one row": AttentionProblem(normal(1, 1), normal(1, 1)),
    "one row, ridges": AttentionProblem(normal(1, 1), normal(1, 1), **RIDGES),
    "queries are zero": AttentionProblem(0 * A, B, A, A, **RIDGES),
    "keys are zero": AttentionProblem(A, B, 0 * A, A, **RIDGES),
    "values are zero": AttentionProblem(A, B, A, 0 * A, **RIDGES),
    "values are zero, no ridge": AttentionProblem(A, B, A, 0 * A),
    "targets are constant": AttentionProblem(A, 0 * B + 1, **RIDGES),
    "one key each": AttentionProblem(normal(3, 1, 2), normal(3, 1, 2, seed=1)),
    "every row sees itself": AttentionProblem(A, B, mask=torch.eye(8, dtype=torch.bool)),
    "large masks": AttentionProblem(A, B, mask=1e9 * normal(8, 8), **RIDGES),
    "one weight": AttentionProblem(A, B, weights=torch.eye(8, dtype=torch.float64)[3], **RIDGES),
    "huge": AttentionProblem(1e150 * A, 1e150 * B, **RIDGES),
    "tiny": AttentionProblem(1e-150 * A, 1e-150 * B),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_problems(tmp_path, name):
    """No exception; both arithmetics state the same, and the certificate can be saved."""
    problem = DEGENERATE[name]
    x = normal(problem.d_query, problem.d_key, seed=2)
    y = normal(problem.d_value, problem.d_out, seed=3)
    found, proven = verify(problem, x, y), verify(problem, x, y, rigorous=True)
    found.save(tmp_path / "c.json")
    assert Certificate.load(tmp_path / "c.json") == found
    assert found.kind is proven.kind
    if found.certified:
        assert found.gap == pytest.approx(proven.gap, rel=1e-6)
        # Without directions of X the objective is convex, and least at the readout of a fit.
        best = fit(problem, init={"X": x, "Y": y}, tol=1e-12).regularised_loss
        assert found.value - best <= found.gap * (1 + 1e-12)
