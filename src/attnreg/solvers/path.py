"""The regularisation path of a cold start.

A start without a readout says nothing about which values matter. With a large extra ridge
``damping ||O||^2`` only the value directions with much variance can be used, and the landscape
that the attention weights see is smoother; the ridge is then lowered in stages to zero, where
the objective is the problem's own. Measured, not proven: from near zero this finds better
minima than the undamped objective does (``benchmarks/planted.py``).
"""

from __future__ import annotations

from torch import Tensor

COLD = (1.0, 0.1, 1e-2, 1e-4, 0.0)
"""Stages from a cold start, in units of the mean squared norm of a feature column."""

WARM = (0.0,)
"""The problem's own objective only."""


def stages_for(readout: Tensor) -> tuple[float, ...]:
    """The stages for a start: a start whose readout is zero is cold."""
    return WARM if bool(readout.any()) else COLD
