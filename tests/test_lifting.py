"""A start by way of more key/value heads."""

import dataclasses
import itertools

import pytest
import torch

import attnreg
from attnreg import lifting
from attnreg.models import Rotary
from attnreg.models.pooling import pool_kv_heads, repeat_kv_heads
from attnreg.objective import Objective
from attnreg.records import Status
from attnreg.solvers import minibatches
from attnreg.solvers.minibatches import sampled
from attnreg.solvers.path import WARM
from tests.twins import normal

HEADS, KV_HEADS, WIDTH, SEQUENCES, ROWS = 6, 3, 3, 400, 8
STUDENT = attnreg.MultiHead(HEADS, KV_HEADS, WIDTH)
WIDE = attnreg.MultiHead(HEADS, HEADS, WIDTH)
SHARED = [(0, 3), (1, 4), (2, 5)]
"""Query heads of the layer that share a key/value head: no neighbours, which averaging joins."""

ITERATIONS, FEWEST = 60, 150
"""A lift has a quarter of the iterations, 15 epochs of 12 steps, and needs so many here."""


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch):
    monkeypatch.setattr(lifting, "FEWEST_STEPS", FEWEST)


def layer():
    """A layer that the student can be, but in another order of heads, and its averaged heads."""
    inputs = normal(SEQUENCES, ROWS, 8)
    blank = attnreg.AttentionProblem(inputs, inputs)
    weights = {
        name: 1.2 * normal(*value.shape, seed=i)
        for i, (name, value) in enumerate(WIDE.start(blank, 0).items())
    }
    for name in ("W_K", "b_K", "W_V", "b_V"):
        heads = weights[name].unflatten(-1, (HEADS, WIDTH))
        for a, b in SHARED:
            heads[..., b, :] = heads[..., a, :]
    outputs = attnreg.predict(WIDE, weights, blank)
    outputs += 0.01 * outputs.std() * normal(*outputs.shape, seed=9)
    return attnreg.AttentionProblem(inputs, outputs), pool_kv_heads(weights, HEADS, KV_HEADS)


def fitted(problem, start, model=STUDENT, solver="auto", iterations=ITERATIONS, **options):
    return attnreg.fit(
        problem, model, init=start, solver=solver, max_iterations=iterations, **options
    )


def phases(result):
    return [phase for phase, _ in itertools.groupby(result.history, lambda record: record.phase)]


def lifts(result):
    return "lifted" in phases(result)


def test_copies_of_key_value_heads_are_the_same_layer():
    problem, _ = layer()
    weights = STUDENT.start(problem, 1)
    weights = {
        name: normal(*value.shape, seed=i) for i, (name, value) in enumerate(weights.items())
    }
    copied = repeat_kv_heads(weights, KV_HEADS, HEADS // KV_HEADS)
    expected = attnreg.predict(STUDENT, weights, problem)
    # The same products of the same numbers, but in matrices of other widths: to rounding.
    torch.testing.assert_close(
        attnreg.predict(WIDE, copied, problem), expected, rtol=1e-12, atol=1e-12
    )
    for name, value in pool_kv_heads(copied, HEADS, KV_HEADS).items():
        torch.testing.assert_close(value, weights[name], rtol=1e-15, atol=0.0)


def test_the_larger_layer_begins_where_the_start_is():
    """Its sums are taken from the start's: those of its own features are the same."""
    problem, start = layer()
    theta, _ = STUDENT.split(problem, start)
    begin = sampled(Objective(problem, STUDENT), theta)
    copied, _ = WIDE.split(problem, repeat_kv_heads(start, KV_HEADS, HEADS // KV_HEADS))
    more = begin.objective.with_model(WIDE)
    taken, made = begin.under(more, copied), sampled(more, copied)
    assert taken.value == pytest.approx(made.value, rel=1e-12)
    torch.testing.assert_close(taken.readout, made.readout, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(taken.gradient, made.gradient, rtol=1e-9, atol=1e-9)


def test_heads_that_share_one_are_found():
    problem, start = layer()
    lifted = fitted(problem, start, max_seconds=60.0)
    plain = fitted(problem, start, solver="stochastic")
    assert lifts(lifted)
    assert not lifts(plain)
    assert any("grouped by fits of pairs" in note for note in lifted.notes)
    assert lifted.solver == "stochastic"
    # The noise is 0.01 of the outputs; neighbours cannot share without losing far more.
    assert lifted.relative_error < 0.05 < 0.2 < plain.relative_error


def validated(**options):
    """A validated fit of most of the sequences, the others judge."""
    problem, start = layer()
    fit, judge = (problem.subset(range(*part)) for part in ((0, 384), (384, SEQUENCES)))
    result = attnreg.fit_validated(
        fit, judge, STUDENT, init=start, max_iterations=ITERATIONS, **options
    )
    return result, start


def test_a_fit_that_others_judge_goes_the_same_way():
    result, _ = validated(max_seconds=60.0)
    assert result.status is Status.VALIDATED
    assert phases(result) == ["start", "lifted", "start", "stochastic"]
    assert "validation error" in result.notes[0]
    assert "grouped by fits of pairs" in result.notes[1]
    assert result.relative_error < 0.05  # as above
    counted = [record.iteration for record in result.history]
    assert counted == sorted(counted)
    assert counted[-1] == ITERATIONS


def test_a_fit_that_others_judge_can_be_stopped_on_the_way():
    result, start = validated(callback=lambda record: record.iteration == 2)
    assert result.status is Status.STOPPED
    assert phases(result) == ["start", "lifted"]
    assert "was cut short" in result.notes[1]
    for name, value in start.items():
        assert torch.equal(result.parameters[name], value)


KINDS = {
    "ragged, weighted, causal": (True, {}),
    "rotary, no biases": (False, {"bias": False, "rotary": Rotary((1.0,)), "head_dim": 3}),
    "narrow values, some biases": (True, {"bias": ("value", "output"), "v_head_dim": 2}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_of_every_kind(monkeypatch, kind, dtype):
    monkeypatch.setattr(minibatches, "EXPLAINED", 0.9)  # random heads are alike on average
    ragged, options = KINDS[kind]
    model = dataclasses.replace(STUDENT, **options)
    lengths = [5 + i % 5 for i in range(500)] if ragged else [7] * 500
    inputs = [normal(n, 8, seed=i, dtype=dtype) for i, n in enumerate(lengths)]
    weights = [torch.full((n,), float(i % 3), dtype=dtype) for i, n in enumerate(lengths)]
    settings = {"mask": "causal", "weights": weights} if ragged else {}
    blank = attnreg.AttentionProblem(inputs, inputs, **settings)
    wide = dataclasses.replace(model, kv_heads=HEADS)
    truth = {
        name: normal(*value.shape, seed=i, dtype=dtype)
        for i, (name, value) in enumerate(wide.start(blank, 0).items())
    }
    problem = attnreg.AttentionProblem(inputs, attnreg.predict(wide, truth, blank), **settings)
    start = pool_kv_heads(truth, HEADS, KV_HEADS)
    lifted, plain = (fitted(problem, start, model, solver) for solver in ("auto", "stochastic"))
    assert any("grouped by fits of pairs" in note for note in lifted.notes)
    second = [record for record in lifted.history if record.phase == "start"][1]
    assert second.loss <= 0.9 * lifted.history[0].loss
    assert lifted.relative_error < 1.1 * plain.relative_error


def test_records_are_counted_on():
    problem, start = layer()
    seen = []
    result = fitted(problem, start, max_seconds=60.0, callback=seen.append)
    assert tuple(seen) == result.history
    assert phases(result) == ["start", "lifted", "start", "stochastic"]
    iterations = [record.iteration for record in seen]
    assert iterations[-1] == ITERATIONS
    for before, after in itertools.pairwise(seen):
        step = after.iteration - before.iteration
        assert step == (0 if after.phase == "start" else 1)
        assert after.passes > before.passes
        assert after.seconds >= before.seconds
        assert all(after.operations[k] >= n for k, n in before.operations.items())
    lifted = sum(record.phase == "lifted" for record in seen)
    assert lifted == int(lifting.SHARE * ITERATIONS)


def test_the_same_seed_gives_the_same_fit():
    problem, start = layer()
    first, second = (fitted(problem, start, seed=3) for _ in range(2))
    for name, value in first.parameters.items():
        assert torch.equal(value, second.parameters[name])


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("at", [0, 10])
def test_a_lift_that_is_stopped_ends_in_the_start(raises, at):
    problem, start = layer()

    def stop(record):
        if record.iteration == at:
            if raises:
                raise KeyboardInterrupt
            return True
        return False

    result = fitted(problem, start, callback=stop)
    assert result.status is (Status.INTERRUPTED if raises else Status.STOPPED)
    assert result.history[-1].iteration == at
    assert result.regularised_loss == pytest.approx(result.history[0].regularised, rel=1e-9)
    for name in ("W_Q", "W_K", "W_V"):
        assert torch.equal(result.parameters[name], start[name])


@pytest.mark.parametrize("name", ["pair_losses", "grouped_start", "sampled"])
def test_an_interrupt_anywhere_in_a_lift_ends_in_the_start(monkeypatch, name):
    def interrupted(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(lifting, name, interrupted)
    problem, start = layer()
    result = fitted(problem, start)
    assert result.status is Status.INTERRUPTED
    assert any("interrupted" in note for note in result.notes)
    for weight in ("W_Q", "W_K", "W_V"):
        assert torch.equal(result.parameters[weight], start[weight])


def test_an_interrupt_before_the_first_record_is_one(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(lifting, "_bounds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(*layer())


@pytest.mark.parametrize("rounds", [False, True])
def test_an_interrupt_at_the_second_start_ends_there(rounds):
    problem, start = layer()

    def interrupt(record):
        if record.phase == "start" and record.iteration:
            raise KeyboardInterrupt

    bound = {} if rounds else {"max_seconds": 60.0}
    result = fitted(problem, start, callback=interrupt, **bound)
    assert result.status is Status.INTERRUPTED
    assert result.regularised_loss <= 0.9 * result.history[0].regularised


@pytest.mark.parametrize("near", [False, True])
def test_a_start_that_is_not_clearly_lower_is_not_taken(monkeypatch, near):
    problem, start = layer()
    if near:  # the given one but for a little: lower on some samples
        made = dict(start, W_Q=start["W_Q"] + 1e-3 * normal(*start["W_Q"].shape))
    else:
        made = {name: 0.0 * value for name, value in start.items()}
    monkeypatch.setattr(lifting, "grouped_start", lambda *_: made)
    result = fitted(problem, start)
    assert any("led to no better start" in note for note in result.notes)
    first, second, *_ = [record for record in result.history if record.phase == "start"]
    assert second.loss == pytest.approx(first.loss, rel=1e-9)
    assert result.regularised_loss < first.regularised


def test_fits_of_pairs_that_fail_are_no_help(monkeypatch):
    def fail(*_, **options):
        raise torch.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr(lifting, "pair_losses", fail)
    problem, start = layer()
    result = fitted(problem, start)
    assert any("a fit of two heads has no readout" in note for note in result.notes)
    assert result.regularised_loss < result.history[0].regularised


@pytest.mark.parametrize("status", [Status.DIVERGED, Status.CONVERGED])
def test_a_lift_that_ends_without_heads_is_no_help(monkeypatch, status):
    def lead(self):
        return status, torch.full_like(walk(self)[1], torch.nan)

    walk = lifting.Stochastic.lead
    monkeypatch.setattr(lifting.Stochastic, "lead", lead)
    problem, start = layer()
    result = fitted(problem, start)
    assert any("was no help" in note for note in result.notes)
    assert result.regularised_loss < result.history[0].regularised


def test_heads_of_another_readout_are_no_help():
    problem, start = layer()
    turn = torch.linalg.qr(normal(len(start["W_O"]), len(start["W_O"])))[0]
    turned = dict(start, W_O=turn @ start["W_O"])
    result = fitted(problem, turned)
    assert lifts(result)
    assert any("explains little" in note for note in result.notes)
    first, second, *_ = [record for record in result.history if record.phase == "start"]
    assert second.loss == pytest.approx(first.loss, rel=1e-9)


def test_a_held_readout_stays():
    problem, start = layer()
    theta, readout = STUDENT.split(problem, start)
    begin = sampled(Objective(problem, STUDENT), theta)
    kept = readout.clone()
    seen = []
    bounds = lifting.Settings(1e-8, 3, None, WARM, None)
    loop = lifting.Stochastic(
        begin, bounds, torch.Generator(), seen.append, 0.0, near=False, held=readout
    )
    status, moved = loop.lead()
    assert status is Status.MAX_ITERATIONS
    assert torch.equal(readout, kept)
    assert not torch.equal(moved, theta)
    # The first epoch's losses are at the given readout, not at one that suits the features.
    assert seen[1].loss > begin.value
    assert seen[-1].loss < seen[1].loss


@pytest.mark.parametrize(("taken", "share"), [(0.1, 0.25), (0.3, 0.3), (0.4, 0.35), (0.5, None)])
def test_the_larger_layer_has_the_time_of_useful_steps_within_bounds(monkeypatch, taken, share):
    """``taken`` is the share of the time that the useful steps would need."""
    monkeypatch.setattr(lifting, "FEWEST_STEPS", 110)
    pace = taken * 60.0 / (lifting.USEFUL_STEPS * lifting.GRADIENTS)
    monkeypatch.setattr(lifting, "_seconds_of_gradient", lambda *_: pace)
    problem, start = layer()
    theta, readout = STUDENT.split(problem, start)
    settings = lifting.Settings(1e-8, 10**6, 60.0, WARM, None)
    began = lifting.time.perf_counter()
    bounds = lifting._bounds(Objective(problem, STUDENT), theta, readout, settings, began)
    assert (bounds is None) == (share is None)
    if bounds is not None:
        assert bounds.max_seconds == pytest.approx(60.0 * share, abs=1.0)
        assert bounds.max_iterations * 12 >= lifting.MOST_STEPS  # epochs of 12 steps


def test_what_is_lifted(monkeypatch):
    def begins(problem, start, *rest, **options):
        result = fitted(problem, start, *rest, callback=lambda one: one.iteration == 1, **options)
        return result.history[-1].phase

    problem, start = layer()
    assert begins(problem, start) == "lifted"
    assert begins(problem, start, max_seconds=60.0) == "lifted"
    monkeypatch.setattr(lifting, "_seconds_of_gradient", lambda *_: pace)
    for pace, phase in ((0.9, "lifted"), (1.1, "stochastic")):  # of what would just do
        pace *= lifting.MOST_SHARE * 60.0 / (FEWEST * lifting.GRADIENTS)
        assert begins(problem, start, max_seconds=60.0) == phase
    assert begins(problem, start, solver="stochastic") == "stochastic"
    assert begins(problem, start, iterations=50) == "stochastic"  # under 150 steps
    unread = dict(start, W_O=0.0 * start["W_O"])
    assert begins(problem, unread) == "stochastic"
    assert begins(problem, WIDE.start(problem, 0), WIDE) == "stochastic"
    one = dataclasses.replace(STUDENT, kv_heads=1)
    assert begins(problem, one.start(problem, 0), one) == "stochastic"
    with monkeypatch.context() as patch:
        patch.setattr(lifting, "MOST_PAIRS", 15 * 2 * WIDTH - 1)
        assert begins(problem, start) == "stochastic"
    normed = dataclasses.replace(STUDENT, norm_eps=1e-6)
    assert begins(problem, normed.start(problem, 0), normed) == "stochastic"
    few = problem.subset(range(300))  # 32 residuals a weight of the layer with more heads
    assert begins(few, start) == "stochastic"
    ridged = problem.replace(ridge_x=1e-6, ridge_y=1e-6, center=start)
    assert begins(ridged, start) == "stochastic"
    near = fitted(problem, start).parameters
    assert begins(problem, near) == "stochastic"
