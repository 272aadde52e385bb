"""Where a cold fit begins, and begins again when its path ends on a plateau.

From a good basin the final stage converges within a few iterations. On a plateau it crawls: ten
iterations later the gradient is where it was. Then the point is kept aside and the path begins
again from another start, a few times; at the end the best of all goes on.

The path begins at small logits: of a start without a readout it keeps the direction, not the
size. Measured, not proven: with well-conditioned planted inputs of 32 dimensions, 15 of 15 paths
from logits of 0.01 lead to the planted solution and 8 of 15 from logits of 0.3, the size that
``benchmarks/planted.py`` gives. Where the path ends above the value of the start itself, the loop
goes on from the start as it was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnreg.models.bilinear import START_LOGITS
from attnreg.objective import Objective, Point
from attnreg.solvers.screening import has_few_dimensions, is_worth_screening, screen

RESTARTS = 6
"""Starts after the first. Two paths in five lead to the planted solution of 16 dimensions and 256
rows; each costs some 25 iterations."""

WINDOW = 10
"""Iterations of the final stage after which a start is judged."""

PROGRESS = 0.1
"""A start whose gradient norm has not fallen to this share within the window crawls."""


@dataclass(frozen=True)
class Start:
    """Where the loop goes on, and the phase that the history names.

    After ``"path"`` the loop is at the beginning of the path, else behind its end.
    """

    theta: Tensor
    phase: Literal["path", "screening", "best"]


class Restarts:
    """The best point so far and the starts that are left.

    Args:
        objective: What is minimised.
        generator: Source of the starts.
        out_of_time: Whether the fit's time is over.
        allowed: Whether there are any; only where no more than the queries move.
    """

    def __init__(
        self,
        objective: Objective,
        generator: torch.Generator,
        out_of_time: Callable[[], bool],
        *,
        allowed: bool,
    ) -> None:
        self._objective, self._generator = objective, generator
        self._out_of_time = out_of_time
        self._left = RESTARTS if allowed else 0
        self._screens = allowed and is_worth_screening(objective)
        self._best: tuple[float, Tensor] | None = None
        self._since: tuple[int, float] | None = None

    @property
    def best_value(self) -> float:
        """Objective of the best point that was left; infinite where there is none."""
        return math.inf if self._best is None else self._best[0]

    @property
    def over(self) -> bool:
        """Whether no start is left and no point is kept aside."""
        return self._left == 0 and self._best is None

    def crawls(self, iteration: int, norm: float) -> bool:
        """Judges an iterate of the final stage by its gradient norm.

        Returns:
            Whether the point should be left.
        """
        if self.over:
            return False
        if self._since is None:
            self._since = (iteration, norm)
        first, before = self._since
        if iteration - first < WINDOW:
            return False
        self._since = (iteration, norm)
        return norm > PROGRESS * before

    def first(self, theta: Tensor) -> Start | None:
        """Where a cold fit goes from the start that was given; None where it stays there."""
        if not self._left:
            return None
        size = self._objective.model.logit_size(self._objective.problem)
        size *= float(theta.square().mean()) ** 0.5
        small = theta * min(1.0, START_LOGITS / size) if size else theta
        if has_few_dimensions(self._objective):
            return self._raced(theta, small)
        return Start(small, "path")

    def leave(self, point: Point) -> Start:
        """Keeps a point aside where it is the best, and says where to go on."""
        if point.value < self.best_value:
            self._best = (point.value, point.theta)
        self._since = None
        if self._left:
            self._left -= 1
            problem, model = self._objective.problem, self._objective.model
            seed = int(torch.randint(2**31, (), generator=self._generator))
            fresh, _ = model.split(problem, model.start(problem, seed))
            return self._raced(fresh, fresh)
        assert self._best is not None
        theta = self._best[1]
        self._best = None
        return Start(theta, "best")

    def best_of(self, point: Point) -> Point:
        """The point, or the one kept aside where that is better."""
        if self._best is None or point.value <= self._best[0]:
            return point
        return Point(self._objective, self._objective.features(self._best[1]))

    def _raced(self, theta: Tensor, small: Tensor) -> Start:
        """The start that has separated from others, ``theta`` among them; else the path."""
        found = None
        if self._screens:
            found = screen(self._objective, theta, self._generator, self._out_of_time)
        if found is None:
            return Start(small, "path")
        return Start(found, "screening")
