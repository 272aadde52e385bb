"""A student's weights for one choice of groups, pooling and truncation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnreg.models import MultiHead
from attnreg.problem import AttentionProblem
from attnreg.reduction import pooling
from attnreg.reduction.frequencies import matched, transfer
from attnreg.reduction.grouping import Group, by_kv_head
from attnreg.reduction.headwise import (
    Family,
    Split,
    join_heads,
    norm_of,
    rotary_of,
    sizes,
    split_heads,
    turning_width,
)
from attnreg.reduction.pooling import Combination, NotApplicable

Weights = dict[str, Tensor]

DECAYS = (0.0, 1.0, 2.0, 3.0)
"""Powers of a distance by which turning pairs of other frequencies are weighed."""

POOLINGS: dict[str, Callable[[Tensor, Tensor], Combination]] = {
    "mean": pooling.mean,
    "first": pooling.first,
    "aligned": pooling.aligned,
}


@dataclass(frozen=True)
class Reduction:
    """An original's layer, the student wanted, and the inputs that both are measured on."""

    problem: AttentionProblem
    teacher: MultiHead
    weights: Mapping[str, Tensor]
    student: MultiHead

    @cached_property
    def split(self) -> Split:
        """The original's weights head by head."""
        return split_heads(self.problem, self.teacher, self.weights)

    @property
    def narrower(self) -> bool:
        """Whether the student's heads are narrower, or turn by other frequencies."""
        problem, teacher, student = self.problem, self.teacher, self.student
        mine, theirs = (sizes(problem, model)[2:] for model in (student, teacher))
        return mine != theirs or self.turns_otherwise

    @property
    def turns_otherwise(self) -> bool:
        """Whether the student's heads turn by other frequencies."""
        old, new = rotary_of(self.teacher), rotary_of(self.student)
        return (new and new.frequencies) != (old and old.frequencies)


def grouped_start(
    problem: AttentionProblem,
    teacher: MultiHead,
    weights: Mapping[str, Tensor],
    student: MultiHead,
    members: Sequence[tuple[int, ...]],
) -> Weights:
    """The start of groups of one's own choice, each with its best common key and value.

    Args:
        problem: The layer's inputs.
        teacher: Description of the original layer.
        weights: Its weights.
        student: Description of the layer wanted, with all query heads of the original.
        members: Key/value heads of each group, of equal numbers.

    Returns:
        The student's weights, not yet with a solved ``W_O``.
    """
    heads, kv_heads, _, _ = sizes(problem, teacher)
    reduction = Reduction(problem, teacher, weights, student)
    return group_weights(reduction, [whole_group(group, heads // kv_heads) for group in members])


def whole_group(members: tuple[int, ...], repeats: int) -> Group:
    """A group with all query heads of its members."""
    return Group(members, tuple(g * repeats + r for g in members for r in range(repeats)))


def group_weights(reduction: Reduction, groups: list[Group]) -> Weights:
    """The best common key and value of each group, or the mean ones where norms forbid those."""
    decay = DECAYS[-2] if reduction.turns_otherwise else 0.0
    try:
        return pooled_weights(reduction, groups, "svd", decay)
    except NotApplicable:
        return pooled_weights(reduction, groups, "mean", decay)


def pooled_weights(
    reduction: Reduction, groups: list[Group], pool: str | None, decay: float | None
) -> Weights:
    """The student's weights for one choice."""
    problem, split, student = reduction.problem, reduction.split, reduction.student
    norms = norm_of(reduction.teacher) is not None
    if norms and (reduction.narrower or pool in ("aligned", "svd")):
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
            scales = _scales(reduction, *grams, decay) if turning else None
            made = _combined(*grams, pool, target, scales)
            parts.append(_applied(family, group, made))
        factors += [torch.cat([left for left, _ in parts]), torch.stack([r for _, r in parts])]
    gains = dict(split.gains)
    if norms:
        ratio = reduction.teacher.logit_scale(problem) / student.logit_scale(problem)
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
        made = POOLINGS[pool or "mean"](right, left)
        if rank == width:
            return made
        return made.then(pooling.truncated(*pooling.moments_of(right, left, made), rank))
    same = torch.equal(scales, torch.eye(width, dtype=scales.dtype, device=scales.device))
    if pool == "svd" or (pool is None and not same):
        return pooling.ranks_one(right, left, scales)
    made = pooling.by_column(right, left, POOLINGS[pool or "mean"])
    if same:
        return made
    return made.then(pooling.ranks_one(*pooling.moments_of(right, left, made), scales))


def _scales(reduction: Reduction, right: Tensor, left: Tensor, decay: float | None) -> Tensor:
    """By how much each original pair enters each of the student's."""
    old, new = rotary_of(reduction.teacher), rotary_of(reduction.student)
    if old is None or new is None:
        return left.new_zeros(0, 0)
    if old.frequencies == new.frequencies:
        return torch.eye(len(old.frequencies), dtype=left.dtype, device=left.device)
    if decay is not None:
        return transfer(reduction.problem, old, new, decay)
    own = right.diagonal(dim1=0, dim2=1).permute(2, 0, 1).diagonal(dim1=1, dim2=2).real
    energy = (left.diagonal(dim1=1, dim2=2).real * own).sum(0)
    return matched(reduction.problem, old, new, energy)


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
