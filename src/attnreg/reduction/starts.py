"""A student's starts from the weights of the original layer.

A start is a choice of three parts. *Grouping*: which key/value heads one of the student stands for
(neighbours; ``clustered``: those that are alike; ``fitted``: those that lose least by sharing one
after a fit, :mod:`attnreg.reduction.sharing`; ``dropped``: the most important stay alone).
*Pooling* of each group's keys and values: ``mean``, ``first``, ``aligned``, ``svd``
(:mod:`attnreg.reduction.pooling`). *Truncation* to narrower heads: the best of that width
(``svd``; with rotary embedding ``1/d^p`` names the weight of a distance, see
:mod:`attnreg.reduction.frequencies`), or single turning pairs as they are (``pairs``). Query
heads in excess are dropped by measured contribution (:mod:`attnreg.reduction.grouping`).

Which start is best is measured, with ``W_O`` solved by least squares, as the metrics that make them
are those of logits and values, not of the output. For groups before a fit that is the wrong
measure, as starts of equal error end far apart: where ``fitted`` groups are asked for they are
taken, and only their pooling is measured so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from attnreg.models import Features, MultiHead
from attnreg.problem import AttentionProblem
from attnreg.readout import NormalEquations
from attnreg.reduction.grouping import (
    Contributions,
    Group,
    clusters,
    distances,
    with_heads,
)
from attnreg.reduction.headwise import check_student, sizes
from attnreg.reduction.pooled_layer import DECAYS, POOLINGS, Reduction, Weights, pooled_weights
from attnreg.reduction.pooling import NotApplicable
from attnreg.reduction.sharing import pair_losses

_FITTED = "fitted"


@dataclass(frozen=True)
class Start:
    """The best of a student's starts.

    Attributes:
        name: Which one.
        weights: Its weights, ``W_O`` and ``b_O`` by least squares.
        unsolved: The same with the ``W_O`` that the pooling makes of the original's. Where data are
            few, the better start for :func:`attnreg.fit_validated`, which pulls towards it.
        relative_error: ``||prediction - B|| / ||B - mean||`` with them.
        tried: The relative error of every start, by name.
        notes: Why a start was left out, by name.
    """

    name: str
    weights: Weights
    unsolved: Weights
    relative_error: float
    tried: dict[str, float]
    notes: dict[str, str] = field(default_factory=dict)


def starts(
    problem: AttentionProblem,
    teacher: MultiHead,
    weights: Mapping[str, Tensor],
    student: MultiHead,
) -> dict[str, Weights]:
    """Every start that applies; ``W_O`` is what the pooling makes of it, not yet solved for.

    Args:
        problem: The layer's inputs, and its outputs as targets. A problem without ``scale`` gives
            teacher and student each the logit scale of its own ``head_dim``.
        teacher: Description of the original layer.
        weights: Its weights, ``y = x W + b``.
        student: Description of the layer wanted: not more heads, nor wider ones.

    Returns:
        The student's weights by the name of the start.

    Raises:
        ValueError: If the student has more of something than the teacher, or no start applies.
    """
    made, notes = _made(problem, teacher, weights, student)
    if not made:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in notes.items())
        raise ValueError(f"no start leads from {teacher} to {student}: {reasons}")
    return made


def best_start(
    problem: AttentionProblem,
    teacher: MultiHead,
    weights: Mapping[str, Tensor],
    student: MultiHead,
    *,
    pairs: AttentionProblem | None = None,
    max_seconds: float | None = None,
) -> Start:
    """The start with the least measured error after ``W_O`` is solved for.

    Args:
        problem: As for :func:`starts`.
        teacher: Description of the original layer.
        weights: Its weights.
        student: Description of the layer wanted.
        pairs: Rows of the layer on which all pairs of key/value heads are fitted for a short time,
            so that those share a head that lose least by it, where groups have a choice. The start
            is then the best one of these groups: before a fit it need not be the best of all. That
            takes as long as some hundred steps of a fit. None: groups are chosen by the start's
            error.
        max_seconds: Bound on the time of these fits, which then have fewer steps.

    Returns:
        The start; of equal ones the first tried.

    Raises:
        ValueError: As :func:`starts`, or if the error of no start is finite.
    """
    measured = None
    if pairs is not None:
        measured = partial(pair_losses, pairs, teacher, weights, student, max_seconds=max_seconds)
    made, notes = _made(problem, teacher, weights, student, measured)
    tried, solved = {}, {}
    for name, start in made.items():
        error, with_readout = solve_readout(problem, student, start)
        if math.isfinite(error):
            tried[name], solved[name] = error, with_readout
        else:
            notes[name] = "its error is not finite"
    if not tried:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in notes.items())
        raise ValueError(f"no start leads from {teacher} to {student}: {reasons}")
    fitted = {name: error for name, error in tried.items() if name.startswith(_FITTED)}
    best = min(fitted or tried, key=lambda name: tried[name])
    return Start(best, solved[best], made[best], tried[best], tried, notes)


def solve_readout(
    problem: AttentionProblem, model: MultiHead, weights: Mapping[str, Tensor]
) -> tuple[float, Weights]:
    """The weights with ``W_O`` and ``b_O`` by least squares, without ridge.

    Args:
        problem: The data.
        model: The layer.
        weights: Its weights.

    Returns:
        The relative error and the new weights.
    """
    theta, _ = model.split(problem, weights)
    features = Features(problem, model, theta, products=False)
    row_weights = torch.cat([batch.weights.flatten() for batch in problem.batches])[:, None]
    targets = torch.cat([batch.B.flatten(0, 1) for batch in problem.batches])
    columns = features.columns
    normal = NormalEquations(row_weights * columns, columns, None, 0.0, 0)
    readout, residual = normal.solve(targets, None)
    loss = float((row_weights.double() * residual.double().square()).sum())
    return problem.relative_error(loss), model.join(problem, theta, readout, weights)


# ---------------------------------------------------------------------- the choices


def _made(
    problem: AttentionProblem,
    teacher: MultiHead,
    weights: Mapping[str, Tensor],
    student: MultiHead,
    measured: Callable[[], Tensor] | None = None,
) -> tuple[dict[str, Weights], dict[str, str]]:
    """The starts, and why others were left out; ``measured`` adds those of fitted pairs."""
    check_student(problem, teacher, student)
    reduction = Reduction(problem, teacher, weights, student)
    made: dict[str, Weights] = {}
    notes: dict[str, str] = {}
    for prefix, make_groups in _groupings(reduction, measured):
        try:
            groups = make_groups()
        except NotApplicable as reason:
            notes[prefix or "neighbours"] = str(reason)
            continue
        for name, pool, decay in _ways(reduction, prefix, groups):
            try:
                made[name] = pooled_weights(reduction, groups, pool, decay)
            except NotApplicable as reason:
                notes[name] = str(reason)
    return made, notes


def _groupings(
    reduction: Reduction, measured: Callable[[], Tensor] | None
) -> Iterator[tuple[str, Callable[[], list[Group]]]]:
    """Names and makers of the groups that the sizes allow."""
    problem, teacher = reduction.problem, reduction.teacher
    heads, kv_heads, _, _ = sizes(problem, teacher)
    wanted_heads, wanted, _, _ = sizes(problem, reduction.student)
    repeats, wanted_repeats = heads // kv_heads, wanted_heads // wanted
    found: list[Contributions] = []

    def contributions() -> Contributions:
        if not found:
            found.append(Contributions(problem, teacher, reduction.weights))
        return found[0]

    def served(members: list[tuple[int, ...]]) -> list[Group]:
        needed = any(len(part) * repeats > wanted_repeats for part in members)
        return with_heads(members, repeats, wanted_repeats, contributions() if needed else None)

    def dropped() -> list[Group]:
        if repeats < wanted_repeats:
            raise NotApplicable(
                f"a key/value head serves {repeats} query heads, and one of the student's serves "
                f"{wanted_repeats}"
            )
        units = [tuple(range(g * repeats, (g + 1) * repeats)) for g in range(kv_heads)]
        kept = contributions().kept(units, [0] * kv_heads, {0: wanted})
        return served([(g,) for g in kept])

    if wanted == kv_heads:
        yield "", lambda: served([(g,) for g in range(kv_heads)])
        return
    size = kv_heads // wanted
    neighbours = [tuple(range(i * size, (i + 1) * size)) for i in range(wanted)]
    alike = clusters(distances(reduction.split), wanted)
    if kv_heads % wanted == 0:
        yield "", lambda: served(neighbours)
    if alike != neighbours:
        yield "clustered", lambda: served(alike)
    if measured is not None and wanted > 1:
        yield _FITTED, lambda: served(clusters(measured(), wanted))
    yield "dropped", dropped


def _ways(
    reduction: Reduction, prefix: str, groups: list[Group]
) -> Iterator[tuple[str, str | None, float | None]]:
    """Name, pooling (None: heads stay alone), decay of distances (None: pairs are selected)."""
    alone = all(len(group.members) == 1 for group in groups)
    problem, student, teacher = reduction.problem, reduction.student, reduction.teacher
    fewer = sizes(problem, student)[0] < sizes(problem, teacher)[0]
    decays: list[float | None] = [0.0]
    if reduction.turns_otherwise:
        decays = [*DECAYS, None] if alone else [DECAYS[-2]]
    for decay in decays:
        suffix = "pairs" if decay is None else f"1/d^{decay:g}" if decay else ""
        for pool in [None] if alone else [*POOLINGS, "svd"]:
            if pool is None and not reduction.narrower:
                name = prefix or ("dropped" if fewer else "original")
            else:
                words = [prefix, pool or ("" if decay is None else "svd"), suffix]
                name = " ".join(word for word in words if word)
            yield name, pool, decay
