"""Many short stochastic runs at once, to choose the start of a cold fit.

Ill-conditioned inputs leave few directions with variance, and a problem of few dimensions has
many local minima: the regularisation path ends in one of them. Short runs of Adam (Kingma and Ba
2015) on single sequences tell the starts apart: some fall to a fraction of the others' loss
within some hundred steps, the rest never do. So many starts race side by side, all in the same
batched matrix products; one that separates is handed to the Newton loop. Where none does, all
are in equally good basins or in equally bad ones, and the path goes its way as without this race.

Measured, not proven (``benchmarks/planted.py``): on planted problems with inputs over 1.5 to 3
decades one start in four separates within a race; with well-conditioned inputs of 32 dimensions
one in sixty, where the path succeeds. The phase is therefore tried only where the inputs have few
effective dimensions: before the first path where these are very few, else only once a path has
ended on a plateau.

Each start works in random orthonormal coordinates of its own: Adam scales single coordinates, and
in the eigenbasis of the inputs that would undo the variance which should lead. Steps are in units
of the logits and of the targets, so that the scale of the inputs does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnreg.masks import hidden_keys
from attnreg.objective import Objective
from attnreg.problem import Batch

STARTS = 16
STEPS = 300
"""Starts side by side and steps of a race."""

ROWS, ENTRIES = 64, 1 << 15
"""Query rows of one sequence in one step, fewer where the softmax matrix of a start would have more
entries than the second: those of all starts pass through memory in every step."""

FIRST_CHECK, CHECK_INTERVAL = 150, 50

SEPARATION = 0.5
"""A start has separated when its loss is below this share of the median start's."""

MAX_DIMENSIONS = 20.0
"""Effective dimensions of the keys up to which the phase is tried."""

FEW_DIMENSIONS = 10.0
"""Effective dimensions up to which the first path is raced for. In trials on well-conditioned
planted problems, in 2.5 or 3 s: of 8 dimensions the race before the path led to the planted
solution of 15 of 24, the path before the race of 13; of 16 dimensions 8 and 10 of 18, the path in
half the time."""

MAX_WIDTH = 128
"""Width of the inputs up to which the phase is tried: each start has matrices of its own."""

START_LOGITS, LOGIT_STEP, TARGET_STEP = 0.6, 0.2, 0.04
"""Standard deviation of a start's logits, and the rates, both in units of the data."""

SMOOTHING = 0.98
"""Weight of the past in the running loss of a start."""


def is_worth_screening(objective: Objective) -> bool:
    """Whether only the queries move, without a ridge, and the keys have few dimensions."""
    layout, problem = objective.layout, objective.problem
    width = max(problem.d_query, problem.d_key, problem.d_value)
    if not layout.only_queries_move or width > MAX_WIDTH or objective.ridge is not None:
        return False
    dimensions = effective_dimensions(problem.gram_key_centered)
    return 1.0 < dimensions <= MAX_DIMENSIONS


def has_few_dimensions(objective: Objective) -> bool:
    """Whether the keys have so few that a path seldom leads to the best minimum."""
    return effective_dimensions(objective.problem.gram_key_centered) <= FEW_DIMENSIONS


def effective_dimensions(gram: Tensor) -> float:
    """Participation ratio ``(trace G)^2 / trace(G^2)`` of a second moment; 0 where it is 0."""
    square = float(gram.square().sum())
    return float(gram.trace()) ** 2 / square if square > 0.0 else 0.0


def screen(
    objective: Objective,
    theta: Tensor,
    generator: torch.Generator,
    out_of_time: Callable[[], bool],
) -> Tensor | None:
    """Races random starts, with ``theta`` among them.

    Args:
        objective: What is minimised; only queries may move. The passes spent are added to its.
        theta: The start that was given.
        generator: Source of starts, coordinates and samples.
        out_of_time: Asked now and then; a true answer ends the race.

    Returns:
        The start that separated from the others, or None.
    """
    race = _Race(objective, theta, generator)
    found = race.run(out_of_time)
    rows = objective.targets.shape[0]
    objective.count_passes(-(-3 * race.rows // rows))  # one forward, two products back
    return None if found is None else found.to(theta).flatten()


class _Race:
    """Float32, all starts in one leading dimension, each in coordinates of its own.

    With orthonormal ``P``, ``K`` and ``V`` of a start its ``X`` is ``P parameters[0] K^T`` and its
    ``Y`` is ``V parameters[1]``.
    """

    def __init__(self, objective: Objective, theta: Tensor, generator: torch.Generator) -> None:
        problem, model = objective.problem, objective.model
        self._generator, self._device = generator, theta.device
        self.rows = 0
        self._scale, unit = model.logit_scale(problem), model.logit_size(problem)
        value_size = (float(problem.gram_value.trace()) / problem.n_keys) ** 0.5
        target_size = (objective.target_norm_squared / problem.total_weight / problem.d_out) ** 0.5
        widths = (problem.d_query, problem.d_key, problem.d_value)
        self._bases = [torch.linalg.qr(self._normal(d, d)).Q for d in widths]
        x = self._normal(*widths[:2]) * (START_LOGITS / unit)
        x[0] = self._bases[0][0].mT @ theta.float().view(widths[:2]) @ self._bases[1][0]
        y = torch.zeros(STARTS, problem.d_value, problem.d_out, device=self._device)
        self.parameters = [x, y]
        rates = (LOGIT_STEP / unit, TARGET_STEP * target_size / (value_size or 1.0))
        groups = [{"params": p, "lr": r} for p, r in zip(self.parameters, rates, strict=True)]
        # Gradients have any unit, so nothing worth the name is added to their size.
        self.optimiser = torch.optim.Adam(groups, eps=1e-30, fused=True)
        self._loss = torch.zeros(STARTS, device=self._device)
        self._chances = torch.tensor([float(batch.B.shape[0]) for batch in problem.batches])
        self._batches = [_single(batch) for batch in problem.batches]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """``X`` and ``Y`` of all starts in the problem's coordinates."""
        (query, key, value), (x, y) = self._bases, self.parameters
        return torch.bmm(torch.bmm(query, x), key.mT), torch.bmm(value, y)

    def run(self, out_of_time: Callable[[], bool]) -> Tensor | None:
        """``X`` of the start that separated, or None."""
        for step in range(1, STEPS + 1):
            self.step()
            if step % CHECK_INTERVAL:
                continue
            if step >= FIRST_CHECK:
                best = int(self._loss.argmin())
                if float(self._loss[best]) < SEPARATION * float(self._loss.median()):
                    return self.matrices()[0][best]
            if out_of_time():
                break
        return None

    def step(self) -> None:
        """One step of Adam on a window of rows of one sequence for each start."""
        q, k, v, b, w, bias = self.sample()
        x, y = self.matrices()
        z = torch.bmm(torch.bmm(q, x), k.mT)
        if bias is not None:
            z += bias
        s = torch.softmax(z, dim=-1)
        f = torch.bmm(s, v)
        residual = torch.bmm(f, y).sub_(b)
        weighted = residual * w
        share = (weighted * residual).sum((1, 2)) / (w * b * b).sum((1, 2)).clamp_min(1e-30)
        self._loss.lerp_(share, 1 - SMOOTHING if self.rows else 1.0)
        u = torch.bmm(weighted, y.mT)
        e = torch.bmm(u, v.mT).sub_((u * f).sum(-1, keepdim=True)).mul_(s)
        query, key, value = self._bases
        by_x = torch.bmm(q.mT, torch.bmm(e, k))
        self.parameters[0].grad = torch.bmm(torch.bmm(query.mT, by_x), key)
        self.parameters[1].grad = torch.bmm(value.mT, torch.bmm(f.mT, weighted))
        self.optimiser.step()
        self.rows += STARTS * q.shape[1]

    def sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """For each start a window of query rows of a random sequence, all of one batch."""
        chosen = 0
        if len(self._batches) > 1:
            chosen = int(torch.multinomial(self._chances, 1, generator=self._generator))
        (a1, a2, a3, b, w, bias), causal, window = self._batches[chosen]
        sequences, n = a1.shape[:2]
        index = torch.randint(0, sequences, (STARTS,), generator=self._generator)
        rows = max(1, min(ROWS, ENTRIES // a2.shape[1]))
        begin = int(torch.randint(0, max(1, n - rows + 1), (1,), generator=self._generator))
        end = min(n, begin + rows)
        index = index.to(self._device)
        additive = None
        if bias is not None:
            additive = bias if bias.shape[0] == 1 else bias[index]
            additive = additive if additive.shape[1] == 1 else additive[:, begin:end]
        if causal:
            queries = torch.arange(begin, end, device=self._device)
            keys = torch.arange(a2.shape[1], device=self._device)
            unseen = hidden_keys(queries, keys, window)
            hidden = torch.zeros(unseen.shape, device=self._device).masked_fill_(unseen, -torch.inf)
            additive = hidden[None] if additive is None else additive + hidden
        q = a1[index, begin:end] * self._scale
        return q, a2[index], a3[index], b[index, begin:end], w[index, begin:end], additive

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn((STARTS, *shape), generator=self._generator).to(self._device)


def _single(batch: Batch) -> tuple[tuple[Any, ...], bool, int | None]:
    """A batch's tensors in float32, whether it is causal, and its window."""
    tensors = (batch.A1, batch.A2, batch.A3, batch.B, batch.weights[..., None])
    a1, a2, a3, b, w = (tensor.float() for tensor in tensors)
    bias = None if batch.bias is None else batch.bias.float()
    return (a1, a2, a3, b, w, bias), batch.causal, batch.window
