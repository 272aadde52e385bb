r"""A start by way of more key/value heads, where the one given says nothing of which may share one.

The query heads of a key/value head stay together through a whole fit, and where it ends depends
more on which those are than on all else (docs/theory.md, "Which heads share one"). Averaged heads
say nothing of it, but the readout beside them says what each head has to give: with it held, the
layer in which every query head has a key/value head of its own has targets for each head apart, and
a few hundred steps find them::

    L(W_Q, W_K repeated, W_V repeated, W_O)      W_O as given; mini-batches, a share of the time
    groups of the heads that are found           fits of pairs, :mod:`attnreg.reduction.sharing`
    the best common key and value of a group     :mod:`attnreg.reduction.pooled_layer`

and the last is the start of the fit that was asked for. A readout that is not that of the layer
shows in what the larger layer leaves unexplained, and the start that comes of it is taken where its
loss is clearly below that of the one given, both on the same sample of the rows with their best
readout.

Heuristic: the shares and the numbers of steps, measured on real layers (docs/theory.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnreg.batching import Batch
from attnreg.models import MultiHead
from attnreg.models.pooling import repeat_kv_heads
from attnreg.objective import Objective
from attnreg.records import Callback, IterationRecord, Status
from attnreg.reduction.grouping import clusters
from attnreg.reduction.pooled_layer import grouped_start
from attnreg.reduction.sampling import sample
from attnreg.reduction.sharing import COLUMNS, ROWS, features_of_pairs, pair_losses
from attnreg.solvers.choice import ENOUGH, residuals_a_weight
from attnreg.solvers.minibatches import (
    Pooled,
    features_of,
    minibatches,
    partial_gradient,
    sampled,
    spread,
    stride,
)
from attnreg.solvers.run import Settings, counted_on
from attnreg.solvers.steepest import ScaledBatches
from attnreg.solvers.stochastic import CLEARLY, Stochastic, steps_of_iteration

SHARE, MOST_SHARE = 0.25, 0.35
"""Of the time, or of the iterations, for the layer with more heads; of the time up to the second
where :data:`USEFUL_STEPS` take so long."""

FEWEST_STEPS, USEFUL_STEPS, MOST_STEPS = 110, 140, 300
"""Steps of the layer with more heads, rounded up to epochs: after more its groups change little,
after fewer its heads are still alike in the groups that they were copied from. Where there is no
room for the fewest it is not tried."""

UNEXPLAINED, CHECKED_ROWS = 0.25, 2048
"""Share of the targets' spread that heads of use leave at most, and rows on which that is seen."""

PAIRS_SHARE, PAIR_STEPS = 0.14, 30
"""Of the time for the steps of the fits of pairs, at most, and how many they are at most."""

GRADIENTS = 2.0
"""Gradients of a mini-batch in the time of a step with a held readout."""

POOLED_ROWS = 4096
"""Of the sequences of which heads are pooled, about."""

MOST_PAIRS = 2 * COLUMNS
"""Features of all pairs: fits of more, of which few are fitted at once, take too long."""


@dataclass(frozen=True)
class Lift:
    """Where a fit goes on.

    Attributes:
        point: The start of the fit, on a sample of the rows; the one given if no other is made.
        near: Whether it explains a tenth of the targets' spread with the readout it came with.
        note: What was done.
        status: That of a fit which is to end here: it was interrupted, or asked to stop.
        scaled: The mini-batches with scaled inputs, which the fit goes on with.
    """

    point: Pooled
    near: bool
    note: str
    status: Status | None
    scaled: ScaledBatches


def lifted(
    begin: Pooled,
    template: Mapping[str, Tensor],
    settings: Settings,
    generator: torch.Generator,
    observe: Callback,
    began: float,
    records: list[IterationRecord],
) -> Lift | None:
    """A better start by way of more key/value heads.

    Args:
        begin: The start given, on a sample of the rows, which says nothing of the heads.
        template: Its weights.
        settings: What bounds the fit as a whole.
        generator: Orders the mini-batches.
        observe: Called with each record.
        began: ``time.perf_counter()`` from which seconds are counted.
        records: Those of this part are added.

    Returns:
        Where the fit goes on, or None where this is not for it: other models, heads with norms or
        too many of them, ridges, one key/value head or as many as heads, no readout, little data or
        little time.
    """
    objective = begin.objective
    problem, model, wide = objective.problem, objective.model, _wider(objective)
    if wide is None:
        return None
    assert isinstance(model, MultiHead)
    groups = objective.layout.groups
    copied = repeat_kv_heads(template, groups, objective.layout.repeats)
    theta, readout = wide.split(problem, copied)
    given = bool(readout[: objective.layout.features].any())
    if not given or residuals_a_weight(problem, theta.numel() + readout.numel()) < ENOUGH:
        return None
    more = objective.with_model(wide)
    bounds = _bounds(more, theta, readout, settings, began)
    if bounds is None:
        return None
    loop = Stochastic(
        begin.under(more, theta),  # copies of heads have the features that they have
        bounds,
        generator,
        counted_on(observe, records),
        began,
        near=False,
        hurried=False,
        phase="lifted",
        held=readout,
    )
    status, theta = loop.lead()
    scaled = loop.scaled
    objective.count_passes(more.passes - objective.passes)
    heads = f"a layer with {model.heads} key/value heads, fitted first,"

    def given_up(why: str, status: Status | None = None) -> Lift:
        return Lift(begin, False, f"{heads} {why}", status, scaled)

    if status in (Status.INTERRUPTED, Status.STOPPED):
        return given_up("was cut short", status)
    if status in (Status.CONVERGED, Status.DIVERGED):
        return given_up(f"was no help: {_WHY[status]}")
    checked = Pooled(more, spread(begin.batches, CHECKED_ROWS), theta)
    if not checked.loss_at(readout) <= UNEXPLAINED * more.target_norm_squared:
        return given_up("was no help: it explains little")
    found = wide.join(problem, theta, readout, copied)
    limit = settings.max_seconds
    bound = None if limit is None else PAIRS_SHARE * limit
    try:
        some = sample(problem, ROWS)
        lost = pair_losses(
            some, wide, found, model, steps=PAIR_STEPS, max_seconds=bound, hurried=True
        )
    except torch.linalg.LinAlgError:
        return given_up("was no help: a fit of two heads has no readout")
    members = clusters(lost.cpu(), groups)
    weights = grouped_start(sample(problem, POOLED_ROWS), wide, found, model, members)
    theta, readout = model.split(problem, weights)
    start = sampled(objective, theta)
    if not start.value <= CLEARLY * begin.value:
        return given_up("led to no better start")
    note = f"the start was made of {heads} its heads grouped by fits of pairs"
    return Lift(start, start.explains(readout), note, None, scaled)


def _wider(objective: Objective) -> MultiHead | None:
    """The layer with a key/value head for every query head, or None where this is not for it."""
    model, layout = objective.model, objective.layout
    if not isinstance(model, MultiHead) or model.norm_eps is not None:
        return None
    if objective.ridge is not None or layout.groups == 1 or layout.repeats == 1:
        return None
    wide = replace(model, kv_heads=model.heads)
    return wide if features_of_pairs(objective.problem, wide) <= MOST_PAIRS else None


_WHY = {
    Status.CONVERGED: "the start is stationary",
    Status.DIVERGED: "its steps left the range of numbers",
}


def _bounds(
    more: Objective, theta: Tensor, readout: Tensor, settings: Settings, began: float
) -> Settings | None:
    """What bounds the fit with more heads; None where that leaves too few steps."""
    batches = minibatches(more.problem.batches)
    steps = steps_of_iteration(batches)
    epochs = min(math.floor(SHARE * settings.max_iterations), math.ceil(MOST_STEPS / steps))
    if epochs * steps < FEWEST_STEPS:
        return None
    seconds = None
    if settings.max_seconds is not None:
        spent = time.perf_counter() - began
        step = GRADIENTS * _seconds_of_gradient(more, batches[len(batches) // 2], theta, readout)
        left = settings.max_seconds - spent
        if FEWEST_STEPS * step > MOST_SHARE * left:
            return None
        seconds = spent + min(max(SHARE * left, USEFUL_STEPS * step), MOST_SHARE * left)
    return replace(settings, max_iterations=epochs, max_seconds=seconds)


def _seconds_of_gradient(
    objective: Objective, batch: Batch, theta: Tensor, readout: Tensor
) -> float:
    """Of the rows that a step reads of a mini-batch, the least of three: the first may be slow."""
    batch = batch.every(stride(batch.B.shape[1]), 0)
    least = math.inf
    for _ in range(3):
        began = time.perf_counter()
        features = features_of(objective, batch, theta)
        partial_gradient(objective, batch, features, readout)
        least = min(least, time.perf_counter() - began)
    return least
