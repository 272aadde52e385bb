"""optimistix: Levenberg-Marquardt and Dogleg in JAX on the CPU.

The package's own loop hides its trajectory, so its steps are called one by one, each compiled.
Compiling is not on the clock. Dense factors and LSMR without a matrix are tried; the dense factor
of Levenberg-Marquardt is QR, its default, and of Dogleg SVD, since at Y = 0 the Jacobian has zero
columns and QR, the default, does not take a step.
JAX takes as many threads as there are cores that the process may use.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.base import Peer, PlantedArrays, Recorder, Weights

TOLERANCE = 1e-15
LSMR_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Optimistix:
    """One of the package's least-squares solvers with a given linear solver."""

    solver: str  # a class of the package
    linear: str  # a class of lineax
    patience: int = 100

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return f"optimistix {self.solver} ({self.linear})"

    def solve(self, problem: PlantedArrays, start: Weights, recorder: Recorder) -> str:
        """See `Method.solve`."""
        if self.linear != "LSMR":
            problem.check_jacobian(factored=True)
        with recorder.clock.paused():
            step, state = _compiled(self.solver, self.linear, problem.A.shape, problem.B.shape)
            data = tuple(_array(array) for array in (problem.A, problem.B))
            y = tuple(_array(start[name]) for name in "XY")
            state = _begin_at(state, y)
        while True:
            y, state, _ = step(y, data, state)
            loss = float((state.f_info.residual**2).sum())
            point = y
            recorder.record(loss, lambda point=point: _torch(point))
            if state.terminate:
                return "its own tolerances"


@functools.cache
def _compiled(solver: str, linear: str, *shapes: Sequence[int]) -> tuple[Any, Any]:
    """One step as a compiled function of (X, Y), (A, B) and a state, and a state to begin with."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax, equinox, optimistix, lineax = map(
        importlib.import_module, ("jax", "equinox", "optimistix", "lineax")
    )
    jax.config.update("jax_enable_x64", True)

    def residual(y: Any, data: Any) -> tuple[Any, None]:
        (X, Y), (A, B) = y, data
        logits = (A @ X) @ A.swapaxes(1, 2)
        return (jax.nn.softmax(logits, axis=-1) @ A) @ Y - B, None

    options = {"rtol": LSMR_TOLERANCE, "atol": LSMR_TOLERANCE} if linear == "LSMR" else {}
    factor = getattr(lineax, linear)(**options)
    method = getattr(optimistix, solver)(TOLERANCE, TOLERANCE, linear_solver=factor)

    @equinox.filter_jit
    def step(y: Any, data: Any, state: Any) -> Any:
        return method.step(residual, y, data, {}, state, frozenset())

    data = tuple(jax.numpy.ones(shape) for shape in shapes)
    y = tuple(jax.numpy.ones((shapes[0][-1], shape[-1])) for shape in shapes)
    output = jax.eval_shape(lambda: residual(y, data)[0])
    state = method.init(residual, y, data, {}, output, None, frozenset())
    jax.block_until_ready(step(y, data, state)[0])
    return step, state


def _begin_at(state: Any, y: Any) -> Any:
    return importlib.import_module("equinox").tree_at(lambda s: s.y_eval, state, y)


def _array(values: Tensor) -> Any:
    return importlib.import_module("jax.numpy").asarray(values.numpy())


def _torch(point: Any) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(np.array(value)) for name, value in zip("XY", point, strict=True)
    }


PEERS = tuple(
    Peer(
        f"optimistix {name}",
        (Optimistix(solver, dense), Optimistix(solver, "LSMR")),
        package="optimistix",
        why_no_layers="factors a dense Jacobian, or keeps a linearisation of the whole batch",
    )
    for name, solver, dense in (("LM", "LevenbergMarquardt", "QR"), ("Dogleg", "Dogleg", "SVD"))
)
