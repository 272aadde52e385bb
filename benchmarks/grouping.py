"""Which key/value heads share one: what a real layer's fit ends with, by how they are grouped.

all-MiniLM-L6-v2's layers from 12 to 4 key/value heads, data of the large tier of
`benchmarks.large_layers`. Every grouping begins with each group's best common key and value, made
on the same sample of the rows, and is fitted by `attnreg.fit` for the same steps. The groups are

    neighbours    heads 0 to 2, 3 to 5, ...: what mean pooling takes
    moments       second moments of logits and values (`attnreg.reduction.grouping`)
    pairs         what short fits of all pairs lose (`attnreg.reduction.sharing`)
    random        drawn at random

    python -m benchmarks.grouping --threads 1

A row is one fit. The seconds that the pairs' fits took are beside the rows; another job on the
machine changes nothing else. Rows that were made with the same settings on the same machine are
kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attnreg import AttentionProblem, fit
from attnreg.reduction.grouping import clusters, distances
from attnreg.reduction.headwise import split_heads
from attnreg.reduction.pooled_layer import grouped_start
from attnreg.reduction.sampling import sample
from attnreg.reduction.sharing import ROWS, pair_losses
from attnreg.reduction.starts import solve_readout
from attnreg.transformers.layer_fit import SCORED_ROWS
from benchmarks.common import (
    Clock,
    command_line,
    console,
    machine,
    parse,
    print_table,
    results_of,
    resumed,
    show,
    write_json,
)
from benchmarks.large_layers import SCORED, TIERS
from benchmarks.layer_problem import (
    KV_HEADS,
    ORIGINAL,
    STUDENT,
    WEIGHTS,
    Bed,
    Weights,
    load_layer,
    third_text,
)

Members = list[tuple[int, ...]]
NAMED = 3  # groupings that are not drawn


@dataclass(frozen=True)
class Setting:
    """How much is run."""

    layers: tuple[int, ...] = (0, 3, 5)
    sequences: int = TIERS["large"].sequences
    scored: int = TIERS["large"].scored
    epochs: int = 6
    random: int = 4
    tokens: int = TIERS["large"].tokens


QUICK = Setting((3,), 64, 16, 2, 1)


def random_groups(number: int) -> Members:
    """Groups of equal size, always the same of a number."""
    heads = list(range(ORIGINAL.heads))
    random.Random(number).shuffle(heads)
    size = len(heads) // KV_HEADS
    return sorted(tuple(sorted(heads[i : i + size])) for i in range(0, len(heads), size))


def groupings(
    problem: AttentionProblem, few: AttentionProblem, weights: Weights, count: int
) -> tuple[dict[str, Members], float]:
    """All groupings by name, and the seconds that the pairs' fits took."""
    size = ORIGINAL.heads // KV_HEADS
    clock = Clock()
    losses = pair_losses(sample(problem, ROWS), ORIGINAL, weights, STUDENT)
    seconds = clock.seconds()
    found = {
        "neighbours": [tuple(range(i, i + size)) for i in range(0, ORIGINAL.heads, size)],
        "moments": clusters(distances(split_heads(few, ORIGINAL, weights)), KV_HEADS),
        "pairs": clusters(losses, KV_HEADS),
    }
    return found | {f"random {i}": random_groups(i) for i in range(count)}, seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = command_line("grouping", __doc__, quick="one layer, little data, one random grouping")
    parser.add_argument("--layers", nargs="+", type=int, help="0 3 5")
    options = parse(parser, arguments)
    setting = QUICK if options.quick else Setting()
    path = results_of("grouping", "quick" if options.quick else "bench")
    content: dict[str, Any] = {
        "machine": machine(),
        "setting": {**asdict(setting), "layers": None},
    }
    if options.quick:
        path.unlink(missing_ok=True)
    for number in options.layers or setting.layers:
        own = f"layer {number}"
        kept = resumed(path, content, "layers").get(own, {"rows": {}})["rows"]
        if len(kept) < NAMED + setting.random:
            _run(number, setting, set(kept), partial(_add, path, content, own))
        _print(own, resumed(path, content, "layers")[own])


def _run(number: int, setting: Setting, kept: set[str], add: Callable[..., None]) -> None:
    """Makes the rows of a layer that are not kept."""
    layer = load_layer(setting.sequences, setting.scored, setting.tokens, number)
    third = third_text(layer, number, setting.scored, setting.tokens)
    texts = dict(zip(SCORED, (layer.train, layer.held_out, third), strict=True))
    bed = Bed(layer.pooled, texts)
    weights = {name: layer.weights[name] for name in WEIGHTS}
    problem = bed.fitted.attention()
    few = sample(problem, SCORED_ROWS)
    members, seconds = groupings(problem, few, weights, setting.random)
    for name, groups in members.items():
        if name not in kept:
            start = grouped_start(few, ORIGINAL, weights, STUDENT, groups)
            start = solve_readout(few, STUDENT, start)[1]
            end = fit(
                problem, STUDENT, solver="stochastic", init=start, max_iterations=setting.epochs
            )
            errors = {"start": bed.errors(start), "errors": bed.errors(end.parameters)}
            add(name, {"groups": groups, **errors}, seconds)


def _add(path: Path, content: dict[str, Any], own: str, name: str, row: Any, spent: float) -> None:
    """Writes a row beside those that other runs have written in the meantime."""
    layers = resumed(path, content, "layers")
    found = layers.setdefault(own, {"seconds_of_pairs": spent, "rows": {}})
    found["rows"][name] = row
    write_json(path, {**content, "layers": dict(sorted(layers.items()))})


def _print(name: str, layer: dict[str, Any]) -> None:
    rows = sorted(layer["rows"].items(), key=lambda item: item[1]["errors"]["validation"])
    lines = [
        (grouping, *(show(found[when][text], 4) for when in ("start", "errors") for text in SCORED))
        for grouping, found in rows
    ]
    columns = ("groups", *(f"start, {text}" for text in SCORED), *SCORED)
    print_table(f"{name}, pairs in {layer['seconds_of_pairs']:.0f} s", columns, lines)
    console.print()


if __name__ == "__main__":
    main()
