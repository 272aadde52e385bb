r"""Mini-batches, for data with many residuals a parameter.

There one gradient over all rows says little more than one over a few sequences, and a curvature
product costs as much as several of them. So the loop takes steps on mini-batches, some rows of some
sequences and all of their keys (:mod:`.minibatches`), with the closed-form gradient of this package
at a readout that is solved all along::

    features F_b, readout O of the last mini-batches    (:mod:`.running_readout`)
    gradient  g = 2 vjp(W_b r_b O_F^T) + ridges',    M <- MOMENTUM M + (1 - MOMENTUM) g
    step      polar factors of (1 - MOMENTUM) g + MOMENTUM M, head by head, in coordinates
              scaled by the inputs' second moment    (:mod:`.steepest`)

On the way to a start (:mod:`attnreg.lifting`) the readout is held instead, with :data:`HELD` times
the rate and less momentum.

The inputs in scaled coordinates are made once and kept, which takes their memory a second time;
runs that follow one another on the same data share them. At both ends the readout is exact: at the
start over a sample of the rows, or over all where that is known, at the end over all. The time of
the end is set aside from a bound on the seconds, estimated from that of the start.

The root mean square of a step is :data:`RATE` times that of the block at the start: the largest
singular value of a head changes by about the same share whatever its width and the data's scale.
Queries and keys move at :data:`NEAR` times that from a start that explains a tenth already: they
need not go far, and what they learn by heart does harm first. (A logit matrix with fixed values has
the whole rate.) A short run, of fewer than :data:`SHORT` steps or :data:`SHORT_NEAR` from a near
start, has a higher rate, since it has as far to go. From a start that is not near and with few
residuals a weight inputs are scaled less (:func:`.steepest.scaled_power`). The rate rises over
:data:`WARM_UP` steps and falls to zero along a line at the bound of the run, by iterations or by
time, whichever is nearer. An iteration is one epoch: all sequences once, of longer ones some of the
rows; of little data as many epochs as make :data:`FEWEST_STEPS`.
Heuristic: the rate, the powers and the size of the mini-batches, measured on real layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.batching import Batch
from attnreg.curvature.preconditioner import natural_metric
from attnreg.kronecker import ParameterBlock
from attnreg.records import Callback, Status
from attnreg.solvers.choice import ENOUGH, residuals_a_weight
from attnreg.solvers.minibatches import (
    SAMPLE_ROWS,
    Pooled,
    features_of,
    minibatches,
    over_all_rows,
    partial_gradient,
    spread,
    stride,
)
from attnreg.solvers.run import Outcome, Run, Settings, relative_gradient_norm
from attnreg.solvers.running_readout import RunningReadout
from attnreg.solvers.steepest import (
    MOMENTUM,
    SCALED,
    ScaledBatches,
    ScaledInputs,
    Steepest,
    scaled_power,
)

RATE = 0.015
WARM_UP = 20
NEAR = 0.4
"""Of the rate, for queries and keys, from a start that is near."""

SHORT, FASTEST = 200, 3.0
"""Steps below which a run from a start that is not near has a higher rate: ``sqrt(SHORT / steps)``
times, :data:`FASTEST` at most."""

SHORT_NEAR, FASTEST_NEAR = 800, 1.4
"""The same from a near start, with :data:`.choice.ENOUGH` residuals a weight. On real layers 272
and 408 steps ended .2 to 1 % lower with 1.4 times the rate, and no lower with 1.7."""

HELD, HELD_QUERIES, HELD_MOMENTUM = 4.0, 0.4, 0.7
"""Where the readout is held, times the rate, of that for queries, and the momentum: each head has
targets of its own then, and stands longer steps."""

FEWEST_STEPS = 8
"""Of an iteration: little data is gone through several times in one."""

CLEARLY = 0.9
"""A loss below this share of the start's, both on a sample, is taken for lower over all rows."""


def steps_of_iteration(batches: Sequence[Batch]) -> int:
    """Steps that an iteration takes with these mini-batches, those of all sequences."""
    return _times(batches) * len(batches)


def _times(batches: Sequence[Batch]) -> int:
    """How often an iteration goes through the mini-batches."""
    return math.ceil(FEWEST_STEPS / len(batches))


def step_rates(blocks: Sequence[ParameterBlock], *, near: bool) -> list[float]:
    """Rates of the blocks: values' the whole, those of queries and keys less from a near start."""
    slower = NEAR if near else 1.0
    return [RATE * (1.0 if block.name == "value" else slower) for block in blocks]


def held_rates(blocks: Sequence[ParameterBlock]) -> list[float]:
    """Rates of the blocks where the readout is held."""
    return [HELD * RATE * (HELD_QUERIES if block.name == "query" else 1.0) for block in blocks]


def warmed_up(steps: int, over: int = WARM_UP) -> float:
    """Share of the rate that the next step has after so many, for the warm-up alone."""
    return min(1.0, (steps + 1) / over)


def lengthened(steps: int, done: float, enough: int, most: float) -> float:
    """Times the rate in a run that will have fewer steps than are enough.

    Args:
        steps: Taken so far.
        done: Share of the run that they are.
        enough: Steps of a run that needs no longer ones.
        most: A bound.

    Returns:
        ``sqrt(enough / all)`` from the second step on, where the number of all can be told.
    """
    return min(max(1.0, enough * done / steps) ** 0.5, most) if steps else 1.0


@dataclass(frozen=True)
class _Estimate:
    """Losses summed over the mini-batches of an epoch, each at the parameters of its step."""

    loss: float
    regularised: float


class Stochastic:
    """The loop over mini-batches.

    Args:
        start: The start, on a sample of the rows or on all; its objective is minimised.
        settings: What bounds the run; the path is not used.
        generator: Orders the mini-batches.
        observe: Called with each record; a true answer stops the run.
        began: ``time.perf_counter()`` from which seconds are counted.
        near: Whether the start is near: whether it explains a tenth of the targets' spread,
            with the readout that was given with it.
        hurried: Whether a short run has a higher rate; not where other runs go on from its end.
        phase: Of the records of its epochs.
        held: A readout that stays as it is, for :meth:`lead`; one that runs after the features
            otherwise.
        scaled: Those of another run on the same data, which are shared where they suit.

    Attributes:
        scaled: The mini-batches with scaled inputs.
    """

    def __init__(
        self,
        start: Pooled,
        settings: Settings,
        generator: torch.Generator,
        observe: Callback,
        began: float,
        *,
        near: bool,
        hurried: bool = True,
        phase: str = "stochastic",
        held: Tensor | None = None,
        scaled: ScaledBatches | None = None,
    ) -> None:
        objective = start.objective
        self._start, self._objective = start, objective
        self._settings, self._generator, self._phase = settings, generator, phase
        self._run = Run(objective, settings, observe, began)
        self._batches = minibatches(objective.problem.batches)
        self._times = _times(self._batches)
        self._metric = natural_metric(self._start)
        values_move = objective.layout.values_move
        far = values_move and not near
        weights = start.theta.numel() + start.readout.numel()
        residuals = residuals_a_weight(objective.problem, weights)
        self._short = (SHORT, FASTEST) if far else (SHORT_NEAR, FASTEST_NEAR)
        self._hurried = hurried and values_move and (far or residuals >= ENOUGH)
        power = scaled_power(residuals) if far else SCALED
        if scaled is None or scaled.inputs.power != power:
            made = ScaledInputs(objective, power)
            scaled = ScaledBatches(made, [made.batch(batch) for batch in self._batches])
        self.scaled, self._inputs = scaled, scaled.inputs.under(objective)
        self._theta = self._inputs.enter(self._start.theta)
        self._held = held is not None
        readout = self._start.readout.clone() if held is None else held
        self._readout = RunningReadout(objective, readout)
        blocks = objective.layout.blocks
        fitted = blocks[: len(blocks) - objective.layout.held]
        rates, momentum = step_rates(fitted, near=values_move and near), MOMENTUM
        if self._held:
            rates, momentum = held_rates(fitted), HELD_MOMENTUM
        self._steepest = Steepest(self._inputs, self._start.theta, blocks, rates, momentum)
        self._steps, self._rows, self._began = 0, 0, time.perf_counter()
        self._reserve = 0.0 if self._held else self._seconds_of_end()

    def run(self) -> Outcome:
        """Runs until a bound is met.

        Returns:
            The end with its readout solved over all rows, or the start where that is lower.
        """
        status = self._until_bound()
        end = over_all_rows(self._start) if status is Status.DIVERGED else self._end()
        return Outcome(end, status)

    def lead(self) -> tuple[Status, Tensor]:
        """Runs until a bound is met; no time is set aside for an end, and none is made.

        Returns:
            The status, and ``theta`` where the steps led, whatever its loss.
        """
        status = self._until_bound()
        return status, self._inputs.leave(self._theta)

    def _until_bound(self) -> Status:
        """Epochs until a bound is met."""
        try:
            norm = relative_gradient_norm(self._start)
            status = self._report(self._start, norm, "start")
            while status is None:
                status = self._epoch()
        except KeyboardInterrupt:
            status = Status.INTERRUPTED
        return status

    @property
    def _sampled(self) -> bool:
        """Whether the start is known on some of the rows only."""
        return len(self._start.batches) < len(self._batches)

    def _seconds_of_end(self) -> float:
        """Estimated: of all rows, summed as they will be, and of the sample looked at before."""
        start = some = self._start
        if not self._sampled:
            return start.seconds
        if self._settings.max_seconds is not None and start.single_will_do:
            chosen = spread(start.batches, SAMPLE_ROWS // 2)
            some = Pooled(self._objective, chosen, start.theta, single=True)
        return start.seconds + len(self._batches) * some.seconds / len(some.batches)

    def _end(self) -> Pooled:
        """The lower of the start and of where the steps led, each with its best readout.

        Where the start is known on a sample only, both have a readout that suits that, so that it
        tells them apart where they differ clearly; over all rows otherwise.

        Returns:
            The point over all rows.
        """
        if not self._steps:
            return over_all_rows(self._start)
        theta = self._inputs.leave(self._theta)
        if self._sampled:
            sampled = Pooled(self._objective, self._start.batches, theta)
            if sampled.value <= CLEARLY * self._start.value:
                return over_all_rows(sampled)
        end = Pooled(self._objective, self._batches, theta)
        start = over_all_rows(self._start)
        return end if end.value <= start.value else start

    def _epoch(self) -> Status | None:
        """All mini-batches in random order, once, or more often where they are few."""
        self._run.iteration += 1
        gradient, loss = torch.zeros_like(self._theta), 0.0
        for i in self._order():
            if self._seconds_left() <= 0:
                return Status.MAX_SECONDS
            part, value = self._step(self._rows_of(self.scaled.batches[i]))
            if not math.isfinite(value):
                return Status.DIVERGED
            gradient += part
            loss += value
        gradient /= self._times
        loss /= self._times
        # Forward and back, in passes over all rows; what is left of one counts later.
        passes, self._rows = divmod(self._rows, self._objective.targets.shape[0])
        self._objective.count_passes(2 * passes)
        norm = self._metric.dual_norm(self._inputs.gradient(gradient))
        norm /= self._objective.target_norm_squared
        theta, readout = self._inputs.leave(self._theta), self._readout.value
        ridges = self._objective.ridge_value(theta, readout)
        return self._report(_Estimate(loss, loss + ridges), norm, self._phase)

    def _order(self) -> Iterator[int]:
        """The mini-batches of an iteration."""
        for _ in range(self._times):
            yield from torch.randperm(len(self._batches), generator=self._generator).tolist()

    def _rows_of(self, batch: Batch) -> Batch:
        """The rows that a step reads, from a random one on."""
        step = stride(batch.B.shape[1])
        first = int(torch.randint(step, (), generator=self._generator))
        return batch.every(step, first)

    def _step(self, batch: Batch) -> tuple[Tensor, float]:
        """One step on a mini-batch with scaled inputs.

        Returns:
            The gradient, and the loss that it was taken at.
        """
        objective, factor = self._objective, self._factor()
        features = features_of(objective, batch, self._theta)
        if not self._held:
            self._readout.add(features.columns, batch, factor)
        readout = self._readout.value
        gradient, loss = partial_gradient(objective, batch, features, readout)
        self._add_ridge(gradient, batch)
        if math.isfinite(loss):
            self._steepest.move(self._theta, gradient, factor * self._faster())
        self._rows += batch.weights.numel()
        self._steps += 1
        return gradient, loss

    def _factor(self) -> float:
        """Of the rate: warm-up, then a line to zero at the nearer bound."""
        return (1.0 - self._done()) * warmed_up(self._steps)

    def _faster(self) -> float:
        """Times the rate: above 1 in a short run."""
        if not self._hurried:
            return 1.0
        return lengthened(self._steps, self._done(), *self._short)

    def _done(self) -> float:
        """Share of the run, by the nearer bound."""
        total = self._settings.max_iterations * steps_of_iteration(self._batches)
        done = self._steps / max(1, total)
        spent, left = time.perf_counter() - self._began, max(0.0, self._seconds_left())
        return min(1.0, max(done, spent / (spent + left)))

    def _seconds_left(self) -> float:
        """Until the end has to begin."""
        return self._run.seconds_left() - self._reserve

    def _add_ridge(self, gradient: Tensor, batch: Batch) -> None:
        ridge = self._objective.ridge
        if ridge is None or not ridge.right:
            return
        share = float(batch.weights.sum()) / self._objective.problem.total_weight
        pull = torch.zeros_like(gradient)
        self._objective.add_ridge_gradient(self._inputs.leave(self._theta) - ridge.center, pull)
        gradient.add_(self._inputs.pulled(pull), alpha=share)

    def _report(self, point: Pooled | _Estimate, norm: float, phase: str) -> Status | None:
        return self._run.report(
            point,
            norm,
            phase,
            iterate=point if isinstance(point, Pooled) else None,
            damping=0.0,
            path=0.0,
            inner_iterations=0,
            accepted=True,
        )
