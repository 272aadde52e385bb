r"""Approximate Newton steps with constant forcing: the paper's algorithm, and the same by CG.

Each iteration finds a direction ``d`` from the exact reduced gradient ``g`` and moves by the
minimiser of the quadratic model with the exact Hessian ``H`` along it, ``t = -g.d / d.H d``.
Only the linear solve differs between the two solvers:

* ``newton-sketch``: ``K~ d = -g`` by dense Cholesky, with ``K~`` from sampled query rows
  (:mod:`attnreg.curvature.sketch`), within ``1 +- DISTORTION`` of the reduced Gauss-Newton matrix
  ``K`` with probability ``1 - FAILURE`` a step. One product with ``H`` gives ``t``.
* ``newton-cg``: ``H d = -g`` by conjugate gradients, preconditioned by the natural metric
  ``G1 (x) G2``, to the relative residual ``FORCING``; with ``K`` instead where ``H`` shows a
  curvature that is not positive. With a ridge the number of products is bounded, whatever ``n``,
  ``d`` and the inputs' condition number. ``t`` is 1 where ``H`` was used.

Proven (``docs/theory.md``): near a minimiser with ``a K~ <= H <= b K~`` and ``a > 0`` the gap
``V - V*`` falls at least by the factor ``((b - a) / (b + a))^2`` an iteration (Kantorovich), that
is ``DISTORTION^2`` where ``H = K``; with conjugate gradients by that of the natural metric at
least. So the number of iterations is ``O(log(1 / gap))`` and no step needs more accuracy than
another: forcing is constant. Directions descend, as the matrices are positive definite on the
directions that carry data.

Safeguards: a step is taken when the objective falls by a share of what the model predicts, and
shortened otherwise. At the level of rounding, where the objective can no longer judge, its length
minimises the gradient's norm to first order, and it is taken when that norm falls. Where the
curvature ``d.H d`` is not positive, the first length is 1. There is no damping, no path and no
restart: these are methods for regularised problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.curvature.preconditioner import natural_metric
from attnreg.curvature.sketch import sketch_gauss_newton
from attnreg.linear_solve.cg import conjugate_gradients
from attnreg.linear_solve.cholesky import DenseSolver
from attnreg.linear_solve.solve import Solve
from attnreg.objective import Objective, Point
from attnreg.records import IterationRecord, Status
from attnreg.solvers.run import (
    ACCEPT,
    Outcome,
    Run,
    Settings,
    relative_gradient_norm,
    rounding_of,
)

DISTORTION, FAILURE = 0.6, 0.01
"""``eps`` and the probability that one step's sketch is not within it. The work to a gap is
``eps^-2 / log(1 / eps)``, smallest at ``exp(-1/2)``."""

FORCING = 0.1
"""Relative residual of a solve by conjugate gradients, in the dual natural metric."""

MAX_INNER = 1000
"""Largest number of products of a linear solve."""

MAX_DENSE_SIZE = 4096
"""Largest number of entries of ``X`` for which ``newton-sketch`` forms its matrix."""

SHORTEN, SHORTEST = 0.25, 1e-12
"""A rejected step is tried again at this share of its length, down to that of its first."""


@dataclass(frozen=True)
class Step:
    """A direction and what it took.

    Attributes:
        direction: ``d``, flat.
        phase: Name of the curvature, for the record.
        curvature: ``d.H d`` where the solve has found it, else None.
        inner_iterations: Products of the linear solve.
        rows_sampled: Rows that entered the curvature; None means all.
        rows_available: Those that could have.
    """

    direction: Tensor
    phase: str
    curvature: float | None = None
    inner_iterations: int = 0
    rows_sampled: int | None = None
    rows_available: int | None = None


LinearSolve = Callable[[Point], Step]


def solve_by_sketch(
    generator: torch.Generator, distortion: float = DISTORTION, failure: float = FAILURE
) -> LinearSolve:
    """Dense Cholesky of a sketch, drawn anew at each point."""

    def solve(point: Point) -> Step:
        sketch = sketch_gauss_newton(point, distortion, failure, generator)
        dense = DenseSolver(sketch.matrix, point.objective.operations)
        direction = dense.solve(point.gradient, 0.0).direction
        if sketch.exact:
            return Step(direction, "gauss-newton")
        return Step(direction, "sketch", None, 0, sketch.sampled, sketch.available)

    return solve


def solve_by_cg(out_of_time: Callable[[], bool], forcing: float = FORCING) -> LinearSolve:
    """Conjugate gradients, preconditioned by the natural metric: the Hessian, or Gauss-Newton."""

    def solve(point: Point) -> Step:
        gradient, precondition = point.gradient, natural_metric(point).inverse(0.0)

        def found_with(product: Callable[[Tensor], Tensor]) -> Solve:
            bounds = (0.0, forcing, MAX_INNER, out_of_time)
            return conjugate_gradients(product, gradient, precondition, *bounds)

        found = found_with(point.hessian)
        if found.negative is None:
            curvature = 2.0 * (found.model_change - float(gradient @ found.direction))
            return Step(found.direction, "newton", curvature, found.iterations)
        again = found_with(point.gauss_newton)
        spent = found.iterations + again.iterations
        return Step(again.direction, "gauss-newton", None, spent)

    return solve


class ApproximateNewton:
    """The state of one run.

    Args:
        objective: What is minimised; regularised.
        theta: Flat start.
        settings: What bounds the run; its path is not used.
        observe: Called with each record; a true answer stops the run.
        began: ``time.perf_counter()`` from which seconds are counted.
        generator: Source of the samples; None solves by conjugate gradients.
    """

    def __init__(
        self,
        objective: Objective,
        theta: Tensor,
        settings: Settings,
        observe: Callable[[IterationRecord], bool | None],
        began: float,
        generator: torch.Generator | None,
    ) -> None:
        self._objective, self._settings = objective, settings
        self._run = Run(objective, settings, observe, began)
        by_cg = solve_by_cg(self._run.out_of_time)
        self._solve = by_cg if generator is None else solve_by_sketch(generator)
        self._step: Step | None = None  # of the current point
        self._move(Point(objective, objective.features(theta)))

    def run(self) -> Outcome:
        """Iterates until a bound is met, the test holds, or nothing helps any more."""
        try:
            status = self._report(Step(self._point.theta, "start"), accepted=True)
            while status is None:
                status = self._iterate()
        except KeyboardInterrupt:
            status = Status.INTERRUPTED
        return Outcome(self._point, self._norm, status)

    def _iterate(self) -> Status | None:
        if self._step is None:
            self._step = step = self._solve(self._point)
            self._measure_along(step)
        else:  # once more, shorter: the solve was reported with the first try
            step = Step(self._step.direction, self._step.phase)
        accepted, stalled = self._try(step.direction)
        self._run.iteration += 1
        status = self._report(step, accepted)
        return Status.STALLED if stalled and status is None else status

    def _measure_along(self, step: Step) -> None:
        """Slope, curvature and first length of a step."""
        point, direction = self._point, step.direction
        self._slope = float(point.gradient @ direction)
        if step.curvature is None:
            self._curvature = float(direction @ point.hessian(direction))
        else:
            self._curvature = step.curvature
        if not self._curvature > 0.0:
            self._curvature = -self._slope  # the approximation's own: its step has length 1
        self._length = self._first = -self._slope / self._curvature if self._curvature else 0.0

    def _try(self, direction: Tensor) -> tuple[bool, bool]:
        """Takes or rejects a step: accepted, stalled."""
        point, t = self._point, self._length
        predicted = t * self._slope + 0.5 * t**2 * self._curvature
        rounding = rounding_of(point)
        if -predicted <= rounding:
            return self._polish(direction, rounding)
        features = self._objective.features(point.theta + t * direction)
        trial, change = None, math.inf
        if bool(features.columns.isfinite().all()):  # no logits that overflow
            trial = Point(self._objective, features)
            change = trial.value - point.value
        if trial is None or not change / predicted > ACCEPT:
            self._length *= SHORTEN
            return False, self._length < SHORTEST * self._first
        self._move(trial)
        return True, False

    def _polish(self, direction: Tensor, rounding: float) -> tuple[bool, bool]:
        """Takes the step that the gradient's norm asks for, or ends the run."""
        point = self._point
        change = point.hessian(direction)  # of the gradient
        dual = natural_metric(point).inverse(0.0)(change)
        square = float(change @ dual)
        if not square > 0.0:
            return False, True
        length = -float(point.gradient @ dual) / square
        trial = Point(self._objective, self._objective.features(point.theta + length * direction))
        taken = trial.value - point.value <= rounding and relative_gradient_norm(trial) < self._norm
        if taken:
            self._move(trial)
        return taken, not taken

    def _move(self, point: Point) -> None:
        self._point, self._step = point, None
        self._norm = relative_gradient_norm(point)

    def _report(self, step: Step, accepted: bool) -> Status | None:
        return self._run.report(
            self._point,
            self._norm,
            step.phase,
            may_converge=True,
            damping=0.0,
            path=0.0,
            inner_iterations=step.inner_iterations,
            accepted=accepted,
            rows_sampled=step.rows_sampled,
            rows_available=step.rows_available,
        )
