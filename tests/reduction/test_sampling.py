"""Some sequences of a problem."""

import torch

from attnreg.problem import AttentionProblem
from attnreg.reduction import sampling
from attnreg.reduction.sampling import sample, sample_for_moments
from tests.twins import normal


def numbered(sequences):
    """A problem of so many sequences of 10 rows."""
    return AttentionProblem(normal(sequences, 10, 3), normal(sequences, 10, 2, seed=1))


def test_a_sample_spreads_over_the_problem():
    problem = numbered(16)
    few = sample(problem, 40)
    assert few.n_sequences == 4
    for i, position in enumerate(positions(few, problem)):
        assert position // 4 == i
    assert positions(sample(problem, 40), problem) == positions(few, problem)
    assert sample(problem, 10**6) is problem


def test_a_sample_has_every_one_of_texts_that_take_turns():
    problem = numbered(64)
    few = positions(sample(problem, 160), problem)  # one in 4
    for texts in (2, 4):
        assert {position % texts for position in few} == set(range(texts))


def test_a_sample_has_sequences_with_weight_only():
    weights = torch.zeros(16, 10, dtype=torch.float64)
    weights[[3, 4, 11], 5] = 1.0
    problem = numbered(16).replace(weights=weights)
    assert positions(sample(problem, 60), problem) == [3, 4, 11]
    [one] = positions(sample(problem, 10), problem)
    assert one in (3, 4, 11)


def positions(few, problem):
    """Where the sequences of one problem are in another."""
    same = (few.batches[0].A1[:, None] == problem.batches[0].A1).all(dim=(2, 3))
    assert bool((same.sum(1) == 1).all())
    return same.int().argmax(1).tolist()


def test_moments_are_those_of_some_rows_a_column_and_of_all_with_ridges(monkeypatch):
    problem = numbered(64)
    assert sample_for_moments(problem) is not problem
    assert sample_for_moments(problem).n_rows == 120  # 40 for each of 3 columns
    assert sample_for_moments(problem.replace(ridge_y=0.1)).n_rows == 640
    monkeypatch.setattr(sampling, "MOMENT_ROWS", 1000)
    assert sample_for_moments(problem) is problem
