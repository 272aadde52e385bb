"""The paper's algorithm with sampled rows, and the same by conjugate gradients."""

import dataclasses
import itertools

import pytest
import torch

from attnreg import fitting
from attnreg.fitting import SOLVERS, fit
from attnreg.models import Bilinear, MultiHead
from attnreg.problem import AttentionProblem
from attnreg.records import Status
from attnreg.result import FitResult
from attnreg.solvers import approximate_newton
from attnreg.storage import read_tensors, write_tensors
from benchmarks import inner_iterations
from tests.cases import twin
from tests.twins import Twin, normal, relative

PAIR = ("newton-sketch", "newton-cg")


def ragged(**options):
    """Sequences of several lengths, causal, with weights and a centre of the ridges."""
    t = twin("ragged, causal, ridges", "bilinear")
    options = t.case.options | {"ridge_x": 0.05, "ridge_y": 0.5} | options
    made = Twin(dataclasses.replace(t.case, options=options), t.model, t.center)
    return made, made.case.problem(t.center)


def tall(n=500, d=3, **options):
    """One sequence at whose solution few rows are enough."""
    a, x = normal(n, d, seed=1), 0.3 * normal(d, d, seed=2)
    targets = torch.softmax(a @ x @ a.T, 1) @ a @ normal(d, d, seed=3)
    targets = targets + 0.1 * targets.std() * normal(n, d, seed=4)
    return AttentionProblem(a, targets, **({"ridge_x": 2e-3, "ridge_y": 0.5} | options))


@pytest.mark.parametrize("solver", PAIR)
@pytest.mark.parametrize("make", [lambda: ragged()[1], tall])
def test_they_find_the_minimiser_that_the_trust_region_finds(solver, make):
    problem = make()
    expected = fit(problem, tol=1e-14)
    result = fit(problem, solver=solver, tol=1e-14)
    assert expected.converged
    assert result.status is Status.CONVERGED
    assert result.gradient_norm <= 1e-14
    assert result.regularised_loss == pytest.approx(expected.regularised_loss, rel=1e-12)
    assert relative(result.X, expected.X) < 1e-9
    assert relative(result.Y, expected.Y) < 1e-9
    assert result.solver == solver
    assert expected.solver == "trust-region"


def test_the_value_falls_at_the_stated_rate():
    problem = tall()
    best = fit(problem, tol=1e-14).regularised_loss
    history = fit(problem, solver="newton-sketch", tol=1e-9).history
    gaps = [record.regularised - best for record in history if record.accepted]
    gaps = [gap for gap in gaps if gap > 1e-10 * best]  # above rounding
    assert len(gaps) >= 4
    # b/a FORCING^2 with b/a = (1 + eps) / (1 - eps), and a half more: the exact Hessian differs
    # from Gauss-Newton by less than a tenth here, and the model is not the objective.
    eps = approximate_newton.DISTORTION
    factor = 1.5 * (1 + eps) / (1 - eps) * approximate_newton.FORCING**2
    for before, after in itertools.pairwise(gaps[1:]):
        assert after < factor * before


def test_records_say_what_was_sampled_and_spent():
    sketch = fit(tall(), solver="newton-sketch", tol=1e-10).history
    assert sketch[0].phase == "start"
    assert sketch[0].rows == "exact"
    assert all(record.phase == "newton" for record in sketch[1:])
    assert all(0 < record.rows_sampled < 250 for record in sketch[1:])
    assert sketch[-1].rows == f"{sketch[-1].rows_sampled} of 500"
    for before, after in itertools.pairwise(sketch):
        spent = {k: after.operations[k] - before.operations[k] for k in after.operations}
        assert min(spent.values()) > 0
        assert after.passes > before.passes
    whole = fit(tall(), tol=1e-10).history[-1]
    steps = len(fit(tall(), tol=1e-10).history) - 1
    per_step = sketch[-1].operations["row_sums"] / (len(sketch) - 1)
    assert per_step < whole.operations["row_sums"] / steps / 2
    by_cg = fit(tall(), solver="newton-cg", tol=1e-10).history
    assert all(record.phase == "newton" and record.inner_iterations for record in by_cg[1:])
    assert by_cg[-1].operations["dense"] == by_cg[-1].operations["comoments"] == 0


def test_all_rows_are_called_exact():
    _, problem = ragged(ridge_x=1e-6, ridge_y=1e-4)
    history = fit(problem, solver="newton-sketch", max_iterations=3).history
    assert [record.rows for record in history] == ["exact"] * 4


def test_the_seed_decides():
    problem = tall()
    first, again, other = (
        fit(problem, solver="newton-sketch", init=init, seed=seed)
        for init, seed in [(Bilinear().start(problem, 0), s) for s in (1, 1, 2)]
    )
    assert torch.equal(first.X, again.X)
    assert not torch.equal(first.X, other.X)


@pytest.mark.parametrize("solver", PAIR)
def test_from_large_logits_the_objective_never_rises(solver):
    made, problem = ragged()
    init = made.random(7)
    init["X"] *= 30
    history = fit(problem, solver=solver, init=init, max_iterations=40).history
    values = [record.regularised for record in history]
    assert values[-1] < 0.5 * values[0]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("solver", PAIR)
def test_inputs_without_full_rank(solver):
    a = normal(40, 4, seed=1)
    a[:, 3] = a[:, 0] + a[:, 1]
    problem = AttentionProblem(a, normal(40, 2, seed=2), ridge_x=0.1, ridge_y=1.0)
    result = fit(problem, solver=solver, tol=1e-11)
    assert result.converged
    assert any("carry no data" in note for note in result.notes)


@pytest.mark.parametrize("solver", PAIR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_ends_at_the_level_of_rounding(solver, dtype):
    result = fit(tall().to(dtype), solver=solver, tol=1e-30)
    assert result.status is Status.STALLED
    assert result.gradient_norm < (1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("solver", PAIR)
def test_bounds_and_callbacks(solver):
    problem = tall()
    assert fit(problem, solver=solver, max_iterations=2).status is Status.MAX_ITERATIONS
    assert fit(problem, solver=solver, max_seconds=1e-9).status is Status.MAX_SECONDS
    stopped = fit(problem, solver=solver, callback=lambda record: record.iteration == 1)
    assert stopped.status is Status.STOPPED
    assert len(stopped.history) == 2

    def interrupt(record):
        raise KeyboardInterrupt

    assert fit(problem, solver=solver, callback=interrupt).status is Status.INTERRUPTED


@pytest.mark.parametrize(
    ("solver", "options", "model", "message"),
    [
        ("newton", {}, None, "'newton' was given, one of 'trust-region', 'stochastic'"),
        ("newton-sketch", {"ridge_x": 0.0}, None, "needs ridge_x and ridge_y above 0"),
        ("newton-sketch", {"ridge_y": 0.0}, None, "needs ridge_x and ridge_y above 0"),
        ("newton-cg", {"ridge_x": 0.0}, None, "needs ridge_x and ridge_y above 0"),
        ("newton-cg", {}, MultiHead(1), "fits the bilinear model, MultiHead was given"),
    ],
)
def test_what_a_solver_is_not_for_is_refused(solver, options, model, message):
    with pytest.raises(ValueError, match=message):
        fit(tall(n=10, **options), model, solver=solver)


def test_a_matrix_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(fitting, "MAX_DENSE_SIZE", 8)
    with pytest.raises(ValueError, match="takes at most 8, X has 9: use solver='newton-cg'"):
        fit(tall(n=10), solver="newton-sketch")
    fit(tall(n=10), solver="newton-cg", max_iterations=1)


def test_a_saved_fit_remembers_its_solver(tmp_path):
    path = tmp_path / "fit.safetensors"
    result = fit(tall(), solver="newton-sketch", max_iterations=4)
    result.save(path)
    loaded = FitResult.load(path)
    assert loaded.solver == "newton-sketch"
    assert loaded.history == result.history
    tensors, metadata = read_tensors(path)
    for name in ("format_version", "digest", "solver"):
        del metadata[name]
    for record in metadata["history"]:
        for name in ("operations", "rows_sampled", "rows_available"):
            del record[name]
    write_tensors(path, tensors, metadata)
    old = FitResult.load(path)
    assert old.solver == "trust-region"
    assert old.history[-1].operations == {}
    assert old.history[-1].rows == "exact"


def test_names_of_solvers_are_those_of_the_command_line():
    assert SOLVERS == ("trust-region", "stochastic", "newton-sketch", "newton-cg", "auto")


@pytest.mark.parametrize("ratio", [1.0, 1e-2])
def test_products_in_the_natural_metric_are_bounded(ratio):
    counts = [
        inner_iterations.products(inner_iterations.Shape(*sizes), decades, ratio, seed=0)
        for sizes in ((1, 64, 4), (1, 300, 6), (4, 40, 6))
        for decades in (0.0, 6.0)
    ]
    assert max(counts) <= inner_iterations.bound(ratio)
    if ratio == 1.0:
        assert max(counts) - min(counts) <= 3  # flat
