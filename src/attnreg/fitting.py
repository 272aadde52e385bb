"""``fit``: from a problem and a model to a result."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attnreg.certificate import Certificate, verify
from attnreg.lifting import lifted
from attnreg.models import Bilinear, Model
from attnreg.objective import Iterate, Objective
from attnreg.problem import AttentionProblem
from attnreg.progress import ProgressDisplay
from attnreg.records import Callback, IterationRecord, Status
from attnreg.reduction.sampling import sample_for_moments
from attnreg.result import FitResult
from attnreg.solvers.approximate_newton import MAX_DENSE_SIZE, ApproximateNewton
from attnreg.solvers.choice import chosen
from attnreg.solvers.minibatches import Pooled, over_all_rows, sampled
from attnreg.solvers.multistart import multistart
from attnreg.solvers.path import WARM, stages_for
from attnreg.solvers.rounds import rounds_then_curvature
from attnreg.solvers.run import Outcome, Run, Settings, counted_on
from attnreg.solvers.stochastic import Stochastic
from attnreg.solvers.trust_region import TrustRegion

SOLVERS = ("trust-region", "stochastic", "newton-sketch", "newton-cg", "auto")
FIRST_CERTIFIED = 1e-9
"""Bound on the gradient at which a certificate is tried first: a larger gradient seldom gets one,
and a Newton step more costs less than a certificate."""

MAX_STARTS = 1 << 16
"""A number of starts above is taken for a mistake: their matrices alone may not fit in memory."""

CUT_SHORT = (Status.MAX_SECONDS, Status.INTERRUPTED, Status.STOPPED)
"""Who wants to stop now is not made to wait for a certificate."""


def fit(
    problem: AttentionProblem,
    model: Model | None = None,
    *,
    solver: str = "trust-region",
    init: Mapping[str, Tensor] | FitResult | None = None,
    starts: int = 1,
    tol: float = 1e-8,
    max_iterations: int = 500,
    max_seconds: float | None = None,
    seed: int = 0,
    certify: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
) -> FitResult:
    """Minimises ``L`` plus the problem's ridges over the parameters of a model.

    Args:
        problem: Inputs, outputs, mask, weights, scale and ridges.
        model: What is fitted; default :class:`Bilinear`.
        solver: ``"trust-region"``, for every problem; ``"stochastic"``, mini-batches of sequences,
            for data with many residuals a parameter (an iteration is an epoch, of little data
            several; the start is ``init``'s, and queries and keys move more slowly where that
            explains a tenth of ``B``'s spread; the rate falls to zero at the bound, so set
            one; gradients, and the moments that their norm is measured in, are of some of the
            rows);
            ``"newton-sketch"``, the paper's algorithm with sampled query rows; ``"newton-cg"``,
            the same by conjugate gradients in the natural metric. The last two are for
            :class:`Bilinear` with both ridges, and descend from the start with constant forcing:
            no path and no other starts. ``"auto"`` takes mini-batches for a layer with at least
            10 residuals a parameter: for all of ``max_seconds``, or, without it, in rounds twice
            as long each time until one gains less than a twentieth, after which ``"trust-region"``
            goes on from there; and ``"trust-region"`` for all else. A start with a readout that
            explains less than a tenth of ``B``'s spread is led through the layer with as many
            key/value heads as query heads, which shows those that may share one, where that has 40
            residuals a parameter and room for 110 steps (no ridges, no norms, two key/value heads
            at least): the heads of the result are in another order than those of ``init``.
            A note of the result says which and why, and the history's phases show it.
        init: Named parameters to start from, or a result to continue. A start whose readout
            (``Y``, or ``W_O`` and ``b_O``) is zero is led in by the regularisation path; for
            :class:`Bilinear` other starts are tried too, and the loss may rise between them. The
            result is the best point of all, never worse than ``init`` with its best readout
            (mini-batches: on a sample of the rows, where they differ there by more than a tenth).
        starts: Above 1, so many starts, ``init``'s among them, descend side by side first, then
            reflections of the best minima; the fit goes on from the best end, and the result's
            ``minima`` says what was found. For :class:`Bilinear` with ``"trust-region"`` and ``X``
            of at most 1024 entries. Meanwhile a record is made where the best so far has fallen,
            ``max_iterations`` bounds nothing, and ``max_seconds`` is looked at after each step
            that all starts take.
        tol: The fit has converged when the dual norm of the reduced gradient in the natural
            metric is at most ``tol * ||B - mean||_F^2``.
        max_iterations: Bound on the iterations, rejected steps included.
        max_seconds: Bound on the wall time, checked after every product; the step in hand is
            still tried.
        seed: Seed of the start without ``init`` and of all samples of the solver; the same
            seed gives the same fit on the same machine with the same number of threads.
        certify: Whether ``tol`` is the certified gap instead: the fit goes on, with ever smaller
            gradients, until :func:`attnreg.verify` bounds the regularised value less that at the
            minimiser by ``tol * ||B - mean||_F^2``. For :class:`Bilinear`; the result has the
            certificate, and a note where it is not strong enough.
        progress: Whether a live display is shown on the terminal.
        callback: Called with every :class:`IterationRecord`; a true answer stops the fit.

    Returns:
        The result. Ctrl-C returns the best iterate so far with its status.

    Raises:
        ValueError: If an argument is out of range, ``init`` does not fit the model, or the solver
            is not for this problem.
    """
    began = time.perf_counter()
    model = Bilinear() if model is None else model
    automatic = solver == "auto"
    check_bounds(tol, max_iterations, max_seconds)
    check_solver(solver, problem, model)
    check_starts(starts, solver, model)
    if certify and solver == "stochastic":
        raise ValueError(
            "certify=True needs a point next to a minimiser, and solver='stochastic' does not come "
            "as near: certify a second fit with solver='trust-region' and init=result"
        )
    if certify and not isinstance(model, Bilinear):
        raise ValueError(
            f"certify=True needs a bound on the gap, which there is for Bilinear only, and "
            f"{type(model).__name__} was given: fit without it and call verify(), which says "
            "whether the point is stationary"
        )
    if isinstance(init, FitResult):
        if init.model != model:
            raise ValueError(
                f"init is a fit of {init.model}, the model is {model}: pass model=init.model"
            )
        init = init.parameters
    template = model.start(problem, seed) if init is None else dict(init)
    theta, readout = model.split(problem, template)
    digest = problem.digest()  # of all data: now, since at the end it would come after the bound
    reasons: tuple[str, ...] = ()
    if automatic:
        solver, reason = chosen(problem, model, theta.numel() + readout.numel())
        reasons = (f"solver='auto' took {solver!r}: {reason}",)
    history: list[IterationRecord] = []
    certifier = Certifier(problem, model, template, tol) if certify else None
    bound = min(tol, FIRST_CERTIFIED) if certify else tol
    confirm = None if certifier is None else certifier.confirms
    with ProgressDisplay(problem, bound, max_seconds, enabled=progress) as display:
        observe = display.observer(history, callback)
        measured = sample_for_moments(problem) if solver == "stochastic" else problem
        objective = Objective(problem, model, measured)
        generator = torch.Generator().manual_seed(seed)
        stages = stages_for(readout) if solver == "trust-region" else WARM
        settings = Settings(bound, max_iterations, max_seconds, stages, confirm)
        found = None
        if starts > 1:
            run = Run(objective, settings, observe, began)
            found = multistart(objective, theta, starts, generator, run, display.show, stages)
            theta, settings = found.theta, replace(settings, stages=WARM)
            if found.ended is not None:
                settings = replace(settings, max_iterations=0)
        if solver == "trust-region":
            outcome = TrustRegion(objective, theta, settings, generator, observe, began).run()
        elif solver == "stochastic":
            begin = sampled(objective, theta)
            near = begin.explains(readout)
            if automatic:
                outcome, solver, more = _mini_batches(
                    begin, template, settings, generator, observe, began, near=near
                )
                reasons = (*reasons, *more)
            else:
                outcome = Stochastic(begin, settings, generator, observe, began, near=near).run()
        else:
            source = generator if solver == "newton-sketch" else None
            loop = ApproximateNewton(objective, theta, settings, observe, began, source)
            outcome = loop.run()
        status, notes, certificate = outcome.status, reasons + _notes(outcome), None
        if found is not None and found.ended and status is Status.MAX_ITERATIONS:
            status = found.ended
        if certifier is not None and status not in CUT_SHORT:
            confirmed, certificate = certifier.confirms(outcome.point), certifier.certificate
            status = Status.CERTIFIED if confirmed else status
        if certifier is not None and status is not Status.CERTIFIED:
            why = "the fit was cut short" if certificate is None else certificate.reason
            notes += (f"the gap is not certified: {why}",)
    point = outcome.point
    return FitResult(
        parameters=model.join(problem, point.theta, point.readout, template),
        model=model,
        loss=point.loss,
        regularised_loss=point.regularised,
        relative_error=problem.relative_error(point.loss),
        gradient_norm=outcome.gradient_norm,
        tol=tol,
        status=status,
        history=tuple(history),
        notes=notes,
        seed=seed,
        scale=problem.scale,
        causal=problem.causal,
        window=problem.window,
        problem_digest=digest,
        certificate=certificate,
        solver=solver,
        minima=None if found is None else found.minima,
    )


def _mini_batches(
    begin: Pooled,
    template: Mapping[str, Tensor],
    settings: Settings,
    generator: torch.Generator,
    observe: Callback,
    began: float,
    *,
    near: bool,
) -> tuple[Outcome, str, tuple[str, ...]]:
    """Mini-batches as ``"auto"`` runs them.

    Returns:
        Where they ended, the solver that ended there, and what was done and why.

    Raises:
        KeyboardInterrupt: If the fit is interrupted before there is anything to lose.
    """
    reasons: tuple[str, ...] = ()
    records: list[IterationRecord] = []
    lift, scaled = None, None
    try:
        if not near:
            lift = lifted(begin, template, settings, generator, observe, began, records)
        if lift is not None:
            begin, near, reasons, scaled = lift.point, lift.near, (lift.note,), lift.scaled
            if lift.status is not None:
                return Outcome(over_all_rows(begin), lift.status), "stochastic", reasons
            observe = counted_on(observe, records)
            left = settings.max_iterations - records[-1].iteration
            settings = replace(settings, max_iterations=left)
        if settings.max_seconds is not None:
            loop = Stochastic(begin, settings, generator, observe, began, near=near, scaled=scaled)
            return loop.run(), "stochastic", reasons
        outcome, switched = rounds_then_curvature(
            begin, settings, generator, observe, began, near=near, scaled=scaled
        )
    except KeyboardInterrupt:
        if not records:  # nothing is lost
            raise
        reasons = reasons or ("interrupted on the way to a start",)
        return Outcome(over_all_rows(begin), Status.INTERRUPTED), "stochastic", reasons
    if switched is None:
        return outcome, "stochastic", reasons
    return outcome, "trust-region", (*reasons, switched)


class Certifier:
    """Certificates of the points of a fit, the last one kept.

    Args:
        problem: The problem.
        model: The bilinear model.
        template: As in ``Model.join``.
        tol: Bound on the gap over ``||B - mean||_F^2``.
    """

    def __init__(
        self, problem: AttentionProblem, model: Model, template: Mapping[str, Tensor], tol: float
    ) -> None:
        self._problem, self._model, self._template = problem, model, template
        self._bound = tol * (problem.target_norm_squared or 1.0)
        self._point: Iterate | None = None
        self.certificate: Certificate | None = None

    def confirms(self, point: Iterate) -> bool:
        """Whether the certified gap at a point is within the tolerance."""
        if point is not self._point:
            named = self._model.join(self._problem, point.theta, point.readout, self._template)
            self.certificate = verify(self._problem, named["X"], named["Y"])
            self._point = point
        assert self.certificate is not None
        gap = self.certificate.gap
        return self.certificate.certified and gap is not None and gap <= self._bound


def check_solver(solver: str, problem: AttentionProblem, model: Model) -> None:
    """Whether a solver is for a problem and a model.

    Raises:
        ValueError: If it is not, or there is none of this name.
    """
    if solver not in SOLVERS:
        names = ", ".join(map(repr, SOLVERS))
        raise ValueError(f"solver={solver!r} was given, one of {names} is expected")
    if solver in ("trust-region", "stochastic", "auto"):
        return
    if not isinstance(model, Bilinear):
        raise ValueError(
            f"solver={solver!r} fits the bilinear model, {type(model).__name__} was given: "
            "use solver='trust-region'"
        )
    if problem.ridge_x == 0.0 or problem.ridge_y == 0.0:
        raise ValueError(
            f"solver={solver!r} needs ridge_x and ridge_y above 0, ridge_x={problem.ridge_x:g} and "
            f"ridge_y={problem.ridge_y:g} were given: set both, or use solver='trust-region'"
        )
    size = problem.d_query * problem.d_key
    if solver == "newton-sketch" and size > MAX_DENSE_SIZE:
        raise ValueError(
            f"solver='newton-sketch' forms a matrix with a row for each entry of X and takes at "
            f"most {MAX_DENSE_SIZE}, X has {size}: use solver='newton-cg'"
        )


def check_starts(starts: int, solver: str, model: Model) -> None:
    """Whether a fit can have so many starts.

    Raises:
        ValueError: If there is no start, or the solver or the model takes one only.
    """
    if not isinstance(starts, int) or not 1 <= starts <= MAX_STARTS:
        raise ValueError(
            f"starts={starts!r} was given, a whole number from 1 to {MAX_STARTS} is expected"
        )
    if starts == 1:
        return
    if solver not in ("trust-region", "auto"):
        raise ValueError(
            f"starts={starts} was given with solver={solver!r}, which takes one start: use "
            "solver='trust-region', and its result as init="
        )
    if not isinstance(model, Bilinear):
        raise ValueError(
            f"starts={starts} was given and {type(model).__name__} takes one start: leave starts "
            "at 1, and compare fits with other seed= or init="
        )


def check_bounds(tol: float, max_iterations: int, max_seconds: float | None) -> None:
    """Whether a fit can have these bounds.

    Raises:
        ValueError: If one is out of range.
    """
    if not (math.isfinite(tol) and tol > 0):
        raise ValueError(f"tol={tol} was given, a positive number such as 1e-8 is expected")
    if max_iterations < 0:
        raise ValueError(f"max_iterations={max_iterations} was given, at least 0 is expected")
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds={max_seconds} was given, a positive number is expected")


def _notes(outcome: Outcome) -> tuple[str, ...]:
    """Null directions that were dropped, by block and in the readout."""
    notes, objective = [], outcome.point.objective
    seen, rows = objective.measured.n_rows, objective.problem.n_rows
    what = "carry no data: the parameters were left as they were along them"
    if seen < rows:
        what = f"carry no data in {seen} of {rows} rows, which tell the scale of the inputs"
    fitted = len(objective.left) - objective.layout.held
    for left, block in zip(objective.left[:fitted], objective.layout.blocks, strict=False):
        if left.nullity:
            notes.append(f"{left.nullity} of {block.rows} input directions of {block.name} {what}")
    readout = outcome.point.readout
    if outcome.point.rank < readout.shape[0]:
        notes.append(
            f"the features have rank {outcome.point.rank} of {readout.shape[0]}: the readout is "
            "the minimum-norm solution (features scaled to equal size)"
        )
    return tuple(notes)
