"""Mini-batches where no time is given: in rounds while they pay, then curvature over all rows.

The rate of mini-batches falls to zero at the end of a run, which has to be known beforehand. So
they run in rounds, the first of :data:`FIRST` epochs and each later one twice as long, from where
the one before ended. After each the objective is known over all rows: once a round has lowered it
by less than :data:`PAYS`, the ordinary loop goes on.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attnreg.records import Callback, IterationRecord, Status
from attnreg.solvers.minibatches import Pooled
from attnreg.solvers.run import Outcome, Settings, counted_on
from attnreg.solvers.steepest import ScaledBatches
from attnreg.solvers.stochastic import Stochastic
from attnreg.solvers.trust_region import TrustRegion

FIRST = 6
"""Epochs of the first round."""

PAYS = 0.05
"""Share of the objective that a round gains where another one follows."""


def rounds_then_curvature(
    point: Pooled,
    settings: Settings,
    generator: torch.Generator,
    observe: Callback,
    began: float,
    *,
    near: bool,
    scaled: ScaledBatches | None = None,
) -> tuple[Outcome, str | None]:
    """Runs rounds of mini-batches, and the trust region once a round has gained little.

    Args:
        point: The start; its objective is minimised.
        settings: What bounds both together, by iterations.
        generator: Source of everything random.
        observe: Called with each record, iterations counted on.
        began: ``time.perf_counter()`` from which seconds are counted.
        near: Whether the start is near, for all rounds (:class:`.stochastic.Stochastic`).
        scaled: Of a run on the same data before.

    Returns:
        Where it ended, and why curvature went on; None where it did not.
    """
    objective, done, epochs = point.objective, 0, FIRST
    records: list[IterationRecord] = []

    def left(bound: int) -> Settings:
        return replace(settings, max_iterations=min(bound, settings.max_iterations - done))

    before = None
    while True:
        bounds, counted = left(epochs), counted_on(observe, records)
        loop = Stochastic(
            point, bounds, generator, counted, began, near=near, hurried=False, scaled=scaled
        )
        outcome, scaled = loop.run(), loop.scaled
        assert isinstance(outcome.point, Pooled)
        before = records[0].regularised if before is None else before
        point, value = outcome.point, outcome.point.regularised
        last, done = records[-1].iteration - done, records[-1].iteration
        if outcome.status is not Status.MAX_ITERATIONS or done >= settings.max_iterations:
            return outcome, None
        if value >= (1 - PAYS) * before:
            break
        before, epochs = value, 2 * epochs
    loop.scaled.batches.clear()  # the copy of the inputs, whoever holds it: curvature needs none
    gain = f"{1 - value / before:.1%}" if before > 0.0 else "nothing"
    reason = (
        f"'trust-region' went on after {done} epochs of mini-batches: the last {last} lowered the "
        f"objective by {gain}"
    )
    bounds, counted = left(settings.max_iterations), counted_on(observe, records)
    exact = objective.measured_whole()
    return TrustRegion(exact, point.theta, bounds, generator, counted, began).run(), reason
