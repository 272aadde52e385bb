"""The fit of one layer of a conversion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnreg.models import Model, MultiHead
from attnreg.problem import AttentionProblem
from attnreg.result import predict
from attnreg.solvers.choice import solver_for
from attnreg.transformers.regularised import Bounds, regularised_fit
from attnreg.transformers.shapes import AttentionShape
from attnreg.transformers.starts import best_start
from attnreg.transformers.streaming import Blockwise

SCORED_ROWS = 4096
"""Rows on which the starts are compared, about: their errors differ by more than a sample does."""

Teacher = tuple[MultiHead, Mapping[str, Tensor]]
"""The original's layer and its weights."""


@dataclass(frozen=True)
class LayerFit:
    """Weights of a layer, rounded to the dtype that they are saved in, and how they were found.

    Attributes:
        weights: By name, float32.
        start: Name of the start.
        tried: Relative error of every start on a sample of the fitted windows.
        start_error: Held-out relative error of the start.
        error: Relative error on the fitted windows, before rounding.
        held_out_error: Relative error on the held-out windows: the least of the start, the stages
            of the fit and the points between, so slightly optimistic.
        iterations: Iterations of the fit, all stages together.
        ridge: Strength of the pull towards the start in the stage that the weights are from.
        step: How far from the start (0) to the end of that stage (1) they lie.
        path: Held-out relative error at the end of every stage, by strength.
    """

    weights: dict[str, Tensor]
    start: str
    tried: dict[str, float]
    start_error: float
    error: float
    held_out_error: float
    iterations: int
    ridge: float = 0.0
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
    progress: Callable[[int, float], None] | None = None,
) -> LayerFit:
    """Fits a student's layer, pulled towards its best start as far as that lowers held-out error.

    The held-out windows also choose the strength of the pull and where the fit ends, so that the
    errors on them are slightly optimistic; they are not taken from the fitted windows, because the
    choice matters where those are few.

    Args:
        problem: The windows to fit on, with the student's logit scale.
        validation: The held-out windows.
        teacher: The original's layer.
        model: The student's layer.
        max_iterations: Bound on the iterations, all stages together.
        max_seconds: Bound on their time.
        seed: Seed of the fit.
        saved: The dtype that the weights are saved in.
        progress: Called with the iteration and the relative error.

    Returns:
        The fit.
    """
    original, weights = teacher
    best = best_start(sample(problem, SCORED_ROWS), original, weights, model)

    def held_out(weights: Mapping[str, Tensor]) -> float:
        return relative_error(validation, model, _rounded(weights, saved))

    found = regularised_fit(
        problem,
        model,
        best.weights,
        held_out,
        solver=solver_for(
            problem.n_rows * problem.d_out, sum(value.numel() for value in best.weights.values())
        ),
        bounds=Bounds(max_iterations, max_seconds),
        seed=seed,
        progress=progress,
    )
    rounded, error = _rounded(found.weights, saved), found.error
    return LayerFit(
        weights=rounded,
        start=best.name,
        tried=dict(best.tried),
        start_error=found.start_error,
        error=relative_error(problem, model, rounded) if error is None else error,
        held_out_error=found.held_out_error,
        iterations=found.iterations,
        ridge=found.strength,
        step=found.step,
        path=found.path,
    )


def sample(problem: AttentionProblem, rows: int) -> AttentionProblem:
    """Sequences spread over the problem with about so many rows in all; all if there are fewer."""
    if problem.n_rows <= rows:
        return problem
    count = max(1, round(problem.n_sequences * rows / problem.n_rows))
    return problem.subset(i * problem.n_sequences // count for i in range(count))


def _rounded(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.detach().to(dtype).float() for name, value in weights.items()}


def relative_error(problem: AttentionProblem, model: Model, weights: Mapping[str, Tensor]) -> float:
    """``||prediction - B||_F / ||B - mean||_F``."""
    predicted = predict(model, weights, problem)
    targets = problem.unpad([batch.B for batch in problem.batches])
    pairs = zip(predicted, targets, strict=True)
    return problem.relative_error(sum(float((p - t).double().square().sum()) for p, t in pairs))


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
