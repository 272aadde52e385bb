"""Attention features and their derivatives against loops over heads and rows, and in blocks."""

import pytest
import torch

from attnreg.models import Features, attention, features
from attnreg.models.attention import plan_blocks
from tests.cases import CASES, MODELS, inputs, twin, visible
from tests.twins import Case, Twin, forward_product, normal, padded, relative, unpadded

PAIRS = [(case, model) for case in CASES for model in MODELS]


def made(case, model):
    """Twin, problem, named parameters, theta and features."""
    t = twin(case, model)
    problem = t.case.problem(t.center)
    parameters = t.random(200)
    theta, readout = t.model.split(problem, parameters)
    return t, problem, parameters, theta, readout, Features(problem, t.model, theta)


@pytest.mark.parametrize(("case", "model"), PAIRS)
def test_features_and_jacobian_products(case, model):
    t, problem, _, theta, _, found = made(case, model)
    width, total = t.features_width, sum(len(b) for b in t.case.B)
    direction = normal(theta.numel(), seed=1)
    u, du = normal(total, width, seed=2), normal(total, width, seed=3)

    def function(theta):
        return t.features(t.named(theta))

    expected, change = forward_product(function, theta, direction)
    assert relative(unpadded(problem, found.columns[:, :width]), expected) < 1e-12
    assert relative(unpadded(problem, found.jvp(direction)), change) < 1e-10

    lengths = [len(b) for b in t.case.B]
    cotangent, moved = (padded(problem, x.split(lengths)) for x in (u, du))
    variable = theta.clone().requires_grad_()
    g, g2 = (
        torch.autograd.grad((function(variable) * x).sum(), variable, create_graph=True)[0]
        for x in (u, du)
    )
    (second,) = torch.autograd.grad(g @ direction, variable)
    assert relative(found.vjp(cotangent), g.detach()) < 1e-10
    assert relative(found.vjp_derivative(direction, cotangent, moved), second + g2.detach()) < 1e-10


@pytest.mark.parametrize("first", ["jvp", "vjp_derivative"])
@pytest.mark.parametrize(("case", "model"), PAIRS)
def test_room_for_a_direction_changes_no_other_product(case, model, first):
    """It is made with the first product along one, and queries and keys move there."""
    _, _, _, theta, _, found = made(case, model)
    u = normal(len(found.both), found.layout.features, seed=4)
    direction, products = normal(theta.numel(), seed=5), [found.vjp(u)]
    if first == "jvp":
        found.jvp(direction)
    second = found.vjp_derivative(direction, u, u)
    products.append(found.vjp(u))
    # The same numbers in matrices of other strides: to rounding.
    assert relative(products[1], products[0]) < 1e-13
    found.jvp(-direction)
    assert relative(found.vjp_derivative(direction, u, u), second) < 1e-13


@pytest.mark.parametrize("case", CASES)
def test_keys_that_are_inputs_are_not_copied(case):
    _, problem, _, theta, _, found = made(case, "bilinear")
    direction, inputs_before = (
        normal(theta.numel(), seed=5),
        [b.A2.clone() for b in problem.batches],
    )
    found.jvp(direction)
    for batch, keys, before in zip(problem.batches, found.kept["keys"], inputs_before, strict=True):
        assert keys.data_ptr() == batch.A2.data_ptr()
        assert torch.equal(batch.A2, before)


@pytest.mark.parametrize(("case", "model"), PAIRS)
def test_split_and_join_keep_the_layer(case, model):
    t, problem, parameters, theta, readout, found = made(case, model)
    again = t.model.join(problem, theta, readout, parameters)
    assert list(again) == list(t.shapes())
    for name, value in parameters.items():
        assert torch.allclose(again[name], value, rtol=0, atol=1e-13), name
    # The gauge biases are in the twin's output: what split leaves out changes nothing.
    assert relative(unpadded(problem, found.columns @ readout), t.output(parameters)) < 1e-12


@pytest.mark.parametrize(("case", "model"), PAIRS)
def test_constant_column_and_passes(case, model):
    t, _, _, theta, _, found = made(case, model)
    width = t.features_width
    assert found.columns.shape[1] == width + found.layout.readout_bias
    assert bool((found.columns[:, width:] == 1).all())
    assert found.passes == 1
    found.jvp(theta)
    found.vjp(found.columns[:, :width].contiguous())
    assert found.passes == 3


# ---------------------------------------------------------------------- blocks


def long_cases():
    n, m = (40, 37, 5), (33, 50, 7)
    weights = [w[:, 0].abs() for w in inputs(n, 1, 4)]
    a1, b = inputs(n, 4, 0), inputs(n, 3, 8)
    return {
        "plain": Case(a1, b, inputs(m, 3, 20), inputs(m, 5, 30), weights=weights),
        "masks": Case(
            *(a1, b, inputs(m, 3, 20), inputs(m, 3, 30)),
            masks=[visible(*sizes, i) for i, sizes in enumerate(zip(n, m, strict=True))],
        ),
        "causal": Case(a1, b, causal=True),
        "causal and masks": Case(
            a1, b, causal=True, masks=[normal(k, k, seed=k) for k in n], weights=weights
        ),
        "window": Case(a1, b, causal=True, window=6, weights=weights),
        "window and masks": Case(
            a1, b, causal=True, window=11, masks=[normal(k, k, seed=k) for k in n]
        ),
        "causal batch": Case(
            inputs((40,) * 3, 4, 0), inputs((40,) * 3, 3, 8), causal=True, stack=True
        ),
    }


LONG = long_cases()
BLOCKS = {"rows": 1, "rows of some": 8 * 40 * 20, "heads": 8 * 40 * 100, "sequences": 8 * 40**2 * 9}


def products(problem, model, parameters):
    theta, _ = model.split(problem, parameters)
    found = Features(problem, model, theta)
    width = found.layout.features
    real = torch.cat([b.weights.flatten() for b in problem.batches])[:, None] > 0
    u, du = (normal(len(real), width, seed=s) * real for s in (1, 2))
    direction = normal(theta.numel(), seed=3)
    results = [found.columns[:, :width] * real, found.jvp(direction) * real, found.vjp(u)]
    results.append(found.vjp_derivative(direction, u, du))
    results += [g.flatten() for part in found.row_gradients(u) for g in part]
    # Recomputation must not have spoilt anything that a second round needs.
    return [r.clone() for r in (*results, found.vjp(u))]


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("size", BLOCKS)
@pytest.mark.parametrize("case", LONG)
@pytest.mark.parametrize("model", MODELS)
def test_blocks_and_recomputation_change_nothing(monkeypatch, model, case, size, kept):
    t = Twin(LONG[case], MODELS[model])
    problem, parameters = t.case.problem(), t.random(50)
    expected = products(problem, t.model, parameters)
    monkeypatch.setattr(attention, "BLOCK_BYTES", BLOCKS[size])
    if not kept:
        monkeypatch.setattr(features, "CACHE_BYTES", 0)
    found = products(problem, t.model, parameters)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 1), (True, 9)])
@pytest.mark.parametrize("shape", [(3, 2, 2, 40, 33), (1, 4, 1, 7, 7), (5, 1, 3, 17, 90)])
@pytest.mark.parametrize("room", [1, 700, 3000, 10**4, 10**9])
def test_blocks_cover_each_entry_once(monkeypatch, shape, room, causal, window):
    b, g, _, n, m = shape
    m = n if causal else m
    monkeypatch.setattr(attention, "BLOCK_BYTES", 8 * room)
    count = torch.zeros(b, g, n, m)
    for k in plan_blocks((b, g, shape[2], n, m), 8, causal, window):
        count[k.b0 : k.b1, k.g0 : k.g1, k.n0 : k.n1, k.m0 : k.m1] += 1
    if causal:
        seen = torch.ones(n, m).tril().bool()
        seen &= True if window is None else torch.ones(n, m).triu(1 - window).bool()
        assert bool((count[..., seen] == 1).all())
        assert bool((count <= 1).all())
    else:
        assert bool((count == 1).all())


def test_memory_is_not_kept_without_products():
    t, problem, _, theta, _, found = made("cross", "heads 2")
    bare = Features(problem, t.model, theta, products=False)
    assert bare.both.shape == bare.columns.shape
    assert relative(bare.columns, found.columns) < 1e-14
