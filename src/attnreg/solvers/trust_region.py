"""The one loop: a damped Newton method on the reduced objective.

Each iteration solves ``(H + damping I) d = -g``, by a dense factorisation where the matrix is
cheaper than the products it saves and inexactly by preconditioned conjugate gradients elsewhere,
and compares the change of the objective with the change that the quadratic model predicted
(Levenberg 1944, Marquardt 1963, More 1978; inexact steps after Steihaug 1983). A rejected step
is an iteration of the same loop.

* **Curvature.** Gauss-Newton far from the solution, where the exact Hessian leads to saddle
  points; the exact Hessian once the steps have become small, for its quadratic tail. A step
  that meets negative curvature follows it, and if that does not pay, Gauss-Newton goes on for
  a while (twice as long at each such return).
* **Damping** is Euclidean, in units of the mean eigenvalue of the curvature, so that early
  steps stay in the directions with variance. In the Newton phase it is scaled by the relative
  gradient and vanishes at the solution (heuristic; the tail is quadratic because of it).
* **Preconditioner and stopping test** live in the natural metric; the preconditioner is corrected
  by the products of the solves before.
* **Cold starts.** Where inputs have few effective dimensions the start is chosen in a race of
  many; a start whose path ends on a plateau is left for another one (:mod:`.restarts`).
* **Path.** Stages of an extra ridge on the readout; the next stage begins when a step of the
  current one gains less than ``STAGE_GAIN`` of the objective, or its gradient is within ``tol``.
  Where the path ends above the value of a start, the loop goes on from that start instead.

At the level of rounding the objective can no longer judge a step; there a step is taken when
it lowers the norm of the gradient, and the loop ends when it does not.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attnreg.curvature.dense import assemble_gauss_newton, assemble_hessian, assembly_cost
from attnreg.curvature.preconditioner import BlockSolver, gauss_newton_estimate
from attnreg.linear_solve.cg import conjugate_gradients
from attnreg.linear_solve.cholesky import DenseSolver
from attnreg.linear_solve.curvature_pairs import CurvaturePairs
from attnreg.linear_solve.solve import Solve
from attnreg.objective import Objective, Point
from attnreg.records import Callback, Status
from attnreg.solvers.restarts import Restarts, Start
from attnreg.solvers.run import (
    ACCEPT,
    Outcome,
    Run,
    Settings,
    relative_gradient_norm,
    rounding_of,
)

STAGE_GAIN = 1e-2
"""A stage of the path ends when a step gains less than this share of the objective."""

NEWTON_GAIN = 1e-2
"""The exact Hessian is tried once a step gains less than this share of the objective."""

OVERHEAD = 1.0
"""A solve with Gauss-Newton ends where another product gains less than the average, so many for
the point counted in. On one real layer 0.7 to 1.3 took alike long, 2 and 4 longer; a point costs
about 1.5 products there."""

ESTIMATE_EVERY = 3
"""Points that share an estimate of the curvature: what it has missed since, the pairs correct."""

FORCING = 0.3
"""Largest relative residual of a solve with the exact Hessian."""

DAMPING, PATH_DAMPING = 0.03, 1.0
"""First damping, off and on the path, in units of the mean eigenvalue of the curvature."""

MIN_PATH_DAMPING = 1e-2
"""Damping does not fall below this before the last stage."""

MIN_FORCING = 1e-4
"""Smallest one: in the Newton phase forcing follows the gradient norm, for a quadratic tail."""

MAX_INNER = 200
"""Largest number of products of a linear solve."""

DENSE_COST = 10.0
"""The curvature is assembled where that costs at most this many products, or as many as the last
solve by conjugate gradients took."""

DENSE_RATE = 3.0
"""Rate of the assembly's large matrix products over that of an attention product (measured)."""

MAX_DENSE_SIZE = 4096
"""Largest number of parameters for which a dense matrix is formed."""

MIN_DAMPING, MAX_DAMPING = 1e-12, 1e12


class TrustRegion:
    """The state of one run of the loop.

    Args:
        objective: What is minimised.
        theta: Flat start.
        settings: What bounds the run.
        generator: Source of the preconditioner's random signs.
        observe: Called with each record; a true answer stops the run.
        began: ``time.perf_counter()`` from which seconds are counted.
    """

    def __init__(
        self,
        objective: Objective,
        theta: Tensor,
        settings: Settings,
        generator: torch.Generator,
        observe: Callback,
        began: float,
    ) -> None:
        self._objective, self._settings = objective, settings
        self._generator = generator
        self._run = Run(objective, settings, observe, began)
        self._last_products = 0
        self._dense: tuple[bool, DenseSolver] | None = None  # of the point; if the exact Hessian
        self._start, self._start_value = theta, math.inf  # the best of all starts
        self._begin(theta)
        layout = objective.layout
        self._assembly_cost = math.inf
        if layout.plain and layout.size <= MAX_DENSE_SIZE:
            self._assembly_cost = assembly_cost(self._point) / DENSE_RATE
        cold = not self._final and layout.only_queries_move
        self._restarts = Restarts(objective, generator, self._run.out_of_time, allowed=cold)

    def _begin(self, theta: Tensor, stage: int = 0) -> None:
        """Goes to a start and a stage of the path."""
        features = self._objective.features(theta)
        columns = features.columns
        power = float(torch.linalg.vector_norm(columns, dtype=torch.float64)) ** 2
        self._unit = power / columns.shape[1]
        self._stage = stage
        self._damping = DAMPING if self._final else PATH_DAMPING
        self._pairs = CurvaturePairs(theta)
        self._estimate: BlockSolver | None = None
        self._estimated = 0  # points that the estimate has served
        self._gain = math.inf  # share of the objective that the last step gained
        self._newton, self._newton_from, self._patience = False, 0, 2
        own = Point(self._objective, features)
        if own.value < self._start_value:
            self._start, self._start_value = theta, own.value
        damping = self._settings.stages[stage] * self._unit
        self._move(Point(self._objective, features, damping) if damping else own)
        self._first_norm = self._norm

    def run(self) -> Outcome:
        """Iterates until a bound is met, the test holds, or nothing helps any more."""
        status = None
        try:
            status, theta = self._report("start", 0.0, 0, accepted=True), self._start
            if status is None and (first := self._restarts.first(theta)):
                status = self._restart(first)
            while status is None:
                status = self._iterate()
        except KeyboardInterrupt:
            status = Status.INTERRUPTED
        if self._point.damping:  # stopped on the path: hand out the problem's own objective
            self._move(Point(self._objective, self._point.features))
        best = self._restarts.best_of(self._point)
        if best.value > self._start_value:  # stopped before the path had come so far
            best = Point(self._objective, self._objective.features(self._start))
        if best is not self._point:
            self._move(best)
        return Outcome(self._point, status)

    # ------------------------------------------------------------------ one iteration

    def _iterate(self) -> Status | None:
        self._advance_path()
        if self._final:
            best = self._point.value <= self._restarts.best_value
            if best and (status := self._run.judge(self._point, self._norm)):
                return status
            ends = not best and self._norm <= self._run.tol
            if ends or self._restarts.crawls(self._run.iteration, self._norm):
                return self._restart(self._restarts.leave(self._point))
        self._choose_curvature()
        point = self._point
        if self._estimate is None or self._estimated >= ESTIMATE_EVERY:
            self._estimate, self._estimated = gauss_newton_estimate(point, self._generator), 0
        shift = self._damping * self._estimate.mean_eigenvalue
        if self._newton:
            shift *= min(1.0, self._norm / self._first_norm)
        solve = self._solve(shift)
        if solve.negative is not None:
            solve = self._follow_negative_curvature(solve)
        accepted, stalled = self._try(solve)
        self._run.iteration += 1
        phase = "newton" if self._newton else "gauss-newton"
        if self._newton and (solve.negative is not None or not accepted):
            self._leave_newton()
        if stalled and self._final:
            if self._point.value > self._restarts.best_value:
                return self._restart(self._restarts.leave(self._point))
            return Status.STALLED
        if stalled:
            self._gain = 0.0  # this stage of the path has nothing more to give
        return self._report(phase, shift, solve.iterations, accepted)

    def _restart(self, start: Start) -> Status | None:
        """Goes on elsewhere."""
        self._run.iteration += 1
        self._begin(start.theta, 0 if start.phase == "path" else len(self._settings.stages) - 1)
        return self._report(start.phase, 0.0, 0, accepted=True)

    def _solve(self, shift: float) -> Solve:
        point, estimate = self._point, self._estimate
        assert estimate is not None
        if self._assembly_cost <= max(DENSE_COST, self._last_products):
            return self._solve_dense(shift)
        forcing = MIN_FORCING
        if self._newton:
            forcing = min(FORCING, max(MIN_FORCING, self._norm / self._first_norm))
        product = point.hessian if self._newton else point.gauss_newton
        floor = MIN_DAMPING * estimate.mean_eigenvalue
        precondition = estimate.inverse(max(shift, floor))
        solve = conjugate_gradients(
            product,
            point.gradient,
            precondition,
            shift,
            forcing,
            MAX_INNER,
            self._run.out_of_time,
            None if self._newton else OVERHEAD,
            self._pairs,
        )
        self._last_products = solve.iterations
        return solve

    def _solve_dense(self, shift: float) -> Solve:
        """The matrix of a point is kept: a rejected step changes the damping only."""
        if self._dense is None or self._dense[0] != self._newton:
            assemble = assemble_hessian if self._newton else assemble_gauss_newton
            self._dense = (
                self._newton,
                DenseSolver(assemble(self._point), self._objective.operations),
            )
        return self._dense[1].solve(self._point.gradient, shift)

    def _follow_negative_curvature(self, solve: Solve) -> Solve:
        """Extends a direction along negative curvature, as long as the direction itself."""
        assert solve.negative is not None
        p, gradient = solve.negative, self._point.gradient
        norm = float(torch.linalg.vector_norm(p))
        length = float(torch.linalg.vector_norm(solve.direction))
        if norm == 0.0:
            return solve
        # CG's first direction has no step before it: fall back on the size of the parameters.
        length = length or 1e-2 * float(torch.linalg.vector_norm(self._point.theta))
        step = length / norm
        slope = min(0.0, float(gradient @ p)) * step
        change = solve.model_change + slope + 0.5 * step**2 * solve.negative_curvature
        return replace(solve, direction=solve.direction.add(p, alpha=step), model_change=change)

    def _try(self, solve: Solve) -> tuple[bool, bool]:
        """Takes or rejects a step and updates the damping: accepted, stalled."""
        point = self._point
        rounding = rounding_of(point)
        if not solve.model_change < 0.0:
            self._damping = min(MAX_DAMPING, 4 * max(self._damping, MIN_DAMPING))
            return False, self._damping >= MAX_DAMPING or not self._newton
        features = self._objective.features(point.theta + solve.direction)
        if not bool(features.columns.isfinite().all()):  # logits that overflow
            self._damping = min(MAX_DAMPING, 4 * max(self._damping, 1e-8))
            return False, self._damping >= MAX_DAMPING
        trial = Point(self._objective, features, point.damping)
        change = trial.value - point.value
        ratio = change / solve.model_change if math.isfinite(change) else -1.0
        if -solve.model_change <= rounding and self._final:
            return self._polish(trial, change, rounding)
        if ratio > 0.75:
            self._damping = max(self._floor, self._damping / (10.0 if self._final else 3.0))
        elif ratio < 0.25:
            self._damping = min(MAX_DAMPING, 4 * max(self._damping, 1e-8))
        if not ratio > ACCEPT:
            return False, self._damping >= MAX_DAMPING
        self._gain = -change / abs(point.value)
        self._move(trial)
        return True, False

    def _polish(self, trial: Point, change: float, rounding: float) -> tuple[bool, bool]:
        """At the level of rounding the gradient judges; both curvatures have to fail at a point."""
        self._gain = 0.0
        if change <= rounding and relative_gradient_norm(trial) < self._norm:
            self._move(trial)
            return True, False
        self._failed.add(self._newton)
        self._newton_from = self._run.iteration
        return False, len(self._failed) == 2

    # ------------------------------------------------------------------ pieces

    @property
    def _final(self) -> bool:
        return self._stage == len(self._settings.stages) - 1

    @property
    def _floor(self) -> float:
        return MIN_DAMPING if self._final else MIN_PATH_DAMPING

    def _advance_path(self) -> None:
        if self._final or (self._gain >= STAGE_GAIN and self._norm > self._run.tol):
            return
        self._stage += 1
        damping = self._settings.stages[self._stage] * self._unit
        self._move(Point(self._objective, self._point.features, damping))
        self._gain = math.inf
        if self._final and self._point.value > self._start_value:  # the path led astray
            self._move(Point(self._objective, self._objective.features(self._start)))

    def _choose_curvature(self) -> None:
        if self._final and self._gain < NEWTON_GAIN and self._run.iteration >= self._newton_from:
            self._newton = True

    def _leave_newton(self) -> None:
        self._newton = False
        self._newton_from = self._run.iteration + self._patience
        self._patience *= 2

    def _move(self, point: Point) -> None:
        self._point, self._dense = point, None
        self._failed: set[bool] = set()  # curvatures whose step at this point polishes nothing
        self._estimated += 1
        self._norm = relative_gradient_norm(point)

    def _report(self, phase: str, shift: float, inner: int, accepted: bool) -> Status | None:
        """Hands out a record; the status if a bound is met."""
        best = self._point.value <= self._restarts.best_value
        return self._run.report(
            self._point,
            self._norm,
            phase,
            iterate=self._point if self._final and best else None,
            damping=shift,
            path=self._settings.stages[self._stage],
            inner_iterations=inner,
            accepted=accepted,
        )
