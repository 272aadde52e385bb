r"""From the original's rotary frequencies to those of a student.

A student with narrower heads has fewer turning pairs, and mostly other frequencies. ``C[f', f]`` is
how much of the form of original pair ``f`` enters that of the student's pair ``f'``: the least
squares approximation of ``e^{i f d}`` by the student's ``e^{i f' d}`` over the distances ``d`` of
all visible pairs of positions, with a ridge of 1e-3 because slow frequencies are nearly the same
function. A distance counts ``(1 + |d|)^-decay`` times as much, as attention falls off: which decay
suits a layer is for its measured error to say. A frequency that both have goes over as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg.models.rotary import Rotary
from attnreg.problem import AttentionProblem

_RIDGE = 1e-3


def transfer(problem: AttentionProblem, original: Rotary, student: Rotary, decay: float) -> Tensor:
    """The coefficients ``C``.

    Args:
        problem: Its lengths and mask give the distances.
        original: Frequencies of the original.
        student: Frequencies of the student.
        decay: How fast the weight of a distance falls off.

    Returns:
        ``(student pairs, original pairs)``, complex128.
    """
    old = torch.tensor(original.frequencies, dtype=torch.float64)
    new = torch.tensor(student.frequencies, dtype=torch.float64)
    among = _correlations(problem, new, new, decay)
    across = _correlations(problem, new, old, decay)
    ridge = _RIDGE * torch.eye(len(new), dtype=torch.float64)
    result = torch.linalg.solve(among + ridge, across)
    for f in range(len(old)):
        same = (new - old[f]).abs() <= 1e-12 * old[f].abs()
        if bool(same.any()):
            result[:, f] = 0.0
            result[int(same.nonzero()[0]), f] = 1.0
    return result.to(problem.device)


def matched(problem: AttentionProblem, original: Rotary, student: Rotary, energy: Tensor) -> Tensor:
    """Coefficients that take one original pair for each of the student's, in order.

    Args:
        problem: Its lengths and mask give the distances.
        original: Frequencies of the original.
        student: Frequencies of the student, not more of them.
        energy: Squared size of each original pair's forms.

    Returns:
        Zeros and ones, ``(student pairs, original pairs)``: of the selections that keep the order,
        the one with the largest sum of energy times squared correlation of the two frequencies.
    """
    old = torch.tensor(original.frequencies, dtype=torch.float64)
    new = torch.tensor(student.frequencies, dtype=torch.float64)
    correlation = _correlations(problem, new, old, 0.0).abs().square()
    worth = (correlation * energy.cpu()).tolist()
    pairs, wanted = len(old), len(new)
    # best[i][j]: the largest sum for the first i student pairs among the first j original ones.
    best = [[0.0] * (pairs + 1)] + [[-1.0] * (pairs + 1) for _ in range(wanted)]
    for i in range(1, wanted + 1):
        for j in range(i, pairs + 1):
            here = best[i - 1][j - 1] + worth[i - 1][j - 1]
            best[i][j] = max(best[i][j - 1], here)
    result = torch.zeros(wanted, pairs, dtype=torch.complex128)
    i, j = wanted, pairs
    while i:
        if j > i and best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            result[i - 1, j - 1] = 1.0
            i, j = i - 1, j - 1
    return result.to(problem.device)


def _correlations(problem: AttentionProblem, left: Tensor, right: Tensor, decay: float) -> Tensor:
    """Weighted mean of ``e^{i (f2 - f1) d}`` over visible pairs, ``(left, right)``, complex128."""
    counts: dict[int, int] = {}
    for n, _ in problem.lengths:
        counts[n] = counts.get(n, 0) + 1
    total = torch.zeros(2 * max(counts) - 1, dtype=torch.float64)
    middle = max(counts) - 1
    for n, times in counts.items():
        distance = torch.arange(1 - n, n)  # key minus query
        seen = (n - distance.abs()) * times * (distance <= 0 if problem.causal else 1)
        if problem.window is not None:
            seen = seen * (distance > -problem.window)
        total[middle + distance] += seen
    distance = torch.arange(len(total), dtype=torch.float64) - middle
    total *= (1.0 + distance.abs()) ** -decay
    angle = (right[None] - left[:, None])[..., None] * distance
    return (torch.polar(torch.ones_like(angle), angle) * (total / total.sum())).sum(-1)
