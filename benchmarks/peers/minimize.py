"""pytorch-minimize: trust-region Newton-CG and line-search Newton-CG.

Both use Hessian products by double backward, so the objective is plain matrix products and a
softmax (fused attention has no second derivative). Their tolerances are set so that they go on to
the end of float64; a hook on X ends a run that would spend its time inside one inner iteration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.peers.base import PlantedArrays, Recorder, Trace, flatten, loss_of, unflatten

PATIENCE = 100
UNLIMITED = 10**9
OPTIONS: dict[str, dict[str, Any]] = {
    "trust-ncg": {"gtol": 0.0, "max_trust_radius": 1e6},
    "newton-cg": {"xtol": 0.0},
}


@dataclass(frozen=True)
class TorchMinimize:
    """One of the methods of `torchmin.minimize` that need Hessian products."""

    method: str

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return f"pytorch-minimize {self.method}"

    def solve(
        self,
        problem: PlantedArrays,
        X0: Tensor,
        Y0: Tensor,
        max_seconds: float,
        target_loss: float | None = None,
    ) -> Trace:
        """See `Method.solve`."""
        from torchmin import minimize

        recorder = Recorder(max_seconds, target_loss, PATIENCE)

        def objective(vector: Tensor) -> Tensor:
            X, Y = unflatten(problem, vector)
            if X.requires_grad:
                X.register_hook(lambda _: recorder.count_derivative())
            loss = loss_of(problem, X, Y)
            recorder.record(loss.item(), lambda: (X, Y))
            return loss

        def body() -> str:
            result = minimize(
                objective,
                flatten(X0, Y0),
                method=self.method,
                max_iter=UNLIMITED,
                options=OPTIONS[self.method],
            )
            return str(result.message)

        return recorder.run(body)
