"""The fit that validation sequences lead: its rounds, where it stops and what it chooses."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import attnreg
from attnreg import early_stopping, judging
from attnreg.early_stopping import FIRST_STEPS, LONGER, Bounds, fit_validated, held_out_fit
from attnreg.judging import RIDGES, Candidate, Judge
from attnreg.objective import Objective, Point
from attnreg.records import Status
from attnreg.reduction.sampling import sample_for_moments
from attnreg.result import relative_error
from attnreg.solvers.minibatches import Pooled, minibatches

MODEL = attnreg.MultiHead(heads=4, kv_heads=2, head_dim=2, bias=False)


def normal(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def planted(sequences, *, noise, away, seed=0):
    """Sequences of a random layer, and a start at a distance from it."""
    generator = torch.Generator().manual_seed(seed)
    inputs = normal(generator, sequences, 10, 6)
    blank = attnreg.AttentionProblem(inputs, inputs[..., :5], mask="causal")
    truth = {
        name: normal(generator, *value.shape) * 0.6
        for name, value in MODEL.start(blank, seed).items()
    }
    outputs = attnreg.predict(MODEL, truth, blank)
    outputs = outputs + noise * normal(generator, *outputs.shape)
    start = {name: value + away * normal(generator, *value.shape) for name, value in truth.items()}
    return attnreg.AttentionProblem(inputs, outputs, mask="causal"), start


def few_and_others(noise=1.5, away=0.3, sequences=26):
    """Six sequences to fit on, ten that judge, the others; and a start."""
    problem, start = planted(sequences, noise=noise, away=away)
    parts = ((0, 6), (6, 16), (16, sequences))
    return (*(problem.subset(range(*part)) for part in parts), start)


def chosen(problem, start, validation, iterations=60, seconds=None, observe=None, **options):
    return held_out_fit(
        Objective(problem, MODEL, sample_for_moments(problem)),
        start,
        validation,
        bounds=Bounds(iterations, seconds),
        seed=0,
        observe=observe or (lambda record: None),
        **options,
    )


def test_where_data_are_few_it_ends_below_the_start_and_the_fits_without():
    few, other, third, start = few_and_others()
    found = chosen(few, start, other)
    assert found.ridge > 0
    assert found.error == pytest.approx(relative_error(other, MODEL, found.weights), rel=1e-10)
    assert found.error <= min(found.start_error, *found.path.values())
    # On sequences that chose nothing: by more than a tenth of the fits' errors.
    for solver in ("trust-region", "stochastic"):
        alone = attnreg.fit(few, MODEL, solver=solver, init=start, max_iterations=60)
        error = relative_error(third, MODEL, alone.parameters)
        assert relative_error(third, MODEL, found.weights) < 0.9 * error
    assert relative_error(third, MODEL, found.weights) < relative_error(third, MODEL, start)


@pytest.mark.parametrize(("center", "away"), [("start", 0.1), ("zero", 0.3)])
def test_the_readout_is_the_ridged_one_of_its_features(center, away):
    few, other, _, start = few_and_others(away=away)
    if center == "zero":  # a readout that says nothing
        start = {**start, "W_O": 30.0 * start["W_O"].flip(0)}
    found = chosen(few, start, other, iterations=0)  # nothing moves but the readout
    assert found.ridge in RIDGES
    assert found.center == center
    assert (found.step, found.iterations, found.path) == (0.0, 0, {})
    for name in ("W_Q", "W_K", "W_V"):
        assert torch.equal(found.weights[name], start[name])
    eye = {**start, "W_O": torch.eye(8, dtype=torch.float64)}
    blank = few.replace(B=torch.zeros((*few.batches[0].B.shape[:2], 8), dtype=torch.float64))
    features = attnreg.predict(MODEL, eye, blank).flatten(0, 1)
    gram = features.mT @ features
    ridge = found.ridge * float(gram.diagonal().mean())
    right = features.mT @ few.batches[0].B.flatten(0, 1)
    if center == "start":
        right = right + ridge * start["W_O"]
    expected = torch.linalg.solve(gram + ridge * torch.eye(8, dtype=torch.float64), right)
    # Two Cholesky factors of a well-conditioned matrix.
    assert torch.allclose(found.weights["W_O"], expected, rtol=0, atol=1e-11)


def test_a_ridge_on_the_readout_alone_has_its_gradient():
    few, _, _, start = few_and_others()
    objective, parts = Objective(few, MODEL), minibatches(few.batches)
    theta, readout = MODEL.split(few, start)
    before = Pooled(objective, parts, theta)
    ridged = objective.with_ridge(before.readout_ridge(0.3, readout))
    assert (objective.ridge, ridged.passes) == (None, objective.passes)
    assert ridged.operations is objective.operations
    point = Pooled(ridged, parts, theta)
    distance = point.readout - readout
    strength = 0.3 * before._gram.diagonal().mean()
    assert point.value == pytest.approx(point.loss + float(strength * distance.square().sum()))
    assert ridged.passes > objective.passes
    generator = torch.Generator().manual_seed(1)
    direction, step = normal(generator, *theta.shape), 1e-5
    sides = [Pooled(ridged, parts, theta + sign * step * direction).value for sign in (1, -1)]
    # Central differences: an error of step^2, and of rounding over step.
    slope = (sides[0] - sides[1]) / (2 * step)
    assert float(point.gradient @ direction) == pytest.approx(slope, rel=1e-6)
    # The same objective in one piece.
    whole = Point(ridged, ridged.features(theta))
    assert whole.value == pytest.approx(point.value, rel=1e-12)
    assert torch.allclose(whole.gradient, point.gradient, rtol=1e-9, atol=1e-9)


def test_a_round_has_the_best_ridge_towards_the_centre_of_the_first(monkeypatch):
    few, other, _, start = few_and_others()
    count, ridges = len(RIDGES), []
    # At the start as it is; then by least squares, with ridges to its readout, and to zero.
    at_start = [0.9, 0.95, *[0.8] * count, 0.85, 0.7, *[0.75] * (count - 2)]
    at_first_end = [0.66, 0.59, *[0.68] * (2 * count - 2), 0.6]  # lowest to the start's readout
    at_second_end = [0.5, *[0.7] * 2 * count]  # without one
    worse = [0.7] * (1 + 2 * count)
    given = iter([*at_start, *at_first_end, *worse, *at_second_end, *worse, *worse, *worse])
    monkeypatch.setattr(judging, "_error", lambda point, readout: next(given))

    class Seen(early_stopping.Stochastic):
        def __init__(self, point, *others, **options):
            ridges.append(point.objective.ridge)
            super().__init__(point, *others, **options)

    monkeypatch.setattr(early_stopping, "Stochastic", Seen)
    found = chosen(few, start, other, iterations=200)
    assert next(given, None) is None
    assert (found.error, found.ridge, found.center) == (0.5, 0.0, "")
    assert torch.equal(ridges[0].center, MODEL.split(few, start)[0])  # where it was chosen
    for ridge, share in zip(ridges[:2], (RIDGES[1], RIDGES[-1]), strict=True):
        assert not ridge.readout_center.any()
        point = Pooled(Objective(few, MODEL), minibatches(few.batches), ridge.center)
        expected = point.readout_ridge(share, ridge.readout_center).readout
        assert torch.allclose(ridge.readout, expected, rtol=1e-12)
    assert ridges[2:] == [None]


@pytest.mark.parametrize("near", [True, False])
def test_the_start_says_whether_it_is_near(monkeypatch, near):
    few, other, _, start = few_and_others()
    seen = []

    class Seen(early_stopping.Stochastic):
        def __init__(self, *arguments, near, **options):
            seen.append((near, options["hurried"]))
            super().__init__(*arguments, near=near, **options)

    monkeypatch.setattr(early_stopping, "Stochastic", Seen)
    theta, readout = MODEL.split(few, start)
    solved = Pooled(Objective(few, MODEL), minibatches(few.batches), theta).readout
    start = MODEL.join(few, theta, solved if near else 30.0 * readout, start)
    with_errors(monkeypatch, [0.9, 0.95])
    chosen(few, start, other, iterations=1000)
    assert seen == [(near, True), (near, False)]  # only the first round is in a hurry


def test_a_readout_that_is_not_from_the_data_is_worth_pulling_towards():
    few, other, third, start = few_and_others(away=0.15)
    found = chosen(few, start, other)
    assert found.center == "start"
    # The same features at the start, whose readout is solved on the data: nothing new to pull to.
    theta, _ = MODEL.split(few, start)
    readout = Pooled(Objective(few, MODEL), minibatches(few.batches), theta).readout
    solved = chosen(few, MODEL.join(few, theta, readout, start), other)
    assert solved.center in ("", "zero")
    ours, theirs = (relative_error(third, MODEL, one.weights) for one in (found, solved))
    assert ours < 0.99 * theirs


def test_where_data_are_many_there_is_one_run_without_a_ridge(monkeypatch):
    problem, start = planted(190, noise=0.05, away=0.3)
    many, other = problem.subset(range(180)), problem.subset(range(180, 190))
    seen, steps, look = [], [], Judge.look

    def looked(self, weights, step, point=None):
        steps.append(step)
        return look(self, weights, step, point)

    monkeypatch.setattr(Judge, "look", looked)
    found = chosen(many, start, other, iterations=12, observe=lambda r: seen.append(r.iteration))
    assert steps == [0.0, 1.0]  # none on the way
    alone = attnreg.fit(many, MODEL, solver="stochastic", init=start, max_iterations=12)
    assert (found.ridge, found.step, found.iterations) == (0.0, 1.0, 12)
    assert list(found.path) == ["12"]
    assert seen == list(range(13))
    for name, value in alone.parameters.items():
        assert torch.equal(found.weights[name], value)


def with_errors(monkeypatch, ends, way=None):
    """One candidate at each point: the start's error is 1, those of ends and between are given.

    Args:
        monkeypatch: Of the test.
        ends: Errors of the ends in turn.
        way: Error by step between start and end; where there is none, infinity.

    Returns:
        The steps and weights that are asked for, in turn.
    """
    given, seen = iter(ends), []

    def look(self, weights, step, point=None, objective=None):
        seen.append((step, weights))
        between = (way or {}).get(step, math.inf)
        error = 1.0 if step == 0.0 else next(given) if step == 1.0 else between
        return [Candidate(weights, error, step, point)]

    monkeypatch.setattr(Judge, "look", look)
    return seen


def first_round(problem, start):
    """Iterations: steps by the residuals a weight, eight of them an iteration."""
    weights = sum(value.numel() for value in start.values())
    residuals = problem.n_rows * problem.d_out
    return math.ceil(FIRST_STEPS * math.sqrt(residuals / weights) / 8)


def lengths_of_rounds(monkeypatch, errors, iterations, seconds=None):
    """Rounds of a fit whose ends have the given errors."""
    few, other, _, start = few_and_others()
    with_errors(monkeypatch, errors)
    found = chosen(few, start, other, iterations, seconds)
    ends = [0, *map(int, found.path)]
    assert found.iterations == ends[-1]
    return [b - a for a, b in itertools.pairwise(ends)], found


@pytest.mark.parametrize(
    ("errors", "iterations", "lengths"),
    [
        ([0.9, 0.8, 0.7, 0.6], 200, [14, 28, 56, 102]),
        ([0.9, 0.95], 200, [14, 28]),  # the second brought nothing
        ([1.1, 0.9, 0.95], 600, [14, 28, 56]),  # the first may
        ([1.1, 1.2], 200, [14, 28]),
        ([0.9], 10, [10]),
        ([0.9], 27, [27]),  # no room for another one
        ([0.9, 0.8, 0.7], 80, [14, 28, 38]),
        ([], 0, []),
    ],
)
def test_rounds_grow_until_one_brings_nothing(monkeypatch, errors, iterations, lengths):
    few, _, _, start = few_and_others()
    assert (first_round(few, start), LONGER) == (14, 2)
    found, result = lengths_of_rounds(monkeypatch, errors, iterations)
    assert found == lengths
    assert result.error == min([1.0, *errors])
    assert result.step == float(min([1.0, *errors]) < 1.0)


def test_the_first_round_goes_with_the_root_of_the_residuals(monkeypatch):
    few, other, _, start = few_and_others()
    for problem in (few.subset(range(2)), few):
        with_errors(monkeypatch, [0.9, 0.95])
        found = chosen(problem, start, other, iterations=1000)
        assert int(next(iter(found.path))) == first_round(problem, start)


def test_the_time_bounds_them(monkeypatch):
    found, _ = lengths_of_rounds(monkeypatch, [0.9] + [0.8] * 9, 10**6, 1e-9)
    assert len(found) == 1
    few, other, _, start = few_and_others()
    result = fit_validated(few, other, MODEL, init=start, max_iterations=10**6, max_seconds=0.5)
    assert 0 < result.history[-1].iteration < 10**6
    seconds = [record.seconds for record in result.history]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    ("way", "seen", "step", "rounds"),
    [
        ({0.8: 0.95}, [0.8], 1.0, 2),  # the end is the best: another round
        ({0.8: 0.9}, [0.8], 1.0, 2),
        ({0.8: 0.7, 0.6: 0.75, 0.4: 0.1}, [0.8, 0.6], 0.8, 1),  # too far: the last round
        ({0.8: 0.7, 0.6: 0.6, 0.4: 0.5, 0.2: 0.4}, [0.8, 0.6, 0.4, 0.2], 0.2, 1),
    ],
)
def test_the_way_back_is_tried_while_it_helps(monkeypatch, way, seen, step, rounds):
    few, other, _, start = few_and_others()
    steps = with_errors(monkeypatch, [0.9, 0.98], way)
    found = chosen(few, start, other, iterations=1000)
    assert len(found.path) == rounds
    assert (found.step, found.error) == (step, {**way, 1.0: 0.9}[step])
    asked = [number for number, _ in steps]
    assert asked[: 2 + len(seen)] == [0.0, 1.0, *seen]
    end = steps[1][1]
    for number, weights in steps[2 : 2 + len(seen)]:
        for name, value in weights.items():
            expected = start[name] + number * (end[name] - start[name])
            assert torch.allclose(value, expected, rtol=0, atol=1e-14)


def test_no_point_on_the_way_once_the_time_is_over(monkeypatch):
    few, other, _, start = few_and_others()
    seen = with_errors(monkeypatch, [0.9, 0.8], {0.8: 0.7, 0.6: 0.6, 0.4: 0.5})
    clock = itertools.count()
    # Every look at the clock is a second later: began 0, the start scored from 1 to 2, around the
    # round 3, 4 and 5, then one for each point, until one and a half scorings before the limit.
    seconds = SimpleNamespace(perf_counter=lambda: float(next(clock)))
    for module in (early_stopping, judging):
        monkeypatch.setattr(module, "time", seconds)
    chosen(few, start, other, seconds=9.0)
    assert [step for step, _ in seen] == [0.0, 1.0, 0.8, 0.6]


def test_an_interrupt_between_rounds_keeps_the_best(monkeypatch):
    few, other, _, start = few_and_others()
    seen = with_errors(monkeypatch, [0.9])
    look = Judge.look

    def interrupted(self, weights, step, point=None, objective=None):
        if step == 0.8:
            raise KeyboardInterrupt
        return look(self, weights, step, point, objective)

    monkeypatch.setattr(Judge, "look", interrupted)
    result = fit_validated(few, other, MODEL, init=start)
    assert result.status is Status.INTERRUPTED
    assert "validation error 0.9000" in result.notes[0]
    for name, value in seen[-1][1].items():
        assert torch.equal(result.parameters[name], value)


@pytest.mark.parametrize("worse", [2.0, math.inf])
def test_the_start_stays_where_nothing_is_better(monkeypatch, worse):
    few, other, _, start = few_and_others()
    with_errors(monkeypatch, [worse] * 2)
    found = chosen(few, start, other)
    assert found.weights is start
    assert (found.step, found.error) == (0.0, 1.0)
    assert len(found.path) == (2 if math.isfinite(worse) else 0)  # infinity is not recorded


def test_errors_are_those_of_what_is_kept():
    few, other, _, start = few_and_others()

    def stored(weights):
        return {name: value.bfloat16().double() for name, value in weights.items()}

    found = chosen(few, start, other, iterations=6, stored=stored)
    kept = relative_error(other, MODEL, stored(found.weights))
    assert found.error == pytest.approx(kept, rel=1e-10)
    assert found.error != pytest.approx(relative_error(other, MODEL, found.weights), rel=1e-6)


def test_the_result_is_what_it_says():
    few, other, _, start = few_and_others()
    result = fit_validated(few, other, MODEL, init=start, max_iterations=40)
    found = chosen(few, start, other, iterations=40)
    for name, value in found.weights.items():
        assert torch.equal(result.parameters[name], value)
    assert result.status is Status.VALIDATED
    assert not result.converged
    assert result.relative_error == pytest.approx(
        relative_error(few, MODEL, result.parameters), rel=1e-10
    )
    assert result.loss == pytest.approx(
        result.relative_error**2 * few.target_norm_squared, rel=1e-10
    )
    assert f"validation error {found.error:.4f}" in result.notes[0]
    for name in ("iteration", "seconds", "passes"):  # counted over the rounds
        numbers = [getattr(record, name) for record in result.history]
        assert numbers == sorted(numbers)
    operations = [sum(record.operations.values()) for record in result.history]
    assert operations == sorted(operations)
    assert result.history[-1].iteration == found.iterations
    again = fit_validated(few, other, MODEL, init=result, max_iterations=1)
    assert relative_error(other, MODEL, again.parameters) <= found.error * (1 + 1e-12)


def test_a_start_that_stays_is_named(monkeypatch):
    few, other, _, start = few_and_others()
    with_errors(monkeypatch, [])
    result = fit_validated(few, other, MODEL, init=start, max_iterations=0)
    assert result.notes[0].endswith("chosen: the start as it is")
    for name, value in start.items():
        assert torch.equal(result.parameters[name], value)


def test_without_a_start_it_takes_the_models():
    few, other, _, _ = few_and_others()
    result = fit_validated(few, other, MODEL, max_iterations=5, seed=3)
    given = fit_validated(few, other, MODEL, init=MODEL.start(few, 3), max_iterations=5, seed=3)
    for name, value in given.parameters.items():
        assert torch.equal(result.parameters[name], value)
    # The model's start has a readout of zero, which is the only thing to pull to.
    assert "the start's" not in result.notes[0]
    start = relative_error(other, MODEL, MODEL.start(few, 3))
    assert relative_error(other, MODEL, result.parameters) < start


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, None])
def test_cut_short_it_hands_out_the_best_point_so_far(stopped):
    few, other, _, start = few_and_others()

    def callback(record):
        if record.iteration == 2 and stopped is not None:
            raise stopped
        return record.iteration == 2

    result = fit_validated(few, other, MODEL, init=start, callback=callback)
    assert result.status is (Status.STOPPED if stopped is None else Status.INTERRUPTED)
    assert result.history[-1].iteration == 2
    assert relative_error(other, MODEL, result.parameters) <= relative_error(other, MODEL, start)


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({"ridge_y": 1.0}, {}, "set both to 0"),
        ({"scale": 0.3}, {}, "the same is expected"),
        ({}, {"max_seconds": -1.0}, "a positive number is expected"),
        ({}, {"max_iterations": -1}, "at least 0 is expected"),
    ],
)
def test_refusals(change, options, said):
    few, other, _, start = few_and_others()
    if "ridge_y" in change:
        change["center"] = start
    with pytest.raises(ValueError, match=said):
        fit_validated(few.replace(**change), other, MODEL, init=start, **options)


def test_a_validation_error_that_is_not_finite_is_refused():
    few, other, _, start = few_and_others()
    huge = {name: torch.full_like(value, 1e200) for name, value in start.items()}
    with pytest.raises(ValueError, match="not finite"):
        chosen(few, huge, other)
    single = [one.to(torch.float32) for one in (few, other)]
    for size in (1e38, 3e38):  # finite weights, features that are not
        big = {name: torch.full_like(value, size).float() for name, value in start.items()}
        with pytest.raises(ValueError, match="not finite"):
            chosen(single[0], big, single[1])
