"""Many starts side by side: the stacked derivatives, the descents, the rounds and what is said."""

import dataclasses
import time

import pytest
import torch

from attnreg import AttentionProblem, FitResult, MultiHead, Status, fit
from attnreg.models import Bilinear
from attnreg.objective import Objective, Point
from attnreg.solvers import descents, multistart, stacked
from attnreg.solvers.descents import Descents
from attnreg.solvers.multistart import _Search, distinct
from attnreg.solvers.path import COLD, WARM
from attnreg.solvers.run import Run, Settings
from attnreg.solvers.stacked import Stack
from benchmarks.multimodal import instance
from tests.cases import CASES, planted, twin
from tests.twins import normal, relative

NOISY = planted(Bilinear(), 0.1)[0].problem()


def objective_of(problem=NOISY):
    return Objective(problem, Bilinear())


def starts_of(objective, count, size=1.0, seed=3):
    problem = objective.problem
    return size * normal(count, problem.d_query, problem.d_key, seed=seed)


def search_of(problem=NOISY, starts=8, seed=0, max_seconds=None):
    generator, objective = torch.Generator().manual_seed(seed), objective_of(problem)
    settings = Settings(1e-8, 500, max_seconds)
    run = Run(objective, settings, lambda record: None, time.perf_counter())
    return _Search(objective, starts, generator, run, lambda *_: None)


# ---------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("chunk", [stacked.CHUNK, 1])
@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_the_twins(case, chunk, monkeypatch):
    """Each start against float64 autograd of the slow twin, with a damping of its own."""
    monkeypatch.setattr(stacked, "CHUNK", chunk)
    t = twin(case, "bilinear")
    objective = objective_of(t.case.problem(t.center))
    x = starts_of(objective, 3, 0.5)
    damping = torch.tensor([0.3, 0.01, 2.0], dtype=torch.float64)
    found = Stack(objective).derivatives(x, damping)
    for i in range(3):
        own, theta = dataclasses.replace(t, damping=float(damping[i])), x[i].flatten()
        # The bounds of test_objective.py: condition numbers of small problems times rounding.
        assert float(found.value[i]) == pytest.approx(float(own.value(theta)), rel=1e-11)
        assert relative(found.gradient[i], own.gradient(theta)) < 1e-10
        assert relative(found.curvature[i], own.gauss_newton(theta)) < 1e-10


def test_values_on_a_hyperplane_cost_a_direction_only():
    """Value directions without data are left out, and the objective is that of the loop."""
    A = normal(2, 9, 4)
    A = A - A.mean(-1, keepdim=True)
    objective = objective_of(AttentionProblem(A, normal(2, 9, 3)))
    x = starts_of(objective, 2)
    found = Stack(objective).derivatives(x, torch.zeros(2, dtype=torch.float64))
    for i in range(2):
        point = Point(objective, objective.features(x[i].flatten()))
        assert float(found.value[i]) == pytest.approx(point.value, rel=1e-11)
        assert relative(found.gradient[i], point.gradient) < 1e-10


def test_power_is_the_unit_of_the_path():
    objective = objective_of()
    x = starts_of(objective, 2)
    for i, power in enumerate(Stack(objective).power(x).tolist()):
        columns = objective.features(x[i].flatten()).columns
        assert power == pytest.approx(float(columns.square().sum(0).mean()), rel=1e-12)


# ---------------------------------------------------------------------- descents


def test_a_start_descends_among_others_as_it_does_alone(monkeypatch):
    """Stages, dampings and ends are a start's own; 25 steps keep the rounding of sums small."""
    monkeypatch.setattr(descents, "HOPELESS_VALUE", torch.inf)
    monkeypatch.setattr(descents, "MAX_STEPS", 25)
    stack = Stack(objective_of())
    x = starts_of(objective_of(), 5) * torch.tensor([0.01, 0.1, 0.3, 1.0, 3.0])[:, None, None]

    def ends(part):
        run = Descents(stack, part, COLD, 0.0)
        while run.running:
            run.step(torch.inf)
        return run.ends()

    values, matrices, converged = ends(x)
    assert len(set(values.tolist())) > 1
    for i in range(5):
        value, matrix, own = ends(x[i : i + 1])
        assert float(value) == pytest.approx(float(values[i]), rel=1e-9)
        assert relative(matrix[0], matrices[i]) < 1e-6  # a root of the value's: minima are flat
        assert bool(own) == bool(converged[i])


def test_values_never_rise_in_a_stage():
    run = Descents(Stack(objective_of()), starts_of(objective_of(), 6), (0.0,), 0.0)
    for _ in range(10):
        before = dict(zip(run._index.tolist(), run._at.value.tolist(), strict=True))
        run.step(torch.inf)
        now = dict(zip(run._index.tolist(), run._at.value.tolist(), strict=True))
        assert all(now[i] <= before[i] for i in now)
        assert any(now[i] < before[i] for i in now)


def test_hopeless_starts_are_dropped_and_not_called_converged():
    stack = Stack(objective_of())
    run = Descents(stack, starts_of(objective_of(), 6), (0.0,), 0.0)
    while run.running:
        run.step(1e-30)  # nothing comes near to this
    values, _, converged = run.ends()
    assert bool(values.isfinite().all())
    assert not bool(converged.any())


# ---------------------------------------------------------------------- rounds


def test_a_reflection_keeps_the_size_of_the_logits():
    search = search_of()
    search._ends, search._values = starts_of(search._objective, 3), torch.arange(3.0).double() + 1
    reflected, gram = search._reflections(), NOISY.gram_key_centered
    parents = search._ends.repeat(3, 1, 1)[:8]
    assert relative(reflected @ gram @ reflected.mT, parents @ gram @ parents.mT) < 1e-12
    sizes = (reflected - parents).flatten(1).norm(dim=1)
    assert float(sizes.min()) > 1e-3
    for one, other in zip(reflected, parents, strict=True):
        # A reflection: one eigenvalue -1, the others 1.
        values = torch.linalg.eigvals(torch.linalg.solve(other, one)).real.sort().values
        expected = torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
        assert torch.allclose(values, expected, atol=1e-9)


def test_distinct_minima():
    assert distinct([], 1.0) == []
    assert distinct([0.0, 1e-12, 1e-3, 1.00001e-3, 2e-3], 1.0) == [0, 2, 4]
    assert distinct([1.0, 1.00001, 1.001], 1.0) == [0, 2]


@pytest.mark.parametrize("width", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_planted_solutions_of_multimodal_problems(width):
    A, B = instance(width, 0)
    result = fit(AttentionProblem(A, B), starts=64)
    assert result.converged
    assert result.relative_error**2 < 1e-9
    minima = result.minima
    assert minima.starts == 64
    assert minima.descents == 64 * (1 + minima.rounds)
    assert 1 <= minima.distinct <= minima.converged <= minima.descents
    assert 1 <= minima.best <= minima.converged


@pytest.mark.parametrize(
    "case", ["ragged, causal, ridges", "cross, additive masks, ridges", "ragged, weights"]
)
def test_every_kind_of_problem(case, monkeypatch):
    """The search ends in a stationary point, at most as high as that of a fit with one start."""
    monkeypatch.setattr(multistart, "ROUNDS", 2)
    t = twin(case, "bilinear")
    problem = t.case.problem(t.center)
    one, many = fit(problem), fit(problem, starts=6)
    assert many.converged
    assert many.regularised_loss <= one.regularised_loss * (1 + 1e-7)


def test_a_noisy_problem_says_how_often_the_best_was_found(monkeypatch):
    monkeypatch.setattr(multistart, "ROUNDS", 1)
    result = fit(NOISY, starts=6)
    assert result.minima.rounds == 1
    assert result.minima.descents == 12
    assert result.minima.best >= 2
    assert "the best found" in result.minima.text


@pytest.mark.parametrize("constant", ["A1", "A2", "A3"])
def test_inputs_without_directions(constant, monkeypatch):
    """Nothing to reflect, or nothing to fit: the search ends all the same."""
    monkeypatch.setattr(multistart, "ROUNDS", 2)
    given = {"A1": normal(7, 3), "A2": normal(5, 2), "A3": normal(5, 3, seed=1)}
    given[constant] = torch.zeros_like(given[constant])
    problem = AttentionProblem(B=normal(7, 2, seed=2), **given)
    result = fit(problem, starts=3)
    assert result.minima.best >= 1
    assert result.loss == pytest.approx(fit(problem).loss, rel=1e-9)


def test_float32_and_groups_of_starts(monkeypatch):
    monkeypatch.setattr(multistart, "ROUNDS", 1)
    whole = fit(NOISY, starts=4)
    monkeypatch.setattr(multistart, "MAX_STATE", 600)  # two starts at a time
    assert fit(NOISY, starts=4).loss == pytest.approx(whole.loss, rel=1e-8)
    single = fit(NOISY.to(torch.float32), starts=4, tol=1e-5)
    assert single.X.dtype == torch.float32
    assert single.loss == pytest.approx(whole.loss, rel=1e-5)


def test_the_same_seed_gives_the_same_fit():
    A, B = instance(4, 1)
    problem = AttentionProblem(A, B)
    one, other, third = (fit(problem, starts=16, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.X, other.X)
    assert one.minima == other.minima
    assert third.history[0].loss != one.history[0].loss


def test_the_start_that_was_given_is_never_made_worse():
    """Its own descent has no path: the search ends in its basin or in a better one."""
    init = fit(NOISY, starts=64)
    for starts in (2, 3):
        search = search_of(starts=starts)
        theta, _ = Bilinear().split(NOISY, init.parameters)
        found = search.run(theta + 0.01 * theta.abs().mean(), WARM)
        value = Point(search._objective, search._objective.features(found.theta)).value
        assert value <= init.loss * (1 + 1e-6)


@pytest.mark.parametrize(
    ("stages", "expected"), [(WARM, [(1, WARM), (7, COLD)]), (COLD, [(8, COLD)])]
)
def test_a_given_start_has_its_own_stages(stages, expected, monkeypatch):
    seen, theta = [], normal(16, seed=9)

    def watched(stack, x, stages, zero):
        seen.append((len(x), stages))
        if len(seen) == 1:
            assert torch.equal(x[0].flatten(), theta)
        return Descents(stack, x, stages, zero)

    monkeypatch.setattr(multistart, "Descents", watched)
    monkeypatch.setattr(multistart, "ROUNDS", 0)
    search_of().run(theta, stages)
    assert seen == expected


def test_ctrl_c_hands_out_the_best_so_far(monkeypatch):
    step, calls = Descents.step, []

    def interrupted(self, best):
        calls.append(best)
        if len(calls) == 5:
            raise KeyboardInterrupt
        step(self, best)

    monkeypatch.setattr(Descents, "step", interrupted)
    result = fit(NOISY, starts=8)
    start = fit(NOISY, max_iterations=0)
    assert result.status is Status.INTERRUPTED
    assert result.minima.descents == 8
    assert result.loss < start.loss


def test_the_search_is_recorded_where_its_best_falls(monkeypatch):
    """Each record is of a lower value; the last is as low as the search's end but for rounding."""
    monkeypatch.setattr(multistart, "ROUNDS", 1)
    result = fit(NOISY, starts=6)
    records = [record for record in result.history if record.phase == "search"]
    values = [record.regularised for record in records]
    assert values == sorted(values, reverse=True)
    assert len(values) > 2
    assert all(record.iteration == 0 for record in records)
    assert records == list(result.history[: len(records)])
    start = result.history[len(records)]
    assert start.phase == "start"
    assert start.regularised == pytest.approx(values[-1], rel=1e-9)
    seconds = [record.seconds for record in result.history]
    assert seconds == sorted(seconds)


def test_the_callback_stops_the_search():
    """At the first record; what is handed out is the best so far, and the loop does nothing."""
    seen = []

    def stop(record):
        seen.append(record.phase)
        return True

    result = fit(NOISY, starts=8, callback=stop)
    assert result.status is Status.STOPPED
    assert seen == ["search", "start"]
    assert result.minima.descents == 8
    assert result.minima.rounds == 0
    assert result.loss <= result.history[0].loss


def test_targets_of_zero_are_found():
    problem = AttentionProblem(
        normal(12, 3), torch.zeros(12, 2, dtype=torch.float64), ridge_x=0.1, ridge_y=0.1
    )
    minima = fit(problem, starts=4).minima
    assert (minima.converged, minima.distinct, minima.best) == (4, 1, 4)


def test_the_time_limit_ends_the_search():
    search = search_of(max_seconds=0.0)
    theta = torch.zeros(16, dtype=torch.float64)
    found = search.run(theta, COLD)
    assert torch.equal(found.theta, theta)
    assert found.minima.descents == found.minima.best == found.minima.distinct == 0
    assert fit(NOISY, starts=8, max_seconds=1e-9).status is Status.MAX_SECONDS


def test_a_result_with_minima_is_saved_and_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(multistart, "ROUNDS", 0)
    result = fit(NOISY, starts=3)
    result.save(tmp_path / "fit.safetensors")
    assert FitResult.load(tmp_path / "fit.safetensors").minima == result.minima
    assert fit(NOISY, max_iterations=0).minima is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"starts": 0}, "starts=0 was given, a whole number from 1"),
        ({"starts": 2.0}, "starts=2.0 was given, a whole number from 1"),
        ({"starts": 10**12}, "a whole number from 1 to 65536 is expected"),
        ({"starts": 2, "solver": "stochastic"}, "takes one start: use solver='trust-region'"),
        ({"starts": 2, "model": MultiHead(2, head_dim=2)}, "MultiHead takes one start"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(NOISY, **arguments)


def test_problems_too_large_are_refused(monkeypatch):
    wide = AttentionProblem(normal(3, 33), normal(3, 2))
    with pytest.raises(ValueError, match="take at most 1024, X has 1089"):
        fit(wide, starts=2)
    monkeypatch.setattr(multistart, "MAX_NUMBERS", 1000)
    with pytest.raises(ValueError, match="192 rows need"):
        fit(NOISY, starts=2)
