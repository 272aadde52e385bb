"""pytorch-minimize: trust-region Newton-CG, line-search Newton-CG and L-BFGS.

The first two use Hessian products by double backward, which fused attention has not, so they are
run on the planted problems only. Tolerances are set so that all go on to the end of the precision;
a hook on the vector ends a run that would spend its time inside one inner iteration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.peers.base import Peer, Problem, Recorder, Weights, flatten, unflatten

UNLIMITED = 10**9
OPTIONS: dict[str, dict[str, Any]] = {
    "trust-ncg": {"gtol": 0.0, "max_trust_radius": 1e6},
    "newton-cg": {"xtol": 0.0},
    "l-bfgs": {"gtol": 0.0, "xtol": 0.0, "gtd_tol": 0.0},
}


@dataclass(frozen=True)
class TorchMinimize:
    """One of the methods of `torchmin.minimize`."""

    method: str
    patience: int = 100

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return f"pytorch-minimize {self.method}"

    def solve(self, problem: Problem, start: Weights, recorder: Recorder) -> str:
        """See `Method.solve`."""
        from torchmin import minimize

        shapes = {name: tuple(value.shape) for name, value in start.items()}

        def objective(vector: Tensor) -> Tensor:
            if vector.requires_grad:
                vector.register_hook(lambda _: recorder.count_derivative())
            loss = problem.loss(unflatten(vector, shapes))
            recorder.record(loss.item(), lambda: unflatten(vector, shapes))
            return loss

        result = minimize(
            objective,
            flatten(start),
            method=self.method,
            max_iter=UNLIMITED,
            options=OPTIONS[self.method],
        )
        return str(result.message)


def _peer(method: TorchMinimize, *, layers: bool) -> Peer:
    return Peer(
        method.name,
        (method,),
        (method,) if layers else (),
        package="torchmin",
        why_no_layers="" if layers else "needs second derivatives, which fused attention has not",
    )


PEERS = (
    _peer(TorchMinimize("trust-ncg"), layers=False),
    _peer(TorchMinimize("newton-cg"), layers=False),
    _peer(TorchMinimize("l-bfgs", patience=1500), layers=True),
)
