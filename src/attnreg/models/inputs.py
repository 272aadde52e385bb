"""The inputs of a layer's projections, with a constant where a bias is fitted.

The constant input of a bias is not 1 but ``c``, the root mean square of the inputs, so that inputs
of any size have a well-scaled second moment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg.problem import AttentionProblem

PROJECTIONS = {"query": "Q", "key": "K", "value": "V"}
"""The projections and the letters of their weights."""


def constant_input(problem: AttentionProblem, name: str) -> float:
    """Root mean square of the inputs of a projection; 1 where that is 0."""
    return problem.input_sizes[name] or 1.0


def input_gram(problem: AttentionProblem, name: str, *, constant: bool, centred: bool) -> Tensor:
    """Gram matrix of the inputs of a projection, float64.

    Args:
        problem: Gives the inputs.
        name: ``"query"``, ``"key"`` or ``"value"``.
        constant: Whether the inputs have the constant behind them.
        centred: Whether the keys are centred, sequence by sequence; the constant is then 0.

    Returns:
        ``(width [+ 1], width [+ 1])``, over all rows, those of the queries weighted.
    """
    gram, total, rows = _moments(problem, name)
    if centred:
        gram = problem.gram_key_centered
    if not constant:
        return gram
    size = gram.shape[0]
    mean, corner = gram.new_zeros(size), gram.new_zeros((1, 1))
    if not centred:
        c = constant_input(problem, name)
        mean = total * c
        corner = mean.new_tensor([[rows * c**2]])
    top = torch.cat([gram, mean[:, None]], dim=1)
    return torch.cat([top, torch.cat([mean[None], corner], dim=1)])


def affine(inputs: Tensor, matrix: Tensor, constant: float | None) -> Tensor:
    """``[inputs c] matrix``, ``(b, n, columns)``; ``inputs matrix`` where there is no constant."""
    if constant is None:
        return inputs @ matrix
    rows = inputs.flatten(0, 1)
    product = torch.addmm(matrix[-1], rows, matrix[:-1], beta=constant)
    return product.unflatten(0, inputs.shape[:2])


def add_transpose(
    inputs: Tensor, gradient: Tensor, constant: float | None, scale: float, out: Tensor
) -> None:
    """Adds ``scale [inputs c]^T gradient`` to ``out``."""
    gradient = gradient.flatten(0, 1)
    if constant is not None:
        out[-1].add_(gradient.sum(0), alpha=scale * constant)
        out = out[:-1]
    out.addmm_(inputs.flatten(0, 1).mT, gradient, alpha=scale)


def _moments(problem: AttentionProblem, name: str) -> tuple[Tensor, Tensor, float]:
    """Gram matrix, sum and number (or weight) of the rows of an input."""
    if name == "query":
        return problem.gram_query, problem.sum_query, problem.total_weight
    if name == "key":
        return problem.gram_key, problem.sum_key, problem.n_keys
    return problem.gram_value, problem.sum_value, problem.n_keys
