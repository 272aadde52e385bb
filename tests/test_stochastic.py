"""The loop over mini-batches: its gradient, its bounds, and that no end is worse than its start."""

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attnreg
from attnreg.objective import Objective, Point
from attnreg.records import Status
from attnreg.reduction import sampling
from attnreg.solvers import choice, minibatches, rounds, steepest, stochastic
from attnreg.solvers.minibatches import Pooled
from attnreg.solvers.minibatches import minibatches as cut
from attnreg.solvers.run import Settings
from attnreg.solvers.stochastic import Stochastic
from tests.planted_layers import MODEL, planted


def loop(problem, start, iterations=1, *, near=False, **options):
    objective = Objective(problem, MODEL)
    theta, _ = MODEL.split(problem, start)
    settings = Settings(1e-12, iterations, None)
    generator = torch.Generator().manual_seed(0)
    point = minibatches.sampled(objective, theta)
    return Stochastic(point, settings, generator, lambda _: None, 0.0, near=near, **options)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_the_parts_of_the_gradient_add_up(monkeypatch, ridge):
    # Nothing moves and the readout is held. At the solved readout the partial gradient by theta is
    # the reduced one, for the sum over the mini-batches, in whatever coordinates it was taken.
    problem, start = planted(ridge=ridge)
    run = loop(problem, start)
    monkeypatch.setattr(run._steepest, "move", lambda theta, gradient, factor: None)
    monkeypatch.setattr(run._readout, "_solve", lambda damping: None)
    found = [run._step(batch) for batch in run.scaled.batches]
    assert len(found) > 4
    point = Point(run._objective, run._objective.features(run._start.theta))
    size = float(point.gradient.norm())
    assert size > 1e-3
    total = run._inputs.gradient(sum(g for g, _ in found))
    # The readout here is not refined as the point's is, and the gradient is linear in it; the
    # coordinates are scaled by at most (1e-6)^-0.2 = 16.
    assert float((total - point.gradient).norm()) <= 1e-9 * size
    assert sum(loss for _, loss in found) == pytest.approx(point.loss, rel=1e-12)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("rows", [8192, 60])
def test_a_start_over_all_rows_is_compared_over_all(monkeypatch, rows):
    monkeypatch.setattr(minibatches, "SAMPLE_ROWS", rows)
    monkeypatch.setattr(stochastic, "RATE", 1e6)  # leaves the start far behind
    monkeypatch.setattr(stochastic, "CLEARLY", 1e9)  # whatever a sample would say
    problem, start = planted()
    run = loop(problem, start, iterations=2)
    assert run._sampled == (rows == 60)
    whole = Pooled(run._objective, run._batches, run._start.theta)
    settings, generator = run._settings, torch.Generator().manual_seed(0)
    known = Stochastic(whole, settings, generator, lambda _: None, 0.0, near=False)
    assert known._start is whole
    assert known._reserve == pytest.approx(whole.seconds)  # of the end: one pass like it
    passes = whole.objective.passes
    assert known.run().point is whole
    # Two epochs forward and back, and one pass over the end.
    assert whole.objective.passes == passes + 2 * 2 + 1


def test_scaled_inputs_do_not_outlive_the_run(monkeypatch):
    kept = []

    class Seen(stochastic.ScaledInputs):
        def batch(self, batch):
            scaled = super().batch(batch)
            kept.append(weakref.ref(scaled.A1))
            return scaled

    class After(rounds.TrustRegion):
        def __init__(self, *arguments):
            assert kept
            assert all(one() is None for one in kept)
            super().__init__(*arguments)

    monkeypatch.setattr(stochastic, "ScaledInputs", Seen)
    monkeypatch.setattr(rounds, "TrustRegion", After)
    problem, start = planted(lengths=(12,) * 48)
    result = attnreg.fit(problem, MODEL, solver="auto", init=start, max_iterations=200)
    assert result.solver == "trust-region"
    assert result.history[-1].phase != "stochastic"
    assert len(kept) == len(cut(problem.batches))  # of one copy, however many rounds there were


@pytest.mark.usefixtures("small_batches")
def test_queries_and_keys_are_slower_from_a_near_start():
    problem, start = planted()
    far, near = (loop(problem, start, near=near)._steepest._lengths for near in (False, True))
    expected = [stochastic.NEAR * far[0], stochastic.NEAR * far[1], far[2]]  # query, key, value
    assert near == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("near", [True, False])
def test_with_far_to_go_inputs_are_scaled_as_the_data_allow(monkeypatch, near):
    powers = []

    class Seen(stochastic.ScaledInputs):
        def __init__(self, objective, power):
            super().__init__(objective, power)
            powers.append(power)

    monkeypatch.setattr(stochastic, "ScaledInputs", Seen)
    problem, start = planted()
    loop(problem, start, near=near)
    residuals = problem.n_rows * problem.d_out / sum(w.numel() for w in MODEL.split(problem, start))
    assert residuals < choice.ENOUGH
    share = 1.0 if near else residuals / choice.ENOUGH
    assert powers == [pytest.approx(steepest.SCALED * share, rel=1e-12)]


def test_a_logit_matrix_alone_keeps_its_rate():
    problem, _ = planted()
    model = attnreg.Bilinear()
    theta, _ = model.split(problem, model.start(problem, 0))
    point = minibatches.sampled(Objective(problem, model), theta)
    settings, generator = Settings(1e-12, 1, None), torch.Generator()
    runs = [
        Stochastic(point, settings, generator, lambda _: None, 0.0, near=near)
        for near in (False, True)
    ]
    assert runs[0]._steepest._lengths == runs[1]._steepest._lengths


@pytest.mark.parametrize("size", [24, 80, 10**6])
def test_steps_of_an_iteration(monkeypatch, size):
    monkeypatch.setattr(minibatches, "BATCH_ROWS", size)
    problem, start = planted()
    run = loop(problem, start)
    run.run()
    steps = stochastic.steps_of_iteration(cut(problem.batches))
    assert steps == run._steps >= stochastic.FEWEST_STEPS


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("bounds", [{"max_seconds": 0.2}, {"max_iterations": 30}])
def test_fit_says_whether_its_start_is_near(monkeypatch, near, bounds):
    seen = []

    class Seen(Stochastic):
        def __init__(self, *arguments, near, **options):
            seen.append(near)
            super().__init__(*arguments, near=near, **options)

    for module in (attnreg.fitting, rounds):
        monkeypatch.setattr(module, "Stochastic", Seen)
    monkeypatch.setattr(rounds, "PAYS", -1.0)  # every round pays
    problem, start = planted(lengths=(12,) * 48)
    theta, readout = MODEL.split(problem, start)
    solved = minibatches.sampled(Objective(problem, MODEL), theta).readout
    weights = MODEL.join(problem, theta, solved if near else 30.0 * readout, start)
    attnreg.fit(problem, MODEL, solver="auto", init=weights, **bounds)
    assert seen == [near] * len(seen)
    assert len(seen) == (1 if "max_seconds" in bounds else 3)  # rounds of 6, 12 and 12


@pytest.mark.usefixtures("small_batches")
def test_it_comes_near_the_minimum_and_is_reproducible():
    problem, start = planted()
    best = attnreg.fit(problem, MODEL, init=start)
    first = attnreg.fit(problem, MODEL, init=start, solver="stochastic", max_iterations=60, seed=3)
    second = attnreg.fit(problem, MODEL, init=start, solver="stochastic", max_iterations=60, seed=3)
    other = attnreg.fit(problem, MODEL, init=start, solver="stochastic", max_iterations=60, seed=4)
    begun = first.history[0].loss
    assert first.status is Status.MAX_ITERATIONS
    assert len(first.history) == 61
    assert first.history[-1].phase == "stochastic"
    # 95 % of the way from the start to the minimum that curvature finds.
    assert first.loss - best.loss <= 0.05 * (begun - best.loss)
    assert first.loss == second.loss
    assert first.loss != other.loss
    for name, value in first.parameters.items():
        assert torch.equal(value, second.parameters[name])


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("rows", [8192, 60])
def test_it_is_never_worse_than_the_start(monkeypatch, rows):
    monkeypatch.setattr(minibatches, "SAMPLE_ROWS", rows)
    monkeypatch.setattr(stochastic, "RATE", 1e6)  # leaves the start far behind
    problem, start = planted()
    theta, _ = MODEL.split(problem, start)
    objective = Objective(problem, MODEL)
    begun = Point(objective, objective.features(theta)).loss
    result = attnreg.fit(problem, MODEL, init=start, solver="stochastic", max_iterations=3)
    assert result.loss == pytest.approx(begun, rel=1e-11)
    none = attnreg.fit(problem, MODEL, init=start, solver="stochastic", max_iterations=0)
    assert none.loss == pytest.approx(begun, rel=1e-11)
    assert (none.history[0].loss == pytest.approx(begun, rel=1e-11)) == (rows == 8192)


@pytest.mark.usefixtures("small_batches")
def test_bounds_end_it():
    problem, start = planted()
    none = attnreg.fit(problem, MODEL, init=start, solver="stochastic", max_iterations=0)
    assert none.status is Status.MAX_ITERATIONS
    assert len(none.history) == 1
    short = attnreg.fit(
        problem, MODEL, init=start, solver="stochastic", max_iterations=10**6, max_seconds=0.3
    )
    assert short.status is Status.MAX_SECONDS
    assert short.loss <= none.loss
    asked = attnreg.fit(
        problem, MODEL, init=start, solver="stochastic", callback=lambda r: r.iteration == 2
    )
    assert asked.status is Status.STOPPED
    assert [record.iteration for record in asked.history] == [0, 1, 2]


@pytest.mark.parametrize(("rows", "batches", "times"), [(10**6, 1, 8), (80, 3, 3), (24, 10, 1)])
def test_an_iteration_has_steps_enough(monkeypatch, rows, batches, times):
    monkeypatch.setattr(minibatches, "BATCH_ROWS", rows)
    problem, start = planted(lengths=(12,) * 20)
    monkeypatch.setattr(stochastic, "RATE", 0.0)  # nothing moves: every epoch has the same loss
    run = loop(problem, start)
    assert (len(run._batches), run._times) == (batches, times)
    monkeypatch.setattr(run._readout, "_solve", lambda damping: None)
    records = []
    monkeypatch.setattr(run._run, "_observe", records.append)
    run.run()
    assert run._steps == batches * times >= stochastic.FEWEST_STEPS
    # The mean over the epochs of an iteration, not their sum.
    assert records[1].loss == pytest.approx(records[0].loss, rel=1e-10)


def test_the_rate_rises_and_falls(small_batches):
    problem, start = planted()
    run = loop(problem, start, iterations=10)
    total = 10 * len(run._batches)
    factors = []
    for step in range(total + 1):
        run._steps = step
        factors.append(run._factor())
    assert factors[0] == pytest.approx(1 / stochastic.WARM_UP)
    peak = factors.index(max(factors))
    assert 0 < peak <= stochastic.WARM_UP
    assert factors[-1] == pytest.approx(0.0, abs=1e-12)
    assert all(math.isfinite(f) and 0 <= f <= 1 for f in factors)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize(("shorter", "times"), [(0.5, 1.0), (4.0, 2.0), (100.0, 3.0)])
def test_a_short_run_with_far_to_go_has_a_higher_rate(monkeypatch, near, shorter, times):
    problem, start = planted()
    steps = 10 * stochastic.steps_of_iteration(cut(problem.batches))
    monkeypatch.setattr(stochastic, "SHORT", shorter * steps)
    run = loop(problem, start, iterations=10, near=near)
    assert run._faster() == 1.0  # nothing is known before the first step
    for step in (1, steps // 3, steps - 1):
        run._steps = step
        assert run._faster() == pytest.approx(1.0 if near else times, rel=1e-12)
    followed = loop(problem, start, iterations=10, near=near, hurried=False)
    followed._steps = 1
    assert followed._faster() == 1.0  # another run goes on from its end
    moved = []
    monkeypatch.setattr(run._steepest, "move", lambda theta, gradient, rate: moved.append(rate))
    run._step(run.scaled.batches[0])
    run._steps = steps - 1
    assert moved == [pytest.approx(run._factor() * run._faster(), rel=1e-12)]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(("enough", "times"), [(0.0, 1.4), (math.inf, 1.0)])
def test_a_short_run_from_a_near_start_has_a_higher_rate_with_enough_data(
    monkeypatch, enough, times
):
    monkeypatch.setattr(stochastic, "ENOUGH", enough)
    problem, start = planted()
    run = loop(problem, start, iterations=10, near=True)
    run._steps = 10 * stochastic.steps_of_iteration(cut(problem.batches)) - 1
    assert run._steps < stochastic.SHORT_NEAR / 2
    assert run._faster() == pytest.approx(times, rel=1e-12)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("bound", [60.0, None])
@pytest.mark.parametrize("will_do", [True, False])
def test_time_is_set_aside_for_an_end_as_it_will_be_summed(monkeypatch, will_do, bound):
    monkeypatch.setattr(minibatches, "SAMPLE_ROWS", 60)
    monkeypatch.setattr(stochastic, "SAMPLE_ROWS", 60)
    made = []

    class Timed(Pooled):
        def __init__(self, objective, batches, theta, *, single=False):
            super().__init__(objective, batches, theta, single=single)
            made.append(single)
            self.seconds = len(batches) * 0.25

    monkeypatch.setattr(stochastic, "Pooled", Timed)
    problem, start = planted()
    objective = Objective(problem, MODEL)
    point = minibatches.sampled(objective, MODEL.split(problem, start)[0])
    point.seconds = len(point.batches) * 1.0
    point.__dict__["single_will_do"] = will_do
    settings, generator = Settings(1e-12, 1, bound), torch.Generator().manual_seed(0)
    run = Stochastic(point, settings, generator, lambda _: None, 0.0, near=False)
    single = will_do and bound is not None
    assert made == [True] * single
    whole = len(run._batches) * (0.25 if single else 1.0)
    assert run._reserve == pytest.approx(len(point.batches) + whole)
    held = Stochastic(
        point, settings, generator, lambda _: None, 0.0, near=False, held=point.readout
    )
    assert held._reserve == 0.0  # it makes no end


@pytest.mark.usefixtures("small_batches")
def test_runs_on_the_same_data_share_scaled_inputs():
    problem, start = planted()
    first = loop(problem, start)
    second = loop(problem, start, scaled=first.scaled)
    assert second.scaled is first.scaled
    gradients = [run._step(run.scaled.batches[0])[0] for run in (first, second)]
    assert torch.equal(*gradients)
    assert bool(gradients[0].any())
    # With other powers they are not the same coordinates.
    near = loop(problem, start, near=True, scaled=first.scaled)
    assert near._inputs.power != first._inputs.power
    assert near.scaled is not first.scaled
    # Another model on the same inputs has the same coordinates, and blocks of its own.
    wide = attnreg.MultiHead(heads=2, kv_heads=2, head_dim=3, bias=True)
    theta, _ = wide.split(problem, wide.start(problem, 0))
    objective = Objective(problem, wide)
    inputs = first.scaled.inputs.under(objective)
    anew = stochastic.ScaledInputs(objective, inputs.power)
    torch.testing.assert_close(inputs.enter(theta), anew.enter(theta), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(inputs.leave(inputs.enter(theta)), theta, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("solver", ["stochastic", "auto"])
def test_moments_of_some_sequences_scale_the_inputs_and_curvature_has_those_of_all(
    monkeypatch, solver
):
    monkeypatch.setattr(sampling, "MOMENT_ROWS", 10)
    problem, start = planted(lengths=(12,) * 48)
    some = sampling.sample_for_moments(problem)
    assert some.n_rows < problem.n_rows
    seen = []

    class Seen(stochastic.ScaledInputs):
        def __init__(self, objective, *arguments):
            super().__init__(objective, *arguments)
            seen.append(objective.left[0].matrix)

    class After(rounds.TrustRegion):
        def __init__(self, objective, *arguments):
            super().__init__(objective, *arguments)
            seen.append(objective.left[0].matrix)

    monkeypatch.setattr(stochastic, "ScaledInputs", Seen)
    monkeypatch.setattr(rounds, "TrustRegion", After)
    result = attnreg.fit(problem, MODEL, solver=solver, init=start, max_iterations=200)
    expected = [MODEL.input_moments(some)[0]]
    expected += [MODEL.input_moments(problem)[0]] if result.solver == "trust-region" else []
    assert len(expected) == (2 if solver == "auto" else 1)
    for found, moment in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, moment, rtol=1e-13, atol=1e-15)


@pytest.mark.usefixtures("small_batches")
def test_a_note_says_of_how_many_rows_a_null_direction_is_known(monkeypatch):
    problem, start = planted(lengths=(12,) * 48)
    problem = problem.replace(
        A1=[a @ torch.diag(torch.tensor([1.0] * 5 + [0.0]).double()) for a in problem._sequences.A1]
    )
    assert sampling.sample_for_moments(problem).n_rows < problem.n_rows
    monkeypatch.setattr(sampling, "MOMENT_ROWS", 1000)
    whole = attnreg.fit(problem, MODEL, solver="stochastic", init=start, max_iterations=2)
    assert "1 of 7 input directions of query carry no data: the parameters" in whole.notes[0]
    monkeypatch.setattr(sampling, "MOMENT_ROWS", 10)
    some = attnreg.fit(problem, MODEL, solver="stochastic", init=start, max_iterations=2)
    rows = sampling.sample_for_moments(problem).n_rows
    assert f"1 of 7 input directions of query carry no data in {rows} of 576 rows" in some.notes[0]


@pytest.mark.usefixtures("small_batches")
def test_steps_that_leave_the_numbers_end_in_the_start(monkeypatch):
    monkeypatch.setattr(stochastic, "RATE", 1e250)
    problem, start = planted()
    result = attnreg.fit(problem, MODEL, init=start, solver="stochastic", max_iterations=3)
    theta, _ = MODEL.split(problem, start)
    objective = Objective(problem, MODEL)
    assert result.status is Status.DIVERGED
    assert not result.converged
    begun = Point(objective, objective.features(theta)).loss
    assert result.loss == pytest.approx(begun, rel=1e-11)


@pytest.mark.usefixtures("small_batches")
def test_auto_goes_from_mini_batches_to_curvature():
    problem, start = planted(lengths=(12,) * 150)
    assert problem.n_rows * problem.d_out > choice.REDUNDANT * sum(
        w.numel() for w in start.values()
    )
    result = attnreg.fit(problem, MODEL, init=start, solver="auto", tol=1e-6)
    assert result.status is Status.CONVERGED
    assert result.solver == "trust-region"
    phases = [record.phase for record in result.history]
    last = max(i for i, phase in enumerate(phases) if phase == "stochastic")
    epochs = phases.count("stochastic")
    assert epochs in (6, 18, 42, 90)  # rounds of 6, 12, 24 and 48
    assert set(phases[last + 1 :]) & {"gauss-newton", "newton"}
    numbers = [record.iteration for record in result.history]
    assert numbers == sorted(numbers)
    assert any(
        f"residuals a parameter, at least {choice.REDUNDANT}" in note for note in result.notes
    )
    assert any(f"went on after {epochs} epochs of mini-batches" in n for n in result.notes)
    few = attnreg.fit(problem, MODEL, init=start, solver="auto", max_iterations=2)
    timed = attnreg.fit(
        problem, MODEL, init=start, solver="auto", max_seconds=1.0, max_iterations=15
    )
    for short in (few, timed):
        assert short.solver == "stochastic"
        assert {record.phase for record in short.history[1:]} == {"stochastic"}


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(("pays", "epochs"), [(1.0, [6]), (-1.0, [6, 12, 2])])
def test_rounds_of_mini_batches_go_on_while_they_pay(monkeypatch, pays, epochs):
    """At 1 no round pays; at -1 all do, until the iterations are over."""
    monkeypatch.setattr(rounds, "PAYS", pays)
    problem, start = planted(lengths=(12,) * 150)
    result = attnreg.fit(problem, MODEL, init=start, solver="auto", tol=1e-12, max_iterations=20)
    phases = [record.phase for record in result.history]
    starts = [i for i, phase in enumerate(phases) if phase == "start"]
    found = [phases[i:].index("start", 1) - 1 for i in starts[:-1]]
    found += [len(phases) - starts[-1] - 1]
    assert found[: len(epochs)] == epochs
    assert (result.solver == "trust-region") == (pays == 1.0)
    last = result.history[-1].iteration
    assert last == 20 if pays < 0 else 6 < last <= 20
    ends = [result.history[i].loss for i in starts]
    assert ends == sorted(ends, reverse=True)


def test_auto_takes_curvature_where_data_are_scarce_or_the_model_bilinear():
    problem, start = planted()
    automatic = attnreg.fit(problem, MODEL, init=start, solver="auto", max_iterations=5)
    plain = attnreg.fit(problem, MODEL, init=start, max_iterations=5)
    assert automatic.loss == plain.loss
    assert automatic.solver == "trust-region"
    assert any(f"less than {choice.REDUNDANT}" in note for note in automatic.notes)
    inputs = torch.randn(400, 2, 2, generator=torch.Generator().manual_seed(0))
    bilinear = attnreg.fit(
        attnreg.AttentionProblem(inputs, inputs), solver="auto", max_iterations=2
    )
    assert bilinear.solver == "trust-region"


class _NumbersRead(TorchDispatchMode):
    """Counts what is read back as a Python number: on a GPU each waits for all work before it.

    What a decomposition checks inside does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("start_is", ["planted", "zero"])
def test_a_step_reads_one_number_back(start_is):
    problem, start = planted()
    if start_is == "zero":
        start = {name: torch.zeros_like(value) for name, value in start.items()}
    run = loop(problem, start, iterations=2)
    for batch in run.scaled.batches:
        with _NumbersRead() as read:
            run._step(batch)
        assert read.count == 1  # the loss: without it the clock would run ahead of the work
