r"""What key/value heads lose where they share one: short fits of all pairs, side by side.

Second moments tell it in part: shared keys and values move, and the queries with them, until little
of a difference that was large may be left. So every two key/value heads are fitted by a layer with
one key/value head to what the two gave, for some steps on mini-batches
(:mod:`attnreg.solvers.steepest` has the steps). All pairs are one layer, so that their projections
are one product; only the readouts are each pair's own. With features ``F_p`` (a constant among them
where the output has a bias) and targets ``T_p``::

    O_p = (F_p^T W F_p)^-1 F_p^T W T_p         over the last mini-batches
    u_p = 2 W (F_p O_p - T_p) O_p^T            what goes back through the features

``T_p`` are the outputs of the two in an orthonormal basis of what their ``W_O`` spans. Inputs are
cut to their leading principal directions, :data:`DIRECTIONS` a coordinate of a head, for original
and pairs alike: a loss here tells which pairs to take, and is none of the layer.

Heuristic: the rate and the numbers of steps, directions and rows, measured on real layers
(docs/theory.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from attnreg.batching import Batch
from attnreg.models import Features, MultiHead
from attnreg.objective import Objective
from attnreg.problem import AttentionProblem
from attnreg.reduction.headwise import sizes
from attnreg.reduction.pooled_layer import Reduction, group_weights, whole_group
from attnreg.solvers.minibatches import features_of, minibatches, stride
from attnreg.solvers.running_readout import window_rows
from attnreg.solvers.steepest import ScaledInputs, Steepest
from attnreg.solvers.stochastic import lengthened, step_rates, warmed_up

ROWS = 16384
"""Of the sequences that a caller should give, about. Of a quarter of them pairs learn by heart what
tells them apart, where the rows of a sequence are alike."""

STEPS = 100
FASTER, LONGEST = 4.0, 2.0
"""Times the rate of a fit: what is wanted is the order of the losses, not the last of each. Where
there is time for fewer than :data:`STEPS` steps, ``sqrt(STEPS / steps)`` times that, the second at
most."""

MOMENTUM, WARM_UP = 0.8, 5
"""Less momentum and fewer steps of warm-up than a fit has: there is no time for more."""

DIRECTIONS = 3
"""Principal directions of the inputs that are kept, a coordinate of one of the original's heads."""

DAMPING, END_DAMPING = 1e-3, 1e-9
"""Of the readouts' normal equations, in units of their mean diagonal: on the way, and at the end,
where it only keeps them solvable."""

COLUMNS = 8192
"""Features of the pairs that are fitted at once, about: a bound on the memory."""

Layer = tuple[MultiHead, Mapping[str, Tensor]]
"""A layer and its weights."""


def pair_losses(
    problem: AttentionProblem,
    teacher: MultiHead,
    weights: Mapping[str, Tensor],
    student: MultiHead,
    *,
    steps: int = STEPS,
    max_seconds: float | None = None,
    hurried: bool = False,
) -> Tensor:
    """What every two key/value heads lose where they share one, after short fits.

    Args:
        problem: The layer's inputs; a sample of :data:`ROWS` rows will do.
        teacher: Description of the original layer.
        weights: Its weights.
        student: Description of the layer wanted; how many heads it has does not matter.
        steps: Of each fit, at most.
        max_seconds: Bound on the time of the fits.
        hurried: As in :func:`sharing_losses`.

    Returns:
        ``(kv_heads, kv_heads)`` of the original, 0 on the diagonal, float64.
    """
    heads, kv_heads, width, value_width = sizes(problem, teacher)
    teacher = replace(teacher, head_dim=width, v_head_dim=value_width)  # whatever the inputs' width
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
    groups = [whole_group(pair, repeats) for pair in pairs]
    begun = model, group_weights(Reduction(problem, teacher, weights, model), groups)
    members = [group.heads for group in groups]
    original = teacher, weights
    losses = sharing_losses(
        problem, original, begun, members, steps=steps, max_seconds=max_seconds, hurried=hurried
    )
    result = losses.new_zeros(kv_heads, kv_heads)
    for (a, b), loss in zip(pairs, losses, strict=True):
        result[a, b] = result[b, a] = loss
    return result


def features_of_pairs(problem: AttentionProblem, teacher: MultiHead) -> int:
    """Features of all pairs together, of which :data:`COLUMNS` are fitted at once.

    Args:
        problem: The layer's inputs.
        teacher: Description of the original layer; heads of pairs are taken to be as wide as its.

    Returns:
        Their number.
    """
    heads, kv_heads, _, value_width = sizes(problem, teacher)
    return heads * (kv_heads - 1) * value_width  # kv_heads (kv_heads - 1) / 2 pairs


def leading_directions(
    problem: AttentionProblem, model: MultiHead, weights: Mapping[str, Tensor], count: int
) -> tuple[AttentionProblem, dict[str, Tensor]]:
    """The problem and a layer on its inputs' leading principal directions.

    Args:
        problem: The data; its targets stay.
        model: The layer.
        weights: Its weights.
        count: Directions of each input; all where it has no more.

    Returns:
        The problem with inputs ``A U``, and the weights with ``U^T W``.
    """
    grams = (problem.gram_query, problem.gram_key, problem.gram_value)
    bases = [_leading(grams[0], count, problem.dtype)]
    bases += [
        bases[0] if problem.self_attention else _leading(gram, count, problem.dtype)
        for gram in grams[1:]
    ]
    cut = dict(weights)
    for letter, basis in zip("QKV", bases, strict=True):
        weight = torch.as_tensor(weights[f"W_{letter}"]).detach().to(basis)
        cut[f"W_{letter}"] = basis.mT @ weight
    return problem.projected(*bases), cut


def _leading(gram: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.eigh(gram)[1].flip(1)[:, :count].to(dtype)


def sharing_losses(
    problem: AttentionProblem,
    original: Layer,
    pairs: Layer,
    members: Sequence[Sequence[int]],
    *,
    steps: int = STEPS,
    max_seconds: float | None = None,
    hurried: bool = False,
) -> Tensor:
    """The loss of each pair after a short fit, or of its start where that is lower.

    Args:
        problem: The inputs.
        original: The layer whose outputs are fitted, with ``W_O``.
        pairs: A layer with a key/value head for each pair, and the start; its readout is not used.
        members: Query heads of the original that each pair stands for, equally many.
        steps: Of each fit.
        max_seconds: Bound on the time of all steps; with fewer steps losses are less like those of
            a fit.
        hurried: Whether the starts are not looked at, which takes as long as ten steps, and the
            ends on every other mini-batch: pairs that lose nothing at their start have a loss then.

    Returns:
        The sum of squares that each pair leaves, float64.
    """
    model, weights = pairs
    count = len(members)
    features = model.layout(problem).features // count
    at_once = max(1, COLUMNS // features)
    parts = [range(i, min(count, i + at_once)) for i in range(0, count, at_once)]
    losses = []
    for chosen in parts:
        part = _part(model, weights, count, chosen)
        fits = PairFits(problem, original, part, members[chosen.start : chosen.stop])
        before = None if hurried else fits.losses()
        fits.run(steps, math.inf if max_seconds is None else max_seconds / len(parts))
        after = fits.losses(every=2 if hurried else 1)
        losses.append(after if before is None else torch.minimum(before, after))
    return torch.cat(losses)


def _part(model: MultiHead, weights: Mapping[str, Tensor], count: int, chosen: range) -> Layer:
    """Some of the pairs of a layer."""
    repeats = model.heads // count
    part = replace(model, heads=repeats * len(chosen), kv_heads=len(chosen))
    own = slice(chosen.start, chosen.stop)
    cut = dict(weights)
    for name in weights:
        if name[2:] in ("Q", "K", "V") and not name.startswith("g_"):
            cut[name] = weights[name].unflatten(-1, (count, -1))[..., own, :].flatten(-2)
    cut["W_O"] = weights["W_O"].unflatten(0, (count, -1))[own].flatten(0, 1)
    return part, cut


class PairFits:
    """The fits of some pairs.

    Args:
        problem: The inputs.
        original: As in :func:`sharing_losses`, as are the others.
        pairs: The layer of these pairs.
        members: Query heads of the original of each.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        original: Layer,
        pairs: Layer,
        members: Sequence[Sequence[int]],
    ) -> None:
        teacher, given = original
        model, start = pairs
        theta, _ = model.split(problem, start)
        self._objective = Objective(problem, model)
        self._teacher = Objective(problem, teacher)
        inputs = ScaledInputs(self._objective)
        self._batches = [inputs.batch(batch) for batch in minibatches(problem.batches)]
        self.theta = inputs.enter(theta)
        self._given = ScaledInputs(self._teacher).enter(teacher.split(problem, given)[0])
        layout = self._objective.layout
        fitted = layout.blocks[: len(layout.blocks) - layout.held]
        rates = step_rates(fitted, near=True)
        self._steepest = Steepest(inputs, theta, layout.blocks, rates, MOMENTUM)
        width = self._teacher.layout.value_width
        inside = torch.arange(width, device=theta.device)
        self._columns = torch.stack([torch.cat([h * width + inside for h in m]) for m in members])
        output = torch.as_tensor(given["W_O"]).detach().to(theta)
        self._bases = torch.linalg.qr(output[self._columns].mT)[1].mT  # (pairs, columns, c)
        self._gram: Tensor | None = None
        self._right: Tensor | None = None

    def run(self, steps: int, max_seconds: float = math.inf) -> None:
        """Takes some steps, at a rate that falls to zero with the last or at the end of the time.

        Args:
            steps: How many at most.
            max_seconds: Bound on their time.
        """
        if max_seconds <= 0.0:
            return
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        order: list[int] = []
        for step in range(steps):
            order = order or torch.randperm(len(self._batches), generator=generator).tolist()
            done = max(step / steps, (time.perf_counter() - began) / max_seconds)
            if done >= 1.0:
                return
            batch = self._batches[order.pop()]
            every = stride(batch.B.shape[1])
            first = int(torch.randint(every, (), generator=generator))
            rate = (1.0 - done) * warmed_up(step, WARM_UP)
            gradient = self.gradient(batch.every(every, first), rate)
            faster = FASTER * lengthened(step, done, STEPS, LONGEST)
            self._steepest.move(self.theta, gradient, rate * faster)

    def gradient(self, batch: Batch, rate: float) -> Tensor:
        """The gradient of all losses on a mini-batch, at the readouts of the last ones.

        Args:
            batch: With scaled inputs.
            rate: Share of the full rate; the readouts remember more as it falls.

        Returns:
            By ``theta``, flat.
        """
        features = features_of(self._objective, batch, self.theta)
        own, targets = self._sides(features, batch)
        weights = batch.weights.reshape(-1, 1)
        rows, k = own.shape[1:]
        keep = max(0.0, 1.0 - rows / window_rows(k, rate))
        weighted = own * weights
        gram, right = weighted.mT @ own, weighted.mT @ targets
        if self._gram is not None and self._right is not None:
            gram, right = gram.add_(self._gram, alpha=keep), right.add_(self._right, alpha=keep)
        self._gram, self._right = gram, right
        readout = _solved(gram, right, DAMPING)
        residual = (own @ readout).sub_(targets).mul_(2.0 * weights)
        width = self._objective.layout.features // len(self._bases)
        back = residual @ readout[:, :width].mT
        return features.vjp(back.transpose(0, 1).flatten(1))

    def losses(self, every: int = 1) -> Tensor:
        """The sum of squares of each pair with its best readout.

        Args:
            every: Of so many mini-batches one.

        Returns:
            Float64 ``(pairs,)``; of long sequences over the rows that a step reads, scaled to all.
        """
        gram = right = square = torch.zeros((), dtype=torch.float64, device=self.theta.device)
        for batch in self._batches[::every]:
            batch = batch.every(stride(batch.B.shape[1]), 0)
            features = features_of(self._objective, batch, self.theta, products=False)
            own, targets = (side.double() for side in self._sides(features, batch))
            weights = batch.weights.double().reshape(-1, 1)
            weighted = own * weights
            gram = gram + weighted.mT @ own
            right = right + weighted.mT @ targets
            square = square + (weights * targets.square()).sum((1, 2))
        readout = _solved(gram, right, END_DAMPING)
        explained = readout * (2.0 * right - gram @ readout)
        return (square - explained.sum((1, 2))).clamp_min(0.0)

    def _sides(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor]:
        """``[F_p 1]`` or ``F_p``, ``(pairs, rows, k)``, and ``T_p`` ``(pairs, rows, c)``."""
        layout = self._objective.layout
        own = features.columns[:, : layout.features]
        own = own.unflatten(1, (len(self._bases), -1)).transpose(0, 1)
        if layout.readout_bias:
            own = torch.cat([own, own.new_ones(*own.shape[:2], 1)], dim=2)
        given = features_of(self._teacher, batch, self._given, products=False).columns
        return own, given[:, self._columns].transpose(0, 1) @ self._bases


def _solved(gram: Tensor, right: Tensor, damping: float) -> Tensor:
    """``(gram + damping mean(diag gram) I)^-1 right`` of every pair; zero where all is zero."""
    gram = gram.clone()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    size = diagonal.mean(1, keepdim=True)
    diagonal += torch.where(size > 0.0, damping * size, 1.0)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))
