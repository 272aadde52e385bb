"""A student's starts from the weights of the original layer.

A start is a choice of three parts. *Grouping*: which key/value heads one of the student stands for
(neighbours; ``clustered``: those that are alike; ``dropped``: the most important stay alone).
*Pooling* of each group's keys and values: ``mean``, ``first``, ``aligned``, ``svd``
(:mod:`attnreg.transformers.pooling`). *Truncation* to narrower heads: the best of that width
(``svd``; with rotary embedding ``1/d^p`` names the weight of a distance, see
:mod:`attnreg.transformers.frequencies`), or single turning pairs as they are (``pairs``). Query
heads in excess are dropped by measured contribution (:mod:`attnreg.transformers.grouping`).

Which start is best is measured, with ``W_O`` solved by least squares, as the metrics that make them
are those of logits and values, not of the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from attnreg.models import Features, MultiHead
from attnreg.problem import AttentionProblem
from attnreg.readout import NormalEquations
from attnreg.transformers import pooling
from attnreg.transformers.frequencies import matched, transfer
from attnreg.transformers.grouping import (
    Contributions,
    Group,
    by_kv_head,
    clusters,
    distances,
    with_heads,
)
from attnreg.transformers.headwise import (
    Family,
    Split,
    check_student,
    join_heads,
    norm_of,
    rotary_of,
    sizes,
    split_heads,
    turning_width,
)
from attnreg.transformers.pooling import Combination, NotApplicable
from attnreg.transformers.sharing import DIRECTIONS, leading_directions, sharing_losses

Weights = dict[str, Tensor]
PairLosses = Callable[[AttentionProblem, MultiHead, Mapping[str, Tensor], MultiHead], Tensor]
"""What :func:`pair_losses` is."""

_DECAYS = (0.0, 1.0, 2.0, 3.0)
_FITTED = "fitted"
_POOLINGS: dict[str, Callable[[Tensor, Tensor], Combination]] = {
    "mean": pooling.mean,
    "first": pooling.first,
    "aligned": pooling.aligned,
}


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
    fit_pairs: bool = False,
    max_seconds: float | None = None,
) -> Start:
    """The start with the least measured error after ``W_O`` is solved for.

    Args:
        problem: As for :func:`starts`.
        teacher: Description of the original layer.
        weights: Its weights.
        student: Description of the layer wanted.
        fit_pairs: Whether key/value heads are grouped by what short fits of all pairs lose, where
            groups have a choice: the start is then the best one of those groups, which need not be
            the best of all before a fit and is after it. Takes as long as some hundred steps.
        max_seconds: Bound on the time of these fits, which then have fewer steps.

    Returns:
        The start; of equal ones the first tried.

    Raises:
        ValueError: As :func:`starts`, or if the error of no start is finite.
    """
    measured = partial(pair_losses, max_seconds=max_seconds) if fit_pairs else None
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


def pair_losses(
    problem: AttentionProblem,
    teacher: MultiHead,
    weights: Mapping[str, Tensor],
    student: MultiHead,
    *,
    max_seconds: float | None = None,
) -> Tensor:
    """What every two key/value heads lose where they share one, after short fits.

    See :mod:`attnreg.transformers.sharing`.

    Args:
        problem: As for :func:`starts`.
        teacher: Description of the original layer.
        weights: Its weights.
        student: Description of the layer wanted; how many heads it has does not matter.
        max_seconds: Bound on the time of the fits.

    Returns:
        ``(kv_heads, kv_heads)`` of the original, 0 on the diagonal, float64.
    """
    heads, kv_heads, width, _ = sizes(problem, teacher)
    _, _, new_width, new_value_width = sizes(problem, student)
    problem, weights = leading_directions(problem, teacher, weights, DIRECTIONS * width)
    repeats, pairs = heads // kv_heads, list(combinations(range(kv_heads), 2))
    model = replace(
        student,
        heads=2 * repeats * len(pairs),
        kv_heads=len(pairs),
        head_dim=new_width,
        v_head_dim=new_value_width,
    )
    split = split_heads(problem, teacher, weights)
    groups = [_whole(pair, repeats) for pair in pairs]
    begun = model, _group_weights(_Task(problem, teacher, weights, model, split), groups)
    members = [group.heads for group in groups]
    original = teacher, weights
    losses = sharing_losses(problem, original, begun, members, max_seconds=max_seconds)
    result = losses.new_zeros(kv_heads, kv_heads)
    for (a, b), loss in zip(pairs, losses, strict=True):
        result[a, b] = result[b, a] = loss
    return result


def grouped_start(
    problem: AttentionProblem,
    teacher: MultiHead,
    weights: Mapping[str, Tensor],
    student: MultiHead,
    members: Sequence[tuple[int, ...]],
) -> Weights:
    """The start of groups of one's own choice, each with its best common key and value.

    Args:
        problem: As for :func:`starts`.
        teacher: Description of the original layer.
        weights: Its weights.
        student: Description of the layer wanted, with all query heads of the original.
        members: Key/value heads of each group, of equal numbers.

    Returns:
        The student's weights, not yet with a solved ``W_O``.
    """
    heads, kv_heads, _, _ = sizes(problem, teacher)
    task = _Task(problem, teacher, weights, student, split_heads(problem, teacher, weights))
    return _group_weights(task, [_whole(group, heads // kv_heads) for group in members])


def _whole(members: tuple[int, ...], repeats: int) -> Group:
    """A group with all query heads of its members."""
    return Group(members, tuple(g * repeats + r for g in members for r in range(repeats)))


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


@dataclass(frozen=True)
class _Task:
    """A teacher, a student and what both are on the problem."""

    problem: AttentionProblem
    teacher: MultiHead
    weights: Mapping[str, Tensor]
    student: MultiHead
    split: Split

    @property
    def narrower(self) -> bool:
        """Whether the student's heads are narrower, or turn by other frequencies."""
        problem, teacher, student = self.problem, self.teacher, self.student
        mine, theirs = (sizes(problem, model)[2:] for model in (student, teacher))
        old, new = rotary_of(teacher), rotary_of(student)
        return mine != theirs or (new and new.frequencies) != (old and old.frequencies)


def _made(
    problem: AttentionProblem,
    teacher: MultiHead,
    weights: Mapping[str, Tensor],
    student: MultiHead,
    measured: PairLosses | None = None,
) -> tuple[dict[str, Weights], dict[str, str]]:
    """The starts, and why others were left out; ``measured`` adds those of fitted pairs."""
    check_student(problem, teacher, student)
    task = _Task(problem, teacher, weights, student, split_heads(problem, teacher, weights))
    made: dict[str, Weights] = {}
    notes: dict[str, str] = {}
    for prefix, make_groups in _groupings(task, measured):
        try:
            groups = make_groups()
        except NotApplicable as reason:
            notes[prefix or "neighbours"] = str(reason)
            continue
        for name, pool, decay in _ways(task, prefix, groups):
            try:
                made[name] = _weights(task, groups, pool, decay)
            except NotApplicable as reason:
                notes[name] = str(reason)
    return made, notes


def _groupings(
    task: _Task, measured: PairLosses | None
) -> Iterator[tuple[str, Callable[[], list[Group]]]]:
    """Names and makers of the groups that the sizes allow."""
    problem, teacher = task.problem, task.teacher
    heads, kv_heads, _, _ = sizes(problem, teacher)
    wanted_heads, wanted, _, _ = sizes(problem, task.student)
    repeats, wanted_repeats = heads // kv_heads, wanted_heads // wanted
    found: list[Contributions] = []

    def contributions() -> Contributions:
        if not found:
            found.append(Contributions(problem, teacher, task.weights))
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
    alike = clusters(distances(task.split), wanted)
    if kv_heads % wanted == 0:
        yield "", lambda: served(neighbours)
    if alike != neighbours:
        yield "clustered", lambda: served(alike)
    if measured is not None and wanted > 1:
        given = problem, teacher, task.weights, task.student
        yield _FITTED, lambda: served(clusters(measured(*given), wanted))
    yield "dropped", dropped


def _group_weights(task: _Task, groups: list[Group]) -> Weights:
    """The best common key and value of each group, or the mean ones where norms forbid those."""
    decay = next(decay for _, _, decay in _ways(task, "", groups))
    try:
        return _weights(task, groups, "svd", decay)
    except NotApplicable:
        return _weights(task, groups, "mean", decay)


def _ways(
    task: _Task, prefix: str, groups: list[Group]
) -> Iterator[tuple[str, str | None, float | None]]:
    """Name, pooling (None: heads stay alone), decay of distances (None: pairs are selected)."""
    alone = all(len(group.members) == 1 for group in groups)
    fewer = sizes(task.problem, task.student)[0] < sizes(task.problem, task.teacher)[0]
    old, new = rotary_of(task.teacher), rotary_of(task.student)
    decays: list[float | None] = [0.0]
    if old and new and old.frequencies != new.frequencies:
        decays = [*_DECAYS, None] if alone else [_DECAYS[-2]]
    for decay in decays:
        suffix = "pairs" if decay is None else f"1/d^{decay:g}" if decay else ""
        for pool in [None] if alone else [*_POOLINGS, "svd"]:
            if pool is None and not task.narrower:
                name = prefix or ("dropped" if fewer else "original")
            else:
                words = [prefix, pool or ("" if decay is None else "svd"), suffix]
                name = " ".join(word for word in words if word)
            yield name, pool, decay


# ---------------------------------------------------------------------- one start


def _weights(task: _Task, groups: list[Group], pool: str | None, decay: float | None) -> Weights:
    """The student's weights for one choice."""
    problem, split, student = task.problem, task.split, task.student
    norms = norm_of(task.teacher) is not None
    if norms and (task.narrower or pool in ("aligned", "svd")):
        raise NotApplicable("norms of queries and keys leave no gauge to pool or truncate in")
    _, _, width, value_width = sizes(problem, student)
    rotary = rotary_of(student)
    plain_width = width - turning_width(rotary)
    factors = []
    for family, target, turning in (
        (split.turning, None, True),
        (split.plain, plain_width, False),
        (split.values, value_width, False),
    ):
        parts = []
        for group in groups:
            grams = _grams(family, group)
            scales = _scales(task, *grams, decay) if turning else None
            made = _combined(*grams, pool, target, scales)
            parts.append(_applied(family, group, made))
        factors += [torch.cat([left for left, _ in parts]), torch.stack([r for _, r in parts])]
    gains = dict(split.gains)
    if norms:
        ratio = task.teacher.logit_scale(problem) / student.logit_scale(problem)
        gains["g_Q"] = gains["g_Q"] * ratio
    constant = _constant(split, groups, factors[4], factors[5])
    return join_heads(problem, student, tuple(factors), constant, gains)  # type: ignore[arg-type]


def _grams(family: Family, group: Group) -> tuple[Tensor, Tensor]:
    """Gram matrices ``B`` and ``A`` of the members, ``A`` over the query heads that stay."""
    members = list(group.members)
    repeats = len(family.left) // len(family.right)
    left = torch.zeros_like(by_kv_head(family)[members])
    for head in group.heads:
        left[members.index(head // repeats)] += family.left_gram[head]
    return family.right_gram[members][:, members], left


def _combined(
    right: Tensor, left: Tensor, pool: str | None, rank: int | None, scales: Tensor | None
) -> Combination:
    """Pooling and truncation of one group's family.

    Args:
        right: ``B``.
        left: ``A``.
        pool: Its name; None where there is one member.
        rank: Columns wanted of a family that does not turn.
        scales: ``(new columns, columns)`` of one that turns.

    Returns:
        The coefficients.
    """
    width = left.shape[-1]
    if scales is None:
        assert rank is not None
        if rank == 0:
            return pooling.truncated(right, left, 0)
        if pool == "svd" or (pool is None and rank < width):
            return pooling.truncated(right, left, rank)
        made = _POOLINGS[pool or "mean"](right, left)
        if rank == width:
            return made
        return made.then(pooling.truncated(*pooling.moments_of(right, left, made), rank))
    same = torch.equal(scales, torch.eye(width, dtype=scales.dtype, device=scales.device))
    if pool == "svd" or (pool is None and not same):
        return pooling.ranks_one(right, left, scales)
    made = pooling.by_column(right, left, _POOLINGS[pool or "mean"])
    if same:
        return made
    return made.then(pooling.ranks_one(*pooling.moments_of(right, left, made), scales))


def _scales(task: _Task, right: Tensor, left: Tensor, decay: float | None) -> Tensor:
    """By how much each original pair enters each of the student's."""
    old, new = rotary_of(task.teacher), rotary_of(task.student)
    if old is None or new is None:
        return left.new_zeros(0, 0)
    if old.frequencies == new.frequencies:
        return torch.eye(len(old.frequencies), dtype=left.dtype, device=left.device)
    if decay is not None:
        return transfer(task.problem, old, new, decay)
    own = right.diagonal(dim1=0, dim2=1).permute(2, 0, 1).diagonal(dim1=1, dim2=2).real
    energy = (left.diagonal(dim1=1, dim2=2).real * own).sum(0)
    return matched(task.problem, old, new, energy)


def _applied(family: Family, group: Group, made: Combination) -> tuple[Tensor, Tensor]:
    """The left factors of the group's query heads and its right factor."""
    members = list(group.members)
    repeats = len(family.left) // len(family.right)
    heads = list(group.heads)
    own = [members.index(head // repeats) for head in heads]
    return family.left[heads] @ made.left[own], (family.right[members] @ made.right).sum(0)


def _constant(split: Split, groups: list[Group], left: Tensor, right: Tensor) -> Tensor | None:
    """``b_O`` with what the values' biases gave before and no longer give."""
    if split.constant is None:
        return None
    repeats = len(split.values.left) // len(split.values.right)
    constant = split.constant.clone()
    position = 0
    for group, new in zip(groups, right, strict=True):
        for head in group.heads:
            constant += split.values.left[head] @ split.values.right[head // repeats][-1]
            constant -= left[position] @ new[-1]
            position += 1
    return constant
