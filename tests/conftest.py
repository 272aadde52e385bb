"""Shared set-up: the tests' problems are tiny, and one thread is fastest on them."""

import pytest
import torch

from attnreg.solvers import minibatches

torch.set_num_threads(1)


@pytest.fixture
def small_batches(monkeypatch):
    """Mini-batches of about two of the tests' sequences."""
    monkeypatch.setattr(minibatches, "BATCH_ROWS", 24)
