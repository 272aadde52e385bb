"""Levenberg-Marquardt from many starts side by side.

All starts take their steps at once, in the same matrix products (:mod:`.stacked`), each with a
damping, a stage of the regularisation path and an end of its own, by the rules of
:mod:`.trust_region`. Starts that have ended leave the stack, and so do hopeless ones (a rule that
was measured, not proven).
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from attnreg.solvers.run import ACCEPT
from attnreg.solvers.stacked import Derivatives, Stack
from attnreg.solvers.trust_region import (
    DAMPING,
    MAX_DAMPING,
    MIN_DAMPING,
    MIN_PATH_DAMPING,
    PATH_DAMPING,
    STAGE_GAIN,
)

LAST_DAMPING = 1e-12
"""Ridge on the readout that stays in the last stage, in units of the path, against singular
normal equations. The ordinary loop, to which the best start is handed, does without it."""

END_GAIN = 1e-8
"""A start has converged when a step gains less than this share of the objective."""

HOPELESS_GAIN, HOPELESS_VALUE = 0.03, 1.5
"""A start in the last stage is dropped when a step gains less than the first and its value is
above the second times the best so far."""

MAX_STEPS = 150
"""Steps after which a start is dropped."""


class Descents:
    """Starts that descend side by side.

    Args:
        stack: The problem.
        x: The starts, ``(s, d_query, d_key)``.
        stages: The path, largest first; the last is 0.
        zero: A value that ends a descent.
    """

    def __init__(self, stack: Stack, x: Tensor, stages: tuple[float, ...], zero: float) -> None:
        self._stack, self._zero = stack, zero
        count = len(x)
        self._index = torch.arange(count, device=x.device)
        self._ends, self._values = x.clone(), x.new_full((count,), torch.inf)
        self._converged = torch.zeros(count, dtype=torch.bool, device=x.device)
        self._x, self._unit = x, stack.power(x)
        self._stages = x.new_tensor(stages).clamp_min(LAST_DAMPING)
        self._stage = torch.zeros_like(self._index)
        self._damping = x.new_full((count,), PATH_DAMPING if len(stages) > 1 else DAMPING)
        self._steps = torch.zeros_like(self._index)
        self._at = self._derivatives(x)

    @property
    def running(self) -> int:
        """How many have not ended."""
        return len(self._index)

    @property
    def best(self) -> float:
        """The best value of the last stage."""
        return float(self._of_last_stage.min())

    @property
    def leader(self) -> Tensor:
        """The matrix that has it, ``(d_query, d_key)``; only where it is finite."""
        matrices = torch.cat([self._ends, self._x[self._last]])
        return matrices[int(self._of_last_stage.argmin())]

    @property
    def _of_last_stage(self) -> Tensor:
        """Values of those that have ended and of those in the last stage."""
        return torch.cat([self._values, self._at.value[self._last]])

    @property
    def _last(self) -> Tensor:
        return self._stage == len(self._stages) - 1

    def _derivatives(self, x: Tensor, of: Tensor | None = None) -> Derivatives:
        """At ``x`` of all that run, or of some of them."""
        damping = self._stages[self._stage] * self._unit
        return self._stack.derivatives(x, damping if of is None else damping[of])

    def step(self, best: float) -> None:
        """One step of every start; a rejected one changes the damping only.

        Args:
            best: The best value known from elsewhere.
        """
        at, last = self._at, self._last
        direction, change = self._solve()
        trial = self._derivatives(self._x + direction)
        gain = at.value - trial.value
        ratio = gain / change
        taken = ratio > ACCEPT
        low = torch.where(last, MIN_DAMPING, MIN_PATH_DAMPING)
        lowered = torch.maximum(self._damping / torch.where(last, 10.0, 3.0), low)
        raised = (4 * self._damping.clamp_min(1e-8)).clamp_max(MAX_DAMPING)
        self._damping = torch.where(
            ratio > 0.75, lowered, torch.where(ratio >= 0.25, self._damping, raised)
        )
        share = torch.where(taken, gain / at.value.abs(), torch.inf)
        self._x = torch.where(taken[:, None, None], self._x + direction, self._x)
        self._at = trial.where(taken, at)
        self._steps += 1
        stuck = (self._damping >= MAX_DAMPING) | ~self._at.gradient.any(dim=1)
        self._leave(share, stuck, best)

    def _solve(self) -> tuple[Tensor, Tensor]:
        """Damped directions ``(s, d_query, d_key)`` and the decreases that the models predict."""
        at = self._at
        mean = at.curvature.diagonal(dim1=1, dim2=2).mean(1)
        damped = at.curvature.clone()
        damped.diagonal(dim1=1, dim2=2).add_((self._damping * mean)[:, None])
        factor, info = torch.linalg.cholesky_ex(damped)
        direction = -torch.cholesky_solve(at.gradient[..., None], factor)
        slope = (at.gradient[:, None] @ direction).flatten()
        change = slope + 0.5 * (direction.mT @ (at.curvature @ direction)).flatten()
        direction = torch.where((info == 0)[:, None, None], direction, 0.0)
        return direction.view(self._x.shape), -change

    def _leave(self, share: Tensor, stuck: Tensor, best: float) -> None:
        """Ends and next stages, by the share of the objective that a step gained."""
        last, value = self._last, self._at.value
        there = stuck | (value <= self._zero)
        converged = last & ((share < END_GAIN) | there)
        hopeless = value > HOPELESS_VALUE * min(best, self.best)
        out = last & (share < HOPELESS_GAIN) & hopeless
        out |= converged | (self._steps >= MAX_STEPS) | value.isinf()
        onward = ~(last | out) & ((share < STAGE_GAIN) | there)
        if bool(out.any()):
            self._put(out, converged)
            onward = onward[~out]
        if bool(onward.any()):
            self._advance(onward)

    def _put(self, out: Tensor, converged: Tensor) -> None:
        """Puts the ends aside and closes the ranks."""
        index = self._index[out]
        self._ends[index], self._values[index] = self._x[out], self._at.value[out]
        self._converged[index] = converged[out]
        kept = ~out
        at = self._at.take(kept)
        x, unit, stage = (part[kept] for part in (self._x, self._unit, self._stage))
        damping, steps, index = (p[kept] for p in (self._damping, self._steps, self._index))
        # At once, so that Ctrl-C finds all of one length.
        self._at, self._x, self._unit, self._stage = at, x, unit, stage
        self._damping, self._steps, self._index = damping, steps, index

    def _advance(self, onward: Tensor) -> None:
        """The next stage, with a damping of its own."""
        self._stage = self._stage + onward
        first = torch.where(self._last, DAMPING, PATH_DAMPING)
        self._damping = torch.where(onward, first, self._damping)
        fresh = self._derivatives(self._x[onward], onward)
        for field in fields(Derivatives):
            getattr(self._at, field.name)[onward] = getattr(fresh, field.name)

    def ends(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, matrices and whether they have converged, of all starts.

        Returns:
            One of each for every start. A start that is still on its way has the value of its
            stage, which bounds its own.
        """
        everywhere = torch.ones_like(self._last)
        self._put(everywhere, ~everywhere)
        return self._values, self._ends, self._converged
