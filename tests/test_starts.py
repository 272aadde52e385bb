"""How a cold fit begins: the race of starts, restarts, and the guard of the path."""

import itertools
import math

import pytest
import torch

from attnreg import AttentionProblem, Status, fit
from attnreg.models import Bilinear
from attnreg.objective import Objective, Point
from attnreg.solvers import restarts, screening
from attnreg.solvers.restarts import Restarts
from tests.cases import CASES, planted, twin
from tests.twins import normal, relative

NOISY = planted(Bilinear(), 0.1)[0].problem()


def never():
    return False


def objective_of(problem=NOISY):
    return Objective(problem, Bilinear())


def race_of(objective, theta=None, seed=0):
    theta = torch.zeros(objective.layout.size, dtype=torch.float64) if theta is None else theta
    return screening._Race(objective, theta, torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- the race


@pytest.mark.parametrize("case", [c for c in CASES if "ridge" not in c])
def test_a_step_of_the_race_follows_the_gradient(case, monkeypatch):
    """The first step of Adam is the sign of the gradient, in each start's own coordinates."""
    monkeypatch.setattr(screening, "ROWS", 1000)
    t = twin(case, "bilinear")
    problem = t.case.problem()
    race = race_of(Objective(problem, Bilinear()))
    sampled = race._sample()
    monkeypatch.setattr(race, "_sample", lambda: sampled)
    race._parameters[1].copy_(0.3 * torch.randn(race._parameters[1].shape))
    x, y = (p.clone().requires_grad_() for p in race._parameters)
    q, k, v, b, w, bias = sampled
    z = q @ x @ k.mT if bias is None else q @ x @ k.mT + bias
    loss = 0.5 * (w * (torch.softmax(z, -1) @ v @ y - b).square()).sum()
    gradients = torch.autograd.grad(loss, (x, y))
    race._step(1)
    bases = ((race._bases[0], race._bases[1]), (race._bases[2], None))
    for before, after, gradient, rate, (left, right) in zip(
        (x, y), race._parameters, gradients, race._rates, bases, strict=True
    ):
        gradient = left.mT @ gradient
        change = left.mT @ (after - before.detach())
        if right is not None:
            gradient, change = gradient @ right, change @ right
        steep = gradient.abs() > 1e-3 * gradient.abs().amax((1, 2), keepdim=True)
        # float32: a change of size `rate` on parameters of size 1 is known to about 1e-4 of it.
        assert steep.any()
        assert torch.allclose(change[steep], -rate * gradient[steep].sign(), rtol=5e-3)


def test_windows_see_the_mask_of_their_rows(monkeypatch):
    monkeypatch.setattr(screening, "ROWS", 3)
    problem = twin("ragged, causal and masks", "bilinear").case.problem()
    race = race_of(Objective(problem, Bilinear()))
    batches = list(problem.batches)
    for _ in range(20):
        q, k, _, b, w, bias = race._sample()
        assert q.shape[1] == b.shape[1] == w.shape[1] == bias.shape[1] == 3
        for i in range(screening.STARTS):
            origin = [
                (batch, s, n)
                for batch in batches
                for s in range(batch.A1.shape[0])
                for n in range(batch.A1.shape[1] - 2)
                if batch.A1.shape[1] >= 3
                and torch.equal(batch.A1[s, n : n + 3].float(), q[i])
                and k.shape[1] == batch.A2.shape[1]
                and torch.equal(batch.A2[s].float(), k[i])
            ]
            assert origin
            batch, s, n = origin[0]
            m = batch.A2.shape[1]
            expected = batch.bias[s if batch.bias.shape[0] > 1 else 0].float()
            expected = expected.expand(batch.A1.shape[1], m)[n : n + 3].clone()
            future = torch.arange(m) > torch.arange(n, n + 3)[:, None]
            expected[future] = -math.inf
            assert torch.equal(bias.expand(screening.STARTS, 3, m)[i], expected)


def test_the_start_that_was_given_takes_part():
    theta = normal(16)
    race = race_of(objective_of(), theta)
    assert torch.equal(race._parameters[0][0], theta.float().view(4, 4))
    assert race._parameters[0][1:].std() > 0


def test_a_start_that_separates_is_found_and_counted(monkeypatch):
    objective = objective_of()
    theta = torch.zeros(16, dtype=torch.float64)
    before = objective.passes
    found = screening.screen(objective, theta, torch.Generator().manual_seed(0), never)
    assert found is not None
    assert (found.dtype, found.shape) == (theta.dtype, theta.shape)
    assert objective.passes > before
    value = Point(objective, objective.features(found)).value
    assert value < 0.5 * Point(objective, objective.features(theta)).value
    monkeypatch.setattr(screening, "SEPARATION", 0.0)
    monkeypatch.setattr(screening, "STEPS", 160)
    assert screening.screen(objective, theta, torch.Generator().manual_seed(0), never) is None


def test_time_ends_a_race():
    race = race_of(objective_of())
    assert race.run(lambda: True) is None
    assert race.rows == screening.CHECK_INTERVAL * screening.STARTS * 24


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
def test_the_race_does_not_see_the_units(size):
    """Inputs and targets in other units give the same start in these units."""
    found = []
    for s in (1.0, size):
        a, b = (torch.stack(list(rows)) for rows in (NOISY.batches[0].A1, NOISY.batches[0].B))
        objective = objective_of(AttentionProblem(a * s, b / s))
        race = race_of(objective)
        for step in range(1, 21):
            race._step(step)
        found.append(race._parameters[0] * s**2)
    assert relative(found[1], found[0]) < 1e-4


def test_effective_dimensions():
    assert screening.effective_dimensions(torch.eye(7)) == pytest.approx(7)
    assert screening.effective_dimensions(torch.diag(torch.tensor([1.0, 0.0]))) == 1.0
    assert screening.effective_dimensions(torch.zeros(3, 3)) == 0.0


def test_where_a_race_is_worth_it():
    assert screening.is_worth_screening(objective_of())
    assert not screening.is_worth_screening(objective_of(NOISY.replace(ridge_y=1.0)))
    many = AttentionProblem(normal(4, 60, 32), normal(4, 60, 2))
    assert screening.effective_dimensions(many.gram_key_centered) > screening.MAX_DIMENSIONS
    assert not screening.is_worth_screening(objective_of(many))


# ---------------------------------------------------------------------- restarts


def restarts_of(objective):
    return Restarts(objective, torch.Generator().manual_seed(0), never, allowed=True)


def test_a_plateau_crawls_and_a_basin_does_not():
    judge = restarts_of(objective_of())
    assert not any(judge.crawls(i, 0.9**i) for i in range(restarts.WINDOW))
    assert judge.crawls(restarts.WINDOW, 0.9**restarts.WINDOW)
    judge = restarts_of(objective_of())
    assert not any(judge.crawls(i, 0.7**i) for i in range(100))
    none = Restarts(objective_of(), torch.Generator(), never, allowed=False)
    assert not any(none.crawls(i, 1.0) for i in range(100))


def test_the_best_point_is_kept_and_comes_back(monkeypatch):
    monkeypatch.setattr(restarts, "is_worth_screening", lambda _: False)
    objective = objective_of()
    left = restarts_of(objective)
    points = [Point(objective, objective.features(normal(16, seed=s))) for s in range(5)]
    values = [point.value for point in points]
    for i, point in enumerate(points[: restarts.RESTARTS]):
        start = left.leave(point)
        assert start.on_path
        assert left.best_value == min(values[: i + 1])
    assert not left.over
    last = left.leave(points[-1])
    assert not last.on_path
    assert torch.equal(last.theta, points[values.index(min(values))].theta)
    assert left.over


def test_a_fit_that_crawls_begins_again_and_returns_the_best(monkeypatch):
    monkeypatch.setattr(restarts, "WINDOW", 0)
    monkeypatch.setattr(restarts, "PROGRESS", 0.0)  # every start crawls
    monkeypatch.setattr(restarts, "is_worth_screening", lambda _: False)
    result = fit(NOISY, tol=1e-12, max_iterations=400)
    phases = [record.phase for record in result.history]
    assert phases.count("path") == restarts.RESTARTS + 1
    assert result.converged
    final = [r.loss for r in result.history if r.path == 0]
    assert result.loss <= min(final) * (1 + 1e-12)
    short = fit(NOISY, max_iterations=phases.index("path", 3) + 1)
    assert short.status is Status.MAX_ITERATIONS
    assert short.loss <= min(r.loss for r in short.history) * (1 + 1e-12)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_stopped_early_it_is_not_worse_than_its_start(iterations):
    """A good X without a readout: the path begins elsewhere, and the start is handed out."""
    _, parameters = planted(Bilinear(), 0.1)
    problem = NOISY.replace(ridge_x=1e-12)  # no race
    start = {"X": parameters["X"], "Y": torch.zeros(4, 3, dtype=torch.float64)}
    objective = objective_of(problem)
    given = Point(objective, objective.features(start["X"].flatten()))
    result = fit(problem, init=start, max_iterations=iterations)
    assert result.history[1].loss > given.loss
    assert result.regularised_loss == pytest.approx(given.value, rel=1e-12)
    assert torch.equal(result.X, start["X"])
    assert fit(problem, init=start).regularised_loss <= given.value


def test_warm_starts_are_never_left(monkeypatch):
    monkeypatch.setattr(restarts, "PROGRESS", 0.0)
    monkeypatch.setattr(restarts, "WINDOW", 1)
    start = {"X": normal(4, 4), "Y": normal(4, 3, seed=1)}
    result = fit(NOISY, init=start)
    assert {r.phase for r in result.history} <= {"start", "gauss-newton", "newton"}
    values = [r.regularised for r in result.history]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(values))


# ---------------------------------------------------------------------- planted, ill-conditioned


@pytest.mark.slow
@pytest.mark.parametrize("decades", [0.0, 1.5, 3.0])
def test_planted_solution_is_found(decades):
    from benchmarks.planted_problem import planted as planted_problem

    for seed in range(3):
        instance = planted_problem(decades, seed, sequences=4, rows=64, width=16)
        problem = AttentionProblem(instance.arrays.A, instance.arrays.B)
        result = fit(problem, max_seconds=60)
        assert result.loss <= instance.planted_loss
