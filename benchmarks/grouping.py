"""Which key/value heads share one: what a real layer's fit ends with, by how they are grouped.

all-MiniLM-L6-v2's layers from 12 to 4 key/value heads, data of the large tier of
`benchmarks.large_layers`. Every grouping begins with each group's best common key and value, made
on the same sample of the rows, and is fitted by `attnreg.fit` for the same steps. The groups are

    neighbours    heads 0 to 2, 3 to 5, ...: what mean pooling takes
    moments       second moments of logits and values (`attnreg.transformers.grouping`)
    pairs         what short fits of all pairs lose (`attnreg.transformers.sharing`)
    random        drawn at random

    python -m benchmarks.grouping --threads 1

A row is one fit, or the medians of as many as `seeds` says. The seconds that the pairs' fits took
are beside the rows; another job on the machine changes nothing else. Rows that were made with the
same settings on the same machine are kept.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnreg import AttentionProblem, fit
from attnreg.transformers.grouping import clusters, distances
from attnreg.transformers.headwise import split_heads
from attnreg.transformers.layer_fit import SCORED_ROWS, sample
from attnreg.transformers.pooled_layer import grouped_start
from attnreg.transformers.sharing import ROWS, pair_losses
from attnreg.transformers.starts import solve_readout
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
from benchmarks.large_layers import SCORED, TIERS, Tier
from benchmarks.layer_problem import (
    KV_HEADS,
    ORIGINAL,
    STUDENT,
    WEIGHTS,
    Bed,
    Layer,
    load_layer,
    medians,
    third_text,
)

Members = list[tuple[int, ...]]
NAMED = ("neighbours", "moments", "pairs")


@dataclass(frozen=True)
class Setting:
    """How much is run."""

    layers: tuple[int, ...] = (0, 3, 5)
    sequences: int = TIERS["large"].sequences
    scored: int = TIERS["large"].scored
    epochs: int = 6
    seeds: int = 1
    random: int = 4
    tokens: int = TIERS["large"].tokens


QUICK = Setting((3,), 64, 16, 2, 1, 1)


def random_groups(number: int) -> Members:
    """Groups of equal size, always the same of a number."""
    heads = list(range(ORIGINAL.heads))
    random.Random(number).shuffle(heads)
    size = len(heads) // KV_HEADS
    return sorted(tuple(sorted(heads[i : i + size])) for i in range(0, len(heads), size))


def groupings(
    problem: AttentionProblem, few: AttentionProblem, layer: Layer, count: int
) -> tuple[dict[str, Members], float]:
    """All groupings by name, and the seconds that the pairs' fits took."""
    weights = {name: layer.weights[name] for name in WEIGHTS}
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


def row(
    bed: Bed, few: AttentionProblem, layer: Layer, members: Members, setting: Setting, seeds: int
) -> dict[str, Any]:
    """Errors of the start, its readout solved, and of the fits' ends."""
    weights = {name: layer.weights[name] for name in WEIGHTS}
    start = grouped_start(few, ORIGINAL, weights, STUDENT, members)
    start = solve_readout(few, STUDENT, start)[1]
    problem, ends = bed.fitted.attention(), []
    for seed in range(seeds):
        end = fit(
            problem,
            STUDENT,
            solver="stochastic",
            init=start,
            max_iterations=setting.epochs,
            seed=seed,
        )
        ends.append(bed.errors(end.parameters))
    return {"groups": members, "start": bed.errors(start), "errors": medians(ends, SCORED)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = command_line("grouping", __doc__, quick="one layer, little data, no file kept")
    parser.add_argument("--layers", nargs="+", type=int, help="0 3 5")
    options = parse(parser, arguments)
    setting = QUICK if options.quick else Setting()
    tier = Tier(setting.layers, setting.sequences, setting.scored, 0.0, 0.0, 0, 0)
    path = results_of("grouping", "quick" if options.quick else "bench")
    content: dict[str, Any] = {
        "machine": machine(),
        "setting": {**asdict(setting), "layers": None},
    }
    if options.quick:
        path.unlink(missing_ok=True)
    for number in options.layers or setting.layers:
        layer = load_layer(tier.sequences, tier.scored, tier.tokens, number)
        third = third_text(layer, number, tier.scored, tier.tokens)
        texts = dict(zip(SCORED, (layer.train, layer.held_out, third), strict=True))
        bed = Bed(layer.pooled, texts)
        problem = bed.fitted.attention()
        few = sample(problem, SCORED_ROWS)
        members, seconds = groupings(problem, few, layer, setting.random)
        own, known = f"layer {number}", resumed(path, content, "layers")
        kept = known.get(own, {"rows": {}})["rows"]
        for name, groups in members.items():
            if name in kept:
                continue
            seeds = setting.seeds if name in NAMED else 1
            made = row(bed, few, layer, groups, setting, seeds)
            layers = resumed(path, content, "layers")  # another run may have added to it
            found = layers.setdefault(own, {"seconds_of_pairs": seconds, "rows": {}})
            found["rows"][name] = made
            content["layers"] = dict(sorted(layers.items()))
            write_json(path, content)
        _print(own, resumed(path, content, "layers")[own])


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
