"""Changes of the data or of the parameters that must change nothing."""

import dataclasses

import pytest
import torch

from attnreg.curvature.preconditioner import natural_metric
from attnreg.models import Bilinear, Features, MultiHead
from attnreg.objective import Objective, Point
from attnreg.problem import AttentionProblem
from tests.cases import CASES, DAMPED, MODELS, RAGGED, RIDGES, inputs, twin, visible
from tests.twins import Case, Twin, normal, relative, unpadded

GROUPED = MODELS["grouped, narrow values"]


def point_of(problem, model, parameters, damping=0.0):
    objective = Objective(problem, model)
    theta, _ = model.split(problem, parameters)
    return Point(objective, objective.features(theta), damping)


def assert_same_point(found, expected, tolerance=1e-10, metric=True):
    """Equal value, readout, gradient and products; the stopping test too unless said otherwise."""
    assert found.value == pytest.approx(expected.value, rel=tolerance)
    assert relative(found.readout, expected.readout) < tolerance
    assert relative(found.gradient, expected.gradient) < tolerance
    d = normal(found.theta.numel(), seed=5)
    assert relative(found.gauss_newton(d), expected.gauss_newton(d)) < tolerance
    assert relative(found.hessian(d), expected.hessian(d)) < tolerance
    if metric:
        assert dual_norm(found) == pytest.approx(dual_norm(expected), rel=1e-6)


def dual_norm(point):
    return natural_metric(point).dual_norm(point.gradient)


def before_and_after(t, change):
    """Points of the twin's problem and of the changed case, at the same parameters."""
    parameters = t.random(200)
    return [
        point_of(case.problem(t.center), t.model, parameters, t.damping)
        for case in (change(t.case), t.case)
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", ["cross", "cross, additive masks, ridges"])
def test_a_row_twice_is_weight_2(case, model):
    def twice(case):
        take = torch.tensor([0, 1, 2, 2, *range(3, len(case.A1[1]))])
        changed = dataclasses.replace(case, A1=list(case.A1), B=list(case.B))
        changed.weights = [torch.ones(len(b), dtype=b.dtype) for b in case.B]
        changed.masks = None if case.masks is None else list(case.masks)
        for rows in (changed.A1, changed.B, changed.weights, changed.masks):
            if rows is not None:
                rows[1] = rows[1][take]
        return changed

    def weighted(case):
        weights = [torch.ones(len(b), dtype=b.dtype) for b in case.B]
        weights[1][2] = 2.0
        return dataclasses.replace(case, weights=weights)

    t = twin(case, model)
    found, _ = before_and_after(t, twice)
    expected, _ = before_and_after(t, weighted)
    assert_same_point(found, expected)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_order_of_sequences(case, model):
    def shuffled(case):
        order = torch.randperm(len(case.A1), generator=torch.Generator().manual_seed(3)).tolist()
        names = ("A1", "B", "A2", "A3", "masks", "weights")
        lists = {name: getattr(case, name) for name in names}
        lists = {k: None if v is None else [v[i] for i in order] for k, v in lists.items()}
        return dataclasses.replace(case, **lists)

    assert_same_point(*before_and_after(twin(case, model), shuffled))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("cross")])
def test_order_of_keys_with_their_values(case, model):
    def shuffled(case):
        order = [
            torch.randperm(len(a), generator=torch.Generator().manual_seed(3)) for a in case.A2
        ]
        masks = case.masks
        if masks is not None:
            masks = [m[:, o] for m, o in zip(masks, order, strict=True)]
        a2, a3 = ([a[o] for a, o in zip(x, order, strict=True)] for x in (case.A2, case.A3))
        return dataclasses.replace(case, A2=a2, A3=a3, masks=masks)

    assert_same_point(*before_and_after(twin(case, model), shuffled))


@pytest.mark.parametrize("model", MODELS)
def test_padding_by_hand_with_weight_0(model):
    def by_hand(case):
        n = max(RAGGED)
        grown = {"A1": [], "B": [], "A2": [], "A3": [], "masks": [], "weights": []}
        for a1, a2, a3, b, w, _ in case.sequences:
            extra = n - len(b)
            mask = torch.zeros(n, n, dtype=torch.bool)
            mask[:, : len(b)] = True
            d = a1.shape[1]
            junk, targets = 10 * normal(extra, d, seed=n), 10 * normal(extra, b.shape[1], seed=n)
            real = (a1, b, a2, a3, mask, w)
            added = (junk, targets, junk, junk, mask[:0], w.new_zeros(extra))
            for rows, *parts in zip(grown.values(), real, added, strict=True):
                rows.append(torch.cat(parts))
        return dataclasses.replace(case, **grown, stack=True)

    # The metric counts all keys, hidden ones too.
    assert_same_point(*before_and_after(twin("ragged, weights", model), by_hand), metric=False)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_its_sequences(case, model):
    t = twin(case, model)
    problem = t.case.problem(t.center)
    theta, _ = t.model.split(problem, t.random(0))
    whole = unpadded(problem, Features(problem, t.model, theta).columns)
    parts = []
    for i in range(problem.n_sequences):
        alone = problem.subset([i])
        theta, _ = t.model.split(alone, t.random(0))
        parts.append(Features(alone, t.model, theta).columns)
    assert relative(whole, torch.cat(parts)) < 1e-13


# ---------------------------------------------------------------------- gauges


def test_logits_constant_over_the_keys_of_a_sequence():
    case = Case(
        *([normal(n, 4, seed=n) for n in RAGGED], [normal(n, 3, seed=n + 1) for n in RAGGED]),
        masks=[visible(n, n, n) for n in RAGGED],
    )
    w = normal(4, seed=9)
    for i, a in enumerate(case.A1):
        a += torch.outer(i - a @ w, w) / (w @ w)  # now a w = i
    problem = case.problem()
    parameters = Twin(case, Bilinear()).random(1)
    moved = parameters | {"X": parameters["X"] + 5 * torch.outer(normal(4, seed=2), w)}
    expected = point_of(problem, Bilinear(), parameters)
    assert_same_point(point_of(problem, Bilinear(), moved), expected)
    metric = natural_metric(expected)
    assert metric.rank == 4 * 3
    # The gauge carries no gradient and no curvature.
    gauge = torch.outer(normal(4, seed=2), w).flatten()
    assert abs(float(gauge @ expected.gradient)) < 1e-12 * float(expected.gradient.norm())
    for product in (expected.gauss_newton, expected.hessian):
        assert float(product(gauge).norm()) < 1e-11 * float(product(expected.theta).norm())


@pytest.mark.parametrize("case", ["ragged, weights", "cross, boolean masks, one ridge"])
def test_multihead_gauge(case):
    t = twin(case, "grouped, narrow values")
    h, g, e, v = t.widths
    problem = t.case.problem(t.center, ridge_y=0.0)
    old = t.random(1)
    new = {name: value.clone() for name, value in old.items()}
    for group in range(g):
        m, u = normal(e, e, seed=group), normal(v, v, seed=10 + group)
        k, w = slice(group * e, (group + 1) * e), slice(group * v, (group + 1) * v)
        new["W_K"][:, k] = old["W_K"][:, k] @ torch.linalg.inv(m).T
        new["W_V"][:, w] = old["W_V"][:, w] @ u
        for head in range(group * h // g, (group + 1) * h // g):
            q, o = slice(head * e, (head + 1) * e), slice(head * v, (head + 1) * v)
            new["W_Q"][:, q], new["b_Q"][q] = old["W_Q"][:, q] @ m, old["b_Q"][q] @ m
            new["W_O"][o] = torch.linalg.inv(u) @ old["W_O"][o]
    # b_K is gauge altogether, and b_V is made up for by b_O.
    new["b_K"] += 3.0
    new["b_V"] += 1.0
    for sign, p in ((-1, new), (1, old)):
        per_head = p["b_V"].view(g, v).repeat_interleave(h // g, 0).flatten()
        new["b_O"] += sign * per_head @ p["W_O"]
    found, expected = point_of(problem, GROUPED, new), point_of(problem, GROUPED, old)
    assert found.value == pytest.approx(expected.value, rel=1e-10)
    assert dual_norm(found) == pytest.approx(dual_norm(expected), rel=1e-7)
    assert relative(Twin(t.case, GROUPED).output(new), Twin(t.case, GROUPED).output(old)) < 1e-10
    (theta, readout), (theta0, readout0) = (GROUPED.split(problem, p) for p in (new, old))
    rows = Features(problem, GROUPED, theta).columns @ readout
    assert relative(rows, Features(problem, GROUPED, theta0).columns @ readout0) < 1e-10


def test_one_head_without_bias_is_bilinear():
    t = twin("cross", "bilinear")
    problem = t.case.problem()
    head = MultiHead(1, head_dim=3, v_head_dim=5, bias=False)
    p = Twin(t.case, head).random(1)
    found = point_of(problem, head, p)
    expected = point_of(problem, Bilinear(), {"X": p["W_Q"] @ p["W_K"].T, "Y": t.random(0)["Y"]})
    assert found.value == pytest.approx(expected.value, rel=1e-10)
    assert relative(p["W_V"] @ found.readout, expected.readout) < 1e-8


# ---------------------------------------------------------------------- coordinates


@pytest.mark.parametrize("ridges", [{}, RIDGES], ids=["no ridge", "ridges"])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_coordinates_of_the_inputs(ridges, size):
    t = twin("cross", "bilinear")
    problem = t.case.problem().replace(**ridges)
    p = t.random(1)
    t1, t2, t3 = (normal(k, k, seed=k) * size for k in t.sizes[:3])
    changed = [[a @ m for a in x] for x, m in ((t.case.A1, t1), (t.case.A2, t2), (t.case.A3, t3))]
    other = problem.replace(A1=changed[0], A2=changed[1], A3=changed[2])
    x = torch.linalg.solve(t1, p["X"]) @ torch.linalg.inv(t2).T
    expected = point_of(problem, Bilinear(), p)
    found = point_of(other, Bilinear(), {"X": x, "Y": p["Y"]})
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    assert dual_norm(found) == pytest.approx(dual_norm(expected), rel=1e-7)
    assert relative(t3 @ found.readout, expected.readout) < 1e-7


def test_scale_is_a_factor_of_the_logits():
    t = twin("cross", "bilinear")
    p = t.random(1)
    found = point_of(t.case.problem().replace(scale=0.5), Bilinear(), p)
    half = p | {"X": 0.5 * p["X"]}
    expected = point_of(t.case.problem().replace(scale=None), Bilinear(), half)
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    assert relative(found.gradient, 0.5 * expected.gradient) < 1e-11
    assert dual_norm(found) == pytest.approx(dual_norm(expected), rel=1e-9)


def test_for_one_sequence_the_ridge_is_the_papers():
    a1, b = inputs((9,), 3, 1)[0], inputs((9,), 2, 2)[0]
    problem = AttentionProblem(a1, b, ridge_x=0.3, ridge_y=0.7)
    x, y = normal(3, 3, seed=4), normal(3, 2, seed=5)
    point = point_of(problem, Bilinear(), {"X": x, "Y": y})
    ridge_x = 0.3 * (a1 @ x @ a1.T).square().sum()
    ridge_y = 0.7 * (a1 @ point.readout).square().sum()
    assert point.regularised - point.loss == pytest.approx(float(ridge_x + ridge_y), rel=1e-12)


def test_damped_cases_are_damped():
    assert all(twin(name, "bilinear").damping > 0 for name in DAMPED)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [1e-8, 1e4])
def test_stopping_test_does_not_depend_on_the_units_of_the_targets(model, size):
    t = twin("cross", model)
    problem, p = t.case.problem(), t.random(1)
    other = problem.replace(B=[b * size for b in t.case.B])

    def relative_norm(problem):
        point = point_of(problem, t.model, p)
        return dual_norm(point) / point.objective.target_norm_squared

    assert relative_norm(other) == pytest.approx(relative_norm(problem), rel=1e-9)
