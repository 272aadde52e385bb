"""The report and the model card of a converted folder: numbers before and after, no times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnreg.transformers.calibration import Windows
from attnreg.transformers.shapes import AttentionShape
from attnreg.transformers.task import Task

REPORT = "attnreg-report.json"
FORMAT = 1


def build_report(
    task: Task,
    settings: Mapping[str, Any],
    digest: str,
    command: str,
    records: Sequence[Mapping[str, Any]],
    final: Mapping[str, Any] | None,
    generated: Windows | None,
    scores: Mapping[str, float],
) -> dict[str, Any]:
    """What a conversion came to, as JSON holds it.

    Args:
        task: The task.
        settings: As ``task.settings()`` gives them.
        digest: Their digest.
        command: The command line.
        records: One for each fitted block, with ``layers`` and the errors.
        final: The record of the final pass; None: there was none.
        generated: Windows beside the user's text; None: none.
        scores: ``before`` and ``after``, nats a held-out token; or ``cosine``.

    Returns:
        The report.
    """
    before, after = _costs(task, student=False), _costs(task, student=True)
    if "cosine" in scores:
        after["cosine"] = scores["cosine"]
    else:
        for side, values in (("before", before), ("after", after)):
            values["nats_per_token"] = scores[side]
            values["perplexity"] = math.exp(min(scores[side], 700.0))
        after["excess_nats"] = scores["after"] - scores["before"]
    groups = {group.applications[0]: group for group in task.groups}
    layers = [
        {
            **record,
            "original": sizes(groups[record["layers"][0]].original),
            "student": sizes(groups[record["layers"][0]].student),
        }
        for record in records
    ]
    architectures = getattr(task.config, "architectures", None)
    return {
        "format": FORMAT,
        "digest": digest,
        "command": command,
        "model": task.checkpoint.folder.name,
        "architecture": architectures[0] if architectures else type(task.config).__name__,
        "loads_with": "transformers" if task.obstacle is None else "attnreg.load",
        "obstacle": task.obstacle,
        "versions": {name: settings[name] for name in ("attnreg", "torch", "transformers")},
        "model_digest": settings["model"],
        "options": settings["options"],
        "calibration": {
            "source": Path(task.fit.source.removesuffix(" (to fit)")).name,
            "fit": task.fit.facts(),
            "held_out": task.held_out.facts(),
            "generated": None if generated is None else generated.facts(),
        },
        "before": before,
        "after": after,
        "layers": layers,
        "final_pass": None if final is None else dict(final),
    }


def sizes(shape: AttentionShape) -> dict[str, int]:
    """The sizes that a conversion may change."""
    return {name: getattr(shape, name) for name in ("heads", "kv_heads", "head_dim")}


def parameters(shape: AttentionShape) -> int:
    """Number of attention weights of a layer."""
    return sum(math.prod(size) for size in shape.weights().values())


def cache_bytes(shape: AttentionShape, itemsize: int) -> int:
    """Bytes of keys and values that a layer keeps for a token."""
    return 2 * shape.kv_heads * shape.head_dim * itemsize


def model_card(report: Mapping[str, Any]) -> str:
    """The folder's README in Markdown.

    Args:
        report: As :func:`build_report` gives it.

    Returns:
        The text.
    """
    before, after = report["before"], report["after"]
    rows = [
        f"| {text} | {_number(before.get(name))} | {_number(after.get(name))} |"
        for name, text in _ROWS.items()
        if after.get(name) is not None
    ]
    layers = [
        f"| {', '.join(map(str, layer['layers']))} | {_sizes(layer['original'])} "
        f"| {_sizes(layer['student'])} | {layer['start']} | {_ridge(layer)} | {layer['step']:g} "
        f"| {layer['start_error']:.4f} | {layer['held_out_error']:.4f} |"
        for layer in report["layers"]
    ]
    text = report["calibration"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "---",
        "library_name: transformers",
        "tags: [attnreg, compression]",
        "---",
        "",
        f"# {report['model']} with smaller attention layers",
        "",
        *_loading(report),
        "",
        "| on held-out text | before | after |",
        "|---|---|---|",
        *rows,
        "",
        f"Held-out text: {text['held_out']['windows']} windows, {text['held_out']['tokens']} "
        f"tokens of {text['source']}, a split of the calibration text that nothing was fitted on; "
        "but it chose where the fits end, so that its numbers are slightly optimistic. "
        f"Fitted on {text['fit']['windows']} windows, {text['fit']['tokens']} tokens"
        f"{_generated(report)}.",
        "",
        "## Layers",
        "",
        "Sizes are query heads / key/value heads / width of a head. Errors are relative errors of "
        "the attention's output on held-out text, on the student's own inputs: of the start, and "
        "of the fit. The held-out text chose a ridge on W_O (as a share of the mean square of what "
        "it reads, towards the start's or towards zero) and the step: how far from the start (0) "
        "to the end of a round of the fit (1).",
        "",
        "| layer | original | student | start | ridge | step | error of the start "
        "| error of the fit |",
        "|---|---|---|---|---|---|---|---|",
        *layers,
        *_final(report),
        "",
        "## How it was made",
        "",
        *([f"    {report['command']}", ""] if report["command"] else []),
        f"- {versions}",
        f"- seed {report['options']['seed']}",
        f"- original: SHA-256 {report['model_digest']} (configuration and weights)",
        f"- calibration: SHA-256 {text['fit']['digest']} (token windows that were fitted), "
        f"{text['held_out']['digest']} (held out)",
        f"- everything else: {REPORT}",
    ]
    return "\n".join(lines) + "\n"


_ROWS = {
    "perplexity": "perplexity",
    "nats_per_token": "nats per token",
    "excess_nats": "excess, nats per token",
    "cosine": "mean cosine of mean-pooled embeddings, original and student",
    "parameters": "parameters",
    "kv_bytes_per_token": "key/value cache, bytes per token",
}


def _loading(report: Mapping[str, Any]) -> list[str]:
    if report["obstacle"] is None:
        return [
            f"A model of class `{report['architecture']}`, which plain transformers loads with "
            "`from_pretrained`."
        ]
    return [
        "No configuration of transformers describes this model, so `from_pretrained` cannot load "
        f"it ({report['obstacle']}). It loads with the package attnreg:",
        "",
        "    import attnreg",
        '    model = attnreg.load("this folder")',
    ]


def _generated(report: Mapping[str, Any]) -> str:
    windows = report["calibration"]["generated"]
    if windows is None:
        return ""
    recombined = "cosine" in report["after"]
    what = "of its spans put together anew" if recombined else "that the original wrote itself"
    return f", and on {windows['tokens']} tokens {what}"


def _final(report: Mapping[str, Any]) -> list[str]:
    record = report["final_pass"]
    if record is None:
        return []
    divergence = "the divergence from its next tokens, nats a token"
    distance = "the relative squared error of the last hidden states"
    measure = distance if "cosine" in report["after"] else divergence
    return [
        "",
        f"After the fits, whose errors these are, all layers together took {record['steps']} steps "
        f"towards what the original predicts: {measure}, was {record['start_loss']:.4f} on "
        f"held-out text before and {record['held_out_loss']:.4f} at step {record['best_step']}, "
        "whose weights are in this folder.",
    ]


def _costs(task: Task, *, student: bool) -> dict[str, Any]:
    total = sum(math.prod(entry.shape) for entry in task.checkpoint.entries.values())
    if student:
        for group in task.groups:
            total += parameters(group.student) - parameters(group.original)
    shapes = task.shapes(student=student)
    dtype = task.dtype if student else task.checkpoint.dtype
    cache = sum(cache_bytes(shape, dtype.itemsize) for shape in shapes)
    return {
        "parameters": total,
        "kv_bytes_per_token": cache if shapes[0].causal else None,
    }


def _sizes(values: Mapping[str, int]) -> str:
    return " / ".join(str(values[name]) for name in ("heads", "kv_heads", "head_dim"))


def _ridge(layer: Mapping[str, Any]) -> str:
    center = layer.get("center")  # not in the journals of older versions
    towards = f" to {center}" if center else ""
    return f"{layer['ridge']:g}{towards}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
