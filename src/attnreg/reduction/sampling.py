"""Some sequences of a problem, for what needs no more: starts and the fits of pairs."""

from __future__ import annotations

import itertools
import random

from attnreg.problem import AttentionProblem


def sample(problem: AttentionProblem, rows: int) -> AttentionProblem:
    """Sequences spread over the problem: one of each of equal parts, at random.

    Equal steps would miss every other text where two take turns.

    Args:
        problem: The problem.
        rows: Of the sequences in all, about.

    Returns:
        The problem of these sequences, always the same; the given one if it has no more rows.
    """
    if problem.n_rows <= rows:
        return problem
    count = max(1, round(problem.n_sequences * rows / problem.n_rows))
    bounds = [i * problem.n_sequences // count for i in range(count + 1)]
    generator = random.Random(0)
    return problem.subset(generator.randrange(*part) for part in itertools.pairwise(bounds))
