"""The demo: fit a real attention layer that ships with the package, beside L-BFGS and Adam.

The layer is number 3 of all-MiniLM-L6-v2 (12 heads, width 384; see NOTICE): its inputs on 72
sequences of 128 tokens of English text, and its weights, from which the outputs are computed.

1. The paper's problem with its regulariser: one head's output from the leading principal
   components of the layer's inputs (and a constant column), from near zero to a certified gap.
2. 12 -> 4 key/value heads, from the best start that can be made of the layer's weights: 48
   sequences are fitted, 12 say where attnreg's fit ends, and 12 are scored.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load
from torch import Tensor

from attnreg.early_stopping import fit_validated
from attnreg.fitting import fit
from attnreg.models import Bilinear, MultiHead
from attnreg.problem import AttentionProblem
from attnreg.records import IterationRecord
from attnreg.reduction.starts import best_start
from attnreg.report.baselines import adam, lbfgs
from attnreg.report.figures import save_figures
from attnreg.report.trace import Trace
from attnreg.result import predict, relative_error

HEADS, KV_HEADS = 12, 4
FITTED, VALIDATION = range(48), range(48, 60)
HELD_OUT = range(60, 72)
ADAM_RATES = (2.5e-4, 5e-4, 1e-3)  # the best of a grid from this start and its neighbours
SECONDS = 8.0

PAPER_HEAD, PAPER_COMPONENTS = 5, 64
PAPER_FITTED, PAPER_HELD_OUT = range(24), HELD_OUT
PAPER_TOL, PAPER_SECONDS = 1e-8, 30.0
LOGIT_SIZE = 5.0
"""The regularisers weigh logits of this size, and outputs of the targets' size, like the loss."""


@dataclass(frozen=True)
class Layer:
    """The embedded layer: inputs ``(sequences, tokens, width)`` and named weights, float32."""

    inputs: Tensor
    weights: dict[str, Tensor]

    @staticmethod
    def load() -> Layer:
        """Reads the embedded file."""
        data = resources.files("attnreg").joinpath("data/minilm_layer3.safetensors").read_bytes()
        tensors = {name: value.float() for name, value in load(data).items()}
        return Layer(tensors.pop("inputs"), tensors)

    def problem(self, sequences: range) -> AttentionProblem:
        """Inputs and outputs of the whole layer on some sequences."""
        inputs = self.inputs[sequences.start : sequences.stop]
        blank = AttentionProblem(inputs, torch.zeros_like(inputs))
        outputs = predict(MultiHead(HEADS), self.weights, blank)
        assert isinstance(outputs, Tensor)
        return AttentionProblem(inputs, outputs)

    def principal_axes(self, sequences: range, components: int) -> tuple[Tensor, Tensor]:
        """Mean of the inputs and their leading axes, the first score of variance 1; float64."""
        rows = self.inputs[sequences.start : sequences.stop].flatten(0, 1).double()
        mean = rows.mean(0)
        values, vectors = torch.linalg.eigh((rows - mean).mT @ (rows - mean) / len(rows))
        return mean, vectors[:, -components:] / values[-1].sqrt()

    def head_problem(
        self, head: int, sequences: range, axes: tuple[Tensor, Tensor]
    ) -> AttentionProblem:
        """One head's output as the paper's problem, float64.

        The inputs are the scores along :meth:`principal_axes`, with a constant column; the
        outputs are the head's contribution, in an orthonormal basis of the space in which it
        lies (distances are kept).

        Returns:
            The problem, without regularisers.
        """
        width = self.inputs.shape[2] // HEADS
        part = slice(head * width, (head + 1) * width)
        basis, size = torch.linalg.qr(self.weights["W_O"][part].mT.double())
        weights = {n: w[..., part].double() for n, w in self.weights.items() if n[-1] != "O"}
        weights |= {"W_O": size.mT, "b_O": basis.new_zeros(basis.shape[1])}
        inputs = self.inputs[sequences.start : sequences.stop].double()
        blank = AttentionProblem(inputs, inputs.new_zeros((*inputs.shape[:2], basis.shape[1])))
        outputs = predict(MultiHead(1, head_dim=width), weights, blank)
        assert isinstance(outputs, Tensor)
        mean, directions = axes
        scores = (inputs - mean) @ directions
        return AttentionProblem(torch.cat([scores, torch.ones_like(scores[..., :1])], 2), outputs)


def run(out: Path, seconds: float | None = None, as_json: bool = False) -> None:
    """Runs the demo, prints a table and writes figures and numbers.

    Args:
        out: Folder for ``demo.json`` and the figures; made if absent.
        seconds: Time for each method; default 8.
        as_json: Whether the numbers are printed as JSON instead of a table.
    """
    budget = SECONDS if seconds is None else seconds
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=as_json)
    layer = Layer.load()
    paper = _paper_problem(layer, out, console)
    conversion, fitted = _conversion(layer, budget, console)
    numbers: dict[str, object] = {
        "paper_problem": paper,
        "conversion": [t.summary() for t in conversion],
    }
    figures = save_figures(out, conversion, fitted.original, fitted.student, fitted.targets)
    (out / "demo.json").write_text(json.dumps(numbers, indent=2) + "\n")
    if as_json:
        print(json.dumps(numbers))  # noqa: T201
        return
    console.print(_table(conversion, budget))
    for path in figures:
        console.print(f"figure {path}")


def _paper_problem(layer: Layer, out: Path, console: Console) -> dict[str, object]:
    axes = layer.principal_axes(PAPER_FITTED, PAPER_COMPONENTS)
    problem = layer.head_problem(PAPER_HEAD, PAPER_FITTED, axes)
    other = layer.head_problem(PAPER_HEAD, PAPER_HELD_OUT, axes)
    pairs, target = sum(n * m for n, m in problem.lengths), problem.target_norm_squared
    problem = problem.replace(
        ridge_x=target / (LOGIT_SIZE**2 * pairs),
        ridge_y=target / float(problem.gram_value.trace()),
    )
    result = fit(problem, Bilinear(), tol=PAPER_TOL, max_seconds=PAPER_SECONDS, certify=True)
    held_out = relative_error(other, result.model, result.parameters)
    console.print(
        f"paper's problem, one head, X {problem.d_query} x {problem.d_key}: {result.status.value} "
        f"in {result.history[-1].seconds:.1f} s, gradient {result.gradient_norm:.0e}, relative "
        f"error {result.relative_error:.4f} fitted, {held_out:.4f} held out"
    )
    problem.save(out / "paper_problem.safetensors")
    result.save(out / "paper_fit.safetensors")
    found = result.certificate
    if found is not None:
        found.save(out / "certificate.json")
        gap = "none" if found.gap is None else f"{found.gap / target:.0e} of ||B - mean||^2"
        console.print(
            f"certificate {found.kind.name}, gap {gap}: {found.reason}\ncheck it: attnreg verify "
            f"{out}/paper_problem.safetensors {out}/paper_fit.safetensors --certificate "
            f"{out}/certificate.json",
            soft_wrap=True,
        )
    return {
        "certificate": None if found is None else found.as_dict(),
        "relative_error": result.relative_error,
        "held_out_error": held_out,
        "gradient_norm": result.gradient_norm,
        "seconds": result.history[-1].seconds,
        "status": result.status.value,
    }


@dataclass(frozen=True)
class _Fitted:
    """What the figures show beside the traces."""

    original: tuple[MultiHead, dict[str, Tensor]]
    student: tuple[MultiHead, dict[str, Tensor]]
    targets: AttentionProblem


def _conversion(layer: Layer, budget: float, console: Console) -> tuple[list[Trace], _Fitted]:
    problem, validation = layer.problem(FITTED), layer.problem(VALIDATION)
    held_out = layer.problem(HELD_OUT)
    model = MultiHead(HEADS, KV_HEADS)
    best = best_start(problem, MultiHead(HEADS), layer.weights, model)
    start = best.unsolved
    ours = Trace("attnreg")
    began = time.perf_counter()

    def observe(record: IterationRecord) -> None:
        ours.add(time.perf_counter() - began, problem.relative_error(record.loss))

    result = fit_validated(
        problem, validation, model, init=start, max_seconds=budget, callback=observe
    )
    console.print(f"start {best.name!r}; {'; '.join(result.notes)}", soft_wrap=True)
    ours.finish(result.relative_error, relative_error(held_out, model, result.parameters))
    traces = [ours]
    for parameters, trace in (
        lbfgs(problem, model, start, budget),
        *(adam(problem, model, start, budget, rate) for rate in ADAM_RATES),
    ):
        fitted_error = relative_error(problem, model, parameters)
        trace.finish(fitted_error, relative_error(held_out, model, parameters))
        traces.append(trace)
    original = (MultiHead(HEADS), layer.weights)
    return traces, _Fitted(original, (model, dict(result.parameters)), held_out)


def _table(traces: list[Trace], budget: float) -> Table:
    table = Table(title=f"12 -> 4 key/value heads, {len(FITTED)} sequences, {budget:g} s each")
    table.add_column("method")
    table.add_column("error, fitted", justify="right")
    table.add_column("error, held out", justify="right")
    for trace in traces:
        table.add_row(trace.name, f"{trace.fitted_error:.4f}", f"{trace.held_out_error:.4f}")
    return table
