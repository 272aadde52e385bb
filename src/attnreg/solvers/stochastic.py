r"""Mini-batches, for data with many residuals a parameter.

There one gradient over all rows says little more than one over a few sequences, and a curvature
product costs as much as several of them. So the loop takes Adam steps (Kingma and Ba 2015) on
mini-batches of whole sequences, with the closed-form gradient of this package, and solves the
readout at both ends: at the start over a sample of the rows, at the end over all.

    joint gradient on a mini-batch     theta: 2 vjp(W r O_F^T)      O: 2 F^T W r

plus the ridges' gradient in the share of the rows. The time of the end is set aside from a bound on
the seconds, estimated from that of the start. The rate of a parameter block is :data:`RATE` times
the root mean square of the block at the start over the root of its number of rows, so that data and
weights of any scale and width are treated alike: where the signs of a step agree with the inputs',
it changes the outputs by a share that does not depend on the width. It rises over :data:`WARM_UP`
steps and falls to zero along a cosine at the bound of the run, by iterations or by time, whichever
is nearer. An iteration is one epoch: all sequences once. Heuristic: the rate and the size of the
mini-batches, both measured on real layers 64 and 384 wide.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.batching import Batch
from attnreg.curvature.preconditioner import natural_metric
from attnreg.kronecker import split_blocks
from attnreg.objective import Objective
from attnreg.records import IterationRecord, Status
from attnreg.solvers.minibatches import (
    SAMPLE_ROWS,
    Pooled,
    joint_gradient,
    minibatches,
    spread,
)
from attnreg.solvers.run import Outcome, Run, Settings, relative_gradient_norm

RATE = 0.56
WARM_UP = 20
CLEARLY = 0.9
"""A loss below this share of the start's, both on the sample, is taken for lower over all rows."""

MOMENTS = (0.9, 0.95)
"""Decay of the gradient's running mean and mean square."""

FLOOR = 1e-30
"""Added to the root of the mean square: no division by zero, whatever the size of the loss."""


@dataclass(frozen=True)
class _Estimate:
    """Losses summed over the mini-batches of an epoch, each at the parameters of its step."""

    loss: float
    regularised: float


class Stochastic:
    """The loop over mini-batches.

    Args:
        objective: What is minimised.
        theta: Start.
        settings: What bounds the run; the path is not used.
        generator: Orders the mini-batches.
        observe: Called with each record; a true answer stops the run.
        began: ``time.perf_counter()`` from which seconds are counted.
    """

    def __init__(
        self,
        objective: Objective,
        theta: Tensor,
        settings: Settings,
        generator: torch.Generator,
        observe: Callable[[IterationRecord], bool | None],
        began: float,
    ) -> None:
        self._objective, self._settings, self._generator = objective, settings, generator
        self._run = Run(objective, settings, observe, began)
        entered = time.perf_counter()
        self._batches = minibatches(objective.problem.batches)
        self._sample = spread(self._batches, SAMPLE_ROWS)
        self._start = Pooled(objective, self._sample, theta)
        passed, share = time.perf_counter() - entered, len(self._batches) / len(self._sample)
        self._metric = natural_metric(self._start)
        self._theta, self._readout = self._start.theta.clone(), self._start.readout.clone()
        blocks = split_blocks(self._theta, objective.layout.blocks)  # views: steps move theta
        self._weights = [*blocks, self._readout]
        roots = [w.shape[0] ** 0.5 for w in self._weights]
        sizes = [_size(w) or 1 / root for w, root in zip(self._weights, roots, strict=True)]
        self._rates = [RATE * size / root for size, root in zip(sizes, roots, strict=True)]
        self._adam = torch.optim.Adam([{"params": w} for w in self._weights], 0, MOMENTS, FLOOR)
        self._steps, self._began = 0, time.perf_counter()
        whole = share if share > 1 else 0.0  # where the sample is not all rows already
        self._reserve = (1 + whole) * passed

    def run(self) -> Outcome:
        """Runs until a bound is met.

        Returns:
            The end with its readout solved over all rows, or the start where that is lower.
        """
        norm = relative_gradient_norm(self._start)
        status = self._report(self._start, norm, "start")
        try:
            while status is None:
                status = self._epoch()
        except KeyboardInterrupt:
            status = Status.INTERRUPTED
        end = self._end()
        return Outcome(end, relative_gradient_norm(end), status)

    def _end(self) -> Pooled:
        """The lower of the start and of where the steps led, each with its best readout.

        On the sample both have a readout that suits it, so that it tells them apart where they
        differ clearly; over all rows otherwise.

        Returns:
            The point over all rows.
        """
        if self._steps:
            sampled = Pooled(self._objective, self._sample, self._theta)
            end = self._whole(sampled)
            if sampled.value <= CLEARLY * self._start.value:
                return end
            start = self._whole(self._start)
            return end if end.value <= start.value else start
        return self._whole(self._start)

    def _whole(self, point: Pooled) -> Pooled:
        """A point of the sample over all rows."""
        if len(self._sample) == len(self._batches):
            return point
        return Pooled(self._objective, self._batches, point.theta)

    def _epoch(self) -> Status | None:
        """All mini-batches once, in random order."""
        self._run.iteration += 1
        gradient, loss = torch.zeros_like(self._theta), 0.0
        for i in torch.randperm(len(self._batches), generator=self._generator).tolist():
            if self._seconds_left() <= 0:
                return Status.MAX_SECONDS
            part, value = self._step(self._batches[i])
            gradient += part
            loss += value
        norm = self._metric.dual_norm(gradient) / self._objective.target_norm_squared
        ridges = self._objective.ridge_value(self._theta, self._readout)
        return self._report(_Estimate(loss, loss + ridges), norm, "stochastic")

    def _step(self, batch: Batch) -> tuple[Tensor, float]:
        """One step; the gradient by ``theta`` and the loss that it was taken at."""
        objective, theta, readout = self._objective, self._theta, self._readout
        gradient, slope, loss = joint_gradient(objective, batch, theta, readout)
        share = float(batch.weights.sum()) / objective.problem.total_weight
        self._add_ridges(gradient, slope, share)
        self._move(gradient, slope)
        # Shares of a pass over all rows, rounded once an epoch: forward and back.
        if self._steps % len(self._batches) == 0:
            objective.count_passes(2)
        return gradient, loss

    def _move(self, gradient: Tensor, slope: Tensor) -> None:
        """One Adam step along the gradients by ``theta`` and by the readout."""
        gradients = [*split_blocks(gradient, self._objective.layout.blocks), slope]
        factor = self._factor()
        for weight, part, rate, group in zip(
            self._weights, gradients, self._rates, self._adam.param_groups, strict=True
        ):
            weight.grad, group["lr"] = part, factor * rate
        self._adam.step()
        self._steps += 1

    def _factor(self) -> float:
        """Of the rate: warm-up, then a cosine to zero at the nearer bound."""
        total = self._settings.max_iterations * len(self._batches)
        done = self._steps / max(1, total)
        spent, left = time.perf_counter() - self._began, max(0.0, self._seconds_left())
        done = max(done, spent / (spent + left))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return cosine * min(1.0, (self._steps + 1) / WARM_UP)

    def _seconds_left(self) -> float:
        """Until the end has to begin."""
        return self._run.seconds_left() - self._reserve

    def _add_ridges(self, gradient: Tensor, slope: Tensor, share: float) -> None:
        ridge = self._objective.ridge
        if ridge is None:
            return
        pull = torch.zeros_like(gradient)
        self._objective.add_ridge_gradient(self._theta - ridge.center, pull)
        gradient.add_(pull, alpha=share)
        distance = (self._readout - ridge.readout_center).double()
        slope.add_((ridge.readout @ distance).to(slope.dtype), alpha=2.0 * share)

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


def _size(matrix: Tensor) -> float:
    """Root mean square."""
    return float(matrix.double().square().mean().sqrt())
