"""Which key/value heads share a student's head, and which query heads stay.

Key/value heads are alike where one head of the same width can stand for both: the distance of two
is the share of the logits' and of the outputs' squared size that their best common key and value
(:func:`attnreg.reduction.pooling.truncated`) leave out. Clusters minimise the sum of distances
inside them by exchanges: a local minimum.

Query heads are dropped one after the other by their measured contribution: with features ``F`` of
the problem and the least-squares readout ``O = M^{-1} F^T W B``, ``M = F^T W F``, leaving out the
columns ``u`` of a head raises the least error by exactly ``tr O_u^T [(M^{-1})_uu]^{-1} O_u``. A
ridge of 1e-9 of the diagonal keeps that finite where heads duplicate each other. The order is
greedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from attnreg.models import Features, MultiHead
from attnreg.problem import AttentionProblem
from attnreg.readout import gram64
from attnreg.reduction.headwise import Family, Split
from attnreg.reduction.pooling import NotApplicable, residual

_RIDGE = 1e-9


@dataclass(frozen=True)
class Group:
    """One key/value head of the student.

    Attributes:
        members: Key/value heads of the original that it stands for.
        heads: Query heads of the original that it serves, in the student's order.
    """

    members: tuple[int, ...]
    heads: tuple[int, ...]


def distances(split: Split) -> Tensor:
    """Distance of every two key/value heads, ``(kv_heads, kv_heads)``, 0 on the diagonal."""
    groups = len(split.values.right)
    result = torch.zeros(groups, groups, dtype=torch.float64)
    logits = float(split.turning.energy.sum()) + _energy(split.plain)
    outputs = _energy(split.values)
    for a, b in combinations(range(groups), 2):
        lost = sum(
            _common(split.turning, (a, b), slice(c, c + 1)) for c in range(split.turning.width)
        )
        lost += _common(split.plain, (a, b), slice(None))
        share = lost / (logits or 1.0)
        share += _common(split.values, (a, b), slice(None)) / (outputs or 1.0)
        result[a, b] = result[b, a] = share
    return result


def by_kv_head(family: Family) -> Tensor:
    """Gram matrices of the left factors summed over the heads of each right one."""
    return family.left_gram.unflatten(0, (len(family.right), -1)).sum(1)


def clusters(distance: Tensor, count: int) -> list[tuple[int, ...]]:
    """Clusters of heads that are alike: of one size where ``count`` divides the number of heads.

    Args:
        distance: ``(heads, heads)``.
        count: Number of clusters.

    Returns:
        Members of each in order; clusters in the order of their first members.
    """
    heads = len(distance)
    if heads % count:
        return _ordered(_agglomerated(distance, count))
    size = heads // count
    neighbours = list(range(heads))
    contiguous = [neighbours[i * size : (i + 1) * size] for i in range(count)]
    found = [_exchanged(distance, start) for start in (contiguous, _nearest(distance, size))]
    return _ordered(min(found, key=lambda parts: _inside(distance, parts)))


class Contributions:
    """The least-squares readout of a layer's features, and what leaving out heads costs.

    Args:
        problem: The data.
        model: The layer.
        weights: Its weights.
    """

    def __init__(
        self, problem: AttentionProblem, model: MultiHead, weights: Mapping[str, Tensor]
    ) -> None:
        theta, _ = model.split(problem, weights)
        features = Features(problem, model, theta, products=False)
        row_weights = torch.cat([batch.weights.flatten() for batch in problem.batches])[:, None]
        targets = torch.cat([batch.B.flatten(0, 1) for batch in problem.batches])
        left = row_weights * features.columns
        self._width = features.layout.value_width
        self._moments = gram64(left, features.columns)
        diagonal = self._moments.diagonal()
        floor = float(diagonal.max()) * torch.finfo(torch.float64).eps or 1.0
        diagonal += _RIDGE * diagonal + floor
        self._right = gram64(left, targets)

    def kept(
        self, units: Sequence[tuple[int, ...]], classes: Sequence[int], least: Mapping[int, int]
    ) -> list[int]:
        """Drops units of heads, the cheapest first, until each class has its number left.

        Args:
            units: Heads that go together, as numbers of the layer's heads.
            classes: The class of each unit.
            least: Units to be left in each class.

        Returns:
            Positions of the units that are kept, in order.
        """
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self._moments))
        right = self._right.clone()
        remaining = list(range(len(units)))
        left = {c: sum(k == c for k in classes) for c in set(classes)}
        while True:
            free = [i for i in remaining if left[classes[i]] > least[classes[i]]]
            if not free:
                return remaining
            readout = inverse @ right
            dropped = min(free, key=lambda i: (self._cost(inverse, readout, units[i]), i))
            columns = self._columns(units[dropped])
            row = inverse[columns]
            own = row[:, columns]
            inverse = inverse - row.mT @ torch.linalg.solve(own, row)
            # The dropped ones must not come back through rounding.
            inverse[columns], inverse[:, columns], right[columns] = 0.0, 0.0, 0.0
            remaining.remove(dropped)
            left[classes[dropped]] -= 1

    def _cost(self, inverse: Tensor, readout: Tensor, unit: tuple[int, ...]) -> float:
        columns = self._columns(unit)
        own = inverse[columns][:, columns]
        return float((readout[columns] * torch.linalg.solve(own, readout[columns])).sum())

    def _columns(self, unit: tuple[int, ...]) -> Tensor:
        inside = torch.arange(self._width, device=self._moments.device)
        return torch.cat([h * self._width + inside for h in unit])


def with_heads(
    members: Sequence[tuple[int, ...]],
    repeats: int,
    wanted: int,
    contributions: Contributions | None,
) -> list[Group]:
    """The query heads of each cluster, the least important dropped until ``wanted`` are left.

    Args:
        members: Key/value heads of each cluster.
        repeats: Query heads of a key/value head of the original.
        wanted: Query heads of a key/value head of the student.
        contributions: What decides where heads are to be dropped.

    Returns:
        The groups.

    Raises:
        NotApplicable: If a cluster has fewer query heads than wanted.
    """
    heads = [tuple(g * repeats + r for g in part for r in range(repeats)) for part in members]
    for part, own in zip(members, heads, strict=True):
        if len(own) < wanted:
            raise NotApplicable(
                f"key/value heads {list(part)} serve {len(own)} query heads, and a key/value head "
                f"of the student serves {wanted}"
            )
    if any(len(own) > wanted for own in heads):
        assert contributions is not None
        units = [(h,) for own in heads for h in own]
        classes = [i for i, own in enumerate(heads) for _ in own]
        kept = contributions.kept(units, classes, dict.fromkeys(range(len(heads)), wanted))
        heads = [tuple(units[k][0] for k in kept if classes[k] == i) for i in range(len(heads))]
    return [Group(part, own) for part, own in zip(members, heads, strict=True)]


def _energy(family: Family) -> float:
    """Squared size of all forms."""
    own = family.right_gram.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    return float((by_kv_head(family) * own).sum().real)


def _common(family: Family, pair: tuple[int, int], columns: slice) -> float:
    if family.width == 0:
        return 0.0
    chosen = list(pair)
    right = family.right_gram[chosen][:, chosen][..., columns, columns]
    left = by_kv_head(family)[chosen][..., columns, columns]
    return residual(right, left, left.shape[-1])


def _inside(distance: Tensor, parts: list[list[int]]) -> float:
    return sum(float(distance[part][:, part].sum()) for part in parts)


def _nearest(distance: Tensor, size: int) -> list[list[int]]:
    """One cluster after the other: the first free head and those nearest to it."""
    free, parts = list(range(len(distance))), []
    while free:
        part = [free.pop(0)]
        while len(part) < size:
            part.append(min(free, key=lambda h: (float(distance[part, h].sum()), h)))
            free.remove(part[-1])
        parts.append(part)
    return parts


def _exchanged(distance: Tensor, parts: list[list[int]]) -> list[list[int]]:
    """Steepest exchanges of two heads until none lowers the sum."""
    parts = [list(part) for part in parts]
    while True:
        best: tuple[float, tuple[int, int, int, int] | None] = (-1e-12, None)
        for i, j in combinations(range(len(parts)), 2):
            for a, x in enumerate(parts[i]):
                for b, y in enumerate(parts[j]):
                    here = distance[parts[i]].sum(0)
                    there = distance[parts[j]].sum(0)
                    gain = float(here[y] - here[x] + there[x] - there[y] - 2 * distance[x, y])
                    best = min(best, (gain, (i, a, j, b)), key=lambda found: found[0])
        if best[1] is None:
            return parts
        i, a, j, b = best[1]
        parts[i][a], parts[j][b] = parts[j][b], parts[i][a]


def _agglomerated(distance: Tensor, count: int) -> list[list[int]]:
    """Joins the two clusters of least sum between them until ``count`` are left."""
    parts = [[h] for h in range(len(distance))]
    while len(parts) > count:
        i, j = min(
            combinations(range(len(parts)), 2),
            key=lambda ij: (float(distance[parts[ij[0]]][:, parts[ij[1]]].sum()), ij),
        )
        parts[i] += parts.pop(j)
    return parts


def _ordered(parts: list[list[int]]) -> list[tuple[int, ...]]:
    return sorted(tuple(sorted(part)) for part in parts)
