"""Some sequences of a problem, for what needs no more: starts and the fits of pairs."""

from __future__ import annotations

import itertools
import random

from attnreg.problem import AttentionProblem


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
