"""Starts from the original's weights: exact where nothing is lost, and against dense twins."""

import dataclasses
import itertools

import pytest
import torch

from attnreg.models import Features, MultiHead
from attnreg.models.rotary import Rotary
from attnreg.problem import AttentionProblem
from attnreg.readout import NormalEquations
from attnreg.reduction import grouping
from attnreg.reduction.headwise import split_heads
from attnreg.reduction.starts import best_start, starts
from tests.twins import normal

WIDTH, OUT = 10, 9
LOSSLESS = 1e-10  # float64 rounding, magnified by the condition of a handful of random features
FREQUENCIES = (1.0, 0.3, 0.05)


def turning(frequencies, **options):
    return Rotary(tuple(frequencies), **options)


def layer(heads, kv_heads, width, v_width=None, kind="bias"):
    """A description: with biases, without, or with rotary (on all but the last coordinates)."""
    if kind == "bias":
        return MultiHead(heads, kv_heads, width, v_width)
    if kind == "no bias":
        return MultiHead(heads, kv_heads, width, v_width, bias=False)
    pairs = (width - 2 if kind == "partial" else width) // 2
    rotary = turning(FREQUENCIES[:pairs], interleaved=kind == "partial")
    bias = kind == "partial"
    return MultiHead(heads, kv_heads, width, v_width, bias=bias, rotary=rotary)


KINDS = [
    "bias",
    "no bias",
    "rotary",
    "partial",
]


def inputs(seed=0):
    return [normal(n, WIDTH, seed=seed + n) + 0.3 for n in (9, 14, 20, 14, 17, 11)]


def problem_of(model, weights, A1=None):
    """The layer's own outputs as targets, causal."""
    A1 = inputs() if A1 is None else A1
    empty = AttentionProblem(A1, [torch.zeros(len(a), OUT).double() for a in A1], mask="causal")
    theta, readout = model.split(empty, weights)
    columns = Features(empty, model, theta, products=False).columns
    shapes = [batch.B.shape for batch in empty.batches]
    rows = (columns @ readout).split([b * n for b, n, _ in shapes])
    outputs = empty.unpad([r.view(s) for r, s in zip(rows, shapes, strict=True)])
    return AttentionProblem(A1, outputs, mask="causal")


def random_weights(model, seed=0):
    shapes = model._shapes(
        AttentionProblem(inputs(), [torch.zeros(len(a), OUT).double() for a in inputs()])
    )
    return {
        name: normal(*shape, seed=seed + i) * (0.4 if name.startswith("W") else 0.2)
        for i, (name, shape) in enumerate(shapes.items())
    }


def head(weights, name, g, width):
    """Views of one head's columns of a matrix and its bias."""
    views = [weights[f"W_{name}"][:, g * width : (g + 1) * width]]
    if f"b_{name}" in weights:
        views.append(weights[f"b_{name}"][None, g * width : (g + 1) * width])
    return views


def gauge(kind, width, seed):
    """A matrix that commutes with the turning: any, or a complex number a pair."""
    pairs = {"rotary": width // 2, "partial": (width - 2) // 2}.get(kind, 0)
    matrix = torch.zeros(width, width, dtype=torch.float64)
    rest = width - 2 * pairs
    matrix[2 * pairs :, 2 * pairs :] = normal(rest, rest, seed=seed) + torch.eye(rest)
    for p in range(pairs):
        a, b = normal(2, seed=seed + p + 1).tolist()
        first, second = (2 * p, 2 * p + 1) if kind == "partial" else (p, p + pairs)
        matrix[first, first] = matrix[second, second] = a
        matrix[first, second], matrix[second, first] = b, -b
    return matrix


def copy_head(weights, model, source, target, kind):
    """Key/value head ``target`` becomes ``source`` in another gauge."""
    for name, width, how in (("K", model.head_dim, kind), ("V", model.v_head_dim, "bias")):
        change = gauge(how, width, 10 * source + target)
        for old, new in zip(
            head(weights, name, source, width), head(weights, name, target, width), strict=True
        ):
            new.copy_(old @ change)


def duplicates(kind):
    """A problem and a layer of four key/value heads, the first the third's and the second the
    fourth's in another gauge."""
    teacher = layer(8, 4, 4, 3, kind)
    weights = random_weights(teacher)
    copy_head(weights, teacher, 0, 2, kind)
    copy_head(weights, teacher, 1, 3, kind)
    return problem_of(teacher, weights), teacher, weights


def turned(weights, model, kind):
    """The same layer in another gauge: of every key/value head, and the query heads it serves."""
    weights = {name: w.clone() for name, w in weights.items()}
    kv_heads, e, v = model.kv_heads, model.head_dim, model.v_head_dim
    repeats = model.heads // kv_heads
    for g in range(kv_heads):
        keys, values = gauge(kind, e, 50 + g), gauge("bias", v, 80 + g)
        for view in head(weights, "K", g, e):
            view.copy_(view @ keys)
        for view in head(weights, "V", g, v):
            view.copy_(view @ values)
        for h in range(g * repeats, (g + 1) * repeats):
            for view in head(weights, "Q", h, e):
                view.copy_(view @ torch.linalg.inv(keys).mT)
            rows = weights["W_O"][h * v : (h + 1) * v]
            rows.copy_(torch.linalg.solve(values, rows))
    return weights


# ---------------------------------------------------------------------- nothing is lost


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeats", [1, 2])
def test_duplicated_key_value_heads_are_found(kind, repeats):
    teacher = layer(4 * repeats, 4, 4, 3, kind)
    weights = random_weights(teacher)
    copy_head(weights, teacher, 0, 1, kind)
    copy_head(weights, teacher, 2, 3, kind)
    problem = problem_of(teacher, weights)
    start = best_start(problem, teacher, weights, layer(4 * repeats, 2, 4, 3, kind))
    assert start.tried["aligned"] < LOSSLESS
    assert start.tried["svd"] < LOSSLESS
    assert start.tried["mean"] > 1e-2
    assert start.relative_error == min(start.tried.values())


@pytest.mark.parametrize("kind", KINDS)
def test_lossless_starts_need_no_new_readout(kind):
    """The pooling's own ``W_O`` and ``b_O`` give the original's outputs already."""
    teacher = layer(4, 2, 4, 3, kind)
    weights = random_weights(teacher)
    copy_head(weights, teacher, 0, 1, kind)
    student = layer(4, 1, 4, 3, kind)
    problem = problem_of(teacher, weights)
    for name in ("aligned", "svd"):
        start = starts(problem, teacher, weights, student)[name]
        again = problem_of(student, start)
        for ours, theirs in zip(again.batches, problem.batches, strict=True):
            assert torch.allclose(ours.B, theirs.B, rtol=0, atol=LOSSLESS)


@pytest.mark.parametrize("kind", KINDS)
def test_duplicates_in_other_groups_are_clustered(kind):
    problem, teacher, weights = duplicates(kind)
    start = best_start(problem, teacher, weights, layer(8, 2, 4, 3, kind))
    assert start.tried["clustered aligned"] < LOSSLESS
    assert start.tried["clustered svd"] < LOSSLESS
    assert start.tried["aligned"] > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_low_rank_become_narrow(kind):
    """Logit maps of rank 2 (one pair or the rest where keys turn) and value maps of rank 2."""
    teacher = layer(4, 2, 4, 3, kind)
    weights = random_weights(teacher)
    e, v = 4, 3
    for g in range(2):
        narrow = torch.diag(torch.tensor([1.0, 0.0, 1.0, 0.0]).double())  # the first pair
        if kind == "partial":
            narrow = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]).double())
        keys = (
            narrow if kind in ("rotary", "partial") else normal(e, 2, seed=g) @ normal(2, e, seed=g)
        )
        values = normal(v, 2, seed=9 + g) @ normal(2, v, seed=10 + g)
        for view in head(weights, "K", g, e):
            view.copy_(view @ keys)
        for view in head(weights, "V", g, v):
            view.copy_(view @ values)
    student = layer(4, 2, 2, 2, "rotary" if kind == "partial" else kind)
    if kind == "partial":
        student = dataclasses.replace(student, bias=True, rotary=turning(FREQUENCIES[:1]))
    problem = problem_of(teacher, weights)
    start = best_start(problem, teacher, weights, student)
    assert start.relative_error < LOSSLESS
    assert all(e < LOSSLESS for name, e in start.tried.items() if name.startswith("svd"))


@pytest.mark.parametrize("kind", KINDS)
def test_duplicated_query_heads_are_dropped(kind):
    teacher = layer(4, 2, 4, 3, kind)
    weights = random_weights(teacher)
    for source, target in ((0, 1), (3, 2)):
        for old, new in zip(
            head(weights, "Q", source, 4), head(weights, "Q", target, 4), strict=True
        ):
            new.copy_(old)
    problem = problem_of(teacher, weights)
    start = best_start(problem, teacher, weights, layer(2, 2, 4, 3, kind))
    assert start.name == "dropped"
    assert start.relative_error < LOSSLESS


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_without_effect_is_dropped_with_its_query_heads(kind):
    teacher = layer(8, 4, 4, 3, kind)
    weights = random_weights(teacher)
    weights["W_O"][2 * 3 : 4 * 3] = 0.0  # query heads 2 and 3, of key/value head 1
    problem = problem_of(teacher, weights)
    student = layer(6, 3, 4, 3, kind)
    assert best_start(problem, teacher, weights, student).tried["dropped"] < LOSSLESS
    made = starts(problem, teacher, weights, student)["dropped"]
    for g, kept in enumerate((0, 2, 3)):
        # Turning keys go through complex numbers times and by the rotary factor of 1.
        assert torch.equal(head(made, "K", g, 4)[0], head(weights, "K", kept, 4)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_shape_is_the_original(kind):
    teacher = layer(4, 2, 4, 3, kind)
    weights = random_weights(teacher)
    made = starts(problem_of(teacher, weights), teacher, weights, teacher)
    assert list(made) == ["original"]
    for name, value in weights.items():
        assert torch.allclose(made["original"][name], value, rtol=1e-15, atol=1e-15)


# ---------------------------------------------------------------------- twins and invariances


@pytest.mark.parametrize("kind", KINDS)
def test_gauge_changes_no_error(kind):
    teacher = layer(8, 4, 4, 3, kind)
    weights = random_weights(teacher)
    problem = problem_of(teacher, weights)
    student = layer(6, 2, 4, 3, kind)
    plain = best_start(problem, teacher, weights, student)
    other = best_start(problem, teacher, turned(weights, teacher, kind), student)
    for name, error in plain.tried.items():
        if name.split()[-1] in ("aligned", "svd"):
            assert other.tried[name] == pytest.approx(error, rel=1e-6)
    assert plain.relative_error <= min(plain.tried.values())


def test_contributions_are_the_increase_of_the_least_error():
    teacher = layer(4, 4, 3, 2, "bias")
    weights = random_weights(teacher)
    problem = problem_of(teacher, weights, inputs())
    noisy = problem.replace(B=[b + normal(*b.shape, seed=3) for b in problem._sequences.B])
    theta, _ = teacher.split(noisy, weights)
    columns = Features(noisy, teacher, theta, products=False).columns
    targets = torch.cat([b.B.flatten(0, 1) for b in noisy.batches])
    rows = torch.cat([b.weights.flatten() for b in noisy.batches])[:, None]

    def loss(heads):
        own = [c for h in heads for c in range(2 * h, 2 * h + 2)]
        chosen = columns[:, [*own, 8]]
        _, r = NormalEquations(rows * chosen, chosen, None, 0.0, 0).solve(targets, None)
        return float((rows * r.square()).sum())

    kept = list(range(4))
    while len(kept) > 2:  # the greedy order, by solving every problem
        kept = min(([h for h in kept if h != k] for k in kept), key=loss)
    found = grouping.Contributions(noisy, teacher, weights)
    assert found.kept([(h,) for h in range(4)], [0] * 4, {0: 2}) == kept
    inverse = torch.linalg.inv(found._moments)
    cost = found._cost(inverse, inverse @ found._right, (1,))
    # The ridge of 1e-9 is the only difference.
    assert cost == pytest.approx(loss([0, 2, 3]) - loss(range(4)), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_clusters_against_all_partitions(seed):
    """No worse than neighbours together, and within 50 % of the best of the 15 partitions."""
    distance = normal(6, 6, seed=seed).square()
    distance = distance + distance.mT
    distance.fill_diagonal_(0.0)

    def cost(parts):
        return sum(float(distance[list(p)][:, list(p)].sum()) for p in parts)

    every = {
        tuple(sorted(tuple(sorted(order[i : i + 2])) for i in (0, 2, 4)))
        for order in itertools.permutations(range(6))
    }
    assert len(every) == 15
    best = min(every, key=cost)
    found = grouping.clusters(distance, 3)
    assert cost(found) <= cost([(0, 1), (2, 3), (4, 5)])
    assert cost(found) == pytest.approx(cost(best), rel=0.5)
    assert sorted(h for part in found for h in part) == list(range(6))


def test_distances_are_the_lost_shares():
    teacher = layer(4, 4, 3, 2, "no bias")
    weights = random_weights(teacher)
    problem = problem_of(teacher, weights)
    found = grouping.distances(split_heads(problem, teacher, weights))
    scale = problem.total_weight**-0.5 * sum(m for _, m in problem.lengths) ** -0.5
    a1 = torch.cat(inputs())
    a2 = torch.cat([a - a.mean(0) for a in inputs()])
    keys, values = [], []
    for h in range(4):
        q, k = head(weights, "Q", h, 3)[0] * 3**-0.5, head(weights, "K", h, 3)[0]
        keys.append(a1 @ q @ k.mT @ a2.mT * scale)
        values.append(a1 @ head(weights, "V", h, 2)[0] @ weights["W_O"][2 * h : 2 * h + 2])
    logits = sum(x.square().sum() for x in keys)
    outputs = sum(x.square().sum() for x in values)
    lost = torch.linalg.svdvals(torch.cat([keys[1], keys[3]]))[3:].square().sum() / logits
    lost += torch.linalg.svdvals(torch.cat([values[1], values[3]], 1))[2:].square().sum() / outputs
    assert float(found[1, 3]) == pytest.approx(float(lost), rel=1e-8)


# ---------------------------------------------------------------------- refusals and notes


def test_more_of_something_is_refused():
    teacher = layer(4, 2, 4, 3)
    weights = random_weights(teacher)
    problem = problem_of(teacher, weights)
    with pytest.raises(ValueError, match="student has kv_heads=4 and the original 2"):
        starts(problem, teacher, weights, layer(4, 4, 4, 3))
    with pytest.raises(ValueError, match="bias of query and key and value and output"):
        starts(problem, teacher, weights, layer(4, 1, 4, 3, "no bias"))


def test_no_start_names_every_reason():
    teacher = layer(12, 6, 4, 3)
    weights = random_weights(teacher)
    with pytest.raises(ValueError, match=r"no start leads .* serve 2 query heads"):
        starts(problem_of(teacher, weights), teacher, weights, layer(12, 4, 4, 3))


def test_a_start_that_fails_is_noted():
    teacher = layer(2, 2, 3, 2)
    weights = random_weights(teacher)
    for view in head(weights, "K", 1, 3):
        view[:, 2] = view[:, 1]
    problem = problem_of(teacher, weights)
    start = best_start(problem, teacher, weights, layer(2, 1, 3, 2))
    assert "aligned" not in start.tried
    assert "linearly dependent columns" in start.notes["aligned"]
    assert "svd" in start.tried


def test_float32_and_determinism():
    teacher = layer(4, 4, 3, 2)
    weights = random_weights(teacher)
    problem = problem_of(teacher, weights).to(torch.float32)
    student = layer(4, 2, 3, 2)
    one, two = (best_start(problem, teacher, weights, student) for _ in range(2))
    assert one.tried == two.tried
    assert one.name == two.name
    for name, value in one.weights.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, two.weights[name])
    made = starts(problem, teacher, weights, student)[one.name]
    for name, value in made.items():
        assert torch.equal(value, one.unsolved[name])
        assert (name in ("W_O", "b_O")) != torch.equal(value, one.weights[name])


def test_norms_leave_mean_first_and_dropping():
    """Under norms dropping is exact still, and what needs a gauge is noted."""
    teacher = MultiHead(8, 4, 4, 3, bias=False, rotary=turning((1.0, 0.3)), norm_eps=1e-6)
    weights = random_weights(teacher)
    weights["W_O"][2 * 3 : 4 * 3] = 0.0
    problem = problem_of(teacher, weights)
    start = best_start(problem, teacher, weights, dataclasses.replace(teacher, heads=6, kv_heads=3))
    assert start.tried["dropped"] < LOSSLESS
    start = best_start(problem, teacher, weights, dataclasses.replace(teacher, kv_heads=2))
    assert {"mean", "first"} <= set(start.tried)
    assert "no gauge" in start.notes["aligned"]
    assert "no gauge" in start.notes["svd"]
    assert torch.equal(start.weights["g_K"], weights["g_K"])
