"""The reduced objective and its derivatives against autograd of the slow twin."""

import pytest
import torch

import attnreg
from attnreg.objective import Objective, Point
from tests.cases import CASES, MODELS, twin
from tests.twins import normal, relative

PAIRS = [(case, model) for case in CASES for model in MODELS]


def point_of(t, seed=200, **changes):
    problem = t.case.problem(t.center, **changes)
    objective = Objective(problem, t.model)
    theta, _ = t.model.split(problem, t.random(seed))
    return Point(objective, objective.features(theta), t.damping)


@pytest.mark.parametrize(("case", "model"), PAIRS)
def test_value_readout_gradient_and_hessian(case, model):
    t = twin(case, model)
    point = point_of(t)
    theta = point.theta
    design, target, extra = t.design(theta)
    readout = torch.linalg.lstsq(design, target).solution
    assert point.rank == readout.shape[0]
    assert relative(point.readout, readout) < 1e-10
    total = (design @ readout - target).square().sum() + extra.square().sum()
    assert point.value == pytest.approx(float(total), rel=1e-12)
    *_, b, w = t.rows
    fitted = t.constant(t.features(t.named(theta))) @ readout
    assert point.loss == pytest.approx(float(w @ (fitted - b).square().sum(1)), rel=1e-11)
    damping = t.damping * float(readout[: t.features_width].square().sum())
    assert point.regularised == pytest.approx(point.value - damping, rel=1e-12)
    assert relative(point.gradient, t.gradient(theta)) < 1e-10
    for seed in (1, 2):
        d = normal(theta.numel(), seed=seed)
        assert relative(point.hessian(d), t.hessian_product(theta, d)) < 1e-10


@pytest.mark.parametrize(("case", "model"), PAIRS)
def test_gauss_newton(case, model):
    t = twin(case, model)
    point = point_of(t)
    size = point.theta.numel()
    found = torch.stack([point.gauss_newton(e) for e in torch.eye(size, dtype=torch.float64)])
    expected = t.gauss_newton(point.theta)
    assert relative(found, expected) < 1e-10
    assert relative(found, found.T) < 1e-12
    assert float(torch.linalg.eigvalsh(expected)[0]) > -1e-10 * float(expected.norm())


@pytest.mark.parametrize("model", MODELS)
def test_products_do_not_disturb_each_other(model):
    point = point_of(twin("ragged, causal, ridges", model))
    d, e = (normal(point.theta.numel(), seed=s) for s in (1, 2))
    d0, gradient = d.clone(), point.gradient.clone()
    first = [point.hessian(d), point.gauss_newton(d)]
    point.gauss_newton(e)
    point.hessian(e)
    assert torch.equal(point.hessian(d), first[0])
    assert torch.equal(point.gauss_newton(d), first[1])
    assert torch.equal(point.gradient, gradient)
    assert torch.equal(d, d0)


def test_two_points_at_one_time():
    t = twin("cross", "heads 2")
    objective = Objective(t.case.problem(), t.model)
    first, second = (t.model.split(objective.problem, t.random(s))[0] for s in (1, 2))
    d = normal(first.numel())
    alone = Point(objective, objective.features(first)).hessian(d)
    a = Point(objective, objective.features(first))
    b = Point(objective, objective.features(second))
    b.hessian(d)
    assert torch.equal(a.hessian(d), alone)


@pytest.mark.parametrize("model", MODELS)
def test_project_out_leaves_what_no_readout_takes_up(model):
    t = twin("ragged, causal, ridges", model)
    point = point_of(t)
    u = normal(*point.residual.shape)
    left = point.objective.weighted(point.features.columns)
    design, _, _ = t.design(point.theta)
    expected = u - left @ torch.linalg.solve(design.T @ design, point.features.columns.T @ u)
    assert relative(point.project_out(u), expected) < 1e-10


@pytest.mark.parametrize("model", MODELS)
def test_float32_agrees_with_float64(model):
    t = twin("ragged, causal, ridges", model)
    exact = point_of(t)
    problem = t.case.problem(t.center).to(torch.float32)
    objective = Objective(problem, t.model)
    point = Point(objective, objective.features(exact.theta.float()), t.damping)
    d = normal(exact.theta.numel())
    assert point.gradient.dtype == point.hessian(d.float()).dtype == torch.float32
    assert point.value == pytest.approx(exact.value, rel=1e-5)
    assert relative(point.gradient.double(), exact.gradient) < 1e-4
    assert relative(point.gauss_newton(d.float()).double(), exact.gauss_newton(d)) < 1e-4
    assert relative(point.hessian(d.float()).double(), exact.hessian(d)) < 1e-4


def test_passes_are_counted_over_all_points():
    t = twin("batch", "bilinear")
    objective = Objective(t.case.problem(), t.model)
    theta, _ = t.model.split(objective.problem, t.random(0))
    for _ in range(4):
        point = Point(objective, objective.features(theta))
        point.gauss_newton(theta)  # a Jacobian product and a transpose
    assert objective.passes == 4 * 3
    point.hessian(theta)
    assert objective.passes == 4 * 3 + 3


def test_target_norm_is_1_for_a_constant_target():
    t = twin("batch", "bilinear")
    problem = t.case.problem().replace(B=torch.full((3, 9, 2), 7.0, dtype=torch.float64))
    assert Objective(problem, t.model).target_norm_squared == 1.0


def test_multihead_ridge_needs_a_centre():
    t = twin("ragged, causal, ridges", "heads 2")
    problem = t.case.problem().replace(center=None)
    with pytest.raises(ValueError, match="center=weights"):
        Objective(problem, t.model)


@pytest.mark.parametrize("name", ["W_Q", "W_K", "W_V", "W_O"])
def test_a_multihead_ridge_is_the_change_that_it_says(name):
    # One weight changes and the others do not, so that the logits or the outputs are linear in it.
    model, scale = attnreg.MultiHead(heads=4, kv_heads=2, head_dim=2, bias=False), 2**-0.5
    problem = attnreg.AttentionProblem(
        normal(3, 10, 6, seed=1), normal(3, 10, 5, seed=2), mask="causal"
    )
    start = {
        key: normal(*value.shape, seed=3 + i)
        for i, (key, value) in enumerate(model.start(problem, 0).items())
    }
    change = normal(*start[name].shape, seed=9)
    # The ridge sums the logits over all heads, and over all pairs of a row and a key.
    ridge_x = 0.3 * problem.target_norm_squared / (30 * 4 * 30)
    objective = Objective(problem.replace(ridge_x=ridge_x, ridge_y=0.3, center=start), model)
    moved = start | {name: start[name] + change}
    found = objective.ridge_value(*model.split(problem, moved))
    inputs = problem.batches[0].A1
    if name in ("W_V", "W_O"):
        moves = attnreg.predict(model, moved, problem) - attnreg.predict(model, start, problem)
        # Values are measured by the pooled inputs, without the softmax's averages.
        if name == "W_V":
            rows = inputs.flatten(0, 1) @ change
            out = start["W_O"].unflatten(0, (4, 2))
            moves = [rows.unflatten(1, (2, 2))[:, head // 2] @ out[head] for head in range(4)]
        expected = 0.3 * sum(float(move.square().sum()) for move in moves)
    else:
        parts = {"W_Q": start["W_Q"], "W_K": start["W_K"], name: change}
        queries = (scale * inputs.flatten(0, 1) @ parts["W_Q"]).unflatten(1, (4, 2))
        centred = inputs - inputs.mean(1, keepdim=True)
        keys = (centred.flatten(0, 1) @ parts["W_K"]).unflatten(1, (2, 2))
        keys = keys.repeat_interleave(2, dim=1)
        logits = torch.einsum("nhe,mhe->hnm", queries, keys)
        expected = 0.3 * problem.target_norm_squared * float(logits.square().mean())
    # Both are sums in float64.
    assert found == pytest.approx(expected, rel=1e-10)
