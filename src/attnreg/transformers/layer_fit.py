"""The fit of one layer of a conversion."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnreg.early_stopping import Bounds, held_out_fit
from attnreg.judging import scarce
from attnreg.models import MultiHead
from attnreg.objective import Objective
from attnreg.problem import AttentionProblem
from attnreg.records import IterationRecord, Status
from attnreg.reduction.sampling import sample, sample_for_moments
from attnreg.reduction.sharing import ROWS
from attnreg.reduction.starts import best_start
from attnreg.result import relative_error
from attnreg.transformers.shapes import AttentionShape
from attnreg.transformers.streaming import Blockwise

SCORED_ROWS = 4096
"""Rows on which the starts are compared, about: their errors differ by more than a sample does."""

PAIRS_SHARE = 1 / 3
"""Share of the time that the fits of pairs may have, and that is left to the fit at least."""

Teacher = tuple[MultiHead, Mapping[str, Tensor]]
"""The original's layer and its weights."""


@dataclass(frozen=True)
class LayerFit:
    """Weights of a layer, rounded to the dtype that they are saved in, and how they were found.

    Attributes:
        weights: By name, float32.
        start: Name of the start.
        tried: Relative error of every start on a sample of the fitted windows.
        start_error: Held-out relative error of the start; where data are few, of the one whose
            ``W_O`` is not solved for.
        error: Relative error on the fitted windows.
        held_out_error: Relative error on the held-out windows: the least of the start, the ends of
            the rounds and points on the way back from them, so slightly optimistic.
        iterations: Iterations of the fit, all rounds together.
        ridge: Of the readout, as a share of the features' mean square.
        center: What that pulls towards: ``"start"``, ``"zero"``, or nothing.
        step: How far from the start (0) to the end of a round (1) the weights lie.
        path: Held-out relative error at the end of every round, by iterations until then.
    """

    weights: dict[str, Tensor]
    start: str
    tried: dict[str, float]
    start_error: float
    error: float
    held_out_error: float
    iterations: int
    ridge: float = 0.0
    center: str = ""
    step: float = 1.0
    path: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """All but the weights."""
        return {name: value for name, value in vars(self).items() if name != "weights"}


def fit_layer(
    problem: AttentionProblem,
    validation: AttentionProblem,
    teacher: Teacher,
    model: MultiHead,
    *,
    max_iterations: int,
    max_seconds: float | None,
    seed: int,
    saved: torch.dtype,
    fit_pairs: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> LayerFit:
    """Fits a student's layer from its best start, as far as that lowers the held-out error.

    The held-out windows choose where the fit ends and a ridge (:mod:`attnreg.early_stopping`), so
    that the errors on them are slightly optimistic; they are not taken from the fitted windows,
    because the choice matters where those are few.

    Args:
        problem: The windows to fit on, with the student's logit scale.
        validation: The held-out windows.
        teacher: The original's layer.
        model: The student's layer.
        max_iterations: Bound on the iterations, all rounds together.
        max_seconds: Bound on their time; with `fit_pairs` that of the start counts, unless it takes
            more than two thirds.
        seed: Seed of the fit.
        saved: The dtype that the weights are saved in.
        fit_pairs: Whether key/value heads are grouped by short fits of all pairs.
        progress: Called with the iteration and the relative error.

    Returns:
        The fit.

    Raises:
        KeyboardInterrupt: If it was interrupted: no half-done fit counts as done.
    """
    original, weights = teacher
    pairs, bound, began = None, None, time.perf_counter()
    if fit_pairs:
        pairs = sample(problem, ROWS)
        bound = None if max_seconds is None else PAIRS_SHARE * max_seconds
    best = best_start(
        sample(problem, SCORED_ROWS), original, weights, model, pairs=pairs, max_seconds=bound
    )
    if fit_pairs and max_seconds is not None:
        spent = time.perf_counter() - began
        max_seconds = max(max_seconds - spent, PAIRS_SHARE * max_seconds)

    def observe(record: IterationRecord) -> None:
        if progress is not None:
            progress(record.iteration, problem.relative_error(record.loss))

    found = held_out_fit(
        Objective(problem, model, sample_for_moments(problem)),
        best.unsolved if scarce(problem, best.weights) else best.weights,
        validation,
        bounds=Bounds(max_iterations, max_seconds),
        seed=seed,
        observe=observe,
        stored=lambda weights: _rounded(weights, saved),
    )
    if found.status is Status.INTERRUPTED:
        raise KeyboardInterrupt
    rounded = _rounded(found.weights, saved)
    return LayerFit(
        weights=rounded,
        start=best.name,
        tried=dict(best.tried),
        start_error=found.start_error,
        error=relative_error(problem, model, rounded),
        held_out_error=found.error,
        iterations=found.iterations,
        ridge=found.ridge,
        center=found.center,
        step=found.step,
        path=found.path,
    )


def _rounded(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.detach().to(dtype).float() for name, value in weights.items()}


def layer_problem(
    runner: Blockwise,
    shape: AttentionShape,
    inputs: list[Tensor],
    targets: list[Tensor],
    first: int,
    last: int,
) -> AttentionProblem:
    """The problem of a student's layer.

    Args:
        runner: Knows where the windows' rows are.
        shape: The student's shape.
        inputs: For each application the rows that go into the attention.
        targets: The rows that should come out.
        first: The first window.
        last: The window after the last.

    Returns:
        The problem; windows of one application after those of another.
    """
    a = [row for rows in inputs for row in runner.sequences(rows, first, last)]
    b = [row for rows in targets for row in runner.sequences(rows, first, last)]
    follows = math.isclose(shape.scale, shape.head_dim**-0.5, rel_tol=1e-12)
    scale = None if follows else shape.scale  # None: each model's own, also the original's
    return AttentionProblem(a, b, mask=shape.mask(), scale=scale)
