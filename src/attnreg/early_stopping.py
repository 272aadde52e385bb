"""A fit that goes as far as other sequences say: early stopping, and a ridge on the readout.

With few residuals a weight the minimum of the loss is learnt by heart: the readout first, as least
squares from as many features as the layer is wide, then everything else. So

- the readout of every point that is looked at is solved with ridges too, shares
  :data:`RIDGES` of the features' mean square on the diagonal (the constant row is free). They pull
  it towards the readout of the start, or towards zero: which, the start's validation errors say;
- mini-batches run in rounds, the first of about :data:`FIRST` steps times the root of the residuals
  a weight and each later one :data:`LONGER` times as long, each from the end of the one before and
  with the ridge that was best there;
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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from attnreg.solvers.minibatches import Pooled, minibatches
from attnreg.solvers.run import Outcome, Settings, counted_on, relative_gradient_norm
from attnreg.solvers.stochastic import Stochastic, is_near, steps_of_iteration

RIDGES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
FIRST, LONGER = 72.0, 2
BACK = 5

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
    at_start = judge.candidates(start, 0.0)
    best = _lowest(at_start)
    if not math.isfinite(best.error):
        raise ValueError(
            "the validation error of the start is not finite: weights or inputs overflow; use "
            "float32 or bfloat16, or scale the inputs"
        )
    path, status, iterations = {}, Status.VALIDATED, 0
    # After a round its end is judged, and a point or two on the way back; one more for the result.
    scoring = time.perf_counter() - began
    limit = math.inf if bounds.seconds is None else began + bounds.seconds
    reserved = None if bounds.seconds is None else bounds.seconds - 3 * scoring
    known, rest = at_start[0].point, Bounds(bounds.iterations, reserved)
    begin = judge.theta if known is None else known.under(judge.objective)
    rounds = _rounds(judge, begin, rest, seed, observe, began)
    for index, (outcome, iterations) in enumerate(rounds):
        point = outcome.point
        assert isinstance(point, Pooled)
        end = _lowest(judge.candidates(judge.weights_of(point), 1.0, point))
        if math.isfinite(end.error):
            path[str(iterations)] = end.error
        better = end.error < best.error
        best = min(best, end, key=_error_of)
        if outcome.status in (Status.INTERRUPTED, Status.STOPPED):
            status = outcome.status
            break
        nearer = judge.way_back(end, limit - scoring)
        best = min(best, nearer, key=_error_of)
        if nearer.error < end.error or (index and not better):
            break
    return Chosen(
        **vars(best),
        start_error=at_start[0].error,
        path=path,
        iterations=iterations,
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
        theta: Flat non-linear parameters of the start.
        objective: With the ridge that had the lowest error at the last end of a round, or at the
            start: for the next round.
        few: Whether data are few.
        first_round: Its iterations, if so.
        near: Whether the start is near, for all rounds.
    """

    def __init__(
        self,
        objective: Objective,
        other: Objective,
        stored: Stored,
        start: Weights,
    ) -> None:
        self.objective, self._other = objective, other
        self._stored, self._start = stored, start
        problem = objective.problem
        self.few = scarce(problem, start)
        steps = FIRST * _residuals_a_weight(problem, start) ** 0.5
        self.first_round = math.ceil(steps / steps_of_iteration(problem))
        self.theta, readout = objective.model.split(problem, start)
        self.near = is_near(objective, self.theta, readout)
        self._centers = {"zero": torch.zeros_like(readout)}
        if readout.any():
            self._centers = {"start": readout, **self._centers}
        self._batches, self._judging = (
            minibatches(one.problem.batches) for one in (objective, other)
        )

    def weights_of(self, point: Pooled) -> Weights:
        """The weights of a point, its readout included."""
        objective = self.objective
        return objective.model.join(objective.problem, point.theta, point.readout, self._start)

    def candidates(
        self, weights: Weights, step: float, point: Pooled | None = None
    ) -> list[_Candidate]:
        """Weights as they are, and where data are few the best readout for them.

        At the start both, and the ridges pull both ways; at later points the better way only.

        Args:
            weights: The weights.
            step: As in :class:`_Candidate`.
            point: Theirs on the sequences to fit on, where it is known.

        Returns:
            One or two.
        """
        model, other = self.objective.model, self._other.problem
        theta, readout = model.split(other, self._stored(weights))
        try:
            judging = Pooled(self._other, self._judging, theta)
            if self.few and point is None:
                mine, _ = model.split(self.objective.problem, weights)
                point = Pooled(self.objective, self._batches, mine)
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
        """The best of least squares and the ridges; at an end the next round's ridge is chosen."""
        model, problem = self.objective.model, self.objective.problem

        def tried(readout: Tensor, share: float = 0.0, center: str = "") -> _Candidate:
            solved = model.join(problem, point.theta, readout, weights)
            _, kept = model.split(self._other.problem, self._stored(solved))
            return _Candidate(solved, _error(judging, kept), step, point, share, center)

        plain = tried(point.under(self.objective.with_ridge(None)).readout)
        ridged = _lowest(
            [
                tried(readout, share, name)
                for name, center in self._centers.items()
                for share, readout in zip(
                    RIDGES, point.ridged_readouts(RIDGES, center), strict=True
                )
            ]
        )
        if step in (0.0, 1.0):
            center = self._centers[ridged.center]
            self._centers = {ridged.center: center}
            ridge = point.readout_ridge(ridged.ridge, center)
            self.objective = self.objective.with_ridge(ridge)
        return _lowest([plain, ridged])

    def way_back(self, end: _Candidate, until: float) -> _Candidate:
        """From an end towards the start while that lowers the error and there is time.

        Args:
            end: The end of a round.
            until: ``time.perf_counter()`` after which no further point is begun.

        Returns:
            The best point, or the end.
        """
        best = end
        for i in range(BACK - 1, 0, -1):
            step = i / BACK
            if time.perf_counter() > until:
                break
            between = {
                name: value.lerp(end.weights[name], step) for name, value in self._start.items()
            }
            candidate = _lowest(self.candidates(between, step))
            if not candidate.error < best.error:
                break
            best = candidate
        return best


def _error(point: Pooled, readout: Tensor) -> float:
    error = point.objective.problem.relative_error(point.loss_at(readout))
    return error if math.isfinite(error) else math.inf


def _rounds(
    judge: _Judge,
    begin: Tensor | Pooled,
    bounds: Bounds,
    seed: int,
    observe: Callback,
    began: float,
) -> Iterator[tuple[Outcome, int]]:
    """The rounds in turn, and the iterations until then; one for all of the bounds if not few."""
    generator = torch.Generator().manual_seed(seed)
    records: list[IterationRecord] = []
    done, epochs = 0, judge.first_round if judge.few else bounds.iterations
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
        descent = Stochastic(
            judge.objective, begin, settings, generator, counted, began, near=judge.near
        )
        outcome = descent.run()
        done = records[-1].iteration
        yield outcome, done
        if outcome.status is not Status.MAX_ITERATIONS:
            return
        assert isinstance(outcome.point, Pooled)
        begin, epochs = outcome.point.under(judge.objective), LONGER * epochs
