"""The fit of one layer of a conversion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg.fitting import fit
from attnreg.models import Model, MultiHead
from attnreg.problem import AttentionProblem
from attnreg.records import IterationRecord
from attnreg.result import predict
from attnreg.transformers.shapes import AttentionShape
from attnreg.transformers.starts import best_start
from attnreg.transformers.streaming import Blockwise

REDUNDANT = 20
"""Residuals a parameter from which mini-batches fit faster than curvature does: real layers with
130 were fitted sooner by mini-batches, one with 2.7 by curvature."""

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
        held_out_error: Relative error on the held-out windows.
        iterations: Iterations of the fit.
    """

    weights: dict[str, Tensor]
    start: str
    tried: dict[str, float]
    start_error: float
    error: float
    held_out_error: float
    iterations: int

    def record(self) -> dict[str, Any]:
        """All but the weights."""
        return {name: value for name, value in vars(self).items() if name != "weights"}


def fit_layer(
    problem: AttentionProblem,
    validation: AttentionProblem,
    teacher: Teacher,
    model: MultiHead,
    *,
    start: Mapping[str, Tensor] | None,
    max_iterations: int,
    max_seconds: float | None,
    seed: int,
    saved: torch.dtype,
    progress: Callable[[int, float], None] | None = None,
) -> LayerFit:
    """Fits a student's layer; of its start and the fit the one with the lower held-out error.

    Args:
        problem: The windows to fit on, with the student's logit scale.
        validation: The held-out windows.
        teacher: The original's layer.
        model: The student's layer.
        start: Weights to start from; None: the best start of the original's weights.
        max_iterations: Bound on the iterations.
        max_seconds: Bound on the time.
        seed: Seed of the fit.
        saved: The dtype that the weights are saved in.
        progress: Called with the iteration and the relative error.

    Returns:
        The fit.
    """
    if start is None:
        original, weights = teacher
        best = best_start(sample(problem, SCORED_ROWS), original, weights, model)
        name, init, tried = best.name, best.weights, dict(best.tried)
    else:
        name, init, tried = "the pass before", dict(start), {}

    def observe(record: IterationRecord) -> None:
        if progress is not None:
            progress(record.iteration, problem.relative_error(record.loss))

    result = fit(
        problem,
        model,
        solver=solver_for(
            problem.n_rows * problem.d_out, sum(value.numel() for value in init.values())
        ),
        init=init,
        max_iterations=max_iterations,
        max_seconds=max_seconds,
        seed=seed,
        callback=observe,
    )
    options = [_rounded(init, saved), _rounded(result.parameters, saved)]
    errors = [relative_error(validation, model, weights) for weights in options]
    chosen = 1 if errors[1] <= errors[0] else 0
    return LayerFit(
        weights=options[chosen],
        start=name,
        tried=tried,
        start_error=errors[0],
        error=problem.relative_error(result.loss if chosen else result.history[0].loss),
        held_out_error=errors[chosen],
        iterations=result.history[-1].iteration if result.history else 0,
    )


def solver_for(residuals: int, weights: int) -> str:
    """``"stochastic"`` where there are many residuals a weight, else ``"trust-region"``."""
    return "stochastic" if residuals >= REDUNDANT * weights else "trust-region"


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
