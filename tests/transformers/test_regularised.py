"""The fit that held-out error leads: its ridge, its path, where it stops and what it chooses."""

import math

import pytest
import torch

import attnreg
from attnreg.objective import Objective
from attnreg.transformers.regularised import (
    STEPS,
    STRENGTHS,
    Bounds,
    pulled,
    regularised_fit,
)

MODEL = attnreg.MultiHead(heads=4, kv_heads=2, head_dim=2, bias=False)
SCALE = 2**-0.5


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


def error_on(problem):
    def error(weights):
        residual = attnreg.predict(MODEL, weights, problem) - problem.batches[0].B
        return problem.relative_error(float(residual.square().sum()))

    return error


def scripted(errors):
    """Held-out errors in the order in which they are asked for, and the weights asked about."""
    asked = []

    def error(weights):
        asked.append(weights)
        return errors[len(asked) - 1]

    return error, asked


def fitted(problem, start, error, iterations=16, solver="trust-region", progress=None):
    bounds = Bounds(iterations, None)
    return regularised_fit(
        problem, MODEL, start, error, solver=solver, bounds=bounds, seed=0, progress=progress
    )


@pytest.mark.parametrize("name", ["W_Q", "W_K", "W_V", "W_O"])
def test_the_ridge_is_the_change_it_says(name):
    # One weight changes and the others do not, so that the logits or the outputs are linear in it.
    problem, start = planted(3, noise=0.1, away=0.3)
    change = normal(torch.Generator().manual_seed(5), *start[name].shape)
    objective = Objective(pulled(problem, MODEL, start, 0.3), MODEL)
    moved = start | {name: start[name] + change}
    found = objective.ridge_value(*MODEL.split(problem, moved))
    inputs = problem.batches[0].A1
    if name in ("W_V", "W_O"):
        moves = attnreg.predict(MODEL, moved, problem) - attnreg.predict(MODEL, start, problem)
        # Values are measured by the pooled inputs, without the softmax's averages.
        if name == "W_V":
            rows = inputs.flatten(0, 1) @ change
            out = start["W_O"].unflatten(0, (4, 2))
            moves = [rows.unflatten(1, (2, 2))[:, head // 2] @ out[head] for head in range(4)]
        expected = 0.3 * sum(float(move.square().sum()) for move in moves)
    else:
        parts = {"W_Q": start["W_Q"], "W_K": start["W_K"], name: change}
        queries = (SCALE * inputs.flatten(0, 1) @ parts["W_Q"]).unflatten(1, (4, 2))
        centred = inputs - inputs.mean(1, keepdim=True)
        keys = (centred.flatten(0, 1) @ parts["W_K"]).unflatten(1, (2, 2))
        keys = keys.repeat_interleave(2, dim=1)
        logits = torch.einsum("nhe,mhe->hnm", queries, keys)
        expected = 0.3 * problem.target_norm_squared * float(logits.square().mean())
    # Both are sums in float64.
    assert found == pytest.approx(expected, rel=1e-10)
    assert pulled(problem, MODEL, start, 0.0) is problem


def test_where_data_are_few_it_ends_below_the_start_and_the_fit_without():
    problem, start = planted(26, noise=1.5, away=0.3)
    few, other, third = (problem.subset(range(*part)) for part in ((0, 6), (6, 16), (16, 26)))
    found = fitted(few, start, error_on(other))
    alone = attnreg.fit(few, MODEL, init=start, max_iterations=16)
    assert found.strength > 0
    assert len(found.path) < len(STRENGTHS)  # it stopped early
    assert found.held_out_error == error_on(other)(found.weights)
    assert found.held_out_error <= min(found.start_error, *found.path.values())
    # On sequences that chose nothing: by more than a tenth of the fit's error.
    assert error_on(third)(found.weights) < 0.9 * error_on(third)(alone.parameters)
    assert error_on(third)(found.weights) < error_on(third)(start)


def test_where_data_are_many_it_goes_to_the_end():
    problem, start = planted(60, noise=0.05, away=0.3)
    many, other = problem.subset(range(50)), problem.subset(range(50, 60))
    found = fitted(many, start, error_on(other), iterations=40)
    assert (found.strength, found.step) == (0.0, 1.0)
    assert list(found.path) == ["0.1", "0.01", "0.001", "0"]
    alone = attnreg.fit(many, MODEL, init=start, max_iterations=40)
    # Within a hundredth of the error of one long fit.
    assert found.held_out_error <= 1.01 * error_on(other)(alone.parameters)


def test_it_stops_with_the_first_stage_that_does_not_help():
    problem, start = planted(6, noise=0.5, away=0.3)
    error, asked = scripted([1.0, 0.8, 0.9, 0.95, 0.85])
    found = fitted(problem, start, error)
    assert found.path == {"0.1": 0.8, "0.01": 0.9}
    assert (found.strength, found.step, found.held_out_error) == (0.1, 1.0, 0.8)
    assert found.start_error == 1.0
    assert found.weights is asked[1]
    assert found.error == pytest.approx(error_on(problem)(asked[1]), rel=1e-12)
    assert found.iterations <= 8  # two stages of four, and none of what was left


def test_a_point_on_the_way_from_the_start():
    problem, start = planted(6, noise=0.5, away=0.3)
    error, asked = scripted([1.0, 0.8, 0.9, 0.7, 0.85])
    found = fitted(problem, start, error)
    assert (found.strength, found.step, found.held_out_error) == (0.01, STEPS[0], 0.7)
    assert found.error is None
    for name, value in found.weights.items():
        expected = start[name] + STEPS[0] * (asked[2][name] - start[name])
        assert torch.allclose(value, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("worse", [2.0, math.nan])
def test_the_start_stays_where_nothing_is_better(worse):
    problem, start = planted(6, noise=0.5, away=0.3)
    found = fitted(problem, start, scripted([1.0] + [worse] * 5)[0])
    assert found.weights is start
    assert (found.step, found.held_out_error) == (0.0, 1.0)
    assert len(found.path) == math.isfinite(worse)  # what is not a number is not recorded


@pytest.mark.parametrize(("iterations", "stages"), [(0, 1), (2, 2), (11, 4)])
def test_bounds_hold_for_all_stages_together(iterations, stages):
    problem, start = planted(6, noise=0.5, away=0.3)
    seen = []
    error = scripted([1.0, 0.9, 0.8, 0.7, 0.6, 1.0, 1.0])[0]
    found = fitted(problem, start, error, iterations, progress=lambda i, e: seen.append(i))
    assert list(found.path) == [f"{s:g}" for s in STRENGTHS[-stages:]]
    assert found.iterations == iterations == max(seen)
    assert seen == sorted(seen)


def test_a_bound_on_the_time_leaves_one_stage_at_least():
    problem, start = planted(6, noise=0.5, away=0.3)
    found = regularised_fit(
        problem,
        MODEL,
        start,
        scripted([1.0, 0.9, 0.8, 0.7, 0.6, 1.0, 1.0])[0],
        solver="trust-region",
        bounds=Bounds(10**6, 1e-9),
        seed=0,
    )
    assert len(found.path) == 1


def test_mini_batches_have_one_stage_without_a_ridge():
    problem, start = planted(40, noise=0.1, away=0.3)
    found = fitted(problem, start, error_on(problem), iterations=5, solver="stochastic")
    alone = attnreg.fit(problem, MODEL, solver="stochastic", init=start, max_iterations=5)
    assert list(found.path) == ["0"]
    assert (found.strength, found.step, found.iterations) == (0.0, 1.0, 5)
    for name, value in alone.parameters.items():
        assert torch.equal(found.weights[name], value)


@pytest.mark.parametrize("solver", ["trust-region", "stochastic"])
def test_an_interrupted_fit_is_not_a_finished_one(solver):
    problem, start = planted(6, noise=0.5, away=0.3)

    def interrupt(iteration, error):
        if iteration:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(problem, start, lambda _: 1.0, solver=solver, progress=interrupt)
