"""What a problem holds, what it computes from it, and that files and copies keep all of it."""

import math
import pickle
from functools import cached_property

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from attnreg.problem import AttentionProblem, Batch
from attnreg.storage import read_tensors, write_tensors


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def single(**options):
    return AttentionProblem(normal(5, 3), normal(5, 2), **options)


def batch(**options):
    return AttentionProblem(normal(4, 5, 3), normal(4, 5, 2), **options)


def ragged(**options):
    return AttentionProblem(
        [normal(n, 3) for n in (5, 2, 5, 7)], [normal(n, 2) for n in (5, 2, 5, 7)], **options
    )


def cross(**options):
    sizes = ((5, 4), (2, 6), (5, 4))
    return AttentionProblem(
        [normal(n, 3) for n, _ in sizes],
        [normal(n, 2, seed=1) for n, _ in sizes],
        [normal(m, 4, seed=2) for _, m in sizes],
        [normal(m, 1, seed=3) for _, m in sizes],
        **options,
    )


def visible(n, m, seed=0):
    mask = normal(n, m, seed=seed) > 0
    mask[:, 0] = True
    return mask


def positive(n, seed=0):
    return normal(n, seed=seed).abs()


SETTINGS = {
    "scale": 0.3,
    "ridge_x": 1e-3,
    "ridge_y": 1e-300,
    "center": {"X": normal(3, 3), "Y": normal(3, 2)},
}
PROBLEMS = {
    "single": lambda: single(),
    "settings": lambda: single(**SETTINGS),
    "causal": lambda: single(mask="causal"),
    "float32": lambda: single().to(torch.float32),
    "one row": lambda: AttentionProblem(normal(1, 1), normal(1, 1)),
    "batch": lambda: batch(weights=normal(4, 5).abs(), **SETTINGS),
    "batch, one mask": lambda: batch(mask=visible(5, 5)),
    "batch, masks": lambda: batch(mask=torch.stack([visible(5, 5, seed=i) for i in range(4)])),
    "batch of one": lambda: AttentionProblem(normal(1, 5, 3), normal(1, 5, 2)),
    "list": lambda: ragged(**SETTINGS),
    "list of one": lambda: AttentionProblem([normal(5, 3)], [normal(5, 2)], mask="causal"),
    "list, weights": lambda: ragged(weights=[positive(n) for n in (5, 2, 5, 7)]),
    "list, causal and masks": lambda: ragged(
        mask=("causal", [visible(n, n) for n in (5, 2, 5, 7)])
    ),
    "equal list, one mask": lambda: AttentionProblem(
        [normal(5, 3)] * 3, [normal(5, 2)] * 3, mask=visible(5, 5)
    ),
    "cross": lambda: cross(**SETTINGS),
    "cross, additive masks": lambda: cross(
        mask=[normal(n, m) for n, m in ((5, 4), (2, 6), (5, 4))]
    ),
    "values are keys": lambda: AttentionProblem(
        normal(5, 3), normal(5, 2), normal(4, 6), normal(4, 6)
    ),
    "values are queries": lambda: AttentionProblem(normal(5, 3), normal(5, 2), normal(5, 6)),
}


@pytest.fixture(params=PROBLEMS, name="problem")
def any_problem(request):
    return PROBLEMS[request.param]()


def assert_same(found, expected):
    """Equal in everything but the device, batches included."""
    for name in ("scale", "ridge_x", "ridge_y", "structure", "lengths", "dtype", "causal"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.self_attention == expected.self_attention
    assert found.center.keys() == expected.center.keys()
    assert all(torch.equal(found.center[name], expected.center[name]) for name in found.center)
    assert len(found.batches) == len(expected.batches)
    for one, other in zip(found.batches, expected.batches, strict=True):
        assert (one.index, one.lengths, one.causal) == (other.index, other.lengths, other.causal)
        assert (one.A3 is one.A2) == (other.A3 is other.A2)
        assert (one.bias is None) == (other.bias is None)
        for name in ("A1", "A2", "A3", "B", "weights", "bias"):
            if getattr(one, name) is not None:
                assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert found.digest() == expected.digest()


# -- what is held


def test_sizes_and_defaults():
    problem = cross()
    assert (problem.d_query, problem.d_key, problem.d_value, problem.d_out) == (3, 4, 1, 2)
    assert (problem.n_sequences, problem.n_rows) == (3, 12)
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


# -- pooled second moments and errors


def test_grams_are_sums_over_the_sequences():
    weights = [positive(n) for n in (5, 2, 5)]
    problem = cross(weights=weights)
    queries, keys, values = (problem.unpadded(name) for name in ("A1", "A2", "A3"))
    torch.testing.assert_close(
        problem.gram_query, sum(a.T @ torch.diag(w) @ a for a, w in zip(queries, weights))
    )
    torch.testing.assert_close(problem.gram_key, sum(a.T @ a for a in keys))
    torch.testing.assert_close(problem.gram_value, sum(a.T @ a for a in values))
    centered = [a - a.mean(0) for a in keys]
    torch.testing.assert_close(problem.gram_key_centered, sum(a.T @ a for a in centered))
