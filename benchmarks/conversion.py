"""A real causal model with smaller attention: attnreg beside what one would otherwise do.

The model is the stories260k folder under ATTNREG_BEDS (5 layers, RoPE, 8 query heads over 4
key/value heads). Everybody converts through the same pipeline, layer by layer on the student's own
inputs with the same targets, and differs only in how a layer is fitted:

    mean      key/value heads averaged over their group, nothing fitted
    start     the best start by measured error, its W_O solved
    adam      from that start: Adam, mini-batches of whole windows, fused attention, a cosine over
              its seconds, best of some rates (four) by held-out error
    ours      from that start: `attnreg.fit`

Seconds a layer are those of one fit (adam: of one rate, so that it is given four times as long).
Fitted on calibration.txt; evaluation.txt only scores: each story from its beginning, at most 512
tokens; excess in nats per token over the original.

    python -m benchmarks.conversion --students kv2 --seconds 5 20
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common import RESULTS, command_line, machine, parse, print_table, save

RATES = (5e-3, 1e-2, 2e-2, 4e-2)
ADAM_WINDOWS = 4
STUDENTS = {
    "kv2": {"kv_heads": 2},
    "kv1": {"kv_heads": 1},
    "heads6": {"heads": 6, "kv_heads": 3},
    "dim6": {"head_dim": 6},
}
METHODS = ("mean", "start", "adam", "ours")


def bed() -> Path:
    """The model's folder."""
    root = Path(os.environ.get("ATTNREG_BEDS", "../shared/beds"))
    folder = root / "stories260k"
    if not folder.is_dir():
        raise SystemExit(f"{folder} does not exist: set ATTNREG_BEDS to the folder of the beds")
    return folder


def features(model: Any, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Features of causal attention with half-split rotary embedding, by fused attention."""
    frequencies = torch.tensor(model.rotary.frequencies, dtype=torch.float64)
    angles = torch.arange(inputs.shape[1])[:, None] * frequencies
    cosine, sine = (torch.cat([f(angles)] * 2, 1).float() for f in (torch.cos, torch.sin))

    def turned(rows: Tensor) -> Tensor:
        first, second = rows.chunk(2, dim=-1)
        return rows * cosine + torch.cat([-second, first], -1) * sine

    heads = [(inputs @ weights[f"W_{name}"]).unflatten(2, (-1, model.head_dim)) for name in "QKV"]
    query, key, value = (rows.transpose(1, 2) for rows in heads)
    found = functional.scaled_dot_product_attention(
        turned(query), turned(key), value, is_causal=True, enable_gqa=True
    )
    return found.transpose(1, 2).flatten(2)


def adam(
    problem: Any, model: Any, start: Mapping[str, Tensor], rate: float, seconds: float, seed: int
) -> dict[str, Tensor]:
    """Adam on all weights for some seconds."""
    parts = [
        batch.part(i, i + ADAM_WINDOWS)
        for batch in problem.batches
        for i in range(0, len(batch.index), ADAM_WINDOWS)
    ]
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    began = time.perf_counter()
    while (spent := (time.perf_counter() - began) / seconds) < 1:
        order = order or torch.randperm(len(parts), generator=generator).tolist()
        part = parts[order.pop()]
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * spent))
        residual = features(model, weights, part.A1) @ weights["W_O"] - part.B
        loss = (residual.square() * part.weights[..., None]).sum() / part.weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in weights.items()}


def peer(method: str, seconds: float, rates: Sequence[float]) -> Callable[..., Any]:
    """What takes the place of `fit_layer` for a method."""
    from attnreg.transformers import layer_fit
    from attnreg.transformers.starts import best_start, solve_readout, starts

    def fit_layer(
        problem: Any, validation: Any, teacher: Any, model: Any, **options: Any
    ) -> layer_fit.LayerFit:
        original, weights = teacher
        few = layer_fit.sample(problem, layer_fit.SCORED_ROWS)
        if method == "mean":
            found = starts(few, original, weights, model)
            name = next(n for n in ("mean", "clustered mean", "svd") if n in found)
            options_found = [found[name]]
        else:
            best = best_start(few, original, weights, model)
            name = best.name
            options_found = [solve_readout(problem, model, best.weights)[1]]
        if method == "adam":
            init = options_found[0]
            options_found = [
                solve_readout(problem, model, adam(problem, model, init, rate, seconds, 0))[1]
                for rate in rates
            ]
        errors = [layer_fit.relative_error(validation, model, w) for w in options_found]
        best_error = min(errors)
        chosen = options_found[errors.index(best_error)]
        return layer_fit.LayerFit(
            weights={n: value.float() for n, value in chosen.items()},
            start=name,
            tried={},
            start_error=best_error,
            error=layer_fit.relative_error(problem, model, chosen),
            held_out_error=best_error,
            iterations=0,
        )

    return fit_layer


@torch.no_grad()
def nats(folder: Path, texts: Sequence[str]) -> float:
    """Nats per token of each text alone, at most 512 tokens of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor(tokenizer(text)["input_ids"][:512])
        logits = model(ids[None]).logits[0, :-1].double()
        total += float(functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    return total / count


def row(
    student: str,
    method: str,
    seconds: float,
    texts: Sequence[str],
    before: float,
    rates: Sequence[float],
) -> dict[str, Any]:
    """One conversion and its score."""
    from attnreg.transformers.convert import convert
    from attnreg.transformers.plan import Plan, Setting
    from attnreg.transformers.task import Options, prepare

    folder, layers = bed(), 5
    ours = method == "ours"
    options = Options(
        max_iterations=10**6,
        max_seconds=seconds * layers if ours else None,
        final_steps=0,
    )
    task = prepare(
        str(folder), Plan(Setting(**STUDENTS[student])), str(folder / "calibration.txt"), options
    )
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "student"
        if ours:
            done = convert(task, out)
        else:
            with mock.patch("attnreg.transformers.stages.fit_layer", peer(method, seconds, rates)):
                done = convert(task, out)
        excess = nats(out, texts) - before
    return {
        "student": student,
        "method": method,
        "seconds_a_layer": seconds,
        "rates": list(rates) if method == "adam" else None,
        "seconds": done.seconds,
        "excess_nats": excess,
        "perplexity": math.exp(before + excess),
        "held_out_errors": [layer["held_out_error"] for layer in done.report["layers"]],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the rows asked for and saves them."""
    parser = command_line("conversion", __doc__, quick="one student, one second a layer")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seconds", nargs="+", type=float, default=[5.0, 20.0])
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="of Adam")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the last run")
    options = parse(parser, arguments)
    if options.quick:
        options.students, options.seconds = ["kv2"], [1.0]
    text = (bed() / "evaluation.txt").read_text(encoding="utf-8")
    texts = [part for part in text.split("\n\n") if part.strip()]
    before = nats(bed(), texts)
    rows: list[dict[str, Any]] = []
    if options.resume:
        rows = json.loads((RESULTS / "conversion.json").read_text())["rows"]
    known = {(r["student"], r["method"], r["seconds_a_layer"]) for r in rows}
    for student in options.students:
        for method in options.methods:
            timed = method in ("adam", "ours")
            for seconds in options.seconds if timed else [0.0]:
                if (student, method, seconds) in known:
                    continue
                rows.append(row(student, method, seconds, texts, before, options.rates))
                content = {"machine": machine(), "original_nats": before}
                save("conversion", {**content, "rows": rows}, quick=options.quick)
    print_table(
        f"stories260k, original perplexity {math.exp(before):.3f}",
        ("student", "method", "seconds a layer", "seconds", "perplexity", "excess nats"),
        [
            (
                r["student"],
                r["method"],
                f"{r['seconds_a_layer']:g}",
                f"{r['seconds']:.0f}",
                f"{r['perplexity']:.3f}",
                f"{r['excess_nats']:.3f}",
            )
            for r in rows
        ],
    )


if __name__ == "__main__":
    main()
