"""The readout of mini-batches: what it minimises, what it forgets, and how it follows."""

import pytest
import torch

import attnreg
from attnreg.objective import Objective
from attnreg.solvers import running_readout
from attnreg.solvers.minibatches import features_of
from attnreg.solvers.minibatches import minibatches as cut
from attnreg.solvers.running_readout import RunningReadout

MODEL = attnreg.MultiHead(heads=2, kv_heads=1, head_dim=3, bias=True)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bed(ridge=0.0):
    a, b = normal(0, 40, 10, 6), normal(1, 40, 10, 4)
    weights = 0.5 + torch.rand(40, 10, generator=torch.Generator().manual_seed(2)).double()
    start = MODEL.start(attnreg.AttentionProblem(a, b), 3)
    start["W_O"] = normal(4, *start["W_O"].shape)
    options = {"ridge_x": ridge, "ridge_y": ridge, "center": start if ridge else None}
    problem = attnreg.AttentionProblem(a, b, weights=weights, **options)
    objective = Objective(problem, MODEL)
    theta, readout = MODEL.split(problem, start)
    return objective, theta, readout


def fed(objective, theta, readout, rate, monkeypatch, batches=None):
    monkeypatch.setattr(running_readout, "EVERY", 1)
    running = RunningReadout(objective, readout.clone())
    batches = batches or cut(objective.problem.batches)
    columns = [features_of(objective, batch, theta).columns for batch in batches]
    for batch, matrix in zip(batches, columns, strict=True):
        running.add(matrix, batch, rate)
    return running, batches, columns


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_it_is_the_damped_ridge_regression_of_what_it_holds(monkeypatch, ridge):
    # By rows that are multiplied by the root of what is left of them, and lstsq.
    monkeypatch.setattr("attnreg.solvers.minibatches.BATCH_ROWS", 20)
    monkeypatch.setattr(running_readout, "WINDOW", 10)
    objective, theta, readout = bed(ridge)
    running, batches, columns = fed(objective, theta, readout, 1.0, monkeypatch)
    k = readout.shape[0]
    keep = 1 - 20 / (10 * k)
    left, right, weight = [], [], 0.0
    for age, (batch, matrix) in enumerate(zip(batches[::-1], columns[::-1], strict=True)):
        root = (batch.weights.reshape(-1, 1) * keep**age).sqrt()
        left.append(root * matrix)
        right.append(root * batch.B.flatten(0, 1))
        weight += float(root.square().sum())
    gram = torch.cat(left).mT @ torch.cat(left)
    damping = running_readout.DAMPING * gram.diagonal()[:-1].mean()
    left.append(torch.diag(damping.sqrt() * torch.ones(k).double())[:-1])
    right.append(torch.zeros(k - 1, 4).double())
    if ridge:
        root = torch.linalg.cholesky(
            objective.ridge.readout * (weight / objective.problem.total_weight)
            + 1e-14 * torch.eye(k)
        ).mT
        left.append(root)
        right.append(root @ objective.ridge.readout_center)
    expected = torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution
    torch.testing.assert_close(running.value, expected, rtol=1e-7, atol=1e-8)


def test_where_the_targets_have_a_readout_it_is_found(monkeypatch):
    # Then every window has the same minimiser, whatever was forgotten.
    monkeypatch.setattr("attnreg.solvers.minibatches.BATCH_ROWS", 20)
    monkeypatch.setattr(running_readout, "DAMPING", 1e-13)
    objective, theta, readout = bed()
    truth = normal(5, *readout.shape)
    for batch in objective.problem.batches:
        columns = features_of(objective, batch, theta).columns
        batch.B.copy_((columns @ truth).view_as(batch.B))
    for rate in (1.0, 0.0):
        running, _, _ = fed(objective, theta, readout, rate, monkeypatch)
        torch.testing.assert_close(running.value, truth, rtol=1e-7, atol=1e-7)


def test_it_waits_for_half_a_window(monkeypatch):
    monkeypatch.setattr("attnreg.solvers.minibatches.BATCH_ROWS", 20)
    objective, theta, readout = bed()
    batches = cut(objective.problem.batches)
    few, _, _ = fed(objective, theta, readout, 1.0, monkeypatch, batches[:5])
    assert torch.equal(few.value, readout)
    more, _, _ = fed(objective, theta, readout, 1.0, monkeypatch, batches)
    assert not torch.equal(more.value, readout)


def test_features_of_zero_leave_it(monkeypatch):
    objective, _theta, readout = bed()
    monkeypatch.setattr(running_readout, "EVERY", 1)
    running = RunningReadout(objective, readout.clone())
    for batch in objective.problem.batches:
        rows = batch.B.shape[0] * batch.B.shape[1]
        running.add(torch.zeros(rows, readout.shape[0], dtype=torch.float64), batch, 1.0)
    assert torch.equal(running.value, readout)
