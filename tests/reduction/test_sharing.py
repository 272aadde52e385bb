"""What pairs of key/value heads lose: against each pair alone, and where nothing is lost."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from attnreg.models import Features, MultiHead
from attnreg.problem import AttentionProblem
from attnreg.reduction import sharing, starts
from attnreg.reduction.grouping import clusters
from attnreg.reduction.pooled_layer import grouped_start
from attnreg.reduction.sharing import (
    PairFits,
    leading_directions,
    pair_losses,
    sharing_losses,
)
from attnreg.solvers import minibatches
from tests.reduction.test_student_starts import (
    KINDS,
    LOSSLESS,
    duplicates,
    inputs,
    layer,
    problem_of,
    random_weights,
    turned,
)
from tests.twins import normal

PAIRS = tuple(combinations(range(4), 2))


def students(kind, repeats):
    """A layer of all pairs with random weights, and the query heads of the original of each."""
    model = layer(2 * repeats * len(PAIRS), len(PAIRS), 4, 3, kind)
    members = [tuple(g * repeats + r for g in pair for r in range(repeats)) for pair in PAIRS]
    return model, random_weights(model, seed=100), members


def case(kind="bias", repeats=1):
    """What `sharing_losses` takes, of a random layer of four key/value heads."""
    teacher = layer(4 * repeats, 4, 4, 3, kind)
    weights = random_weights(teacher)
    model, start, members = students(kind, repeats)
    return problem_of(teacher, weights), (teacher, weights), (model, start), members


def one(model, weights, number, count):
    """A pair alone."""
    heads = model.heads // count
    alone = MultiHead(heads, 1, 4, 3, bias=model.bias, rotary=model.rotary)
    cut = {}
    for name, width in (("Q", 4 * heads), ("K", 4), ("V", 3)):
        own = slice(number * width, (number + 1) * width)
        cut[f"W_{name}"] = weights[f"W_{name}"][:, own]
        if f"b_{name}" in weights:
            cut[f"b_{name}"] = weights[f"b_{name}"][own]
    cut["W_O"] = weights["W_O"][number * 3 * heads : (number + 1) * 3 * heads]
    return alone, cut | {"b_O": weights["b_O"]} if "b_O" in weights else cut


def columns_of(problem, model, weights):
    theta, _ = model.split(problem, weights)
    return Features(problem, model, theta, products=False).columns


def losses_alone(problem, original, pairs, members):
    """Least squares of every pair on its own, by the singular value decomposition."""
    (teacher, weights), (model, start) = original, pairs
    rows = torch.cat([batch.weights.flatten() for batch in problem.batches]).sqrt()[:, None]
    width = 3
    given = columns_of(problem, teacher, weights)
    losses = []
    for number, heads in enumerate(members):
        own = [h * width + i for h in heads for i in range(width)]
        targets = rows * (given[:, own] @ weights["W_O"][own])
        features = rows * columns_of(problem, *one(model, start, number, len(members)))
        found = torch.linalg.lstsq(features, targets, driver="gelsd").solution
        losses.append((features @ found - targets).square().sum())
    return torch.stack(losses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeats", [1, 2])
def test_losses_without_steps_are_those_of_each_pair_alone(kind, repeats):
    given = case(kind, repeats)
    found, expected = sharing_losses(*given, steps=0), losses_alone(*given)
    assert float(expected.min()) > 1e-3
    # The damping of 1e-9 that keeps the equations solvable is the larger part of the difference.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_losses(kind):
    fits = PairFits(*case(kind))
    batch = fits._batches[0]
    gradient = fits.gradient(batch, 1.0)
    readout = sharing._solved(fits._gram, fits._right, sharing.DAMPING)
    theta, direction = fits.theta, normal(*fits.theta.shape, seed=3)

    def loss(step):
        moved = theta + step * direction
        features = minibatches.features_of(fits._objective, batch, moved)
        own, targets = fits._sides(features, batch)
        return float((batch.weights.reshape(-1, 1) * (own @ readout - targets).square()).sum())

    # Of central differences of 1e-5 the second-order remainder and the rounding are below 1e-9.
    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert slope == pytest.approx(float(gradient @ direction), rel=1e-7)


def test_pairs_that_are_fitted_in_parts_have_the_same_losses(monkeypatch):
    monkeypatch.setattr(sharing, "LONGEST", 1.0)  # five steps as long as those of many
    given = case()
    together, moved = (sharing_losses(*given, steps=steps) for steps in (0, 5))
    monkeypatch.setattr(sharing, "COLUMNS", 13)  # two pairs of two heads of 3 at once
    torch.testing.assert_close(sharing_losses(*given, steps=0), together, rtol=1e-12, atol=0.0)
    # The length of a step is a share of the size of all heads at once.
    torch.testing.assert_close(sharing_losses(*given, steps=5), moved, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_lower_the_losses(kind):
    given = case(kind)
    before, after = (sharing_losses(*given, steps=steps) for steps in (0, 60))
    assert bool((after < 0.9 * before).all())


def test_a_bound_on_the_time_takes_no_steps_where_it_is_short():
    given = case()
    expected = sharing_losses(*given, steps=0, hurried=True)
    assert bool((expected > 0.0).all())
    found = sharing_losses(*given, max_seconds=1e-9, hurried=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    # The starts are looked at on all mini-batches, in a hurry the ends on every other.
    found = sharing_losses(*given, max_seconds=1e-9)
    torch.testing.assert_close(found, sharing_losses(*given, steps=0), rtol=1e-12, atol=0.0)


@pytest.mark.usefixtures("small_batches")
def test_losses_of_every_other_mini_batch_are_those_of_its_rows():
    problem, original, pairs, members = case()
    fits = PairFits(problem, original, pairs, members)
    kept = fits._batches
    assert len(kept) > 3
    found, whole = fits.losses(every=2), fits.losses()
    fits._batches = kept[::2]
    torch.testing.assert_close(found, fits.losses(), rtol=1e-12, atol=0.0)
    assert bool((found < whole).all())


@pytest.mark.parametrize("bound", [None, 30.0, 0.05])
@pytest.mark.parametrize("kind", KINDS)
def test_duplicates_lose_nothing_and_share_a_head(kind, bound):
    problem, teacher, weights = duplicates(kind)
    student = layer(8, 2, 4, 3, kind)
    losses = pair_losses(problem, teacher, weights, student, max_seconds=bound)
    assert clusters(losses, 2) == [(0, 2), (1, 3)]
    others = [float(losses[a, b]) for a, b in PAIRS if (a, b) not in ((0, 2), (1, 3))]
    # Their start is exact; END_DAMPING leaves 1e-9 of the targets.
    assert max(float(losses[0, 2]), float(losses[1, 3])) < 1e-6 * min(others)
    start = starts.best_start(problem, teacher, weights, student, pairs=problem)
    assert start.tried["fitted svd"] < LOSSLESS
    assert start.name in ("fitted svd", "fitted aligned")


def test_the_start_is_of_the_fitted_groups_even_where_another_is_ahead():
    teacher = layer(6, 6, 4, 3)
    weights = random_weights(teacher)
    problem, student = problem_of(teacher, weights), layer(6, 3, 4, 3)
    plain = starts.best_start(problem, teacher, weights, student)
    start = starts.best_start(problem, teacher, weights, student, pairs=problem)
    fitted = {name: e for name, e in start.tried.items() if name.startswith("fitted")}
    assert start.name == min(fitted, key=fitted.get)
    assert {name: e for name, e in start.tried.items() if name not in fitted} == plain.tried


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_ones_own_choice_are_those_of_the_clusters(kind):
    problem, teacher, weights = duplicates(kind)
    student = layer(8, 2, 4, 3, kind)
    found = grouped_start(problem, teacher, weights, student, [(0, 2), (1, 3)])
    expected = starts.starts(problem, teacher, weights, student)["clustered svd"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_nothing_is_fitted_where_there_is_no_choice(monkeypatch):
    monkeypatch.setattr(starts, "pair_losses", lambda *given, **bound: pytest.fail("fitted"))
    teacher = layer(4, 2, 4, 3)
    weights = random_weights(teacher)
    problem = problem_of(teacher, weights)
    for student in (layer(4, 1, 4, 3), layer(2, 2, 4, 3), layer(4, 2, 2, 3)):
        starts.best_start(problem, teacher, weights, student, pairs=problem)


def test_gauge_changes_no_loss_of_the_start(monkeypatch):
    monkeypatch.setattr(
        sharing, "sharing_losses", lambda *given, **bound: sharing_losses(*given, steps=0)
    )
    teacher, student = layer(8, 4, 4, 3), layer(8, 2, 4, 3)
    weights = random_weights(teacher)
    problem = problem_of(teacher, weights)
    found = [
        pair_losses(problem, teacher, given, student)
        for given in (weights, turned(weights, teacher, "bias"))
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-9)


def test_the_time_bounds_the_steps(monkeypatch):
    fits = PairFits(*case())
    clock, rates = iter(range(100)), []
    timer = SimpleNamespace(perf_counter=lambda: float(next(clock)))
    monkeypatch.setattr(sharing, "time", timer)
    monkeypatch.setattr(fits._steepest, "move", lambda theta, g, rate: rates.append(rate))
    fits.run(1000, 8.0)
    # One tick a step: of 8 s 1 to 7 are gone at the seven steps that are taken.
    left = [1 - second / 8 for second in range(1, 8)]
    warm = [sharing.FASTER * min(1.0, (step + 1) / sharing.WARM_UP) for step in range(7)]
    # Few for STEPS: each but the first, when nothing is known, is as long as they may be.
    warm[1:] = [sharing.LONGEST * rate for rate in warm[1:]]
    assert rates == pytest.approx([a * b for a, b in zip(left, warm, strict=True)])


def test_few_steps_are_longer(monkeypatch):
    fits, rates = PairFits(*case()), []
    monkeypatch.setattr(fits._steepest, "move", lambda theta, g, rate: rates.append(rate))
    fits.run(36)
    left = [1 - step / 36 for step in range(36)]
    warm = [min(1.0, (step + 1) / sharing.WARM_UP) for step in range(36)]
    longer = [sharing.FASTER * (sharing.STEPS / 36 if step else 1.0) ** 0.5 for step in range(36)]
    assert rates == pytest.approx([a * b * c for a, b, c in zip(left, warm, longer, strict=True)])


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_losses_in_single_precision_are_those_in_double(offset):
    """Inputs with a common offset have features that are nearly one: their sums are float64."""
    teacher, student = layer(4, 4, 4, 3), layer(4, 2, 4, 3)
    weights = random_weights(teacher)
    A1 = [a * torch.logspace(0, -1, a.shape[1]).double() + offset for a in inputs()]
    targets = [normal(len(a), 9, seed=7) for a in A1]
    problem = AttentionProblem(A1, targets)
    single = AttentionProblem([a.float() for a in A1], [b.float() for b in targets])
    given = {name: w.float() for name, w in weights.items()}
    no_steps = {"max_seconds": 0.0}
    expected = pair_losses(problem, teacher, weights, student, **no_steps)
    found = pair_losses(single, teacher, given, student, **no_steps)
    # Rounding of the inputs by 6e-8 of an offset of 30 is 2e-6 of what varies.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 * float(expected.max()))


def test_widths_that_follow_from_the_inputs_are_kept_when_those_are_cut():
    explicit, implied = MultiHead(5, 5, 2, 2), MultiHead(5)
    weights = random_weights(explicit)
    problem = problem_of(explicit, weights)
    expected = pair_losses(problem, explicit, weights, MultiHead(5, 1, 2, 2))
    assert torch.equal(pair_losses(problem, implied, weights, MultiHead(5, 1)), expected)
    assert bool((expected + torch.eye(5) > 0.0).all())


def test_norms_of_queries_and_keys_begin_at_the_mean():
    teacher = MultiHead(4, 4, 4, 3, norm_eps=1e-6)
    weights = random_weights(teacher)
    problem = problem_of(teacher, weights)
    student = MultiHead(4, 2, 4, 3, norm_eps=1e-6)
    start = starts.best_start(problem, teacher, weights, student, pairs=problem)
    # Of the ways to pool the two that need a gauge are left out.
    assert {name for name in start.tried if name.startswith("fitted")} == {
        "fitted mean",
        "fitted first",
    }
    assert start.name in ("fitted mean", "fitted first")


def test_a_layer_of_zeros_is_grouped_too():
    teacher, student = layer(6, 6, 4, 3), layer(6, 2, 4, 3)
    weights = {name: 0.0 * w for name, w in random_weights(teacher).items()}
    problem = problem_of(teacher, weights)
    assert torch.equal(pair_losses(problem, teacher, weights, student), torch.zeros(6, 6).double())


@pytest.mark.parametrize("cross", [False, True])
def test_leading_directions_keep_the_layer_and_drop_the_rest(cross):
    teacher = layer(4, 2, 4, 3)
    weights = random_weights(teacher)
    A1 = inputs()
    others = {"A2": inputs(5), "A3": inputs(6)} if cross else {}
    problem = AttentionProblem(A1, [normal(len(a), 9, seed=7) for a in A1], **others)
    whole, turned_weights = leading_directions(problem, teacher, weights, 99)
    torch.testing.assert_close(
        columns_of(whole, teacher, turned_weights), columns_of(problem, teacher, weights)
    )
    few, _ = leading_directions(problem, teacher, weights, 3)
    values = torch.linalg.eigvalsh(problem.gram_key).flip(0)[:3]
    torch.testing.assert_close(few.gram_key, torch.diag(values), rtol=1e-9, atol=1e-9)
    assert few.self_attention is not cross
