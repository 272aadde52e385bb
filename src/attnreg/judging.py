"""Validation errors of points, and the readout that suits each best.

With few residuals a weight the readout of a point is solved by least squares and with ridges,
shares :data:`RIDGES` of the features' mean square on the diagonal (the constant row is free), that
pull it towards the readout of the start or towards zero; the lowest validation error chooses. A
start's readout is worth pulling towards where it is not from the same data, such as what is left of
an original layer's. One that was solved on them is where least squares ends anyway.

Judging changes nothing: what follows from a choice is in the :class:`Candidate`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.objective import Objective
from attnreg.problem import AttentionProblem
from attnreg.solvers.choice import ENOUGH, residuals_a_weight
from attnreg.solvers.minibatches import Pooled, minibatches

RIDGES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)

BACK = 5
"""Parts of the way back from an end to the start."""

Weights = Mapping[str, Tensor]
Stored = Callable[[Weights], Weights]


@dataclass(frozen=True)
class Candidate:
    """Weights that the validation error chooses among.

    Attributes:
        weights: The weights.
        error: Their validation error.
        step: How far from the start to the end of a round: 0 the start, 1 the end.
        point: Their features, under whatever ridge, on the sequences to fit on; None where they
            were not needed.
        ridge: On the readout, as a share of the features' mean square.
        center: What it pulls towards: ``"start"``, ``"zero"``, or nothing.
    """

    weights: Weights
    error: float
    step: float
    point: Pooled | None = None
    ridge: float = 0.0
    center: str = ""


def scarce(problem: AttentionProblem, weights: Weights) -> bool:
    """Whether there are too few residuals a weight to do without early stopping and ridges."""
    return _residuals(problem, weights) < ENOUGH


def _residuals(problem: AttentionProblem, weights: Weights) -> float:
    return residuals_a_weight(problem, sum(value.numel() for value in weights.values()))


def error_of(candidate: Candidate) -> float:
    """Its validation error, a key to compare by."""
    return candidate.error


def lowest(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the lowest validation error; of equal ones the first."""
    return min(candidates, key=error_of)


class Judge:
    """Validation errors of weights, with ridges on the readout where data are few.

    The features of the validation sequences are made once for all readouts of a point.

    Args:
        objective: What is fitted.
        other: The same on the sequences that judge.
        stored: What weights become where they are kept, such as rounded.
        start: The weights to start from.

    Attributes:
        batches: Mini-batches of what is fitted.
        theta: Flat non-linear parameters of the start.
        readout: That of the start.
        residuals: Residuals a weight.
        few: Whether data are few.
    """

    def __init__(
        self,
        objective: Objective,
        other: Objective,
        stored: Stored,
        start: Weights,
    ) -> None:
        self._objective, self._other = objective, other
        self._stored, self._start = stored, start
        self.theta, self.readout = objective.model.split(objective.problem, start)
        self._centers = {"zero": torch.zeros_like(self.readout)}
        if self.readout.any():
            self._centers = {"start": self.readout, **self._centers}
        self.batches, self._judging = (
            minibatches(one.problem.batches) for one in (objective, other)
        )
        self.residuals = _residuals(objective.problem, start)
        self.few = self.residuals < ENOUGH

    def weights_of(self, point: Pooled) -> Weights:
        """The weights of a point, its readout included."""
        problem, model = self._objective.problem, self._objective.model
        return model.join(problem, point.theta, point.readout, self._start)

    def ridged(self, candidate: Candidate) -> Pooled | None:
        """A candidate's point under the ridge that it was chosen with; None without a point."""
        point = candidate.point
        if point is None:
            return None
        ridge = None
        if candidate.center:
            ridge = point.readout_ridge(candidate.ridge, self._centers[candidate.center])
        return point.under(point.objective.with_ridge(ridge))

    def look(
        self,
        weights: Weights,
        step: float,
        point: Pooled | None = None,
        objective: Objective | None = None,
    ) -> list[Candidate]:
        """Weights as they are; where data are few, with the best readouts for their features.

        Args:
            weights: The weights. At the start they count as they are too, first.
            step: As in :class:`Candidate`.
            point: Theirs on the sequences to fit on, where it is known.
            objective: Counts the pass over these where it is not.

        Returns:
            One as they are, or one for each centre: the best ridge towards it, or least squares,
            which has none.
        """
        model, other = self._objective.model, self._other.problem
        theta, readout = model.split(other, self._stored(weights))
        try:
            judging = Pooled(self._other, self._judging, theta)
            if self.few and point is None:
                mine, _ = model.split(self._objective.problem, weights)
                point = Pooled(objective or self._objective, self.batches, mine)
        except torch.linalg.LinAlgError:  # features that are not finite
            return [Candidate(weights, math.inf, step)]
        found = []
        if not (self.few and step):
            found.append(Candidate(weights, _error(judging, readout), step, point))
        if self.few:
            assert point is not None
            found += self._solved(weights, step, point, judging)
        return found

    def _solved(
        self, weights: Weights, step: float, point: Pooled, judging: Pooled
    ) -> list[Candidate]:
        """For each centre the best of least squares and the ridges towards it."""
        model, problem = self._objective.model, self._objective.problem

        def tried(readout: Tensor, share: float = 0.0, center: str = "") -> Candidate:
            solved = model.join(problem, point.theta, readout, weights)
            _, kept = model.split(self._other.problem, self._stored(solved))
            return Candidate(solved, _error(judging, kept), step, point, share, center)

        free = tried(point.under(point.objective.with_ridge(None)).readout)
        found = []
        for name, center in self._centers.items():
            best, readouts = free, point.ridged_readouts(RIDGES, center)
            for share, readout in zip(RIDGES, readouts, strict=True):
                best = min(best, tried(readout, share, name), key=error_of)
            found.append(best)
        return found

    def way_back(self, end: Candidate, until: float) -> Candidate:
        """From an end towards the start while that lowers the error and there is time.

        Args:
            end: The end of a round.
            until: ``time.perf_counter()`` after which no further point is begun.

        Returns:
            The best point, or the end.
        """
        best, objective = end, None if end.point is None else end.point.objective
        for i in range(BACK - 1, 0, -1):
            step = i / BACK
            if time.perf_counter() > until:
                break
            between = {
                name: value.lerp(end.weights[name], step) for name, value in self._start.items()
            }
            candidate = lowest(self.look(between, step, objective=objective))
            if not candidate.error < best.error:
                break
            best = candidate
        return best


def _error(point: Pooled, readout: Tensor) -> float:
    error = point.objective.problem.relative_error(point.loss_at(readout))
    return error if math.isfinite(error) else math.inf
