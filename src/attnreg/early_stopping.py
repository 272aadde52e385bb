"""A fit that goes as far as other sequences say: early stopping, and a ridge on the readout.

With few residuals a weight the minimum of the loss is learnt by heart: the readout first, as least
squares from as many features as the layer is wide, then everything else. So

- the readout of every point that is looked at is solved with ridges too, shares
  :data:`RIDGES` of the features' mean square on the diagonal (the constant row is free). They pull
  it towards the readout of the start, or towards zero: which, the start's validation errors say;
- mini-batches run in rounds, the first of :data:`FIRST` epochs and each later one :data:`LONGER`
  times as long, each from the end of the one before and with the ridge that was best there, until
  one after the first brings nothing;
- points on the way from the start to the end of the best round, and to that of the last where there
  is time, are compared with the ends.

A start's readout is worth pulling towards where it is not from the same data, such as what is left
of an original layer's. One that was solved on them is where least squares ends anyway.

The lowest validation error wins. From :data:`ENOUGH` residuals a weight on there is one run of
mini-batches for all of the time and no ridge (trials in docs/theory.md; with less:
`benchmarks/little_data.py`).

Everything but the clock's bound is decided by counted work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnreg.fitting import check_bounds
from attnreg.models import Model, Ridge
from attnreg.objective import Objective
from attnreg.problem import AttentionProblem
from attnreg.progress import ProgressDisplay
from attnreg.records import Callback, IterationRecord, Status
from attnreg.result import FitResult
from attnreg.solvers.minibatches import Pooled, minibatches
from attnreg.solvers.run import Outcome, Settings, counted_on, relative_gradient_norm
from attnreg.solvers.stochastic import Stochastic

RIDGES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
FIRST, LONGER = 6, 2
STEPS = (0.5, 0.75)
"""Points on the way from the start (0) to the end of a round (1)."""

TOL = 1e-8
"""Of every round; seldom met."""

ENOUGH = 20
"""Residuals a weight from which nothing of this is needed."""

TOWARDS = {"start": "the start's", "zero": "zero"}

Weights = Mapping[str, Tensor]
Stored = Callable[[Weights], Weights]


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
class _Candidate:
    """Weights that the validation error chooses among.

    Attributes:
        weights: The weights.
        error: Their validation error.
        ridge: On the readout, as a share of the features' mean square.
        center: What it pulls towards: ``"start"``, ``"zero"``, or nothing.
        step: How far from the start to the end of a round: 0 the start, 1 the end.
    """

    weights: Weights
    error: float
    step: float
    ridge: float = 0.0
    center: str = ""


@dataclass(frozen=True)
class Chosen(_Candidate):
    """The weights with the lowest validation error.

    Attributes:
        start_error: Of the start, as it was given.
        path: At the end of every round, with its best ridge, by the number of iterations until
            then; where it is finite.
        iterations: Over all rounds.
        status: :attr:`Status.VALIDATED`, or how it was cut short.
    """

    start_error: float = math.inf
    path: dict[str, float] = field(default_factory=dict)
    iterations: int = 0
    status: Status = Status.VALIDATED


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
    The validation error of the result is slightly optimistic: it is the least of several.

    Args:
        problem: The sequences to fit on, without ridges.
        validation: Others, with the same widths, scale and kind of mask.
        model: What is fitted.
        init: Named parameters to start from, or a result; the better they are, the fewer epochs
            there are in which to overfit. A readout that was solved on the same sequences tells
            nothing new: give the one before. Default: those of ``model.start``.
        max_iterations: Bound on the epochs of all rounds together.
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
    objective = Objective(problem, model)
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
    point = Pooled(objective, minibatches(problem.batches), theta)
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
        notes=(f"{errors}; chosen: {chosen}",),
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
    problem, model = objective.problem, objective.model
    few = scarce(problem, start)
    theta, readout = model.split(problem, start)
    judge = _Judge(objective, Objective(validation, model), stored, readout, few=few)
    found = judge.candidates(start, 0.0)
    start_error, lowest = found[0].error, _lowest(found)
    if not math.isfinite(lowest):
        raise ValueError(
            "the validation error of the start is not finite: weights or inputs overflow; use "
            "float32 or bfloat16, or scale the inputs"
        )
    path, status = {}, Status.VALIDATED
    last, leading, iterations = start, start, 0
    # After the last round the points on the way are judged, and the result is made.
    scoring = time.perf_counter() - began
    seconds = None if bounds.seconds is None else bounds.seconds - (len(STEPS) + 1) * scoring
    rounds = _rounds(judge, theta, Bounds(bounds.iterations, seconds), seed, observe, began)
    for index, (outcome, iterations) in enumerate(rounds):
        point = outcome.point
        assert isinstance(point, Pooled)
        last = model.join(problem, point.theta, point.readout, start)
        ends = judge.candidates(last, 1.0, point)
        found += ends
        if math.isfinite(_lowest(ends)):
            path[str(iterations)] = _lowest(ends)
        better = _lowest(ends) < lowest
        if better:
            lowest, leading = _lowest(ends), last
        if outcome.status in (Status.INTERRUPTED, Status.STOPPED):
            status = outcome.status
            break
        if index and not better:
            break
    first = last if leading is start else leading
    if last is not start:
        found += judge.on_the_way(start, first)
    spent = time.perf_counter() - began
    in_time = bounds.seconds is None or spent + len(STEPS) * scoring <= bounds.seconds
    if last is not first and in_time:
        found += judge.on_the_way(start, last)
    best = min(found, key=lambda one: one.error)
    return Chosen(
        **vars(best), start_error=start_error, path=path, iterations=iterations, status=status
    )


def scarce(problem: AttentionProblem, weights: Weights) -> bool:
    """Whether there are too few residuals a weight to do without early stopping and ridges."""
    count = sum(value.numel() for value in weights.values())
    return problem.n_rows * problem.d_out < ENOUGH * count


def _lowest(candidates: Sequence[_Candidate]) -> float:
    return min(one.error for one in candidates)


class _Judge:
    """Validation errors of weights, with ridges on the readout where data are few.

    The features of the validation sequences are made once for all readouts of a point.

    Args:
        objective: What is fitted.
        other: The same on the sequences that judge.
        stored: What weights become where they are kept, such as rounded.
        readout: Of the start.
        few: Whether data are few.

    Attributes:
        objective: With the ridge that had the lowest error at the last point, for the next round.
        few: Whether data are few.
    """

    def __init__(
        self,
        objective: Objective,
        other: Objective,
        stored: Stored,
        readout: Tensor,
        *,
        few: bool,
    ) -> None:
        self.objective, self._other = objective, other
        self._stored, self.few = stored, few
        self._centers = {"zero": torch.zeros_like(readout)}
        if readout.any():
            self._centers = {"start": readout, **self._centers}
        self._batches, self._judging = (
            minibatches(one.problem.batches) for one in (objective, other)
        )

    def candidates(
        self, weights: Weights, step: float, fitted: Pooled | None = None
    ) -> list[_Candidate]:
        """Weights as they are; where data are few, with readouts by least squares and by ridges.

        At the start both, and the ridges pull both ways; at later points the better way only.

        Args:
            weights: The weights.
            step: As in :class:`_Candidate`.
            fitted: Their point on the sequences to fit on, where it is known.

        Returns:
            One or more.
        """
        model, problem, other = self.objective.model, self.objective.problem, self._other.problem
        theta, readout = model.split(other, self._stored(weights))
        mine, _ = model.split(problem, weights)
        try:
            judging = Pooled(self._other, self._judging, theta)
            if self.few and fitted is None:
                fitted = Pooled(self.objective, self._batches, mine)
        except torch.linalg.LinAlgError:  # features that are not finite
            return [_Candidate(weights, math.inf, step)]
        found = []
        if not (self.few and step):
            found.append(_Candidate(weights, _error(judging, readout), step))
        if not self.few:
            return found
        assert fitted is not None

        def solved(ridge: Ridge | None, share: float = 0.0, center: str = "") -> _Candidate:
            ridged = model.join(problem, mine, fitted.ridged(ridge), weights)
            _, readout = model.split(other, self._stored(ridged))
            return _Candidate(ridged, _error(judging, readout), step, share, center)

        found.append(solved(None))
        ridges = [
            (fitted.readout_ridge(share, center), share, name)
            for name, center in self._centers.items()
            for share in RIDGES
        ]
        ridged = [solved(*one) for one in ridges]
        best = min(range(len(ridges)), key=lambda i: ridged[i].error)
        ridge, _, name = ridges[best]
        self._centers = {name: self._centers[name]}
        self.objective = self.objective.with_ridge(ridge)
        return found + ridged

    def on_the_way(self, start: Weights, end: Weights) -> list[_Candidate]:
        """The candidates of the points :data:`STEPS` from a start to an end."""
        found = []
        for step in STEPS:
            between = {name: value.lerp(end[name], step) for name, value in start.items()}
            found += self.candidates(between, step)
        return found


def _error(point: Pooled, readout: Tensor) -> float:
    error = point.objective.problem.relative_error(point.loss_at(readout))
    return error if math.isfinite(error) else math.inf


def _rounds(
    judge: _Judge, theta: Tensor, bounds: Bounds, seed: int, observe: Callback, began: float
) -> Iterator[tuple[Outcome, int]]:
    """The rounds in turn, and the iterations until then; one for all of the bounds if not few."""
    generator = torch.Generator().manual_seed(seed)
    records: list[IterationRecord] = []
    done, epochs = 0, FIRST if judge.few else bounds.iterations
    while done < bounds.iterations:
        spent = time.perf_counter() - began
        left = math.inf if bounds.seconds is None else bounds.seconds - spent
        if done and left <= 0:
            return
        # What would be left for less than another such round, this one takes.
        if 2 * epochs > bounds.iterations - done or (done and 2 * epochs * spent / done > left):
            epochs = bounds.iterations - done
        settings = Settings(TOL, epochs, bounds.seconds)
        counted = counted_on(observe, records)
        outcome = Stochastic(judge.objective, theta, settings, generator, counted, began).run()
        done = records[-1].iteration
        yield outcome, done
        if outcome.status is not Status.MAX_ITERATIONS:
            return
        theta, epochs = outcome.point.theta, LONGER * epochs
