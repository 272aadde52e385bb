"""What a problem holds, what it computes from it, and that copies keep all of it."""

import math

import numpy as np
import pytest
import torch

from attnreg.problem import AttentionProblem, Batch
from tests.problems import (
    PROBLEMS,
    SETTINGS,
    assert_same,
    batch,
    cross,
    normal,
    positive,
    ragged,
    single,
    visible,
)


@pytest.fixture(params=PROBLEMS, name="problem")
def any_problem(request):
    return PROBLEMS[request.param]()


# -- what is held


def test_sizes_and_defaults():
    problem = cross()
    assert (problem.d_query, problem.d_key, problem.d_value, problem.d_out) == (3, 4, 1, 2)
    assert (problem.n_sequences, problem.n_rows, problem.n_keys) == (3, 12, 14)
    assert problem.lengths == ((5, 4), (2, 6), (5, 4))
    assert (problem.scale, problem.ridge_x, problem.ridge_y) == (None, 0.0, 0.0)
    assert dict(problem.center) == {}
    assert (problem.dtype, problem.device) == (torch.float64, torch.device("cpu"))
    assert not problem.self_attention
    assert not problem.causal


def test_inputs_that_are_equal_are_held_once():
    a, b = normal(5, 3), normal(5, 2)
    for problem in (
        AttentionProblem(a, b),
        AttentionProblem(a, b, a),
        AttentionProblem(a, b, a.clone(), a.numpy()),
    ):
        assert problem.self_attention
        held = problem.batches[0]
        assert held.A1 is held.A2 is held.A3
    keys = normal(4, 6)
    held = AttentionProblem(a, b, keys, keys.clone()).batches[0]
    assert held.A3 is held.A2
    assert held.A2 is not held.A1


def test_missing_values_are_the_queries_where_they_fit():
    held = AttentionProblem(normal(5, 3), normal(5, 2), normal(5, 6)).batches[0]
    assert held.A3 is held.A1


def test_numpy_and_torch_give_the_same_problem():
    a, b, mask = normal(4, 5, 3), normal(4, 5, 2), visible(5, 5)
    found = AttentionProblem(a.numpy(), b.numpy(), mask=mask.numpy())
    assert_same(found, AttentionProblem(a, b, mask=mask))


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.astype(a.dtype.newbyteorder(">")),
        lambda a: a[::-1][::-1],
        np.asfortranarray,
        lambda a: a.view(np.ndarray),
    ],
    ids=["big endian", "strides", "Fortran order", "view"],
)
def test_any_memory_layout(change):
    a, b = normal(5, 3).numpy(), normal(5, 2).numpy()
    assert AttentionProblem(change(a), b).digest() == AttentionProblem(a, b).digest()


def test_read_only_arrays_and_parameters_are_taken():
    a, b = normal(5, 3).numpy(), torch.nn.Parameter(normal(5, 2))
    a.flags.writeable = False
    held = AttentionProblem(a, b).batches[0]
    assert not held.B.requires_grad
    assert held.A1.is_contiguous()


@pytest.mark.parametrize("convert", [lambda t: t, lambda t: t.numpy()], ids=["torch", "numpy"])
def test_later_changes_of_the_inputs_do_not_reach_the_problem(convert):
    a, b, weights, x0 = normal(5, 3), normal(5, 2), positive(5), normal(3, 3)
    mask = normal(5, 5)
    problem = AttentionProblem(
        convert(a), convert(b), weights=convert(weights), mask=convert(mask), center={"X": x0}
    )
    digest = problem.replace().digest()
    for tensor in (a, b, weights, mask, x0):
        tensor.zero_()
    assert problem.digest() == digest


def test_frozen():
    problem = single(**SETTINGS)
    with pytest.raises(AttributeError, match=r"scale cannot be set: .*; use replace\(\)"):
        problem.scale = 2.0
    with pytest.raises(AttributeError, match="ridge_x cannot be deleted"):
        del problem.ridge_x
    with pytest.raises(TypeError, match="does not support item assignment"):
        problem.center["X"] = None
    with pytest.raises(AttributeError, match="cannot assign"):
        problem.batches[0].A1 = None
    assert isinstance(problem.batches[0], Batch)


def test_repr_is_one_line(problem):
    assert repr(problem).startswith("AttentionProblem(")
    assert "\n" not in repr(problem)


def test_repr_tells_what_matters():
    assert repr(ragged(mask="causal", **SETTINGS)) == (
        "AttentionProblem(4 sequence(s) of 2 to 7 queries and 2 to 7 keys, d_query=3, d_key=3, "
        "d_value=3, d_out=2, float64 on cpu, causal, scale=0.3, ridge_x=0.001, ridge_y=1e-300, "
        "center of X and Y)"
    )


# -- masks


def test_boolean_and_additive_masks_are_the_same_problem():
    mask = visible(5, 5)
    additive = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~mask, -math.inf)
    assert_same(single(mask=mask), single(mask=additive))
    assert torch.equal(single(mask=mask).batches[0].bias[0], additive)


def test_mask_in_a_list_for_each_sequence():
    masks = [visible(5, 5, seed=i) for i in range(4)]
    assert_same(batch(mask=masks), batch(mask=torch.stack(masks)))


def test_causal_combines_with_a_mask():
    mask = visible(5, 5)
    for given in (("causal", mask), ["causal", mask], (mask, "causal")):
        problem = single(mask=given)
        assert problem.causal
        assert torch.equal(problem.batches[0].bias[0] == 0, mask)
    problem = ragged(mask=("causal", [visible(n, n) for n in (5, 2, 5, 7)]))
    assert problem.causal


@pytest.mark.parametrize("mask", [torch.ones(5, 5, dtype=torch.bool), torch.zeros(5, 5).double()])
def test_mask_that_adds_nothing_is_dropped(mask):
    assert single(mask=mask).batches[0].bias is None
    assert single(mask=mask).digest() == single().digest()


def test_huge_negative_mask_values_are_not_forbidden():
    lowest = torch.finfo(torch.float64).min
    bias = single(mask=torch.full((5, 5), lowest, dtype=torch.float64)).batches[0].bias
    assert (bias == lowest).all()


def test_mask_is_given_back_as_an_argument(problem):
    assert_same(problem.replace(mask=problem.mask), problem)


def test_mask_without_arrays_is_given_back_as_it_was():
    assert single().mask is None
    assert single(mask="causal").mask == "causal"
    word, array = single(mask=("causal", visible(5, 5))).mask
    assert word == "causal"
    assert torch.equal(array == 0, visible(5, 5))


# -- pooled second moments and errors


def test_grams_are_sums_over_the_sequences():
    sizes = ((5, 4), (2, 6), (5, 4))
    queries = [normal(n, 3) for n, _ in sizes]
    keys = [normal(m, 4, seed=2) for _, m in sizes]
    values = [normal(m, 1, seed=3) for _, m in sizes]
    weights = [positive(n) for n, _ in sizes]
    problem = cross(weights=weights)
    weighted = zip(queries, weights, strict=True)
    expected = {
        "gram_query": sum(a.T @ torch.diag(w) @ a for a, w in weighted),
        "gram_key": sum(a.T @ a for a in keys),
        "gram_value": sum(a.T @ a for a in values),
        "gram_key_centered": sum((a - a.mean(0)).T @ (a - a.mean(0)) for a in keys),
    }
    for name, gram in expected.items():
        torch.testing.assert_close(getattr(problem, name), gram, rtol=1e-13, atol=1e-13)
    means = {
        "query": sum((w[:, None] * a**2).sum() for w, a in zip(weights, queries, strict=True))
        / (3 * sum(w.sum() for w in weights)),
        "key": torch.cat(keys).square().mean(),
        "value": torch.cat(values).square().mean(),
    }
    for name, mean in means.items():
        assert problem.input_sizes[name] == pytest.approx(float(mean) ** 0.5, rel=1e-13)


def test_grams_of_float32_are_accumulated_in_float64():
    a, b = normal(1000, 4, dtype=torch.float32) + 100, normal(1000, 1, dtype=torch.float32)
    problem = AttentionProblem(a, b)
    exact = a.double().T @ a.double()
    torch.testing.assert_close(problem.gram_key, exact, rtol=1e-14, atol=0)
    centered = a.double() - a.double().mean(0)
    torch.testing.assert_close(
        problem.gram_key_centered, centered.T @ centered, rtol=1e-12, atol=1e-10
    )
    assert problem.gram_value is problem.gram_key


def test_grams_over_blocks_of_rows(monkeypatch):
    expected = cross(weights=[positive(n) for n in (5, 2, 5)]).gram_query
    monkeypatch.setattr("attnreg.moments._BLOCK", 3)
    found = cross(weights=[positive(n) for n in (5, 2, 5)]).gram_query
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_weight_two_is_the_row_twice():
    a, b, keys = normal(3, 2), normal(3, 4), normal(5, 2)
    weights = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    rows = [0, 0, 1]
    weighted = AttentionProblem(a, b, keys, keys, weights=weights)
    repeated = AttentionProblem(a[rows], b[rows], keys, keys)
    assert weighted.total_weight == repeated.total_weight == 3.0
    assert torch.equal(weighted.gram_key, repeated.gram_key)
    torch.testing.assert_close(weighted.gram_query, repeated.gram_query, rtol=1e-14, atol=0)
    assert math.isclose(weighted.target_norm_squared, repeated.target_norm_squared, rel_tol=1e-14)


def test_total_weight(problem):
    expected = sum(float(batch.weights.double().sum()) for batch in problem.batches)
    assert math.isclose(problem.total_weight, expected, rel_tol=1e-14)
    assert type(problem.total_weight) is float


def test_total_weight_without_weights_is_the_number_of_rows():
    assert cross().total_weight == cross().n_rows == 12


def test_total_weight_of_float32_is_summed_in_float64():
    weights = torch.full((1 << 20,), 0.1)
    problem = AttentionProblem(torch.ones(1 << 20, 1), torch.ones(1 << 20, 1), weights=weights)
    assert math.isclose(problem.total_weight, (1 << 20) * float(weights[0]), rel_tol=1e-12)


def test_target_norm_is_about_the_weighted_mean_over_all_rows():
    b = [normal(n, 2) for n in (5, 2, 5, 7)]
    weights = [positive(n) for n in (5, 2, 5, 7)]
    rows, w = torch.cat(b), torch.cat(weights)[:, None]
    mean = (w * rows).sum(0) / w.sum()
    expected = float((w * (rows - mean) ** 2).sum())
    problem = ragged(weights=weights)
    assert math.isclose(problem.target_norm_squared, expected, rel_tol=1e-13)
    assert math.isclose(problem.relative_error(4 * expected), 2.0, rel_tol=1e-13)
    assert isinstance(problem.target_norm_squared, float)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -1e-8, 1e4])
def test_constant_target_is_measured_by_its_size(dtype, value):
    b = torch.full((4, 7, 3), value, dtype=dtype)
    problem = AttentionProblem(normal(4, 7, 2, dtype=dtype), b)
    assert problem.target_norm_squared == 0.0
    size = float(b.double().square().sum())
    assert math.isclose(problem.relative_error(size), 1.0, rel_tol=1e-12)


def test_target_that_is_constant_where_it_counts():
    b = torch.tensor([[5.0], [0.1], [0.1], [0.1]], dtype=torch.float64)
    weights = torch.tensor([0.0, 0.3, 0.7, 0.9], dtype=torch.float64)
    assert AttentionProblem(normal(4, 2), b, weights=weights).target_norm_squared == 0.0


def test_one_row_is_measured_by_its_size():
    problem = AttentionProblem(normal(1, 2), torch.full((1, 1), 3.0, dtype=torch.float64))
    assert problem.relative_error(9.0) == 1.0


def test_zero_target_is_measured_by_one():
    problem = AttentionProblem(normal(5, 2), torch.zeros(5, 2, dtype=torch.float64))
    assert problem.relative_error(4.0) == 2.0
    assert problem.relative_error(0.0) == 0.0


def test_relative_error_of_a_loss_rounded_below_zero_and_of_nan():
    assert single().relative_error(-1e-18) == 0.0
    assert math.isnan(single().relative_error(math.nan))


# -- other problems


@pytest.mark.parametrize(
    ("problem", "kind"), [(single(), "single"), (batch(), "batch"), (ragged(), "list")]
)
def test_unpad_restores_the_structure(problem, kind):
    assert problem.structure == kind
    found = problem.unpad([b.B for b in problem.batches])
    if kind == "single":
        assert torch.equal(found, normal(5, 2))
    elif kind == "batch":
        assert torch.equal(found, normal(4, 5, 2))
    else:
        assert all(map(torch.equal, found, [normal(n, 2) for n in (5, 2, 5, 7)]))


def test_subset_of_all_is_the_same(problem):
    assert_same(problem.subset(range(problem.n_sequences)), problem)


def test_subset_of_a_list_takes_everything_along():
    weights = [positive(n, seed=n) for n in (5, 2, 5)]
    masks = [visible(n, m, seed=n) for n, m in ((5, 4), (2, 6), (5, 4))]
    found = cross(weights=weights, mask=masks, **SETTINGS).subset([1, 0])
    expected = AttentionProblem(
        [normal(n, 3) for n in (2, 5)],
        [normal(n, 2, seed=1) for n in (2, 5)],
        [normal(m, 4, seed=2) for m in (6, 4)],
        [normal(m, 1, seed=3) for m in (6, 4)],
        weights=[weights[1], weights[0]],
        mask=[masks[1], masks[0]],
        **SETTINGS,
    )
    assert_same(found, expected)


@pytest.mark.parametrize(
    "indices",
    [[2, 0], (2, 0), np.array([2, 0]), torch.tensor([2, 0]), iter([2, 0])],
    ids=["list", "tuple", "numpy", "torch", "iterator"],
)
def test_subset_of_a_batch(indices):
    expected = AttentionProblem(normal(4, 5, 3)[[2, 0]], normal(4, 5, 2)[[2, 0]])
    assert_same(batch().subset(indices), expected)


def test_subset_may_repeat_a_sequence():
    once, twice = batch().subset([1]), batch().subset([1, 1])
    torch.testing.assert_close(twice.gram_query, 2 * once.gram_query, rtol=1e-14, atol=1e-14)
    assert single().subset([0, 0]).n_sequences == 2


def test_subset_and_replace_hold_copies():
    problem = batch()
    for other in (problem.subset([0]), problem.replace(), problem.to(torch.float64)):
        other.batches[0].A1.zero_()
    assert torch.equal(problem.batches[0].A1, normal(4, 5, 3))


def test_projected_has_other_inputs_and_all_else():
    weights = [positive(n, seed=n) for n in (5, 2, 5)]
    masks = [visible(n, m, seed=n) for n, m in ((5, 4), (2, 6), (5, 4))]
    given = cross(weights=weights, mask=masks, **SETTINGS)
    matrices = normal(3, 2, seed=5), normal(4, 3, seed=6), normal(1, 1, seed=7)
    found = given.projected(*matrices)
    for name, matrix in zip(("A1", "A2", "A3"), matrices, strict=True):
        for new, old in zip(found.batches, given.batches, strict=True):
            torch.testing.assert_close(getattr(new, name), getattr(old, name) @ matrix)
    assert found.center is None or not found.center
    back = found.projected(*(torch.linalg.pinv(matrix) for matrix in matrices))
    for new, old in zip(back.batches, given.batches, strict=True):
        assert torch.equal(new.B, old.B)
        assert torch.equal(new.weights, old.weights)
        assert torch.equal(new.bias, old.bias)
    assert (found.scale, found.ridge_x, found.ridge_y) == (
        given.scale,
        given.ridge_x,
        given.ridge_y,
    )


def test_projected_inputs_that_are_one_stay_one():
    matrix = normal(3, 2, seed=5)
    assert batch().projected(matrix, matrix, matrix).self_attention
    assert not batch().projected(matrix, matrix, 2.0 * matrix).self_attention


def test_unpad_needs_a_tensor_for_each_batch():
    with pytest.raises(ValueError, match="zip"):
        ragged().unpad([])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "indices is empty; expected the position of at least one sequence"),
        ([4], "indices holds 4; expected integers from 0 to 3"),
        ([-1], "indices holds -1; expected integers from 0 to 3"),
        ([0.5], "indices holds 0.5; expected integers"),
        ([True, False], "indices holds True; expected integers"),
        (np.array([True, False]), "indices holds .*True.*; expected integers"),
        (torch.tensor([True, False]), "indices holds .*True.*; expected integers"),
    ],
)
def test_subset_refuses(indices, message):
    with pytest.raises(ValueError, match=message):
        batch().subset(indices)


def test_replace_changes_only_what_is_named():
    assert_same(cross().replace(**SETTINGS), cross(**SETTINGS))
    assert_same(ragged(**SETTINGS).replace(scale=None, ridge_x=0, ridge_y=0, center=None), ragged())
    assert_same(batch().replace(mask="causal"), batch(mask="causal"))
    with pytest.raises(ValueError, match="ridge_x is -1"):
        single().replace(ridge_x=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ridge'"):
        single().replace(ridge=1)


def test_to_casts_everything_and_back(problem):
    narrow = problem.to(torch.float32)
    assert narrow.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in narrow.center.values())
    for name in ("A1", "A2", "A3", "B", "weights", "bias"):
        held = getattr(narrow.batches[0], name)
        assert held is None or held.dtype == torch.float32
    if problem.dtype == torch.float64:
        assert narrow.digest() != problem.digest()
    assert_same(narrow.to(torch.float64).to(torch.float32, "cpu"), narrow)


def test_to_refuses_what_overflows():
    big = AttentionProblem(normal(5, 3) * 1e300, normal(5, 2))
    with pytest.raises(ValueError, match=r"A1 holds 15 non-finite value\(s\), the first -?inf"):
        big.to(torch.float32)
    with pytest.raises(ValueError, match="A1 has dtype float16; expected float32 or float64"):
        single().to(torch.float16)
