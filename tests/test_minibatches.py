"""Mini-batches, and the reduced objective summed over them, against all rows in one piece."""

import math

import pytest
import torch

import attnreg
from attnreg.objective import Objective, Point
from attnreg.solvers import minibatches
from attnreg.solvers.minibatches import Pooled
from attnreg.solvers.minibatches import minibatches as cut
from tests.planted_layers import MODEL, planted


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_the_reduced_objective_is_the_same_in_parts(ridge):
    problem, start = planted(ridge=ridge)
    theta, _ = MODEL.split(problem, start)
    objective = Objective(problem, MODEL)
    point = Point(objective, objective.features(theta))
    parts = cut(problem.batches)
    assert len(parts) > 4
    pooled = Pooled(objective, parts, theta)
    # The normal equations square the condition number (about 1e3) and are not refined here.
    torch.testing.assert_close(pooled.readout, point.readout, rtol=1e-9, atol=1e-11)
    assert pooled.rank == point.rank
    assert pooled.loss == pytest.approx(point.loss, rel=1e-11)  # a difference of squares
    assert pooled.value == pytest.approx(point.value, rel=1e-11)
    difference = float((pooled.gradient - point.gradient).norm())
    assert difference <= 1e-9 * float(point.gradient.norm())


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("bias", [True, False])
def test_a_point_under_another_ridge_is_that_made_anew(bias):
    problem, start = planted()
    model = attnreg.MultiHead(heads=2, kv_heads=1, head_dim=3, bias=bias)
    start = {name: value for name, value in start.items() if bias or name.startswith("W")}
    theta, readout = model.split(problem, start)
    objective, parts = Objective(problem, model), cut(problem.batches)
    plain = Pooled(objective, parts, theta)
    norm, shares = float(plain.gradient.norm()), (1e-2, 0.3, 3.0)
    for center in (readout, torch.zeros_like(readout)):
        for share, found in zip(shares, plain.ridged_readouts(shares, center), strict=True):
            ridged = objective.with_ridge(plain.readout_ridge(share, center))
            passes = ridged.passes
            under = plain.under(ridged)
            assert ridged.passes == passes  # no pass over the rows
            anew = Pooled(ridged, parts, theta)
            # An eigendecomposition against a Cholesky factor, ridge at least a hundredth.
            torch.testing.assert_close(found, anew.readout, rtol=1e-9, atol=1e-11)
            assert torch.equal(under.readout, anew.readout)
            assert (under.loss, under.value, under.rank) == (anew.loss, anew.value, anew.rank)
            assert torch.equal(under.gradient, anew.gradient)  # not what was kept of the other
            assert abs(float(under.gradient.norm()) - norm) > 1e-3 * norm
    assert plain.objective is objective


def test_a_ridge_on_features_of_zero_leaves_the_constant():
    problem, start = planted()
    start["W_V"], start["b_V"] = torch.zeros_like(start["W_V"]), torch.zeros_like(start["b_V"])
    theta, readout = MODEL.split(problem, start)
    point = Pooled(Objective(problem, MODEL), cut(problem.batches), theta)
    (found,) = point.ridged_readouts([0.1], readout)
    assert not found[:-1].any()
    # A weighted mean of the targets, by a division here and a scaled inverse there.
    torch.testing.assert_close(found, point.readout, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("rows", [10**6, 60])
def test_near_is_what_explains_a_tenth_of_the_spread(monkeypatch, rows):
    monkeypatch.setattr(minibatches, "SAMPLE_ROWS", rows)
    problem, start = planted()
    objective, answers = Objective(problem, MODEL), set()
    for size in (0.0, 0.3, 0.9, 1.0, 1.1, 3.0):
        weights = {**start, "W_O": size * start["W_O"]}
        theta, readout = MODEL.split(problem, weights)
        point = minibatches.sampled(objective, theta)
        seen = problem.subset(sorted({i for part in point.batches for i in part.index}))
        assert (seen.n_rows < problem.n_rows) == (rows == 60)
        # The loss of the rows that are seen against their share of the targets' spread.
        loss = attnreg.result.relative_error(seen, MODEL, weights) ** 2 * seen.target_norm_squared
        share = seen.total_weight / problem.total_weight
        expected = loss <= 0.9 * share * objective.target_norm_squared
        assert point.explains(readout) == expected, size
        answers.add(expected)
    assert answers == {True, False}
    assert not point.explains(math.nan * readout)


@pytest.mark.usefixtures("small_batches")
def test_a_sampled_gradient_is_that_of_its_sequences(monkeypatch):
    monkeypatch.setattr(minibatches, "GRADIENT_ROWS", 60)
    problem, start = planted()
    theta, _ = MODEL.split(problem, start)
    objective = Objective(problem, MODEL)
    parts = cut(problem.batches)
    pooled = Pooled(objective, parts, theta)
    chosen = minibatches.spread(parts, 60)
    assert 1 < len(chosen) < len(parts)
    # All rows at once, those of the other sequences with weight 0.
    numbers = {i for part in chosen for i in part.index}
    inside = torch.cat(
        [
            torch.tensor([i in numbers for i in batch.index]).repeat_interleave(batch.B.shape[1])
            for batch in problem.batches
        ]
    )
    features = objective.features(theta)
    residual = features.columns @ pooled.readout - objective.targets
    residual *= objective.weights * inside[:, None]
    share = float((objective.weights[:, 0] * inside).sum()) / problem.total_weight
    width = objective.layout.features
    expected = 2 * features.vjp(residual @ pooled.readout[:width].mT) / share
    # The same sums in another order; the residual is a difference of like numbers.
    torch.testing.assert_close(pooled.gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("small_batches")
def test_minibatches_hold_every_sequence_once():
    problem, _ = planted()
    parts = cut(problem.batches)
    assert sorted(i for part in parts for i in part.index) == list(range(problem.n_sequences))
    for part in parts:
        assert part.B.shape[0] == len(part.index) == len(part.lengths)
        assert part.A2 is part.A1
    assert max(part.B.shape[0] * part.B.shape[1] for part in parts) <= 2 * minibatches.BATCH_ROWS


def in_single(problem, start):
    """The same data and start in float32."""
    inputs, targets, weights = (
        [one.float() for one in given]
        for given in (problem._sequences.A1, problem._sequences.B, problem._sequences.weights)
    )
    single = attnreg.AttentionProblem(inputs, targets, mask="causal", weights=weights)
    return single, {name: value.float() for name, value in start.items()}


@pytest.mark.usefixtures("small_batches")
def test_sums_in_single_precision_lead_to_the_same_readout_and_loss():
    problem, start = in_single(*planted(noise=0.5))
    objective, parts = Objective(problem, MODEL), cut(problem.batches)
    theta, _ = MODEL.split(problem, start)
    double, single = (Pooled(objective, parts, theta, single=one) for one in (False, True))
    assert double.single_will_do
    assert single.single_will_do
    assert not torch.equal(double.readout, single.readout)
    # Errors of the sums are some 6e-8. The readout's are those times the condition number, about
    # 1e2 here; the loss's have that of ||B||_W^2 over it, and of the readout's the square.
    torch.testing.assert_close(single.readout, double.readout, rtol=1e-4, atol=1e-5)
    assert single.rank == double.rank
    assert single.loss == pytest.approx(double.loss, rel=1e-5)
    assert double.loss_at(single.readout) == pytest.approx(double.loss, rel=1e-9)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("why", ["a small loss", "features alike", "no loss", "matmuls", "float64"])
def test_where_single_precision_would_not_do_sums_are_double(monkeypatch, why):
    problem, start = planted(noise=0.0 if why == "a small loss" else 0.5)
    if why == "a small loss":
        truth = attnreg.fit(problem, MODEL, init=start, max_iterations=60).parameters
        start = {name: value.clone() for name, value in truth.items()}
    if why == "features alike":  # both heads see the same: the readout has null directions
        start["W_Q"], start["b_Q"] = start["W_Q"] * 0.0, start["b_Q"] * 0.0
    if why == "no loss":
        problem = problem.replace(B=[0.0 * b for b in problem._sequences.B])
    if why != "float64":
        problem, start = in_single(problem, start)
    if why == "matmuls":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    objective = Objective(problem, MODEL)
    theta, _ = MODEL.split(problem, start)
    point = Pooled(objective, cut(problem.batches), theta)
    assert point.single_will_do == (why == "no loss")  # a loss of 0 is told exactly

    # A sample said that they would do, and the whole says that they have not.
    monkeypatch.setattr(minibatches, "SAMPLE_ROWS", 60)
    some = minibatches.sampled(objective, theta)
    assert len(some.batches) < len(point.batches)
    some.__dict__["single_will_do"] = True
    whole = minibatches.over_all_rows(some)
    assert whole.single == (why == "no loss")
    torch.testing.assert_close(whole.readout, point.readout, rtol=0.0, atol=0.0)
    assert whole.loss == point.loss


@pytest.mark.usefixtures("small_batches")
def test_what_a_point_takes_is_told_by_the_median_of_its_mini_batches(monkeypatch):
    problem, start = planted()
    objective, parts = Objective(problem, MODEL), cut(problem.batches)[:5]
    ticks = iter([0.0, 9.0, 9.1, 9.3, 9.6, 10.0])  # the first is slow
    monkeypatch.setattr(minibatches.time, "perf_counter", lambda: next(ticks))
    point = Pooled(objective, parts, MODEL.split(problem, start)[0])
    assert point.seconds == pytest.approx(5 * 0.3, rel=1e-9)
