"""Extreme inputs: solved, finite and right, never NaN and never a hang."""

import warnings

import pytest
import torch

from attnreg.fitting import fit
from attnreg.models import Bilinear, MultiHead
from attnreg.problem import AttentionProblem
from tests.cases import planted
from tests.twins import Twin, normal, relative

MODELS = {
    "bilinear": Bilinear(),
    "heads": MultiHead(2, 1, 2),
    "no bias": MultiHead(2, 2, 1, bias=False),
}
DTYPES = [torch.float64, torch.float32]
CASE, PARAMETERS = planted(Bilinear(), 0.1)
A, B = torch.stack(CASE.A1), torch.stack(CASE.B)


def checked(problem, model=None, **options):
    """The fit, everything in it finite, its loss that of its prediction, no warning raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(problem, model, **({"max_iterations": 60} | options))
    for value in result.parameters.values():
        assert bool(value.isfinite().all())
    numbers = (result.loss, result.regularised_loss, result.relative_error, result.gradient_norm)
    assert all(0 <= x < float("inf") for x in numbers), numbers
    for record in result.history:
        numbers = (record.loss, record.regularised, record.gradient_norm, record.damping)
        assert all(0 <= x < float("inf") for x in numbers), record
    predicted = result.predict(problem)
    (batch,) = problem.batches
    loss = float((predicted.reshape(batch.B.shape) - batch.B).double().square().sum())
    eps, size = torch.finfo(problem.dtype).eps, float(batch.B.double().square().sum())
    # An interpolating readout may be large, and its products cancel: that is rounded too.
    maps = [result.parameters[name] for name in ("Y", "W_V", "W_O") if name in result.parameters]
    terms = float(batch.A3.double().square().sum())
    for matrix in maps:
        terms *= float(matrix.double().square().sum())
    rounding = eps**2 * max(1e3 * size, terms)
    assert result.loss == pytest.approx(loss, rel=1e4 * eps, abs=rounding + 1e-300)
    # Never worse than the best that predicts nothing.
    assert result.loss <= size * (1 + 1e-6)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
class TestEveryModel:
    def tol(self, dtype):
        return 1e-8 if dtype == torch.float64 else 1e-6

    def test_one_row(self, model, dtype):
        """The softmax of one key is 1, so that some readout gives B exactly."""
        problem = AttentionProblem(normal(1, 3, dtype=dtype), normal(1, 2, seed=1, dtype=dtype))
        result = checked(problem, MODELS[model], tol=self.tol(dtype))
        assert result.converged
        assert result.relative_error < 100 * torch.finfo(dtype).eps

    def test_one_column(self, model, dtype):
        a, b = normal(4, 20, 1, dtype=dtype), normal(4, 20, 1, seed=1, dtype=dtype)
        m = MODELS[model] if model == "bilinear" else MultiHead(1, head_dim=1)
        result = checked(AttentionProblem(a, b), m, tol=self.tol(dtype))
        assert result.converged

    def test_zero_inputs(self, model, dtype):
        """Nothing can be seen: zero, or the mean where there is a bias, is the best prediction."""
        b = normal(2, 6, 3, dtype=dtype)
        problem = AttentionProblem(torch.zeros(2, 6, 4, dtype=dtype), b)
        result = checked(problem, MODELS[model], tol=self.tol(dtype))
        assert result.converged
        rows = b.double().flatten(0, 1)
        best = rows - rows.mean(0) if model == "heads" else rows
        assert result.loss == pytest.approx(float(best.square().sum()), rel=1e-5)
        assert result.notes

    def test_zero_targets(self, model, dtype):
        problem = AttentionProblem(A.to(dtype), torch.zeros_like(B, dtype=dtype))
        result = checked(problem, MODELS[model])
        assert result.converged
        assert (result.loss, result.relative_error) == (0.0, 0.0)
        assert not result.predict(problem).any()

    def test_constant_targets(self, model, dtype):
        problem = AttentionProblem(A.to(dtype), torch.full_like(B, 3.0, dtype=dtype))
        result = checked(problem, MODELS[model], tol=self.tol(dtype))
        if model == "heads":  # its bias is the answer
            assert result.converged
            assert result.relative_error < 100 * torch.finfo(dtype).eps
        assert result.relative_error <= 1.0

    @pytest.mark.parametrize("size", [1e-8, 1e4])
    def test_scaled_inputs(self, model, dtype, size):
        """From parameters scaled the other way the fit is the one of the unscaled inputs."""
        m = MODELS[model]
        case, parameters = planted(m, 0.1)
        a, b = torch.stack(case.A1).to(dtype), torch.stack(case.B).to(dtype)
        powers = {"X": 2, "Y": 1, "W_Q": 1, "W_K": 1, "W_V": 1}
        start = {n: p / size ** powers.get(n, 0) for n, p in parameters.items()}
        tol = {"tol": self.tol(dtype)}
        expected = checked(AttentionProblem(a, b), m, init=parameters, **tol)
        result = checked(AttentionProblem(a * size, b), m, init=start, **tol)
        assert result.loss == pytest.approx(expected.loss, rel=1e-3)
        if model == "bilinear":
            assert expected.converged
            assert result.converged

    @pytest.mark.parametrize("size", [1e-8, 1e4])
    def test_scaled_inputs_from_a_cold_start(self, model, dtype, size):
        problem = AttentionProblem((A * size).to(dtype), B.to(dtype))
        result = checked(problem, MODELS[model], max_iterations=25)
        if model == "bilinear":  # its start knows the units
            expected = checked(AttentionProblem(A.to(dtype), B.to(dtype)), max_iterations=25)
            assert result.loss == pytest.approx(expected.loss, rel=1e-3)

    @pytest.mark.parametrize("size", [1e-8, 1e4])
    def test_scaled_targets(self, model, dtype, size):
        m = MODELS[model]
        case, start = planted(m, 0.1)
        a, b = torch.stack(case.A1).to(dtype), torch.stack(case.B).to(dtype)
        expected = checked(AttentionProblem(a, b), m, init=start, tol=self.tol(dtype))
        scaled = {n: p * size if n in ("Y", "W_O", "b_O") else p for n, p in start.items()}
        problem = AttentionProblem(a, b * size)
        result = checked(problem, m, init=scaled, tol=self.tol(dtype))
        assert result.relative_error == pytest.approx(expected.relative_error, rel=1e-3)

    def test_logits_of_1e4(self, model, dtype):
        """The softmax is a choice of one key; there is almost no slope and no overflow."""
        m = MODELS[model]
        case, start = planted(m, 0.1)
        for name in ("X", "W_Q"):
            if name in start:
                start[name] = start[name] * 1e4
        problem = AttentionProblem(torch.stack(case.A1), torch.stack(case.B)).to(dtype)
        result = checked(problem, m, init=start, max_iterations=25)
        before = checked(problem, m, init=start, max_iterations=0)
        assert result.loss <= before.loss * (1 + 1e-6)
        if dtype == torch.float64:
            t = Twin(case, m)
            assert (
                relative(result.predict(problem).flatten(0, 1), t.output(result.parameters)) < 1e-8
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["duplicate", "zero", "combination"])
def test_columns_that_add_nothing(kind, dtype):
    """The fit is as good as without them, and the dropped directions are reported."""
    a = A.clone()
    extra = {
        "duplicate": a[..., :2],
        "zero": torch.zeros_like(a[..., :2]),
        "combination": a @ normal(4, 2, seed=3),
    }[kind]
    problem = AttentionProblem(torch.cat([a, extra], -1).to(dtype), B.to(dtype))
    tol = 1e-8 if dtype == torch.float64 else 1e-6
    expected = checked(AttentionProblem(a.to(dtype), B.to(dtype)), tol=tol)
    result = checked(problem, tol=tol, max_iterations=100)
    assert expected.converged
    assert result.converged
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    assert "2 of 6 input directions of X" in result.notes[0]
    assert "rank 4 of 6" in result.notes[1]
    if kind == "zero":
        assert not result.Y[4:].any()


def test_dropped_directions_stay_as_they_were():
    a = torch.cat([A, torch.zeros_like(A[..., :1])], -1)
    x = normal(5, 5, seed=3) * 0.2
    start = {"X": x, "Y": normal(5, 3, seed=4)}
    result = checked(AttentionProblem(a, B), init=start, max_iterations=5)
    assert torch.equal(result.X[4], x[4])
    assert not torch.equal(result.X[0], x[0])


def test_more_columns_than_rows():
    problem = AttentionProblem(normal(1, 6, 30), normal(1, 6, 2, seed=1))
    result = checked(problem, max_iterations=20)
    assert result.relative_error < 1e-6
    assert any("rank" in note for note in result.notes)


def test_equal_rows():
    """All keys equal: the output cannot depend on X."""
    a = normal(1, 1, 4).expand(1, 9, 4).clone()
    b = normal(1, 9, 2, seed=1)
    result = checked(AttentionProblem(a, b))
    assert result.converged
    mean = b[0].mean(0)
    assert result.loss == pytest.approx(float((b[0] - mean).square().sum()), rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_offset_far_from_the_origin(dtype):
    """A large mean common to all rows, as before a layer norm."""
    problem = AttentionProblem((A + 100.0).to(dtype), B.to(dtype))
    result = checked(problem, max_iterations=30)
    # Attention with equal weights is where a cold start begins.
    assert result.loss <= fit(problem, max_iterations=0).loss


def test_all_weights_0_but_one():
    weights = torch.zeros(8, 24, dtype=torch.float64)
    weights[2, 3] = 1.0
    result = fit(AttentionProblem(A, B, weights=weights), max_iterations=20)
    assert result.loss < 1e-20
    assert all(bool(value.isfinite().all()) for value in result.parameters.values())


@pytest.mark.parametrize("ridge", [1e-300, 1e-30, 1e30])
def test_extreme_ridges(ridge):
    problem = AttentionProblem(A, B, ridge_x=ridge, ridge_y=ridge)
    result = fit(problem, max_iterations=60)
    assert all(bool(value.isfinite().all()) for value in result.parameters.values())
    assert result.loss <= float(B.square().sum()) * (1 + 1e-9)
    if ridge < 1:
        assert result.loss == pytest.approx(fit(AttentionProblem(A, B)).loss, rel=1e-6)
