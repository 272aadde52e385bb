"""Pooling of heads and transfer of frequencies against dense and enumerated twins."""

import cmath
import itertools

import pytest
import torch

from attnreg.models.rotary import Rotary
from attnreg.problem import AttentionProblem
from attnreg.reduction import frequencies, pooling
from tests.twins import normal


def random_family(r=3, heads=(2, 2, 2), w=3, complex_=False, seed=0):
    def factor(*shape, seed):
        real = normal(*shape, seed=seed)
        return torch.complex(real, normal(*shape, seed=seed + 1)) if complex_ else real

    left = [[factor(7, w, seed=seed + 10 * g + h) for h in range(heads[g])] for g in range(r)]
    right = [factor(6, w, seed=seed + 100 + g) for g in range(r)]
    x, z = normal(30, 7, seed=seed + 200), normal(30, 6, seed=seed + 201)
    g1, g2 = x.mT @ x, z.mT @ z
    cast = right[0].dtype
    a = torch.stack([sum(q.mH @ g1.to(cast) @ q for q in own) for own in left])
    b = torch.stack([torch.stack([k.mH @ g2.to(cast) @ k2 for k2 in right]) for k in right])
    return left, right, x.to(cast), z.to(cast), a, b


def applied(left, right, made):
    new = sum(k @ c for k, c in zip(right, made.right, strict=True))
    return [[q @ t for q in own] for own, t in zip(left, made.left, strict=True)], new


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_truncation_is_the_best_of_its_rank(complex_, scaled):
    """Eckart and Young on the stacked maps, written out: the tail of their singular values."""
    left, right, x, z, a, b = random_family(complex_=complex_)
    scale = normal(3, seed=5).to(a.dtype) if scaled else torch.ones(3).to(a.dtype)
    made = pooling.truncated(b, a, 2, scale)
    queries, key = applied(left, right, made)
    exact = torch.cat(
        [x @ (q * scale) @ k.mT @ z.mT for own, k in zip(left, right, strict=True) for q in own]
    )
    ours = torch.cat([x @ q @ key.mT @ z.mT for own in queries for q in own])
    tail = torch.linalg.svdvals(exact)[2:].square().sum()
    assert torch.allclose((ours - exact).norm() ** 2, tail, rtol=1e-10)
    if not scaled:
        assert pooling.residual(b, a, 2) == pytest.approx(float(tail), rel=1e-10)
    energies = [
        (z @ key).norm(dim=0),
        torch.cat([x @ q for own in queries for q in own]).norm(dim=0),
    ]
    assert torch.allclose(*energies, rtol=1e-8)


@pytest.mark.parametrize("complex_", [False, True])
def test_alignment_keeps_the_left_factors_and_does_not_depend_on_the_gauge(complex_):
    left, right, x, z, a, b = random_family(complex_=complex_)
    made = pooling.aligned(b, a)
    queries, key = applied(left, right, made)
    logits = [x @ q @ key.mT @ z.mT for own in queries for q in own]
    change = torch.stack([normal(3, 3, seed=g) + 2 * torch.eye(3) for g in range(3)]).to(a.dtype)
    other = torch.linalg.inv(change).mT
    a2 = other.mH @ a @ other
    b2 = torch.einsum("gac,ghab,hbd->ghcd", change.conj(), b, change)
    again, key2 = applied(
        [[q @ t for q in own] for own, t in zip(left, other, strict=True)],
        [k @ m for k, m in zip(right, change, strict=True)],
        pooling.aligned(b2, a2),
    )
    logits2 = [x @ q @ key2.mT @ z.mT for own in again for q in own]
    for one, two in zip(logits, logits2, strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-7 * float(one.abs().max()))


def test_alignment_is_not_beaten_by_nearby_turns():
    """Unweighted it is generalised Procrustes: no small rotation of a head lowers the spread."""
    _, right, _, z, _, b = random_family()
    white = [z @ k @ torch.linalg.inv(torch.linalg.cholesky(k.mT @ z.mT @ z @ k)).mT for k in right]
    a = torch.stack(
        [torch.linalg.inv(k.mT @ z.mT @ z @ k) for k in right]
    )  # the same energy in every direction
    made = pooling.aligned(b, a)

    def spread(heads):
        middle = sum(heads) / len(heads)
        return float(sum((k - middle).square().sum() for k in heads))

    found = [z @ k @ torch.linalg.inv(t).mT for k, t in zip(right, made.left, strict=True)]
    # The columns are balanced by one diagonal for all heads: undo it, so that each is white.
    found = [k / found[0].norm(dim=0) for k in found]
    assert torch.allclose(found[0].mT @ found[0], torch.eye(3).double(), atol=1e-9)
    assert spread(found) <= spread(white)
    for g, seed in itertools.product(range(3), range(20)):
        skew = 0.02 * normal(3, 3, seed=seed)
        moved = list(found)
        moved[g] = found[g] @ torch.linalg.matrix_exp(skew - skew.mT)
        assert spread(moved) >= spread(found)


# ---------------------------------------------------------------------- frequencies


def causal(mask="causal"):
    rows = [normal(n, 3, seed=n) for n in (9, 14, 5, 14)]
    return AttentionProblem(rows, rows, mask=mask)


def visible_mean(problem, f, decay=0.0):
    """Weighted mean of ``e^{i f d}`` over the visible pairs, one by one."""
    pairs = [
        (i, j)
        for n, _ in problem.lengths
        for i in range(n)
        for j in range(max(0, i + 1 - (problem.window or n)), i + 1)
    ]
    weights = [(1.0 + i - j) ** -decay for i, j in pairs]
    terms = [w * cmath.exp(1j * f * (j - i)) for w, (i, j) in zip(weights, pairs, strict=True)]
    return torch.tensor(sum(terms) / sum(weights), dtype=torch.complex128)


@pytest.mark.parametrize("mask", ["causal", ("causal", 4)])
def test_transfer_is_a_least_squares_fit_over_the_visible_distances(mask):
    problem = causal(mask)
    old, new = (1.0, 0.4, 0.05), (1.0, 0.1)
    found = frequencies.transfer(problem, Rotary(old), Rotary(new), 2.0)
    among = torch.stack(
        [torch.stack([visible_mean(problem, b - a, 2.0) for b in new]) for a in new]
    )
    across = torch.stack(
        [torch.stack([visible_mean(problem, b - a, 2.0) for b in old]) for a in new]
    )
    expected = torch.linalg.solve(among + 1e-3 * torch.eye(2, dtype=torch.float64), across)
    expected[:, 0] = torch.tensor([1.0, 0.0])  # both have it
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_matched_pairs_against_all_selections():
    problem = causal()
    old, new = (1.0, 0.4, 0.2, 0.05), (1.0, 0.1)
    energy = torch.tensor([1.0, 0.1, 3.0, 2.0]).double()
    found = frequencies.matched(problem, Rotary(old), Rotary(new), energy)

    def worth(chosen):
        shares = [
            visible_mean(problem, old[c] - new[i]).abs() ** 2 * energy[c]
            for i, c in enumerate(chosen)
        ]
        return float(sum(shares))

    best = max(itertools.combinations(range(4), 2), key=worth)
    assert found.abs().argmax(1).tolist() == list(best)
    assert float(found.abs().sum()) == 2.0
