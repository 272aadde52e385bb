"""What the conversion benchmarks share: the methods compared and the rows they are measured in.

Everybody converts through the same pipeline, layer by layer on the student's own inputs with the
same targets, and differs only in how a layer is fitted:

    mean      key/value heads averaged over their group, nothing fitted
    first     the first key/value head of each group, nothing fitted
    svd       truncated SVD of each bilinear form, weighted by the activations, nothing fitted
    start     the best start by measured error, its W_O solved
    adam      from that start: Adam, mini-batches of whole windows, fused attention, a cosine over
              its seconds, W_O solved at the end within them (not counted: at the start), best of
              some rates (four) by held-out error
    ours      from that start: `attnreg.fit`
    adam+     adam for half of the time, then our final pass over the whole model for the other half
    final     ours for half of the time, then the final pass: what `attnreg compress` does

Seconds a layer are those of one fit (adam: of one rate, so that it is given four times as long);
the last two share the same time in all between fits and final pass. Everybody has the same data:
the text, and with `--generate` tokens that the original itself has written.
With `--resume` rows are added to the file, by several runs side by side if wanted.
Where the groups cannot be of neighbours, the first three take those of alike heads; a row that a
student's sizes do not allow is left out, and why is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from attnreg.result import relative_error
from benchmarks.common import RESULTS, command_line, console, machine, parse, print_table, save

METHODS = ("mean", "first", "svd", "start", "adam", "ours", "adam+", "final")
UNFITTED = ("mean", "first", "svd")
TIMED = METHODS[4:]
OURS = ("ours", "final")
KEY = ("student", "method", "seconds_a_layer", "generated_tokens", "seed")


class NotApplicable(Exception):
    """A method that does not exist for a student's sizes."""


@dataclass(frozen=True)
class Bed:
    """A model with its texts, and what is asked of the students.

    Attributes:
        name: Of the file of results.
        title: Of the table.
        layers: How many are fitted.
        students: Their sizes by name, as `attnreg.transformers.plan.Setting` takes them.
        seconds: A layer, where none are asked for.
        rates: Of Adam, where none are asked for.
        windows: In a mini-batch of Adam.
        generate: Tokens that the original writes, where no other number is asked for.
        prepare: Makes the task of a conversion out of sizes and fields of `Options`.
        score: Scores of a converted folder by name, the first of them for the table.
        facts: About the bed, for the file of results.
    """

    name: str
    title: str
    layers: int
    students: Mapping[str, Mapping[str, int]]
    seconds: tuple[float, ...]
    rates: tuple[float, ...]
    windows: int
    generate: int
    prepare: Callable[[Mapping[str, int], Mapping[str, Any]], Any]
    score: Callable[[Path], dict[str, float]]
    facts: Mapping[str, Any]


# ---------------------------------------------------------------------- the peers


def features(model: Any, weights: Mapping[str, Tensor], part: Any) -> Tensor:
    """Features of self-attention by fused attention; rotary embedding is half-split."""
    inputs = part.A1

    def projected(name: str) -> Tensor:
        rows = inputs @ weights[f"W_{name}"]
        if f"b_{name}" in weights:
            rows = rows + weights[f"b_{name}"]
        return rows.unflatten(2, (-1, model.head_dim)).transpose(1, 2)

    query, key, value = (projected(name) for name in "QKV")
    if model.rotary is not None:
        frequencies = torch.tensor(model.rotary.frequencies, dtype=torch.float64)
        angles = torch.arange(inputs.shape[1])[:, None] * frequencies
        cosine, sine = (torch.cat([f(angles)] * 2, 1).to(inputs) for f in (torch.cos, torch.sin))
        query, key = (
            rows * cosine + torch.cat([-rows.chunk(2, -1)[1], rows.chunk(2, -1)[0]], -1) * sine
            for rows in (query, key)
        )
    hidden = None if part.bias is None else part.bias[:, None]  # padding
    found = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=hidden, is_causal=part.causal, enable_gqa=True
    )
    return found.transpose(1, 2).flatten(2)


def adam(
    problem: Any,
    model: Any,
    start: Mapping[str, Tensor],
    *,
    rate: float,
    windows: int,
    seconds: float,
    seed: int,
) -> dict[str, Tensor]:
    """Adam on all weights for some seconds."""
    parts = [
        batch.part(i, i + windows)
        for batch in problem.batches
        for i in range(0, len(batch.index), windows)
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
        output = features(model, weights, part) @ weights["W_O"]
        residual = output + weights.get("b_O", 0.0) - part.B
        loss = (residual.square() * part.weights[..., None]).sum() / part.weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in weights.items()}


def peer(
    method: str, seconds: float, rates: Sequence[float], windows: int, seed: int
) -> Callable[..., Any]:
    """What takes the place of `fit_layer` for a method."""
    from attnreg.reduction.starts import best_start, solve_readout, starts
    from attnreg.transformers import layer_fit

    def unfitted(few: Any, teacher: Any, model: Any) -> dict[str, dict[str, Tensor]]:
        made = starts(few, *teacher, model)
        name = next((n for n in (method, f"clustered {method}") if n in made), None)
        if name is None:
            raise NotApplicable(f"of its starts none is of that kind: {', '.join(made)}")
        return {name: made[name]}

    def fitted(problem: Any, few: Any, teacher: Any, model: Any) -> dict[str, dict[str, Tensor]]:
        best = best_start(few, *teacher, model)
        began = time.perf_counter()
        init = solve_readout(problem, model, best.weights)[1]
        solve = time.perf_counter() - began
        if method == "start":
            return {best.name: init}
        found, own = {}, max(seconds - solve, seconds / 10)
        for rate in rates:
            end = adam(problem, model, init, rate=rate, windows=windows, seconds=own, seed=seed)
            found[f"rate {rate:g}"] = solve_readout(problem, model, end)[1]
        return found

    def fit_layer(
        problem: Any, validation: Any, teacher: Any, model: Any, **options: Any
    ) -> layer_fit.LayerFit:
        few = layer_fit.sample(problem, layer_fit.SCORED_ROWS)
        if method in UNFITTED:
            found = unfitted(few, teacher, model)
        else:
            found = fitted(problem, few, teacher, model)
        errors = {n: relative_error(validation, model, w) for n, w in found.items()}
        name = min(errors, key=lambda n: errors[n])
        return layer_fit.LayerFit(
            weights={n: value.float() for n, value in found[name].items()},
            start=name,
            tried=errors,
            start_error=errors[name],
            error=relative_error(problem, model, found[name]),
            held_out_error=errors[name],
            iterations=0,
        )

    return fit_layer


# ---------------------------------------------------------------------- the rows


def settings(bed: Bed, method: str, seconds: float, generate: int, seed: int) -> dict[str, Any]:
    """Fields of `Options`; time bounds ours and the final pass, peers keep theirs themselves."""
    bound = seconds * bed.layers if method in TIMED[1:] else None
    steps = 10**6 if method in ("adam+", "final") else 0
    return {
        "max_iterations": 10**6,
        "max_seconds": bound,
        "final_steps": steps,
        "generate": generate,
        "seed": seed,
    }


def measure(
    bed: Bed,
    student: str,
    method: str,
    seconds: float,
    generate: int,
    seed: int,
    rates: Sequence[float],
) -> dict[str, Any]:
    """One conversion and its scores."""
    from attnreg.transformers import stages
    from attnreg.transformers.convert import convert

    task = bed.prepare(bed.students[student], settings(bed, method, seconds, generate, seed))
    fit_layer = stages.fit_layer
    if method not in OURS:
        own = seconds * stages.FIT_SHARE if method == "adam+" else seconds
        fit_layer = peer(method.removesuffix("+"), own, rates, bed.windows, seed)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "student"
        with mock.patch.object(stages, "fit_layer", fit_layer):
            done = convert(task, out)
        scores = bed.score(out)
    layers = done.report["layers"]
    return {
        "student": student,
        "method": method,
        "seconds_a_layer": seconds,
        "generated_tokens": generate,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "rates": list(rates) if method.startswith("adam") else None,
        "seconds": done.seconds,
        **scores,
        "starts": [layer["start"] for layer in layers],
        "held_out_errors": [layer["held_out_error"] for layer in layers],
    }


def arguments_of(bed: Bed, description: str | None) -> argparse.ArgumentParser:
    """The options that a bed's benchmark has."""
    parser = command_line(bed.name, description, quick="one student, one second a layer")
    parser.add_argument("--students", nargs="+", choices=bed.students, default=list(bed.students))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seconds", nargs="+", type=float, default=list(bed.seconds))
    parser.add_argument("--rates", nargs="+", type=float, default=list(bed.rates), help="of Adam")
    parser.add_argument("--generate", type=int, default=bed.generate, metavar="TOKENS")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--resume", action="store_true", help="keep the rows of the last run")
    return parser


def run(bed: Bed, description: str | None, arguments: Sequence[str] | None) -> None:
    """Runs the rows asked for and saves them after each."""
    options = parse(arguments_of(bed, description), arguments)
    if options.quick:
        options.students, options.seconds = options.students[:1], [1.0]
    path = RESULTS / f"{bed.name}{'-quick' if options.quick else ''}.json"
    rows = merged(path, []) if options.resume else []
    known = {key_of(row) for row in rows}
    asked = [
        (student, method, seconds, options.generate, seed)
        for seed in options.seeds
        for student in options.students
        for method in options.methods
        for seconds in (options.seconds if method in TIMED else [0.0])
    ]
    for key in asked:
        if key in known:
            continue
        try:
            rows.append(measure(bed, *key, options.rates))
        except NotApplicable as reason:
            console.print(f"{key[0]}, {key[1]} left out: {reason}")
            continue
        if options.resume:
            rows = merged(path, rows)
        save(bed.name, {"machine": machine(), **bed.facts, "rows": rows}, quick=options.quick)
    show(bed, rows)


def merged(path: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a file, which others may have added to meanwhile, and those that it has not."""
    before = json.loads(path.read_text())["rows"] if path.is_file() else []
    there = {key_of(row) for row in before}
    return [*before, *(row for row in rows if key_of(row) not in there)]


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart; older ones have no seed, which was 0."""
    return tuple(row.get(name, 0) for name in KEY)


def show(bed: Bed, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a table."""
    if not rows:
        return
    common = (*KEY, "threads", "rates", "seconds")
    scores = [n for n in rows[0] if n not in (*common, "starts", "held_out_errors")]
    print_table(
        bed.title,
        (
            "student",
            "method",
            "seconds a layer",
            "generated",
            "seed",
            "threads",
            "seconds",
            *(n.replace("_", " ") for n in scores),
        ),
        [
            (
                r["student"],
                r["method"],
                f"{r['seconds_a_layer']:g}",
                f"{r['generated_tokens']}",
                f"{r.get('seed', 0)}",
                f"{r.get('threads', '-')}",
                f"{r['seconds']:.0f}",
                *(f"{r[name]:.4f}" for name in scores),
            )
            for r in rows
        ],
    )
