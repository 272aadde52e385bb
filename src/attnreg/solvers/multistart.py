r"""Many starts side by side, then reflections of the best minima.

Small problems have many local minima. Here many starts descend side by side (:mod:`.descents`),
with logits of several sizes, along the regularisation path.

**Reflections.** To first order in ``X`` the outputs are ``A1 X G Y`` plus a constant, with the
second moment ``G`` of keys and values, and ``X P`` with another ``Y`` gives the same for every
invertible ``P``. Many local minima are right to first order and wrong in ``P``: on planted problems
of eight dimensions the better ones have an ``X`` for which ``X*^{-1} X`` has one or two negative
eigenvalues. So the best distinct minima are reflected in random directions,
``X (I - 2 G u u^T / u^T G u)``, which keeps the second moment of the logits, and descend again
without the path. Where two rounds of it bring nothing better, the next round has fresh starts,
and the reflections after it are of what these found.

Measured, not proven (``benchmarks/multimodal.py``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.kronecker import LeftFactor
from attnreg.objective import Objective, Point
from attnreg.records import Minima, Status
from attnreg.solvers.descents import Descents
from attnreg.solvers.path import COLD, WARM
from attnreg.solvers.run import Run, relative_gradient_norm
from attnreg.solvers.stacked import Stack, numbers_per_start

ROUNDS = 16
"""Rounds after the first, as many descents in each as there are starts."""

PATIENCE = 2
"""Rounds of reflections that bring nothing better, after which others start."""

PARENTS = 4
"""Distinct minima that are reflected in a round, the best ones."""

START_LOGITS = (0.1, 1.0)
"""Standard deviation of the logits of the starts, spread evenly in powers between the two."""

DISTINCT, SAME = 1e-4, 1e-9
"""Minima are distinct where their values differ by more than the first, relative, and the second
in units of ``||B - mean||_F^2``."""

ZERO = 1e-11
"""A value in the same units below which nothing better is looked for; the ridge that stays in the
last stage makes up about a tenth of it."""

RECORDED = 0.99
"""The best so far is recorded where it has fallen to this share of the last record, or has come to
rest below it: a record costs a point of its own."""

MAX_SIZE, MAX_NUMBERS, MAX_STATE = 1024, 1 << 26, 1 << 24
"""Parameters, and numbers that are formed for one start, up to which curvature is formed for many;
numbers of the curvature matrices of all starts at a time, of which a step holds about five."""

Tell = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Found:
    """Where the starts ended.

    Attributes:
        theta: The best end, flat; the start that was given where that is better.
        minima: What was found.
        ended: ``INTERRUPTED`` or ``STOPPED`` where that is what ended the search, else None.
    """

    theta: Tensor
    minima: Minima
    ended: Status | None


def multistart(
    objective: Objective,
    theta: Tensor,
    starts: int,
    generator: torch.Generator,
    run: Run,
    tell: Tell,
    stages: tuple[float, ...] = COLD,
) -> Found:
    """Descends from ``theta`` and random starts, and from reflections of what they found.

    Args:
        objective: What is minimised; only queries may move. The passes spent are added to its.
        theta: The start that was given, the first of all.
        starts: Number of starts.
        generator: Source of the others and of the reflections.
        run: Its clock is asked before every step; it is given a record whenever the best so far
            has fallen, and where that is answered with a stop the search ends.
        tell: Called with a text, how far the search is, and the whole way.
        stages: The path of ``theta``; the others have :data:`.path.COLD`.

    Returns:
        The best end and what was found.

    Raises:
        ValueError: If the problem is too large for it.
    """
    return _Search(objective, starts, generator, run, tell).run(theta, stages)


class _Search:
    """The ends so far."""

    def __init__(
        self,
        objective: Objective,
        starts: int,
        generator: torch.Generator,
        run: Run,
        tell: Tell,
    ) -> None:
        self._objective, self._starts, self._generator = objective, starts, generator
        self._run, self._tell = run, tell
        self._ended: Status | None = None
        self._recorded = self._last_seen = math.inf
        check_size(objective)
        self._stack = Stack(objective)
        problem = objective.problem
        gram = problem.gram_key_centered
        self._keys = LeftFactor.of(gram, problem.dtype)
        self._values = gram.new_zeros(0)
        self._ends = gram.new_zeros(0, *self._stack.shape)
        self._converged = torch.zeros(0, dtype=torch.bool, device=gram.device)
        # The ends from `_island` on are those of the last fresh starts and their reflections.
        self._rounds, self._island, self._stale = 0, 0, 0

    def run(self, theta: Tensor, stages: tuple[float, ...]) -> Found:
        given, others = theta.double().view(1, *self._stack.shape), self._random()[1:]
        try:
            if stages == COLD:
                self._descend(torch.cat([given, others]), COLD)
            else:
                self._descend(given, stages)
                self._descend(others, COLD)
            while self._rounds < ROUNDS and not self._over():
                if self._best() <= ZERO * self._unit:
                    break
                self._rounds += 1
                self._next_round()
        except KeyboardInterrupt:
            self._ended = Status.INTERRUPTED
        return Found(self._better(theta), self._minima(), self._ended)

    def _next_round(self) -> None:
        """Reflections while they help, else other starts."""
        before = self._island_best
        if self._stale < PATIENCE and len(self._keys.values) and math.isfinite(before):
            self._descend(self._reflections(), WARM)
            after = self._island_best
            helped = len(distinct([after, before], self._unit)) == 2
            self._stale = 0 if helped else self._stale + 1
        else:
            self._island, self._stale = len(self._values), 0
            self._descend(self._random(), COLD)

    @property
    def _island_best(self) -> float:
        values = self._values[self._island :]
        return float(values.min()) if len(values) else torch.inf

    @property
    def _unit(self) -> float:
        return self._objective.target_norm_squared or 1.0

    def _best(self) -> float:
        return float(self._values.min()) if len(self._values) else torch.inf

    def _descend(self, x: Tensor, stages: tuple[float, ...]) -> None:
        group = max(1, MAX_STATE // (x[0].numel() ** 2))
        for part in x.split(group):
            if self._over():
                break
            descents = Descents(self._stack, part, stages, ZERO * self._unit)
            try:
                while descents.running and not self._over():
                    descents.step(self._best())
                    best = descents.best
                    self._record(descents, best)
                    self._show(descents.running, best)
            finally:  # after Ctrl-C too
                values, ends, converged = descents.ends()
                self._values = torch.cat([self._values, values])
                self._ends = torch.cat([self._ends, ends])
                self._converged = torch.cat([self._converged, converged])

    def _over(self) -> bool:
        return self._ended is not None or self._run.out_of_time()

    def _record(self, descents: Descents, best: float) -> None:
        """Hands out the best of the descents where it is news."""
        rests = best >= self._last_seen
        self._last_seen = min(best, self._last_seen)
        if best >= self._recorded or not (rests or best <= RECORDED * self._recorded):
            return
        theta = descents.leader.flatten().to(self._objective.targets)
        point = Point(self._objective, self._objective.features(theta))
        status = self._run.report(
            point,
            relative_gradient_norm(point),
            "search",
            iterate=None,
            damping=0.0,
            path=0.0,
            inner_iterations=0,
            accepted=True,
        )
        self._recorded = best
        if status is Status.STOPPED:
            self._ended = status

    def _show(self, running: int, best: float) -> None:
        error = (max(0.0, min(best, self._best())) / self._unit) ** 0.5
        self._tell(
            f"starts, round {self._rounds}: {running:4d} left, best error {error:.2e}",
            self._rounds,
            ROUNDS + 1,
        )

    def _random(self) -> Tensor:
        """Random starts with logits of several sizes."""
        problem = self._objective.problem
        shape = (self._starts, *self._stack.shape)
        x = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        low, high = (torch.tensor(size, dtype=torch.float64).log() for size in START_LOGITS)
        sizes = torch.linspace(float(low), float(high), self._starts, dtype=torch.float64).exp()
        x *= sizes[:, None, None] / self._objective.model.logit_size(problem)
        return x.to(problem.device)

    def _reflections(self) -> Tensor:
        """As many reflections as there are starts, of the best distinct minima."""
        parents = self._parents()
        x = parents.repeat(-(-self._starts // len(parents)), 1, 1)[: self._starts]
        vectors, root = self._keys.vectors.double(), self._keys.values.double().sqrt()
        normal = torch.randn(len(x), len(root), generator=self._generator, dtype=torch.float64)
        normal /= torch.linalg.vector_norm(normal, dim=1, keepdim=True)  # u^T G u = 1
        normal = normal.to(x)
        image, direction = normal * root @ vectors.mT, normal / root @ vectors.mT  # G u, u
        return x - 2 * (x @ image[..., None]) * direction[:, None]

    def _parents(self) -> Tensor:
        """The best distinct minima since the last fresh starts."""
        order = self._island + self._values[self._island :].argsort()
        order = order[self._values[order].isfinite()]
        first = distinct(self._values[order].tolist(), self._unit)[:PARENTS]
        return self._ends[order[first]]

    def _better(self, theta: Tensor) -> Tensor:
        if not len(self._values):
            return theta
        best = self._ends[int(self._values.argmin())].flatten().to(theta)
        values = [Point(self._objective, self._objective.features(x)).value for x in (best, theta)]
        return best if values[0] <= values[1] else theta

    def _minima(self) -> Minima:
        values = self._values[self._converged].sort().values.tolist()
        first = distinct(values, self._unit)
        second = first[1] if len(first) > 1 else len(values)
        return Minima(
            starts=self._starts,
            rounds=self._rounds,
            descents=len(self._values),
            converged=len(values),
            distinct=len(first),
            best=second,
        )


def distinct(values: list[float], unit: float) -> list[int]:
    """Where the distinct minima begin.

    Args:
        values: Sorted values, finite.
        unit: ``||B - mean||_F^2``.

    Returns:
        The index of the lowest value of each.
    """
    pairs = enumerate(itertools.pairwise(values), start=1)
    apart = [i for i, (low, high) in pairs if high - low > DISTINCT * low + SAME * unit]
    return [0, *apart] if values else []


def check_size(objective: Objective) -> None:
    """Whether curvature can be formed for many starts.

    Raises:
        ValueError: If the problem is too large for it.
    """
    problem = objective.problem
    size = problem.d_query * problem.d_key
    if size > MAX_SIZE:
        raise ValueError(
            f"starts above 1 form a matrix with a row for each entry of X and take at most "
            f"{MAX_SIZE}, X has {size}: leave starts at 1, or give init= a start of your own"
        )
    numbers = numbers_per_start(objective)
    if numbers > MAX_NUMBERS:
        raise ValueError(
            f"starts above 1 form at most {MAX_NUMBERS} numbers a start, {problem.n_rows} rows "
            f"need {numbers}: leave starts at 1, or fit a subset() of the sequences with many "
            "starts and give that fit as init="
        )
