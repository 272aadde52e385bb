"""What every loop shares: what bounds a run, its clock, its records and where it ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from attnreg.curvature.preconditioner import natural_metric
from attnreg.objective import Iterate, Objective, Point
from attnreg.records import Callback, IterationRecord, Status

ACCEPT = 1e-4
"""Smallest ratio of actual to predicted decrease at which a step is taken."""


LOWER = 1e-2
"""Factor on the tolerance where a point within it was not confirmed."""


@dataclass(frozen=True)
class Settings:
    """What bounds a run.

    Attributes:
        tol: Dual norm of the reduced gradient over ``||B - mean||_F^2`` at which it has converged.
        max_iterations: Bound on the iterations, rejected steps included.
        max_seconds: Bound on the wall time, or None.
        stages: The path, largest first; the last is 0.
        confirm: Asked of a point whose gradient is within ``tol``; a false answer lowers the bound
            on the gradient by :data:`LOWER`, and the run goes on.
    """

    tol: float
    max_iterations: int
    max_seconds: float | None
    stages: tuple[float, ...] = (0.0,)
    confirm: Callable[[Iterate], bool] | None = None


@dataclass(frozen=True)
class Outcome:
    """Where the loop ended and why."""

    point: Iterate
    status: Status

    @cached_property
    def gradient_norm(self) -> float:
        """Of the point, relative; made when asked for: between rounds nobody does."""
        return relative_gradient_norm(self.point)


class Value(Protocol):
    """What is recorded of an iterate: its loss, without and with the ridges."""

    @property
    def loss(self) -> float:
        """``L`` alone."""

    @property
    def regularised(self) -> float:
        """``L`` plus the problem's ridges."""


class Run:
    """The clock and the records of one run.

    Args:
        objective: What is minimised.
        settings: What bounds the run.
        observe: Called with each record; a true answer stops the run.
        began: ``time.perf_counter()`` from which seconds are counted.

    Attributes:
        iteration: Counted from 0, the start.
        tol: Bound on the gradient norm that holds now.
    """

    def __init__(
        self,
        objective: Objective,
        settings: Settings,
        observe: Callback,
        began: float,
    ) -> None:
        self._objective, self._settings = objective, settings
        self._observe, self._began = observe, began
        self.iteration, self.tol = 0, settings.tol

    def seconds_left(self) -> float:
        """Until the time limit; infinity without one."""
        limit = self._settings.max_seconds
        return math.inf if limit is None else limit - (time.perf_counter() - self._began)

    def out_of_time(self) -> bool:
        """Whether the time limit is over."""
        return self.seconds_left() <= 0

    def judge(self, point: Iterate, norm: float) -> Status | None:
        """Whether the run may end at a point with this relative gradient norm."""
        if norm > self.tol:
            return None
        if self._settings.confirm is None:
            return Status.CONVERGED
        if self._settings.confirm(point):
            return Status.CERTIFIED
        self.tol *= LOWER
        return None

    def report(
        self, point: Value, norm: float, phase: str, *, iterate: Iterate | None, **fields: Any
    ) -> Status | None:
        """Hands out a record.

        Args:
            point: The current iterate, or what is known of it.
            norm: Its relative gradient norm.
            phase: As in :class:`IterationRecord`.
            iterate: The same, where a small gradient may end the run here.
            **fields: The other fields of the record.

        Returns:
            The status if a bound is met.
        """
        record = IterationRecord(
            iteration=self.iteration,
            seconds=time.perf_counter() - self._began,
            loss=point.loss,
            regularised=point.regularised,
            gradient_norm=norm,
            passes=self._objective.passes,
            phase=phase,
            operations=self._objective.operations.as_dict(),
            **fields,
        )
        if self._observe(record):
            return Status.STOPPED
        if iterate is not None and (status := self.judge(iterate, norm)):
            return status
        if self.iteration >= self._settings.max_iterations:
            return Status.MAX_ITERATIONS
        if self.out_of_time():
            return Status.MAX_SECONDS
        return None


def counted_on(observe: Callback, records: list[IterationRecord]) -> Callback:
    """Observes one of several runs, its iterations counted on.

    Args:
        observe: Called with each record; a true answer stops the run.
        records: Those of the runs before; the new ones are added.

    Returns:
        What the run is given.
    """
    done = records[-1].iteration if records else 0

    def counted(record: IterationRecord) -> bool | None:
        records.append(replace(record, iteration=record.iteration + done))
        return observe(records[-1])

    return counted


def relative_gradient_norm(point: Iterate) -> float:
    """Dual norm of the reduced gradient in the natural metric over ``||B - mean||_F^2``."""
    norm = natural_metric(point).dual_norm(point.gradient)
    return norm / point.objective.target_norm_squared


def rounding_of(point: Point) -> float:
    """Changes of the objective below this cannot be told from rounding."""
    return 64 * torch.finfo(point.theta.dtype).eps * abs(point.value)
