"""Padding and grouping change nothing but the shape."""

import math

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from attnreg.batching import MAX_PADDING, group_by_length
from attnreg.problem import AttentionProblem

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8)


@given(LENGTHS)
def test_groups_hold_each_sequence_once_and_pad_little(lengths):
    groups = group_by_length(lengths)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[i] for i in group]
        n, m = (max(column) for column in zip(*sizes, strict=True))
        assert len(group) * n <= MAX_PADDING * sum(q for q, _ in sizes)
        assert len(group) * n * m <= MAX_PADDING * sum(q * k for q, k in sizes)


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 9))
def test_equal_lengths_are_one_group_in_order(count, n, m):
    assert group_by_length([(n, m)] * count) == [list(range(count))]


def test_grouping_many_sequences_takes_no_quadratic_time():
    assert len(group_by_length([(128, 128)] * 200_000)) == 1


def draw_problem(lengths, *, causal, masked, weighted, seed):
    """A random ragged problem, its inputs, and the masks written out as booleans."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    if causal:
        lengths = [(n, n) for n, _ in lengths]
    inputs = {
        "A1": [normal(n, 3) for n, _ in lengths],
        "A2": [normal(m, 2) for _, m in lengths],
        "A3": [normal(m, 4) for _, m in lengths],
        "B": [normal(n, 2) for n, _ in lengths],
    }
    visible = [torch.ones(n, m, dtype=torch.bool) for n, m in lengths]
    weights = [torch.ones(n, dtype=torch.float64) for n, _ in lengths]
    mask = None
    if masked:
        mask = [torch.rand(n, m, generator=g) < 0.5 for n, m in lengths]
        for allowed in mask:
            allowed[:, 0] = True
        visible = [a & b for a, b in zip(visible, mask, strict=True)]
    if causal:
        mask = "causal" if mask is None else ("causal", mask)
        visible = [allowed.tril() for allowed in visible]
    if weighted:
        weights = [torch.rand(n, generator=g, dtype=torch.float64) + 0.1 for n, _ in lengths]
    given_weights = weights if weighted else None
    return AttentionProblem(**inputs, mask=mask, weights=given_weights), inputs, visible, weights


def dense_loss(inputs, visible, weights, x, y):
    """The loss sequence by sequence, straight from the definition."""
    total = 0.0
    for a1, a2, a3, b, allowed, w in zip(
        *(inputs[name] for name in ("A1", "A2", "A3", "B")), visible, weights, strict=True
    ):
        logits = (a1 @ x @ a2.T).masked_fill(~allowed, -math.inf)
        residual = logits.softmax(-1) @ a3 @ y - b
        total += float((w * residual.square().sum(1)).sum())
    return total


def batched(batch, x, y):
    logits = batch.A1 @ x @ batch.A2.mT
    if batch.bias is not None:
        logits = logits + batch.bias
    if batch.causal:
        n = logits.shape[-1]
        logits = logits.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -math.inf)
    return logits.softmax(-1) @ batch.A3 @ y


@settings(deadline=None)
@given(LENGTHS, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_batches_give_the_loss_of_the_sequences(lengths, causal, masked, weighted, seed):
    problem, inputs, visible, weights = draw_problem(
        lengths, causal=causal, masked=masked, weighted=weighted, seed=seed
    )
    x, y = torch.ones(3, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    outputs = [batched(batch, x, y) for batch in problem.batches]
    assert all(bool(out.isfinite().all()) for out in outputs)  # padding rows see something too
    loss = sum(
        float((batch.weights * (out - batch.B).square().sum(-1)).sum())
        for batch, out in zip(problem.batches, outputs, strict=True)
    )
    expected = dense_loss(inputs, visible, weights, x, y)
    assert math.isclose(loss, expected, rel_tol=1e-12)


@settings(deadline=None)
@given(LENGTHS, st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_padding_is_zero_and_unpad_undoes_it(lengths, causal, masked, seed):
    problem, inputs, _, _ = draw_problem(
        lengths, causal=causal, masked=masked, weighted=True, seed=seed
    )
    for batch in problem.batches:
        for row, (n, m) in enumerate(batch.lengths):
            assert not batch.weights[row, n:].any()
            assert not batch.A1[row, n:].any()
            assert not batch.B[row, n:].any()
            assert not batch.A2[row, m:].any()
            assert not batch.A3[row, m:].any()
    for name in ("A1", "B"):
        restored = problem.unpad([getattr(batch, name) for batch in problem.batches])
        assert len(restored) == len(inputs[name])
        assert all(map(torch.equal, restored, inputs[name]))


def test_causal_alone_is_not_written_out():
    equal = AttentionProblem(torch.randn(2, 5, 3), torch.randn(2, 5, 3), mask="causal")
    ragged = [torch.randn(n, 3) for n in (7, 8, 8)]
    padded = AttentionProblem(ragged, ragged, mask="causal")
    for problem in (equal, padded):
        assert all(batch.causal and batch.bias is None for batch in problem.batches)
    assert len(padded.batches) == 1


def test_long_causal_problem_takes_no_square_memory():
    n = 1 << 20  # a matrix n x n would not fit into any memory
    problem = AttentionProblem(torch.ones(n, 1), torch.ones(n, 1), mask="causal")
    assert problem.batches[0].bias is None


def test_padding_alone_is_one_row_of_bias():
    lengths = (7, 8, 8)
    problem = AttentionProblem(
        [torch.ones(n, 3) for n in lengths], [torch.ones(n, 1) for n in lengths]
    )
    (batch,) = problem.batches
    assert batch.bias.shape == (3, 1, 8)
    assert batch.bias.isinf().sum() == 1
    assert batch.bias[0, 0, 7] == -math.inf


def test_mask_for_all_is_held_once():
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    (batch,) = AttentionProblem(torch.randn(4, 5, 3), torch.randn(4, 5, 3), mask=mask).batches
    assert batch.bias.shape == (1, 5, 5)


def test_order_within_a_batch_is_told():
    a = [torch.full((n, 1), float(n)) for n in (5, 1, 5, 2)]
    problem = AttentionProblem(a, a)
    assert [batch.index for batch in problem.batches] == [(1,), (3,), (0, 2)]
    assert problem.lengths == ((5, 5), (1, 1), (5, 5), (2, 2))
    assert [batch.lengths for batch in problem.batches] == [((1, 1),), ((2, 2),), ((5, 5),) * 2]
