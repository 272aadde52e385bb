r"""Approximate Newton steps with constant forcing: the paper's algorithm, and one without d^6.

Each iteration solves ``H d = -g``, with the exact reduced gradient and products of the exact
Hessian, by conjugate gradients to the relative residual ``FORCING``, always the same. Only the
preconditioner differs between the two solvers:

* ``newton-sketch``: the reduced Gauss-Newton matrix from sampled query rows
  (:mod:`attnreg.curvature.sketch`), within ``1 +- DISTORTION`` of the exact one with probability
  ``1 - FAILURE`` a step, as a dense matrix with its Cholesky factor. Where ``H`` is close to
  Gauss-Newton one or two products are enough: the approximate Newton step of the paper, with the
  best length along it.
* ``newton-cg``: the natural metric ``G1 (x) G2``, whose inverse is two small ones. With a ridge the
  number of products is bounded, whatever ``n``, ``d`` and the inputs' condition number.

Where ``H`` shows a curvature that is not positive, the solve is done again with Gauss-Newton.

Proven (``docs/theory.md``): with a preconditioner ``P`` and ``a P <= H <= b P``, ``a > 0``, near a
minimiser a solve takes at most ``1/2 sqrt(b/a) ln(2 sqrt(b/a) / FORCING) + 1`` products, and the
gap ``V - V*`` falls at least by the smaller of ``((b - a) / (b + a))^2`` and ``b/a FORCING^2`` an
iteration. So the number of iterations is ``O(log(1 / gap))`` and no step needs more accuracy than
another. Directions descend.

Safeguards: a step is taken when the objective falls by a share of what the model predicts, and
shortened otherwise. At the level of rounding, where the objective can no longer judge, its length
minimises the gradient's norm to first order, and it is taken when that norm falls. There is no
damping, no path and no restart: these are methods for regularised problems.
"""

from __future__ import annotations

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
from attnreg.records import Callback, Status
from attnreg.solvers.run import (
    ACCEPT,
    Outcome,
    Run,
    Settings,
    relative_gradient_norm,
    rounding_of,
)

DISTORTION, FAILURE = 0.6, 0.01
"""``eps`` and the probability that one step's sketch is not within it."""

FORCING = 0.1
"""Relative residual of a solve, in the dual norm of the preconditioner."""

MAX_INNER = 1000
"""Largest number of products of a linear solve."""

MAX_DENSE_SIZE = 4096
"""Largest number of entries of ``X`` for which ``newton-sketch`` forms its matrix."""

SHORTEN, SHORTEST = 0.25, 1e-12
"""A rejected step is tried again at this share of its length, down to that of its first."""


@dataclass(frozen=True)
class Preconditioner:
    """A symmetric positive definite approximation of the Hessian.

    Attributes:
        inverse: ``v -> P^{-1} v``.
        rows_sampled: Rows that entered it; None means all.
        rows_available: Those that could have.
    """

    inverse: Callable[[Tensor], Tensor]
    rows_sampled: int | None = None
    rows_available: int | None = None


def from_sketch(
    point: Point, generator: torch.Generator, distortion: float = DISTORTION
) -> Preconditioner:
    """The Gauss-Newton matrix of rows sampled for this point."""
    sketch = sketch_gauss_newton(point, distortion, FAILURE, generator)
    inverse = DenseSolver(sketch.matrix, point.objective.operations).inverse()
    if sketch.exact:
        return Preconditioner(inverse)
    return Preconditioner(inverse, sketch.sampled, sketch.available)


def from_metric(point: Point) -> Preconditioner:
    """The natural metric."""
    return Preconditioner(natural_metric(point).inverse(0.0))


@dataclass(frozen=True)
class Step:
    """A direction and what it took.

    Attributes:
        solve: The direction, and the change that the model predicts for its length 1.
        phase: Name of the curvature, for the record.
        inner_iterations: Products of the linear solves.
    """

    solve: Solve
    phase: str
    inner_iterations: int


def newton_step(
    point: Point,
    preconditioner: Preconditioner,
    out_of_time: Callable[[], bool] | None = None,
    forcing: float = FORCING,
) -> Step:
    """Solves for a direction: with the Hessian, or with Gauss-Newton where that is not positive."""

    def solve(product: Callable[[Tensor], Tensor]) -> Solve:
        bounds = (0.0, forcing, MAX_INNER, out_of_time)
        return conjugate_gradients(product, point.gradient, preconditioner.inverse, *bounds)

    found = solve(point.hessian)
    if found.negative is None:
        return Step(found, "newton", found.iterations)
    again = solve(point.gauss_newton)
    return Step(again, "gauss-newton", found.iterations + again.iterations)


class ApproximateNewton:
    """The state of one run.

    Args:
        objective: What is minimised; regularised.
        theta: Flat start.
        settings: What bounds the run; its path is not used.
        observe: Called with each record; a true answer stops the run.
        began: ``time.perf_counter()`` from which seconds are counted.
        generator: Source of the samples; None preconditions by the natural metric.
    """

    def __init__(
        self,
        objective: Objective,
        theta: Tensor,
        settings: Settings,
        observe: Callback,
        began: float,
        generator: torch.Generator | None,
    ) -> None:
        self._objective, self._settings = objective, settings
        self._run = Run(objective, settings, observe, began)
        self._generator = generator
        self._step: Step | None  # of the current point
        self._move(Point(objective, objective.features(theta)))

    def run(self) -> Outcome:
        """Iterates until a bound is met, the test holds, or nothing helps any more."""
        try:
            status = self._report("start", 0, None, accepted=True)
            while status is None:
                status = self._iterate()
        except KeyboardInterrupt:
            status = Status.INTERRUPTED
        return Outcome(self._point, status)

    def _iterate(self) -> Status | None:
        point, used, inner = self._point, None, 0
        if self._step is None:
            generator = self._generator
            used = from_metric(point) if generator is None else from_sketch(point, generator)
            self._step = newton_step(point, used, self._run.out_of_time)
            self._length, inner = 1.0, self._step.inner_iterations
        phase = self._step.phase
        accepted, stalled = self._try(self._step.solve)
        self._run.iteration += 1
        status = self._report(phase, inner, used, accepted)
        return Status.STALLED if stalled and status is None else status

    def _try(self, solve: Solve) -> tuple[bool, bool]:
        """Takes or rejects a step: accepted, stalled."""
        point, t = self._point, self._length
        slope = float(point.gradient @ solve.direction)
        predicted = t * slope + t**2 * (solve.model_change - slope)
        rounding = rounding_of(point)
        if -predicted <= rounding:
            return self._polish(solve.direction, rounding)
        features = self._objective.features(point.theta + t * solve.direction)
        if bool(features.columns.isfinite().all()):  # no logits that overflow
            trial = Point(self._objective, features)
            if (trial.value - point.value) / predicted > ACCEPT:
                self._move(trial)
                return True, False
        self._length *= SHORTEN
        return False, self._length < SHORTEST

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
        norm = relative_gradient_norm(point)  # before: an interrupt here leaves all as it was
        self._point, self._norm, self._step = point, norm, None

    def _report(
        self, phase: str, inner: int, used: Preconditioner | None, accepted: bool
    ) -> Status | None:
        return self._run.report(
            self._point,
            self._norm,
            phase,
            iterate=self._point,
            damping=0.0,
            path=0.0,
            inner_iterations=inner,
            accepted=accepted,
            rows_sampled=None if used is None else used.rows_sampled,
            rows_available=None if used is None else used.rows_available,
        )
