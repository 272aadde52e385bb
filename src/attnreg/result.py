"""What a fit returns: parameters, a status that says what happened, and the history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnreg.certificate import Certificate
from attnreg.masks import and_causal
from attnreg.models import Bilinear, Features, Model, MultiHead, Rotary
from attnreg.problem import AttentionProblem
from attnreg.records import IterationRecord, Minima, Status
from attnreg.storage import read_tensors, write_tensors


@dataclass(frozen=True)
class FitResult:
    """Parameters found by :func:`attnreg.fit`, with what is needed to trust and reuse them.

    Attributes:
        parameters: Named tensors; ``X`` and ``Y`` for :class:`Bilinear`.
        model: The model that was fitted.
        loss: ``L`` alone.
        regularised_loss: ``L`` plus the problem's ridges: what was minimised.
        relative_error: ``||prediction - B||_F / ||B - mean||_F``.
        gradient_norm: Dual norm of the reduced gradient in the natural metric, over
            ``||B - mean||_F^2``: the number that ``tol`` bounds. By mini-batches it is estimated
            from about 2,048 rows where there are more.
        tol: The tolerance that was asked for.
        status: Why the fit ended.
        history: One record an iteration.
        notes: Things a reader should know, such as dropped null directions.
        seed: Seed of the fit.
        scale: Logit scale of the problem (None: the model's own).
        causal: Whether query ``i`` saw keys 0 to ``i`` only.
        problem_digest: Digest of the problem that was solved.
        certificate: What was proven of the point, where ``fit`` was asked to.
        solver: Name of the solver that found it.
        window: How many keys a query saw where the mask was causal; None for all up to its own.
        minima: What the search with many starts found; None for a fit with one.
    """

    parameters: Mapping[str, Tensor]
    model: Model
    loss: float
    regularised_loss: float
    relative_error: float
    gradient_norm: float
    tol: float
    status: Status
    history: tuple[IterationRecord, ...]
    notes: tuple[str, ...]
    seed: int
    scale: float | None
    causal: bool
    problem_digest: str
    certificate: Certificate | None = None
    solver: str = "trust-region"
    window: int | None = None
    minima: Minima | None = None

    @property
    def converged(self) -> bool:
        """Whether the stopping test was met."""
        return self.status in (Status.CONVERGED, Status.CERTIFIED)

    @property
    def X(self) -> Tensor:
        """``W_Q W_K^T`` of a bilinear fit.

        Raises:
            AttributeError: For other models.
        """
        return self._named("X")

    @property
    def Y(self) -> Tensor:
        """``W_V`` of a bilinear fit.

        Raises:
            AttributeError: For other models.
        """
        return self._named("Y")

    def predict(
        self,
        A1: AttentionProblem | Tensor | list[Tensor] | Any,
        A2: Any = None,
        A3: Any = None,
        mask: Any = None,
    ) -> Tensor | list[Tensor]:
        """The layer's output on new inputs.

        Args:
            A1: Query inputs as :class:`AttentionProblem` takes them, or a problem.
            A2: Key inputs; default ``A1``.
            A3: Value inputs; default ``A1``.
            mask: As :class:`AttentionProblem` takes it; inputs that are no problem are causal
                where the fit was.

        Returns:
            ``(n, d_out)``, ``(b, n, d_out)`` or a list, as the inputs were given.

        Raises:
            ValueError: If the inputs do not fit the parameters.
        """
        if isinstance(A1, AttentionProblem):
            return predict(self.model, self.parameters, A1)
        d_out = self.parameters["W_O" if "W_O" in self.parameters else "Y"].shape[1]
        targets = _zero_targets(A1, d_out)
        mask = and_causal(mask, self.window) if self.causal else mask
        problem = AttentionProblem(A1, targets, A2, A3, mask=mask, scale=self.scale)
        return predict(self.model, self.parameters, problem)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file with its metadata; an old file stays until it is complete.

        Raises:
            OSError: If the file cannot be written.
        """
        metadata = {
            "kind": "fit",
            "model": {"name": type(self.model).__name__, **asdict(self.model)},  # type: ignore[call-overload]
            "status": self.status.value,
            "history": [asdict(record) for record in self.history],
            "notes": list(self.notes),
            "certificate": None if self.certificate is None else self.certificate.as_dict(),
            "minima": None if self.minima is None else asdict(self.minima),
        }
        metadata |= {name: getattr(self, name) for name in (*_PLAIN, "solver", "window")}
        tensors = {name: value.cpu().contiguous() for name, value in self.parameters.items()}
        write_tensors(path, tensors, metadata)

    @staticmethod
    def load(path: str | Path) -> FitResult:
        """Reads what :meth:`save` wrote.

        Returns:
            The result.

        Raises:
            ValueError: If the file is missing, damaged, or no fit.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("kind") != "fit":
            kind = metadata.get("kind", "plain safetensors")
            raise ValueError(f"{path} holds {kind!r}, a fit is expected: pass a file of save()")
        sizes = dict(metadata["model"])
        if sizes.get("rotary") is not None:
            sizes["rotary"] = Rotary(**sizes["rotary"])
        model = _MODELS[sizes.pop("name")](**sizes)
        certificate, minima = metadata.get("certificate"), metadata.get("minima")
        return FitResult(
            parameters=tensors,
            model=model,
            status=Status(metadata["status"]),
            history=tuple(IterationRecord(**record) for record in metadata["history"]),
            notes=tuple(metadata["notes"]),
            certificate=None if certificate is None else Certificate.of_dict(certificate),
            solver=metadata.get("solver", "trust-region"),
            window=metadata.get("window"),
            minima=None if minima is None else Minima(**minima),
            **{name: metadata[name] for name in _PLAIN},
        )

    def _named(self, name: str) -> Tensor:
        if name not in self.parameters:
            raise AttributeError(
                f"a {type(self.model).__name__} fit has no {name}: its parameters are "
                f"{list(self.parameters)}"
            )
        return self.parameters[name]


def predict(
    model: Model, parameters: Mapping[str, Tensor], problem: AttentionProblem
) -> Tensor | list[Tensor]:
    """Output of a layer on a problem's inputs.

    Args:
        model: The layer.
        parameters: Its named parameters.
        problem: Gives inputs, masks and scale; its targets are not used.

    Returns:
        One output per sequence, in the structure in which the problem was given.

    Raises:
        ValueError: If the parameters do not fit the model and the problem.
    """
    theta, readout = model.split(problem, parameters)
    rows = Features(problem, model, theta, products=False).columns @ readout
    shapes = [batch.B.shape for batch in problem.batches]
    parts = rows.split([shape[0] * shape[1] for shape in shapes])
    return problem.unpad([p.view(shape) for p, shape in zip(parts, shapes, strict=True)])


def relative_error(
    problem: AttentionProblem, model: Model, parameters: Mapping[str, Tensor]
) -> float:
    """``||prediction - B||_F / ||B - mean||_F`` of a layer on a problem.

    Args:
        problem: Inputs and outputs.
        model: The layer.
        parameters: Its named parameters.

    Returns:
        The error, without unit.

    Raises:
        ValueError: If the parameters do not fit the model and the problem.
    """
    theta, readout = model.split(problem, parameters)
    loss = 0.0
    for batch in problem.batches:
        sequences, rows = batch.B.shape[:2]
        step = max(1, _ROWS // rows)
        for i in range(0, sequences, step):
            part = batch.part(i, min(i + step, sequences))
            features = Features(problem, model, theta, products=False, batches=[part])
            squares = (features.columns @ readout - part.B.flatten(0, 1)).double().square().sum(1)
            loss += float(squares @ part.weights.double().flatten())
    return problem.relative_error(loss)


_ROWS = 8192
"""Of which predictions are held at once, about."""

_PLAIN = (
    "loss",
    "regularised_loss",
    "relative_error",
    "gradient_norm",
    "tol",
    "seed",
    "scale",
    "causal",
    "problem_digest",
)
_MODELS: dict[str, type[Bilinear] | type[MultiHead]] = {
    "Bilinear": Bilinear,
    "MultiHead": MultiHead,
}


def _zero_targets(inputs: Any, d_out: int) -> Tensor | list[Tensor]:
    if isinstance(inputs, list | tuple):
        return [_zero_targets(x, d_out) for x in inputs]  # type: ignore[misc]
    tensor = torch.as_tensor(inputs)
    return tensor.new_zeros((*tensor.shape[:-1], d_out))
