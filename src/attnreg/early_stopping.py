"""A fit that goes as far as other sequences say: early stopping, and a ridge on the readout.

With few residuals a weight the minimum of the loss is learnt by heart: the readout first, as least
squares from as many features as the layer is wide, then everything else. So

- the readout of every point that is looked at is solved with ridges too, shares
  :data:`RIDGES` of the features' mean square on the diagonal (the constant row is free), that pull
  it towards the readout of the start or towards zero;
- mini-batches run in rounds, the first of about :data:`FIRST_STEPS` steps times the root of the
  residuals a weight and each later one :data:`LONGER` times as long, each from the end of the one
  before and with the ridge that was best there;
- from the end of a round the way back to the start is tried, a fifth (:data:`BACK`) at a time,
  while that lowers the error. Where it does, the round went too far and was the last; so was one
  after the first that brought nothing.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnreg.fitting import check_bounds
from attnreg.models import Model
from attnreg.objective import Objective
from attnreg.problem import AttentionProblem
from attnreg.progress import ProgressDisplay
from attnreg.records import Callback, IterationRecord, Status
from attnreg.result import FitResult
from attnreg.solvers.minibatches import Pooled, minibatches, sampled
from attnreg.solvers.run import Settings, counted_on, relative_gradient_norm
from attnreg.solvers.stochastic import Stochastic, steps_of_iteration

RIDGES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
FIRST_STEPS = 72.0
"""Of the first round, where there is one residual a weight."""

LONGER = 2
"""Times the length of a round, of the next."""

BACK = 5
"""Parts of the way back from an end to the start."""

TOL = 1e-8
"""Of every round; seldom met."""

ENOUGH = 40
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
            nothing new: give the one before. From a start that explains the outputs better than
            their mean does queries and keys move more slowly. Default: those of ``model.start``.
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
    judge = _Judge(objective, Objective(validation, objective.model), stored, start)
    at_start = judge.look(start, 0.0)
    best = _lowest(at_start)
    if not math.isfinite(best.error):
        raise ValueError(
            "the validation error of the start is not finite: weights or inputs overflow; use "
            "float32 or bfloat16, or scale the inputs"
        )
    # After a round its end is judged, and a point on the way back; one more for the result.
    scoring = time.perf_counter() - began
    limit = math.inf if bounds.seconds is None else began + bounds.seconds
    available = None if bounds.seconds is None else bounds.seconds - 3 * scoring
    records: list[IterationRecord] = []
    generator = torch.Generator().manual_seed(seed)
    theta, readout = objective.model.split(objective.problem, start)
    point = judge.ridged(at_start[-1]) or sampled(objective, theta)
    near = point.explains(readout)
    epochs = judge.first_round if judge.few else bounds.iterations
    path, status, done, running = {}, Status.VALIDATED, 0, 0.0
    try:
        while done < bounds.iterations:
            left = limit - 3 * scoring - time.perf_counter()
            if done and left <= 0:
                break
            # What would be left for less than another such round, this one takes.
            pace = running / done if done else 0.0
            if 2 * epochs > bounds.iterations - done or 2 * epochs * pace > left:
                epochs = bounds.iterations - done
            settings, counted = Settings(TOL, epochs, available), counted_on(observe, records)
            entered = time.perf_counter()
            outcome = Stochastic(point, settings, generator, counted, began, near=near).run()
            running += time.perf_counter() - entered
            assert isinstance(outcome.point, Pooled)
            first, done = not done, records[-1].iteration
            end = _lowest(judge.look(judge.weights_of(outcome.point), 1.0, outcome.point))
            if math.isfinite(end.error):
                path[str(done)] = end.error
            better = end.error < best.error
            best = min(best, end, key=_error_of)
            if outcome.status in (Status.INTERRUPTED, Status.STOPPED):
                status = outcome.status
                break
            if not judge.few:
                break
            nearer = judge.way_back(end, limit - 2 * scoring)
            best = min(best, nearer, key=_error_of)
            too_far = nearer.error < end.error
            if too_far or not (first or better) or outcome.status is not Status.MAX_ITERATIONS:
                break
            point, epochs = judge.ridged(end) or outcome.point, LONGER * epochs
    except KeyboardInterrupt:
        status = Status.INTERRUPTED
    return Chosen(
        **vars(best),
        start_error=at_start[0].error,
        path=path,
        iterations=records[-1].iteration if records else 0,
        status=status,
    )


def scarce(problem: AttentionProblem, weights: Weights) -> bool:
    """Whether there are too few residuals a weight to do without early stopping and ridges."""
    return _residuals_a_weight(problem, weights) < ENOUGH


def _residuals_a_weight(problem: AttentionProblem, weights: Weights) -> float:
    return problem.n_rows * problem.d_out / sum(value.numel() for value in weights.values())


def _error_of(candidate: _Candidate) -> float:
    return candidate.error


def _lowest(candidates: Sequence[_Candidate]) -> _Candidate:
    return min(candidates, key=_error_of)


class _Judge:
    """Validation errors of weights, with ridges on the readout where data are few.

    The features of the validation sequences are made once for all readouts of a point.

    Args:
        objective: What is fitted.
        other: The same on the sequences that judge.
        stored: What weights become where they are kept, such as rounded.
        start: The weights to start from.

    Attributes:
        few: Whether data are few.
        first_round: Its iterations, if so.
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
        problem = objective.problem
        _, readout = objective.model.split(problem, start)
        self._centers = {"zero": torch.zeros_like(readout)}
        if readout.any():
            self._centers = {"start": readout, **self._centers}
        self._batches, self._judging = (
            minibatches(one.problem.batches) for one in (objective, other)
        )
        self.few = scarce(problem, start)
        steps = FIRST_STEPS * _residuals_a_weight(problem, start) ** 0.5
        self.first_round = math.ceil(steps / steps_of_iteration(self._batches))

    def weights_of(self, point: Pooled) -> Weights:
        """The weights of a point, its readout included."""
        problem, model = self._objective.problem, self._objective.model
        return model.join(problem, point.theta, point.readout, self._start)

    def ridged(self, candidate: _Candidate) -> Pooled | None:
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
    ) -> list[_Candidate]:
        """Weights as they are; where data are few, with the best readout for their features.

        Args:
            weights: The weights. At the start both ways count, the second one last.
            step: As in :class:`_Candidate`.
            point: Theirs on the sequences to fit on, where it is known.
            objective: Counts the pass over these where it is not.

        Returns:
            One or two.
        """
        model, other = self._objective.model, self._other.problem
        theta, readout = model.split(other, self._stored(weights))
        try:
            judging = Pooled(self._other, self._judging, theta)
            if self.few and point is None:
                mine, _ = model.split(self._objective.problem, weights)
                point = Pooled(objective or self._objective, self._batches, mine)
        except torch.linalg.LinAlgError:  # features that are not finite
            return [_Candidate(weights, math.inf, step)]
        found = []
        if not (self.few and step):
            found.append(_Candidate(weights, _error(judging, readout), step, point))
        if self.few:
            assert point is not None
            found.append(self._solved(weights, step, point, judging))
        return found

    def _solved(self, weights: Weights, step: float, point: Pooled, judging: Pooled) -> _Candidate:
        """The best of least squares and the ridges."""
        model, problem = self._objective.model, self._objective.problem

        def tried(readout: Tensor, share: float = 0.0, center: str = "") -> _Candidate:
            solved = model.join(problem, point.theta, readout, weights)
            _, kept = model.split(self._other.problem, self._stored(solved))
            return _Candidate(solved, _error(judging, kept), step, point, share, center)

        best = tried(point.under(point.objective.with_ridge(None)).readout)
        for name, center in self._centers.items():
            readouts = point.ridged_readouts(RIDGES, center)
            for share, readout in zip(RIDGES, readouts, strict=True):
                best = min(best, tried(readout, share, name), key=_error_of)
        return best

    def way_back(self, end: _Candidate, until: float) -> _Candidate:
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
            candidate = _lowest(self.look(between, step, objective=objective))
            if not candidate.error < best.error:
                break
            best = candidate
        return best


def _error(point: Pooled, readout: Tensor) -> float:
    error = point.objective.problem.relative_error(point.loss_at(readout))
    return error if math.isfinite(error) else math.inf
