"""Little data: the layers of all-MiniLM-L6-v2 from 12 to 4 key/value heads, few residuals a weight.

Everybody has the same start, the best that `attnreg compress` makes of the original's weights
(`W_O` not solved for: on little data least squares is a worse start, for peers too), and the same
sequences, float32, threads and seconds. The errors are ||prediction - B||_F / ||B - column mean||_F
on the fitted sequences, on those that choose (validation), on others of the same two texts, and on
a third text; the last two chose nothing.

Peers: every setting of `benchmarks.peers`, and its lowest rates again at a quarter, for all of the
time, the best by validation, its weights scored as they are and with W_O and b_O solved on the
fitted sequences, off the clock: the better by validation counts. A further row of each has a ridge
on its W_O, off the clock, towards its own or zero (`fit_validated` without an iteration). attnreg
in three ways: by curvature, by mini-batches, and as far as the validation sequences say
(`attnreg.fit_validated`), whose scoring is on its clock. Rows are medians of three runs, of a
peer's best setting too.

    python -m benchmarks.little_data
    python -m benchmarks.little_data --averaged      from mean-pooled heads, which explain nothing

Layers are kept as they are done; an interrupted run goes on, and runs with different `--layers`
side by side add to one file. `--fresh` begins anew, `--ours` makes attnreg's rows anew and keeps
those of the peers, which take most of the time.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from attnreg import AttentionProblem, FitResult, fit, fit_validated
from attnreg.reduction.starts import best_start
from benchmarks.common import (
    command_line,
    console,
    machine,
    median,
    parse,
    print_table,
    results_of,
    resumed,
    show,
    write_json,
)
from benchmarks.layer_problem import (
    ORIGINAL,
    STUDENT,
    WEIGHTS,
    Bed,
    Errors,
    Weights,
    finite,
    load_layer,
    medians,
    third_text,
)
from benchmarks.peers import Peer, found, installed, run

NAMES = ("Adam", "Muon", "SOAP")
OURS = "attnreg, validated"
RIDGED = "{}, ridged"
SLOWER = 4.0
REPEATS = 3
TEXTS = ("fitted", "validation", "same_texts", "third_text")


@dataclass(frozen=True)
class Setting:
    """How much is run."""

    layers: tuple[int, ...]
    sequences: tuple[int, ...]  # of 128 tokens, to fit on
    seconds: tuple[float, ...]  # for each
    scored: int = 32  # to validate on, and as many of each other text
    tokens: int = 128


SETTINGS = {
    "bench": Setting((0, 3, 5), (8, 32, 96), (4.0, 6.0, 12.0)),
    "averaged": Setting((0, 3, 5), (32, 96), (6.0, 12.0)),
    "quick": Setting((3,), (32,), (2.0,), 16),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    options = _options(arguments)
    tier = "quick" if options.quick else "averaged" if options.averaged else "bench"
    setting = SETTINGS[tier]
    everybody, missing = installed(found())
    peers = [peer for peer in everybody if peer.name in NAMES]
    tried = {peer.name: [method.name for method in settings(peer)] for peer in peers}
    content: dict[str, Any] = {
        "machine": machine(),
        "setting": asdict(setting) | {"layers": None, "tried": tried, "dtype": "float32"},
        "missing": missing,
    }
    path = results_of("little_data", tier)
    if options.fresh:
        path.unlink(missing_ok=True)
    for number in options.layers or setting.layers:
        name = f"layer {number}"
        before = resumed(path, content, "layers").get(name)
        if before is None or options.ours:
            rows = _layer(number, setting, peers, before, averaged=options.averaged)
            content["layers"] = dict(
                sorted({**resumed(path, content, "layers"), name: rows}.items())
            )
            write_json(path, content)
        _print(name, resumed(path, content, "layers")[name])


def _layer(
    number: int,
    setting: Setting,
    peers: Sequence[Peer],
    before: Mapping[str, Any] | None,
    *,
    averaged: bool,
) -> dict[str, Any]:
    """Rows by number of sequences, those of peers from before where there are any."""
    layer = load_layer(max(setting.sequences), 2 * setting.scored, setting.tokens, number)
    third = third_text(layer, number, setting.scored, setting.tokens)
    judging, scoring = (layer.held_out.part(i * setting.scored, setting.scored) for i in (0, 1))
    original = {name: layer.weights[name] for name in WEIGHTS}
    cells = {}
    for count, seconds in zip(setting.sequences, setting.seconds, strict=True):
        fitted = layer.train.part(0, count)
        name, start = "mean-pooled heads", layer.pooled
        if not averaged:
            best = best_start(fitted.attention(), ORIGINAL, original, STUDENT)
            name, start = best.name, best.unsolved
        bed = Bed(start, dict(zip(TEXTS, (fitted, judging, scoring, third), strict=True)))
        rows = {"start": bed.errors(bed.start) | {"setting": name}}
        kept = {} if before is None else before[str(count)]["rows"]
        for peer in peers:
            rows |= peer_rows(peer, bed, seconds, kept)
        rows |= our_rows(bed, seconds)
        weights = sum(value.numel() for value in start.values())
        cells[str(count)] = {
            "seconds": seconds,
            "residuals_a_weight": fitted.B.numel() / weights,
            "rows": rows,
        }
        console.print(f"[dim]layer {number}, {count} sequences done[/dim]")
    return cells


def settings(peer: Peer) -> list[Any]:
    """A peer's settings for layers, and their lower rates at a fraction."""
    methods: list[Any] = list(peer.layers)
    lowest = sorted({method.rate for method in methods})[:2]
    return methods + [
        replace(method, rate=method.rate / SLOWER) for method in methods if method.rate in lowest
    ]


def peer_rows(
    peer: Peer, bed: Bed, seconds: float, kept: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The best setting of a peer, its readout as it is or solved; and with attnreg's ridges.

    Args:
        peer: The peer.
        bed: The layer.
        seconds: Of each run.
        kept: Rows of an earlier run; those of this peer are taken from it.
    """
    ways: dict[str, Callable[[Weights], dict[str, Any]]] = {
        peer.name: bed.best_errors,
        RIDGED.format(peer.name): partial(ridged_errors, bed),
    }

    def score(method: Any, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        weights = run(method, bed.fitted, bed.start, seconds).weights
        return {name: ways[name](weights) | {"setting": method.name} for name in names}

    methods = {method.name: method for method in settings(peer)}
    if set(ways) <= set(kept):
        best = {name: kept[name] for name in ways}
    else:
        rows = [score(method, ways) for method in methods.values()]
        best = {
            name: min((row[name] for row in rows), key=lambda row: row["validation"])
            for name in ways
        }
        best[peer.name]["tried"] = {
            row[peer.name]["setting"]: row[peer.name]["validation"] for row in rows
        }
    found = {}
    for name, row in best.items():
        missing = REPEATS - row.get("runs", 1)
        ends = [score(methods[row["setting"]], [name])[name] for _ in range(missing)]
        found[name] = row | (medians([row, *ends], TEXTS) | {"runs": REPEATS} if ends else {})
    return found


def ridged_errors(bed: Bed, weights: Weights) -> Errors:
    """Errors with the readout that validation chooses; infinite where weights are not finite."""
    if not finite(weights):
        return dict.fromkeys(TEXTS, math.inf)
    problem, judging = bed.fitted.attention(), bed.judging.attention()
    solved = fit_validated(problem, judging, STUDENT, init=weights, max_iterations=0)
    return bed.errors(solved.parameters)


def our_rows(bed: Bed, seconds: float) -> dict[str, dict[str, Any]]:
    """attnreg's, by name, with the seconds that they took."""
    shared: dict[str, Any] = {"init": bed.start, "max_seconds": seconds, "max_iterations": 10**6}
    stochastic, judging = {"solver": "stochastic", **shared}, bed.judging.attention()
    ways: dict[str, Callable[[AttentionProblem], FitResult]] = {
        "attnreg, curvature": lambda problem: fit(problem, STUDENT, **shared),
        "attnreg, mini-batches": lambda problem: fit(problem, STUDENT, **stochastic),
        OURS: lambda problem: fit_validated(problem, judging, STUDENT, **shared),
    }
    rows = {}
    for name, way in ways.items():
        ends, times = [], []
        for _ in range(REPEATS):
            began = time.perf_counter()
            result = way(bed.fitted.attention())
            times.append(time.perf_counter() - began)
            ends.append(bed.errors(result.parameters))
        took = {"seconds": median(times), "runs": REPEATS}
        rows[name] = medians(ends, TEXTS) | {"setting": "; ".join(result.notes)} | took
    return rows


def _print(name: str, cells: Mapping[str, Any]) -> None:
    for count, cell in cells.items():
        rows = sorted(cell["rows"].items(), key=lambda item: item[1]["same_texts"])
        print_table(
            f"{name}, {count} sequences, {cell['residuals_a_weight']:.2g} residuals a weight, "
            f"{cell['seconds']:g} s",
            ("method", "setting", *TEXTS),
            [
                (
                    method,
                    "" if method.startswith("attnreg") else row["setting"],
                    *(show(row[text], 4) for text in TEXTS),
                )
                for method, row in rows
            ],
        )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    quick = "one layer, 32 sequences and 2 s a run"
    parser = command_line("little_data", __doc__, quick=quick)
    parser.add_argument("--layers", type=int, nargs="+", help="of 0, 3 and 5")
    parser.add_argument("--averaged", action="store_true", help="begin at mean-pooled heads")
    parser.add_argument("--fresh", action="store_true", help="begin the file anew")
    parser.add_argument("--ours", action="store_true", help="make attnreg's rows anew")
    return parse(parser, arguments, threads=1)


if __name__ == "__main__":
    main()
