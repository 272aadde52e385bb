"""PNG figures: convergence, error per head, attention maps."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from attnreg.models import Features, MultiHead
from attnreg.problem import AttentionProblem
from attnreg.report.trace import Trace

Weighted = tuple[MultiHead, dict[str, Tensor]]


def save_figures(
    out: Path,
    traces: list[Trace],
    original: Weighted,
    student: Weighted,
    problem: AttentionProblem,
) -> list[Path]:
    """Writes ``convergence.png``, ``heads.png`` and ``attention.png``.

    Args:
        out: An existing folder.
        traces: Error against time of each method.
        original: Model and weights that made the targets.
        student: Model and weights that were fitted.
        problem: Held-out data for the errors per head and the maps.

    Returns:
        The files written.
    """
    errors, partners = _partners(original, student, problem)
    figures = {
        "convergence": _convergence(traces),
        "heads": _heads(errors),
        "attention": _attention(original, student, partners.tolist(), problem),
    }
    paths = []
    with mpl.rc_context({"font.size": 9}):
        for name, figure in figures.items():
            path = out / f"{name}.png"
            figure.savefig(path, dpi=120)
            paths.append(path)
    return paths


def _convergence(traces: list[Trace]) -> Figure:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for i, trace in enumerate(traces):
        style = {"linewidth": 2.2, "color": "black"} if i == 0 else {"linewidth": 1.0}
        axes.plot(trace.seconds, trace.errors, label=trace.name, **style)
    axes.set(xlabel="seconds", ylabel="relative error on the fitted data", yscale="log")
    ticks = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title("12 to 4 key/value heads of a real layer")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    return figure


def _head_outputs(weighted: Weighted, problem: AttentionProblem) -> Tensor:
    """Contribution of each head to the output, ``(heads, rows, d_out)``."""
    model, weights = weighted
    theta, readout = model.split(problem, weights)
    columns = Features(problem, model, theta, products=False).columns[:, :-1]
    per_head = columns.unflatten(1, (model.heads, -1)).transpose(0, 1)
    outputs = per_head @ readout[:-1].unflatten(0, (model.heads, -1))
    return outputs - outputs.mean(dim=1, keepdim=True)


def _partners(
    original: Weighted, student: Weighted, problem: AttentionProblem
) -> tuple[Tensor, Tensor]:
    """Each original head's nearest head of the student, whose heads may be in another order.

    Returns:
        Relative errors of the partners' outputs, and which they are.
    """
    target, fitted = (_head_outputs(one, problem).flatten(1) for one in (original, student))
    nearest = torch.cdist(target, fitted).min(dim=1)
    return nearest.values / target.norm(dim=1), nearest.indices


def _heads(errors: Tensor) -> Figure:
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(errors)), errors.tolist(), color="tab:blue")
    axes.set(xlabel="query head", ylabel="relative error of its output", xticks=range(len(errors)))
    axes.set_title("held-out error of each head (its nearest of the student's)")
    return figure


def _maps(weighted: Weighted, problem: AttentionProblem) -> Tensor:
    """Attention of the first sequence, ``(heads, n, n)``."""
    model, weights = weighted
    one = problem.subset([0])
    theta, _ = model.split(one, weights)
    layout = model.layout(one)
    blocks = theta.split([block.size for block in layout.blocks])
    matrices = [
        p.view(b.rows, b.heads * b.width) for p, b in zip(blocks, layout.blocks, strict=True)
    ]
    rows = model.project(one, one.batches[0], matrices, change=False)
    head_map = model.head_map(one, one.batches[0], matrices, rows)
    q, k, _ = rows if head_map is None else head_map.apply(rows)
    assert k is not None
    heads = q[0].unflatten(1, (model.heads, -1)).transpose(0, 1)
    keys = k[0].unflatten(1, (layout.groups, -1)).transpose(0, 1)
    return torch.softmax(heads @ keys.repeat_interleave(layout.repeats, dim=0).mT, dim=-1)


def _attention(
    original: Weighted, student: Weighted, partners: list[int], problem: AttentionProblem
) -> Figure:
    shown = (0, 4, 8, 11)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots(2, len(shown))
    rows = (("original", original, shown), ("fitted", student, [partners[i] for i in shown]))
    for row, (name, weighted, heads) in enumerate(rows):
        maps = _maps(weighted, problem)
        for column, head in enumerate(heads):
            cell = axes[row, column]
            cell.imshow(maps[head, :64, :64].sqrt().numpy(), cmap="viridis", vmin=0, vmax=1)
            cell.set_title(f"{name}, head {head}", fontsize=9)
            cell.set(xticks=[], yticks=[])
    figure.suptitle("attention of a held-out sequence, first 64 tokens (square root)", fontsize=9)
    return figure
