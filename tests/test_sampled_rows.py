"""Some queries of a batch with all keys: their features, and over all offsets the whole."""

import pytest
import torch

from attnreg.models.features import Features
from tests.cases import CASES, MODELS, twin
from tests.test_rotary import LAYERS, LayerTwin
from tests.twins import normal, relative

STEPS = (2, 3)


def check(problem, model, theta, step):
    """Every batch of a problem; sums in another order are all that differs."""
    for batch in problem.batches:
        sequences, n = batch.B.shape[:2]
        whole = Features(problem, model, theta, batches=[batch])
        columns = whole.columns.unflatten(0, (sequences, n))
        cotangent = normal(sequences, n, model.layout(problem).features, seed=n)
        total = torch.zeros_like(theta)
        for first in range(step):
            part = batch.every(step, first)
            some = Features(problem, model, theta, batches=[part])
            assert relative(some.columns, columns[:, first::step].flatten(0, 1)) < 1e-14
            total += some.vjp(cotangent[:, first::step].flatten(0, 1))
            assert torch.equal(part.weights, step * batch.weights[:, first::step])
            assert torch.equal(part.B, batch.B[:, first::step])
            pairs = zip(part.lengths, batch.lengths, strict=True)
            assert all(got == (len(range(own)[first::step]), m) for got, (own, m) in pairs)
        assert relative(total, whole.vjp(cotangent.flatten(0, 1))) < 1e-13


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_rows_of_every_kind_of_problem(case, model, step):
    t = twin(case, model)
    problem = t.case.problem(t.center)
    theta, _ = t.model.split(problem, t.random(3))
    check(problem, t.model, theta, step)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("layer", LAYERS)
def test_rows_keep_their_positions(layer, step):
    """Rotations and causal masks are those of the rows' places in the sequence."""
    t = LayerTwin(LAYERS[layer])
    problem = t.problem()
    theta, _ = t.model.split(problem, t.parameters())
    check(problem, t.model, theta, step)


def test_a_step_of_one_is_the_batch():
    batch = twin("ragged, causal and masks", "bilinear").case.problem().batches[0]
    assert batch.every(1, 0) is batch
