"""The demo's figures: the student's heads may be in another order than the original's."""

import pytest
import torch

import attnreg
from attnreg.report.figures import _partners

MODEL = attnreg.MultiHead(heads=3, head_dim=2)


def test_partners_are_found_in_another_order():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 9, 6, generator=generator, dtype=torch.float64)
    problem = attnreg.AttentionProblem(inputs, inputs)
    weights = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in MODEL.start(problem, 0).items()
    }
    order = [2, 0, 1]
    columns = [2 * head + i for head in order for i in range(2)]
    moved = {name: w[..., columns] for name, w in weights.items() if name[-1] != "O"}
    moved |= {"W_O": weights["W_O"][columns], "b_O": weights["b_O"]}
    errors, found = _partners((MODEL, weights), (MODEL, moved), problem)
    assert [order[i] for i in found.tolist()] == [0, 1, 2]
    # Distances of equal points by a product of matrices: the root of the rounding.
    assert errors.tolist() == pytest.approx([0.0] * 3, abs=1e-6)
