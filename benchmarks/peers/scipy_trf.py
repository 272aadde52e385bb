"""scipy.optimize.least_squares, method "trf", with closed-form derivatives.

Variants: how the trust-region step is computed ("exact" is an SVD of the whole Jacobian, "lsmr"
iterates), whether the Jacobian is a matrix or a LinearOperator (products at the price of one
attention pass), and whether the variables are scaled by the columns of the Jacobian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.peers.base import Peer, PlantedArrays, Recorder, Weights, flatten, unflatten
from benchmarks.peers.derivatives import Evaluation

UNLIMITED = 10**9
TOLERANCE = 1e-15  # the least that scipy accepts without a warning is 2.2e-16


@dataclass(frozen=True)
class ScipyTRF:
    """`least_squares(method="trf")` with a given linear solver and form of the Jacobian."""

    solver: str  # "exact" or "lsmr"
    dense: bool
    scale: str | float = 1.0  # x_scale: "jac" needs the dense form
    patience: int = 100

    @property
    def name(self) -> str:
        """Name in tables and files."""
        form = "dense" if self.dense else "operator"
        return f"scipy trf ({form}, {self.solver}{', scaled' if self.scale == 'jac' else ''})"

    def solve(self, problem: PlantedArrays, start: Weights, recorder: Recorder) -> str:
        """See `Method.solve`."""
        from scipy.optimize import least_squares

        if self.dense:
            problem.check_jacobian(factored=self.solver == "exact")
        system = _System(problem, recorder, self.dense)
        result = least_squares(
            system.residual,
            flatten(start).numpy(),
            jac=system.jacobian,
            method="trf",
            tr_solver=self.solver,
            x_scale=self.scale,
            ftol=TOLERANCE,
            xtol=TOLERANCE,
            gtol=TOLERANCE,
            max_nfev=UNLIMITED,
        )
        return str(result.message)


class _System:
    """Callbacks in numpy; the evaluation of the last residual serves the Jacobian there."""

    def __init__(self, problem: PlantedArrays, recorder: Recorder, dense: bool) -> None:
        self._problem, self._recorder = problem, recorder
        self._vector = np.empty(0)
        self._last: Evaluation | None = None
        parameters = sum(rows * columns for rows, columns in problem.shapes.values())
        size = (problem.B.numel(), parameters)
        self._buffer = torch.empty(size, dtype=torch.float64) if dense else None
        self._size = size

    def residual(self, vector: np.ndarray) -> np.ndarray:
        evaluation = self._evaluate(vector)
        loss = float(evaluation.residual @ evaluation.residual)
        self._recorder.record(
            loss, lambda: unflatten(torch.from_numpy(vector), self._problem.shapes)
        )
        return evaluation.residual.numpy()

    def jacobian(self, vector: np.ndarray) -> Any:
        evaluation = self._evaluate(vector)
        self._recorder.count_derivative()
        if self._buffer is not None:
            return evaluation.jacobian(self._buffer).numpy()
        return self._operator(evaluation)

    def _operator(self, evaluation: Evaluation) -> Any:
        from scipy.sparse.linalg import LinearOperator

        def product(vector: np.ndarray) -> np.ndarray:
            self._recorder.count_derivative()
            return evaluation.jvp(torch.from_numpy(np.ascontiguousarray(vector).ravel())).numpy()

        def transposed(vector: np.ndarray) -> np.ndarray:
            self._recorder.count_derivative()
            return evaluation.vjp(torch.from_numpy(np.ascontiguousarray(vector).ravel())).numpy()

        return LinearOperator(self._size, matvec=product, rmatvec=transposed, dtype=np.float64)

    def _evaluate(self, vector: np.ndarray) -> Evaluation:
        if self._last is None or not np.array_equal(vector, self._vector):
            self._vector = vector.copy()
            self._last = Evaluation(self._problem, torch.from_numpy(self._vector))
        return self._last


PEERS = (
    Peer(
        "scipy trf",
        (
            ScipyTRF("lsmr", dense=False),
            ScipyTRF("lsmr", dense=True),
            ScipyTRF("lsmr", dense=True, scale="jac"),
            ScipyTRF("exact", dense=True),
        ),
        package="scipy",
        why_no_layers="works in float64 on residuals of the whole batch",
    ),
)
