"""How much each layer loses at each size: the profile from which a plan is made.

A layer is fitted on the original's own inputs, all other layers being the original's. What it loses
at a setting is the square of the held-out relative error of its output: the share of the output's
variance that is gone. Errors of different layers are taken to add up, each with weight one; the
plan within a budget is exact for that sum (:func:`attnreg.transformers.plan.cheapest`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from attnreg.transformers.adapters import Adapter, adapter_for
from attnreg.transformers.calibration import Windows
from attnreg.transformers.checkpoint import Checkpoint
from attnreg.transformers.layer_fit import fit_layer, layer_problem
from attnreg.transformers.plan import Choice, Plan, Setting, cheapest
from attnreg.transformers.shapes import AttentionShape
from attnreg.transformers.streaming import Blockwise
from attnreg.transformers.task import Options, find_groups, multi_head, original_shapes


@dataclass(frozen=True)
class Measured:
    """One layer at one setting.

    Attributes:
        layers: The applications of the block.
        setting: The setting.
        student: The shape that it gives.
        cost: Numbers in the key/value cache for a token, over these layers.
        error: Held-out relative error of the layer's output; 0 where nothing changes.
        start: Name of the start.
    """

    layers: tuple[int, ...]
    setting: Setting
    student: AttentionShape
    cost: int
    error: float
    start: str

    @property
    def loss(self) -> float:
        """What counts in a plan: the squared error, once for each application."""
        return len(self.layers) * self.error**2


def candidates(
    adapter: Adapter, config: Any, layer: int, shape: AttentionShape, settings: Iterable[Setting]
) -> dict[AttentionShape, Setting]:
    """The settings that a layer may have, by the shape that they give; first the unchanged one.

    Args:
        adapter: The adapter of the family.
        config: The original's configuration.
        layer: Number of the layer.
        shape: The original's shape.
        settings: Those to consider; none: every smaller number of key/value heads that divides the
            original's.

    Returns:
        At least two settings.

    Raises:
        ValueError: If a setting does not suit the layer, or there is no smaller one.
    """
    given = tuple(settings) or tuple(
        Setting(kv_heads=g) for g in range(shape.kv_heads - 1, 0, -1) if shape.kv_heads % g == 0
    )
    found = {shape: Setting()}
    for setting in given:
        found.setdefault(setting.student(adapter, config, layer, shape), setting)
    if len(found) < 2:
        raise ValueError(
            f"layer {layer} has {shape.kv_heads} key/value head(s), and no smaller setting was "
            "given: give --kv-heads, --heads or --head-dim below the original's"
        )
    return found


def measure(
    checkpoint: Checkpoint,
    fit: Windows,
    held_out: Windows,
    settings: Sequence[Setting],
    options: Options,
    observer: Callable[[int, int, Measured], None] | None = None,
) -> list[list[Measured]]:
    """The sensitivity profile.

    Args:
        checkpoint: The model.
        fit: Windows to fit on.
        held_out: Windows that the errors are measured on.
        settings: Settings to try; empty: every smaller number of key/value heads.
        options: ``max_iterations`` bounds each fit (0: the best start, its ``W_O`` moved
            towards the solved one as far as held-out error says);
            seed and device.
        observer: Called with the number of measurements done, that of all, and the last one.

    Returns:
        For each block what it loses at each setting, the unchanged one first.

    Raises:
        ValueError: If a setting does not suit a layer.
    """
    adapter = adapter_for(checkpoint.config)
    shapes = original_shapes(checkpoint)
    groups = find_groups(checkpoint, shapes, shapes)
    tried = [
        candidates(adapter, checkpoint.config, group.applications[0], group.original, settings)
        for group in groups
    ]
    total = sum(len(found) - 1 for found in tried)
    runner = Blockwise(checkpoint, [*fit.ids, *held_out.ids], device=options.device)
    rows, done, profile = runner.start(), 0, []
    for group, found in zip(groups, tried, strict=True):
        block = runner.block(group.block)
        weights = {name: value.float() for name, value in adapter.read(block).items()}
        inputs, outputs = [], []
        for application in group.applications:
            rows, given, output = runner.apply(application, block, rows, attention=True)
            assert given is not None
            assert output is not None
            inputs.append(given)
            outputs.append(output)
        measured = []
        for student, setting in found.items():
            if student == group.original:
                error, start = 0.0, "unchanged"
            else:
                layer = fit_layer(
                    layer_problem(runner, student, inputs, outputs, 0, len(fit)),
                    layer_problem(
                        runner, student, inputs, outputs, len(fit), len(runner.offsets) - 1
                    ),
                    (multi_head(group.original), weights),
                    multi_head(student),
                    max_iterations=options.max_iterations,
                    max_seconds=None,
                    seed=options.seed,
                    saved=checkpoint.dtype,
                    fit_pairs=options.fit_pairs,
                )
                error, start, done = layer.held_out_error, layer.start, done + 1
            cost = 2 * student.kv_heads * student.head_dim * len(group.applications)
            measured.append(Measured(group.applications, setting, student, cost, error, start))
            if observer is not None and student != group.original:
                observer(done, total, measured[-1])
        profile.append(measured)
    return profile


@dataclass(frozen=True)
class Choices:
    """What each layer is given within a budget.

    Attributes:
        measured: One for each block.
        share: Their cost as a share of the original's.
    """

    measured: tuple[Measured, ...]
    share: float

    @property
    def loss(self) -> float:
        """Sum of the losses."""
        return sum(one.loss for one in self.measured)

    def plan(self) -> Plan:
        """The plan that ``compress`` takes."""
        given = {n: one.setting for one in self.measured for n in one.layers}
        settings = set(given.values())
        if len(settings) == 1:
            return Plan(settings.pop())
        return Plan(layers={n: setting for n, setting in given.items() if setting.given()})


def choose(profile: Sequence[Sequence[Measured]], budget: float) -> Choices:
    """The settings with the least sum of losses within a budget.

    Args:
        profile: As :func:`measure` gives it.
        budget: Largest key/value cache as a share of the original's.

    Returns:
        One setting for each block; exact for losses that add up.

    Raises:
        ValueError: If the budget is not between 0 and 1, or no plan is that small.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"the budget is {budget}; expected a share above 0 and at most 1")
    whole = sum(layer[0].cost for layer in profile)
    choices = [[Choice(i, one.cost, one.loss) for i, one in enumerate(layer)] for layer in profile]
    found = cheapest(choices, math.floor(budget * whole + 1e-9))
    if found is None:
        least = sum(min(one.cost for one in layer) for layer in profile) / whole
        raise ValueError(
            f"no plan keeps {budget:g} of the key/value cache; the smallest of these settings "
            f"keeps {least:.3g}: raise the budget, or allow smaller settings"
        )
    picked = tuple(layer[c.index] for layer, c in zip(profile, found, strict=True))
    return Choices(picked, sum(one.cost for one in picked) / whole)


def choose_even(profile: Sequence[Sequence[Measured]], budget: float) -> Choices | None:
    """The same with one setting for all layers, which plain transformers may load.

    Returns:
        The setting with the least loss, or None if none is within the budget.
    """
    whole = sum(layer[0].cost for layer in profile)
    found = []
    for one in profile[0]:
        same = [m for layer in profile for m in layer if m.setting == one.setting]
        share = sum(m.cost for m in same) / whole
        if len(same) == len(profile) and share <= budget + 1e-9:
            found.append(Choices(tuple(same), share))
    return min(found, key=lambda c: c.loss, default=None)
