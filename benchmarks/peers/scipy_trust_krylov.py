"""scipy.optimize.minimize, method "trust-krylov": exact Hessian products by double backward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.base import Peer, PlantedArrays, Recorder, Weights, flatten, unflatten

UNLIMITED = 10**9


@dataclass(frozen=True)
class TrustKrylov:
    """The method with exact or with loose solutions of its subproblems."""

    inexact: bool
    patience: int = 100

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return f"scipy trust-krylov ({'inexact' if self.inexact else 'exact'})"

    def solve(self, problem: PlantedArrays, start: Weights, recorder: Recorder) -> str:
        """See `Method.solve`."""
        from scipy.optimize import minimize

        system = _System(problem, recorder)
        result = minimize(
            system.value,
            flatten(start).numpy(),
            jac=system.gradient,
            hessp=system.product,
            method="trust-krylov",
            options={"gtol": 0.0, "maxiter": UNLIMITED, "inexact": self.inexact},
        )
        return str(result.message)


class _System:
    """Callbacks in numpy that share one graph a point."""

    def __init__(self, problem: PlantedArrays, recorder: Recorder) -> None:
        self._problem, self._recorder = problem, recorder
        self._at = np.empty(0)

    def value(self, vector: np.ndarray) -> float:
        self._move(vector)
        loss = self._loss.item()
        self._recorder.record(loss, lambda: unflatten(self._vector, self._problem.shapes))
        return loss

    def gradient(self, vector: np.ndarray) -> np.ndarray:
        self._move(vector)
        return self._slope().detach().numpy()

    def product(self, vector: np.ndarray, direction: np.ndarray) -> np.ndarray:
        self._recorder.count_derivative()
        self._move(vector)
        towards = torch.from_numpy(np.array(direction))
        (product,) = torch.autograd.grad(self._slope(), self._vector, towards, retain_graph=True)
        return product.numpy()

    def _slope(self) -> Tensor:
        if self._gradient is None:
            (self._gradient,) = torch.autograd.grad(self._loss, self._vector, create_graph=True)
        return self._gradient

    def _move(self, vector: np.ndarray) -> None:
        if np.array_equal(vector, self._at):
            return
        self._at = vector.copy()
        self._vector = torch.from_numpy(self._at).clone().requires_grad_()
        self._loss = self._problem.loss(unflatten(self._vector, self._problem.shapes))
        self._gradient: Tensor | None = None


PEERS = (
    Peer(
        "scipy trust-krylov",
        (TrustKrylov(inexact=False), TrustKrylov(inexact=True)),
        package="scipy",
        why_no_layers="needs second derivatives, which fused attention has not",
    ),
)
