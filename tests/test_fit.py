"""``fit``: what it finds, when it ends, and what it says about it."""

import dataclasses
import itertools
import math

import pytest
import torch

import attnreg.solvers.trust_region as trust_region
from attnreg.fitting import fit
from attnreg.models import Bilinear, MultiHead
from attnreg.objective import Objective, Point
from attnreg.records import Status
from tests.cases import RIDGES, moved, planted
from tests.twins import Twin, normal, relative

HEADS = MultiHead(2, head_dim=2)
GROUPED = MultiHead(4, 2, 2, 1)
NOISY = planted(Bilinear(), 0.1)[0].problem()


def assert_honest(result, problem):
    """Loss, error and the regularised value are those of the parameters, finite and recomputed."""
    assert all(bool(p.isfinite().all()) for p in result.parameters.values())
    predicted = result.predict(problem)
    loss = 0.0
    for batch, row in zip(problem.batches, [predicted], strict=True):
        squares = (row.reshape(batch.B.shape) - batch.B).double().square().sum(-1)
        loss += float((batch.weights.double() * squares).sum())
    size = float(sum(b.B.double().square().sum() for b in problem.batches))
    eps = torch.finfo(problem.dtype).eps
    assert result.loss == pytest.approx(loss, rel=1e3 * eps, abs=(1e3 * eps) ** 2 * size)
    assert result.relative_error == pytest.approx(problem.relative_error(result.loss), rel=1e-12)


def dual_norm(case, result):
    """The number that ``tol`` bounds, from autograd and dense matrices; Bilinear only."""
    t = Twin(case, Bilinear())
    gradient = t.gradient(result.X.flatten()).view(result.X.shape)
    a = torch.cat(case.A1)
    centred = torch.cat([x - x.mean(0) for x in case.A1])
    left, right = a.T @ a, centred.T @ centred
    square = (gradient * (torch.linalg.solve(left, gradient) @ torch.linalg.inv(right))).sum()
    b = torch.cat(case.B)
    return float(square) ** 0.5 / float((b - b.mean(0)).square().sum())


# ---------------------------------------------------------------------- what is found


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_bilinear_is_recovered_from_a_cold_start(seed):
    case, parameters = planted(Bilinear(), seed=seed)
    problem = case.problem()
    result = fit(problem, tol=1e-12)
    assert result.status is Status.CONVERGED
    assert result.relative_error < 1e-8
    assert relative(result.X, parameters["X"]) < 1e-7
    assert relative(result.Y, parameters["Y"]) < 1e-7
    assert result.notes == ()
    assert_honest(result, problem)


@pytest.mark.parametrize("model", [HEADS, GROUPED, MultiHead(2, 1, 2, 3, bias=False)])
def test_planted_multihead_is_recovered_from_nearby(model):
    case, parameters = planted(model)
    result = fit(case.problem(), model, init=moved(parameters, 0.1, 1), tol=1e-12)
    assert result.status is Status.CONVERGED
    assert result.relative_error < 1e-8
    assert relative(Twin(case, model).output(result.parameters), torch.cat(case.B)) < 1e-8


@pytest.mark.parametrize("model", [Bilinear(), HEADS, GROUPED])
@pytest.mark.parametrize("seed", [0, 1])
def test_noisy_reaches_1e_12(model, seed):
    case, parameters = planted(model, 0.1, seed)
    problem = case.problem()
    result = fit(problem, model, init=moved(parameters, 0.1, 1), tol=1e-12)
    assert result.status is Status.CONVERGED
    assert result.converged
    assert result.gradient_norm <= result.tol == 1e-12
    t = Twin(case, model)
    theta = t.flat(result.parameters)
    assert result.loss == pytest.approx(float(t.value(theta)), rel=1e-10)
    scale = float(t.gradient(t.flat(parameters)).norm())
    assert float(t.gradient(theta).norm()) < 1e-7 * scale
    # A minimum: no curvature is negative, null directions of the gauge aside.
    objective = Objective(problem, model)
    point = Point(objective, objective.features(theta))
    h = torch.stack([point.hessian(e) for e in torch.eye(len(theta), dtype=torch.float64)])
    values = torch.linalg.eigvalsh((h + h.T) / 2)
    assert float(values[0]) > -1e-6 * float(values[-1])
    assert_honest(result, problem)


@pytest.mark.parametrize("iterations", [1, 3, 500])
def test_gradient_norm_is_what_the_documentation_says(iterations):
    case, parameters = planted(Bilinear(), 0.1)
    start = moved(parameters, 0.5, 1)
    result = fit(case.problem(), init=start, tol=1e-8, max_iterations=iterations)
    assert result.gradient_norm == pytest.approx(dual_norm(case, result), rel=1e-5)
    assert result.converged == (result.gradient_norm <= 1e-8)


def test_tail_is_quadratic():
    history = fit(NOISY, tol=1e-13).history
    assert history[-1].phase == "newton"
    newton = [record.iteration for record in history if record.phase == "newton"]
    norms = [record.gradient_norm for record in history[newton[0] - 1 :]]
    assert len(norms) >= 3
    # One constant for all steps, down to rounding (1e-15 is a few ulp of the gradient). Measured:
    # 340 and 570 from 4e-6 on; a linear tail would pass 1e5 at the second step.
    assert all(b < max(3000 * a**2, 1e-15) for a, b in itertools.pairwise(norms[-3:]))


@pytest.mark.parametrize("model", [Bilinear(), HEADS])
def test_ridges_towards_a_centre(model):
    case, parameters = planted(model, 0.3)
    case = dataclasses.replace(case, options=RIDGES)
    center = moved(parameters, 0.3, 1)
    problem = case.problem(center)
    result = fit(problem, model, init=center, tol=1e-11)
    assert result.converged
    assert result.regularised_loss > result.loss
    t = Twin(case, model, center)
    theta = t.flat(result.parameters)
    assert result.regularised_loss == pytest.approx(float(t.value(theta)), rel=1e-10)
    assert float(t.gradient(theta).norm()) < 1e-7 * float(t.gradient(t.flat(center)).norm())
    strong = problem.replace(ridge_x=1e9, ridge_y=1e9)
    held = fit(strong, model, init=center, max_iterations=30).parameters
    again = Twin(case, model)
    assert relative(again.output(held), again.output(center)) < 1e-6


def test_a_newton_step_that_fails_at_the_level_of_rounding_is_not_the_end(monkeypatch):
    # Rounding can show a negative curvature where the Hessian has nearly none. Newton steps begin
    # at that level here, and lead away from the minimum; damped Gauss-Newton steps get nearer.
    solve, failed = trust_region.TrustRegion._solve, []

    def late(self):
        self._newton = self._norm < 1e-10 and self._run.iteration >= self._newton_from

    def away(self, shift):
        found = solve(self, shift)
        if not self._newton:
            return found
        failed.append(self._norm)
        return dataclasses.replace(found, direction=-found.direction)

    monkeypatch.setattr(trust_region.TrustRegion, "_choose_curvature", late)
    monkeypatch.setattr(trust_region.TrustRegion, "_solve", away)
    case, parameters = planted(GROUPED, 0.1, 0)
    result = fit(case.problem(), GROUPED, init=moved(parameters, 0.1, 1), tol=1e-11)
    assert failed
    assert result.status is Status.CONVERGED


def test_float32_finds_the_minimum_of_float64():
    exact = fit(NOISY)
    result = fit(NOISY.to(torch.float32), tol=1e-6)
    assert result.converged
    assert result.X.dtype == result.Y.dtype == torch.float32
    assert result.loss == pytest.approx(exact.loss, rel=1e-5)
    assert relative(result.X.double(), exact.X) < 1e-3
    assert_honest(result, NOISY.to(torch.float32))
    # Below what float32 can reach the status says so.
    beyond = fit(NOISY.to(torch.float32), tol=1e-14)
    assert beyond.status is Status.STALLED
    assert "float64" in beyond.status.text
    assert beyond.loss == pytest.approx(exact.loss, rel=1e-5)


def test_causal_and_masked_and_weighted():
    case, _ = planted(Bilinear(), 0.1)
    weights = [normal(24, seed=i).abs() for i in range(8)]
    case = dataclasses.replace(case, causal=True, weights=weights, options={"scale": 0.5})
    result = fit(case.problem())
    assert result.converged
    t = Twin(case, Bilinear())
    theta = result.X.flatten()
    assert result.loss == pytest.approx(float(t.value(theta)), rel=1e-10)
    assert float(t.gradient(theta).norm()) < 1e-5 * float(t.gradient(0 * theta).norm())


# ---------------------------------------------------------------------- history and seeds


def test_history():
    seen = []
    result = fit(NOISY, callback=seen.append)
    history = result.history
    assert list(history) == seen
    assert [record.iteration for record in history] == list(range(len(history)))
    first = history[0]
    assert (first.phase, first.accepted, first.inner_iterations) == ("start", True, 0)
    assert history[1].phase == "screening"
    assert {record.phase for record in history[2:]} == {"gauss-newton", "newton"}
    for name in ("seconds", "passes"):
        values = [getattr(record, name) for record in history]
        assert all(a <= b for a, b in itertools.pairwise(values)), name
    paths = [record.path for record in history]
    assert paths == sorted(paths, reverse=True)
    assert (paths[0], paths[-1]) == (1.0, 0.0)
    final = [record.regularised for record in history if record.path == 0]
    assert all(b <= a * (1 + 1e-13) for a, b in itertools.pairwise(final))
    last = history[-1]
    assert (last.loss, last.gradient_norm) == (result.loss, result.gradient_norm)
    assert last.accepted


@pytest.mark.parametrize("model", [Bilinear(), HEADS])
def test_accepted_steps_never_raise_the_objective(model):
    case, parameters = planted(model, 0.3, 2)
    history = fit(case.problem(), model, init=moved(parameters, 1.0, 7)).history
    assert all(record.path == 0 for record in history)  # a warm start needs no path
    for before, after in itertools.pairwise(history):
        if after.accepted:
            assert after.regularised <= before.regularised * (1 + 1e-13)
        else:
            assert after.regularised == before.regularised


@pytest.mark.parametrize("model", [Bilinear(), HEADS])
def test_the_same_seed_gives_the_same_fit(model):
    case, _ = planted(model, 0.1)
    one, two, other = (fit(case.problem(), model, seed=s, max_iterations=12) for s in (3, 3, 4))
    for name, value in one.parameters.items():
        assert torch.equal(value, two.parameters[name]), name
    for a, b in zip(one.history, two.history, strict=True):
        assert dataclasses.replace(a, seconds=0) == dataclasses.replace(b, seconds=0)
    key = "X" if "X" in one.parameters else "W_Q"
    assert not torch.equal(one.parameters[key], other.parameters[key])
    assert (one.seed, other.seed) == (3, 4)


def test_a_fit_leaves_torchs_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    fit(NOISY, max_iterations=2, seed=5)
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------------- ends


def test_max_iterations():
    result = fit(NOISY, max_iterations=3)
    assert result.status is Status.MAX_ITERATIONS
    assert not result.converged
    assert len(result.history) == 4
    assert "max_iterations" in result.status.text
    assert_honest(result, NOISY)


def test_no_iteration_at_all_gives_the_best_readout_of_the_start():
    case, parameters = planted(Bilinear(), 0.1)
    result = fit(case.problem(), init=parameters, max_iterations=0)
    assert torch.equal(result.X, parameters["X"])
    t = Twin(case, Bilinear())
    assert relative(result.Y, t.readout(parameters["X"].flatten())) < 1e-10
    assert len(result.history) == 1


def test_ended_on_the_path_the_readout_is_still_the_best_one():
    problem = NOISY.replace(ridge_x=1e-9)  # no race of starts with a ridge
    result = fit(problem, max_iterations=2)
    assert result.history[-1].path > 0
    objective = Objective(problem, Bilinear())
    point = Point(objective, objective.features(result.X.flatten()))
    assert result.loss == pytest.approx(point.loss, rel=1e-10)
    assert relative(result.Y, point.readout) < 1e-8


def test_max_seconds():
    result = fit(NOISY, max_seconds=1e-9)
    assert result.status is Status.MAX_SECONDS
    assert len(result.history) == 1
    assert "max_seconds" in result.status.text


def test_callback_stops():
    result = fit(NOISY, callback=lambda record: record.iteration == 4)
    assert result.status is Status.STOPPED
    assert len(result.history) == 5
    assert_honest(result, NOISY)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_interrupt_from_the_callback(at):
    def interrupt(record):
        if record.iteration == at:
            raise KeyboardInterrupt

    try:
        result = fit(NOISY, callback=interrupt)
    except KeyboardInterrupt:  # it would end the whole test run
        pytest.fail("the interrupt escaped")
    assert result.status is Status.INTERRUPTED
    assert "init=result" in result.status.text
    assert len(result.history) == at + 1
    assert_honest(result, NOISY)
    assert fit(NOISY, init=result).converged


@pytest.mark.parametrize(
    "place", ["conjugate_gradients", "relative_gradient_norm", "gauss_newton_estimate"]
)
def test_interrupt_anywhere_gives_a_consistent_result(monkeypatch, place):
    calls = itertools.count()
    original = getattr(trust_region, place)

    def interrupted(*args, **options):
        if next(calls) == 22:
            raise KeyboardInterrupt
        return original(*args, **options)

    case, parameters = planted(Bilinear(), 0.3, 2)
    start = moved(parameters, 1.0, 7)
    monkeypatch.setattr(trust_region, place, interrupted)
    result = fit(case.problem(), init=start, tol=1e-300)
    assert result.status in (Status.INTERRUPTED, Status.STALLED)
    monkeypatch.undo()
    assert_honest(result, case.problem())
    known = {record.regularised: record.gradient_norm for record in result.history}
    assert result.gradient_norm == known.get(result.regularised_loss, math.nan)


def test_statuses_say_what_to_try():
    texts = [status.text for status in Status]
    assert len(set(texts)) == len(Status)
    for status in (Status.MAX_ITERATIONS, Status.MAX_SECONDS, Status.INTERRUPTED):
        assert "init=result" in status.text


def test_progress_display_changes_nothing(capsys):
    shown, plain = (fit(NOISY, max_iterations=4, progress=p) for p in (True, False))
    assert torch.equal(shown.X, plain.X)
    capsys.readouterr()
