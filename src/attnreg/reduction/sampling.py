"""Some sequences of a problem, for what needs no more: moments, starts and the fits of pairs."""

from __future__ import annotations

import itertools
import random

from attnreg.problem import AttentionProblem

MOMENT_ROWS = 40
"""Rows a column that tell the second moments of inputs: their eigenvalues to a third at the ends of
the spectrum, where steps are scaled by the fifth root."""


def sample_for_moments(problem: AttentionProblem) -> AttentionProblem:
    """As many sequences as tell the second moments of the inputs.

    Args:
        problem: The problem.

    Returns:
        The problem of these; the given one where it has no more, or has ridges, which are defined
        by the moments of all.
    """
    if problem.ridge_x or problem.ridge_y:
        return problem
    return sample(problem, MOMENT_ROWS * max(problem.d_query, problem.d_key, problem.d_value))


def sample(problem: AttentionProblem, rows: int) -> AttentionProblem:
    """Sequences spread over those of the problem that have weight: one of each of equal parts.

    Which is drawn at random: equal steps would miss every other text where two take turns.

    Args:
        problem: The problem.
        rows: Of the sequences in all, about.

    Returns:
        The problem of these sequences, always the same; the given one if it has no more rows.
    """
    if problem.n_rows <= rows:
        return problem
    weighted = sorted(
        position
        for batch in problem.batches
        for position, any_row in zip(batch.index, batch.weights.any(dim=1).tolist(), strict=True)
        if any_row
    )
    count = max(1, round(problem.n_sequences * rows / problem.n_rows))
    count = min(count, len(weighted))
    bounds = [i * len(weighted) // count for i in range(count + 1)]
    generator = random.Random(0)
    return problem.subset(weighted[generator.randrange(*b)] for b in itertools.pairwise(bounds))
