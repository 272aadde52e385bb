"""A fit that goes as far as other sequences say: early stopping, and a ridge on the readout.

With few residuals a weight the minimum of the loss is learnt by heart: the readout first, as least
squares from as many features as the layer is wide, then everything else. So

- the readout of every point that is looked at is solved with ridges too, of which validation
  chooses (:mod:`.judging`);
- mini-batches run in rounds, the first of about :data:`FIRST_STEPS` steps times the root of the
  residuals a weight and each later one :data:`LONGER` times as long, each from the end of the one
  before, with the ridge that was best there towards the centre that was best at the start;
- from the end of a round the way back to the start is tried, a fifth (:data:`.judging.BACK`) at a
  time, while that lowers the error. Where it does, the round went too far and was the last; so was
  one after the first that brought nothing.

The lowest validation error wins. From :data:`.choice.ENOUGH` residuals a weight on there is one
run of mini-batches for all of the time and no ridge (trials in docs/theory.md; with less:
`benchmarks/little_data.py`), from a better start first (:mod:`attnreg.lifting`) where the one given
explains little.

Everything but the clock's bound is decided by counted work.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch

from attnreg.fitting import check_bounds
from attnreg.judging import Candidate, Judge, Stored, Weights, error_of, lowest
from attnreg.lifting import lifted
from attnreg.models import Model
from attnreg.objective import Objective
from attnreg.problem import AttentionProblem
from attnreg.progress import ProgressDisplay
from attnreg.records import Callback, IterationRecord, Status
from attnreg.reduction.sampling import sample_for_moments
from attnreg.result import FitResult
from attnreg.solvers.minibatches import Pooled, minibatches, sampled
from attnreg.solvers.run import Settings, counted_on, relative_gradient_norm
from attnreg.solvers.stochastic import Stochastic, steps_of_iteration

FIRST_STEPS = 72.0
"""Of the first round, where there is one residual a weight."""

LONGER = 2
"""Times the length of a round, of the next."""

TOL = 1e-8
"""Of every round; seldom met."""

TOWARDS = {"start": "the start's", "zero": "zero"}


@dataclass(frozen=True)
class Bounds:
    """What bounds a fit, all its rounds together.

    Attributes:
        iterations: Bound on the iterations.
        seconds: Bound on the time, or None.
    """

    iterations: int
    seconds: float | None


@dataclass(frozen=True)
class Chosen(Candidate):
    """The weights with the lowest validation error.

    Attributes:
        start_error: Of the start, as it was given.
        path: At the end of every round, with its best ridge, by the number of iterations until
            then; where it is finite.
        iterations: Over all rounds.
        status: :attr:`Status.VALIDATED`, or how it was cut short.
        note: How a better start was made, or why not; empty where none was tried.
    """

    start_error: float = math.inf
    path: dict[str, float] = field(default_factory=dict)
    iterations: int = 0
    status: Status = Status.VALIDATED
    note: str = ""


def fit_validated(
    problem: AttentionProblem,
    validation: AttentionProblem,
    model: Model,
    *,
    init: Weights | FitResult | None = None,
    max_iterations: int = 500,
    max_seconds: float | None = None,
    seed: int = 0,
    progress: bool = False,
    callback: Callback | None = None,
) -> FitResult:
    """Fits by mini-batches and takes the point with the lowest error on other sequences.

    For layers with few residuals (tokens times outputs) a weight, whose minimum is learnt by heart.
    With many it goes the way of ``fit(solver="auto")``, by more key/value heads too where the start
    explains little, and says how well it did on other sequences. The validation error of the result
    is slightly optimistic: it is the least of several.

    Args:
        problem: The sequences to fit on, without ridges.
        validation: Others, with the same widths, scale and kind of mask.
        model: What is fitted.
        init: Named parameters to start from, or a result; the better they are, the fewer epochs
            there are in which to overfit. A readout that was solved on the same sequences tells
            nothing new: give the one before. From a start that explains a tenth of the
            outputs' spread queries and keys move more slowly. Default: those of ``model.start``.
        max_iterations: Bound on the iterations of all rounds together.
        max_seconds: Bound on their time, the scoring included.
        seed: Seed of the order of the mini-batches.
        progress: Whether a live display is shown on the terminal.
        callback: Called with every :class:`IterationRecord`; a true answer stops the fit.

    Returns:
        The result, with status ``VALIDATED`` and a note of the choice. Its ``gradient_norm`` is
        that of the reduced objective, without a ridge, at the chosen point; records of the history
        have the ridge of their round. Ctrl-C returns the best point so far.

    Raises:
        ValueError: If a ridge is set, the sequences differ in widths, scale, dtype or device, an
            argument is out of range, the parameters do not fit the model, or no validation error is
            finite.
    """
    if problem.ridge_x or problem.ridge_y:
        raise ValueError(
            f"ridge_x={problem.ridge_x:g} and ridge_y={problem.ridge_y:g} were given with "
            "validation sequences, which choose a ridge themselves: set both to 0"
        )
    check_bounds(TOL, max_iterations, max_seconds)
    for name in ("d_query", "d_key", "d_value", "d_out", "scale", "dtype", "device"):
        given, expected = getattr(validation, name), getattr(problem, name)
        if given != expected:
            raise ValueError(
                f"the validation sequences have {name}={given}, those to fit on have "
                f"{name}={expected}: the same is expected"
            )
    if init is None:
        init = model.start(problem, seed)
    start = init.parameters if isinstance(init, FitResult) else dict(init)
    objective = Objective(problem, model, sample_for_moments(problem))
    history: list[IterationRecord] = []
    with ProgressDisplay(problem, TOL, max_seconds, enabled=progress) as display:
        found = held_out_fit(
            objective,
            start,
            validation,
            bounds=Bounds(max_iterations, max_seconds),
            seed=seed,
            observe=display.observer(history, callback),
        )
    theta, readout = model.split(problem, found.weights)
    point = found.point or Pooled(objective, minibatches(problem.batches), theta)
    point = point.under(objective)
    loss = point.loss_at(readout)
    towards = f" towards {TOWARDS[found.center]}" if found.center else ""
    chosen = (
        f"{found.step:g} of the way to the end of a round, readout with a ridge of {found.ridge:g} "
        f"of the features' mean square{towards}"
    )
    if found.weights is start:
        chosen = "the start as it is"
    errors = f"validation error {found.error:.4f}, of the start {found.start_error:.4f}"
    return FitResult(
        parameters=found.weights,
        model=model,
        loss=loss,
        regularised_loss=loss,
        relative_error=problem.relative_error(loss),
        gradient_norm=relative_gradient_norm(point),
        tol=TOL,
        status=found.status,
        history=tuple(history),
        notes=(f"{errors}; chosen: {chosen}", *([found.note] if found.note else [])),
        seed=seed,
        scale=problem.scale,
        causal=problem.causal,
        window=problem.window,
        problem_digest=problem.digest(),
        solver="stochastic",
    )


def held_out_fit(
    objective: Objective,
    start: Weights,
    validation: AttentionProblem,
    *,
    bounds: Bounds,
    seed: int,
    observe: Callback,
    stored: Stored = lambda weights: weights,
) -> Chosen:
    """The same with its choice, where weights are kept rounded.

    Args:
        objective: The sequences to fit on, and what is fitted.
        start: Weights to start from.
        validation: The sequences that judge.
        bounds: For all rounds together.
        seed: Seed of the order of the mini-batches.
        observe: Called with each record, counted over the rounds; a true answer stops the fit.
        stored: What weights become where they are kept; the errors are those of that.

    Returns:
        The choice, not rounded; of equal ones the first.

    Raises:
        ValueError: If the error of the start is not finite, whatever its readout.
    """
    began = time.perf_counter()
    judge = Judge(objective, Objective(validation, objective.model), stored, start)
    entered = time.perf_counter()
    at_start = judge.look(start, 0.0)
    scoring = time.perf_counter() - entered
    best = lowest(at_start)
    if not math.isfinite(best.error):
        raise ValueError(
            "the validation error of the start is not finite: weights or inputs overflow; use "
            "float32 or bfloat16, or scale the inputs"
        )
    records: list[IterationRecord] = []
    generator = torch.Generator().manual_seed(seed)
    solved = lowest(at_start[1:] or at_start)
    point = judge.ridged(solved) or sampled(objective, judge.theta)
    near = point.explains(judge.readout)
    # Set aside: to judge the last end, half of that for the result, and two or three points on the
    # way back where the start is near and going too far is likely.
    seconds = (math.inf if bounds.seconds is None else bounds.seconds) - 1.5 * scoring
    available = seconds - (2.5 * scoring if near and judge.few else 0.0)
    epochs = bounds.iterations
    if judge.few:
        steps = FIRST_STEPS * judge.residuals**0.5
        epochs = math.ceil(steps / steps_of_iteration(judge.batches))
    path, status, done, running = {}, Status.VALIDATED, 0, 0.0
    note, scaled = "", None
    try:
        if not (near or judge.few):
            settings = Settings(TOL, bounds.iterations, available)
            lift = lifted(point, start, settings, generator, observe, began, records)
            if lift is not None:
                point, near, note, scaled = lift.point, lift.near, lift.note, lift.scaled
                status, done = lift.status or status, records[-1].iteration
        while done < bounds.iterations and status is Status.VALIDATED:
            left = available - (time.perf_counter() - began)
            if running and left <= 0:
                break
            # What would be left for less than another such round, this one takes.
            pace = running / done if done else 0.0
            if 2 * epochs > bounds.iterations - done or 2 * epochs * pace > left:
                epochs = bounds.iterations - done
            settings, counted = Settings(TOL, epochs, available), counted_on(observe, records)
            entered, first = time.perf_counter(), not running
            outcome = Stochastic(
                point, settings, generator, counted, began, near=near, hurried=first, scaled=scaled
            ).run()
            running += time.perf_counter() - entered
            assert isinstance(outcome.point, Pooled)
            done = records[-1].iteration
            looked = judge.look(judge.weights_of(outcome.point), 1.0, outcome.point)
            end = lowest(looked)
            if math.isfinite(end.error):
                path[str(done)] = end.error
            better = end.error < best.error
            best = min(best, end, key=error_of)
            if outcome.status in (Status.INTERRUPTED, Status.STOPPED):
                status = outcome.status
                break
            if not judge.few:
                break
            nearer = judge.way_back(end, began + seconds)
            best = min(best, nearer, key=error_of)
            too_far = nearer.error < end.error
            if too_far or not (first or better) or outcome.status is not Status.MAX_ITERATIONS:
                break
            held = lowest([one for one in looked if one.center in ("", solved.center)] or [end])
            point, epochs = judge.ridged(held) or outcome.point, LONGER * epochs
    except KeyboardInterrupt:
        status = Status.INTERRUPTED
    return Chosen(
        **vars(best),
        start_error=at_start[0].error,
        path=path,
        iterations=records[-1].iteration if records else 0,
        status=status,
        note=note,
    )
