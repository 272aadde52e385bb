"""A real layer with scarce data: all-MiniLM-L6-v2's layer 3 from 12 to 4 key/value heads.

Same start (mean-pooled heads), data (32 x 128 tokens), dtype (float32) and threads for all. The
peers are tuned first: each setting runs for a tenth of the time, and the best go on to the full
time. The numbers wanted are the seconds in which attnreg is at the training error that the best
L-BFGS, and the best Adam, have at the end. With so few tokens all methods overfit, the better
optimiser more: the held-out error stands beside each number.

    python -m benchmarks.real_layer --seconds 80
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import (
    RESULTS,
    Clock,
    command_line,
    console,
    machine,
    median,
    parse,
    print_table,
    show,
    write_json,
)
from benchmarks.layer_problem import (
    KV_HEADS,
    LAYER,
    STUDENT,
    Layer,
    load_layer,
    relative_error,
)
from benchmarks.minilm import HEADS
from benchmarks.peers import Method, run
from benchmarks.peers.adam import Adam
from benchmarks.peers.lbfgs import HISTORIES, LBFGS

BATCHES, RATES = (4, 8, 16), (5e-4, 1e-3, 2e-3, 4e-3)
FINALISTS = {"Adam": 3, "L-BFGS": 1}
MAX_ITERATIONS = 10**6
FRACTIONS = [k / 80 for k in range(81)]  # of the time, at which the peers' errors are noted
Errors = dict[str, dict[str, float | None]]


@dataclass
class LayerTrace:
    """Errors against time, and the errors at the end."""

    seconds: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    held_out: list[float | None] = field(default_factory=list)
    steps: int = 0
    note: str = ""

    def seconds_to(self, error: float) -> float | None:
        """Seconds until the first training error of at most `error`; None for never."""
        for seconds, value in zip(self.seconds, self.train, strict=True):
            if value <= error:
                return seconds
        return None

    def at(self, seconds: float) -> float:
        """The last training error noted by then; the first where there is none."""
        noted = [e for s, e in zip(self.seconds, self.train, strict=True) if s <= seconds]
        return noted[-1] if noted else self.train[0]

    def summary(self, budget: float) -> dict[str, Any]:
        """For JSON. Training error within the budget; the held-out one is that of the end.

        A method that looks at the clock between iterations only may end later than `budget`.
        """
        return {
            "train": self.at(budget * 1.02),  # a step of Adam begun in time counts
            "train_at_end": self.train[-1],
            "held_out": self.held_out[-1],
            "seconds": self.seconds[-1],
            "steps": self.steps,
            "note": self.note,
            "curve": list(zip(self.seconds, self.train, self.held_out, strict=True)),
        }


def solve_peer(method: Method, layer: Layer, seconds: float) -> LayerTrace:
    """A peer's run; its errors are evaluated afterwards, from the weights kept on the way."""
    found = run(method, layer.train, layer.pooled, seconds, fractions=FRACTIONS)
    trace = LayerTrace(steps=len(found.losses), note=found.note)
    for time, weights in found.snapshots:
        trace.seconds.append(time)
        trace.train.append(relative_error(weights, layer.train))
        trace.held_out.append(relative_error(weights, layer.held_out))
    return trace


def solve_ours(layer: Layer, seconds: float, target: float = 0.0) -> LayerTrace:
    """`attnreg.fit` until the time is over or the training error is at most `target`."""
    import attnreg

    clock, trace = Clock(), LayerTrace()
    problem = attnreg.AttentionProblem(layer.train.A, layer.train.B)
    spread = layer.train.spread

    def callback(record: attnreg.IterationRecord) -> bool:
        trace.seconds.append(clock.seconds())
        trace.train.append((record.loss / spread) ** 0.5)
        trace.held_out.append(None)
        trace.steps = record.passes
        return trace.train[-1] <= target

    result = attnreg.fit(
        problem,
        STUDENT,
        init=layer.pooled,
        max_iterations=MAX_ITERATIONS,
        max_seconds=seconds,
        callback=callback,
    )
    trace.seconds.append(clock.seconds())
    weights = dict(result.parameters)
    trace.train.append(relative_error(weights, layer.train))
    trace.held_out.append(relative_error(weights, layer.held_out))
    trace.note = result.status.name
    return trace


def tune(
    peers: Sequence[Method], layer: Layer, seconds: float, keep: int
) -> tuple[list[Method], Errors]:
    """The `keep` best settings after a short run each, and the errors of all."""
    errors: Errors = {}
    for peer in peers:
        trace = solve_peer(peer, layer, seconds)
        errors[peer.name] = {"train": trace.train[-1], "held_out": trace.held_out[-1]}
        console.print(f"[dim]{peer.name}: {trace.train[-1]:.4f} after {seconds:g} s[/dim]")
    ranked = sorted(peers, key=lambda peer: errors[peer.name]["train"] or 0.0)
    return ranked[:keep], errors


def compare(layer: Layer, content: dict[str, Any], options: argparse.Namespace) -> None:
    """Fills `content` with the peers' runs, attnreg's runs and the seconds to the targets."""
    first = options.tune_seconds
    grid: dict[str, Sequence[Method]] = {
        "L-BFGS": [LBFGS(history) for history in HISTORIES],
        "Adam": [Adam(rate, batch) for batch in BATCHES for rate in RATES],
    }
    content["start"] = {
        "train": relative_error(layer.pooled, layer.train),
        "held_out": relative_error(layer.pooled, layer.held_out),
    }
    targets: dict[str, float] = {}
    for family, peers in grid.items():
        kept, content["first_pass"][family] = tune(peers, layer, first, FINALISTS[family])
        for peer in kept:
            row = solve_peer(peer, layer, options.seconds).summary(options.seconds)
            content["runs"][peer.name] = row
            targets[family] = min(targets.get(family, row["train"]), row["train"])
        options.save()
    content["targets"] = targets
    full = solve_ours(layer, options.seconds)
    content["runs"]["attnreg"] = full.summary(options.seconds)
    options.save()
    for family, target in targets.items():
        times = [full.seconds_to(target)]
        held_out: list[float | None] = []
        while times[0] is not None and len(times) < options.repeats:
            trace = solve_ours(layer, options.seconds, target)
            times.append(trace.seconds_to(target))
            held_out.append(trace.held_out[-1])
        seconds = median(times)
        content["seconds_to"][family] = {
            "target": target,
            "seconds": seconds,
            "repeats": times,
            "ratio": options.seconds / seconds if seconds else None,
            "held_out": held_out[-1] if held_out else None,
        }
        options.save()


def print_results(content: dict[str, Any], seconds: float) -> None:
    """Two tables: errors at the end, and seconds to the peers' errors."""
    runs = sorted(content["runs"].items(), key=lambda item: item[1]["train"])
    rows = [
        (name, f"{run['train']:.4f}", f"{run['held_out']:.4f}", show(run["seconds"]))
        for name, run in [*runs, ("start (mean-pooled)", {**content["start"], "seconds": None})]
    ]
    print_table(
        f"Relative error after {seconds:g} s",
        ("method", "training", "held out, end", "end, s"),
        rows,
    )
    lines = [
        (
            f"best {family} at {seconds:g} s",
            f"{entry['target']:.4f}",
            show(entry["seconds"]),
            show(entry["ratio"]),
            show(entry["held_out"], 4),
        )
        for family, entry in content["seconds_to"].items()
    ]
    columns = ("training error of", "error", "attnreg s", "times sooner", "our held out then")
    print_table("Seconds until attnreg is at the peer's training error", columns, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    options = _options(arguments)
    path: Path = RESULTS / ("real_layer-quick.json" if options.quick else "real_layer.json")
    content: dict[str, Any] = {
        "machine": machine(),
        "setting": {
            "layer": LAYER, "heads": HEADS, "kv_heads": KV_HEADS, "dtype": "float32",
            "sequences": options.sequences, "held_out": options.held_out,
            "tokens": options.tokens, "seconds": options.seconds,
            "tune_seconds": options.tune_seconds,
        },
        "first_pass": {}, "runs": {}, "seconds_to": {},
    }  # fmt: skip
    save: Callable[[], None] = lambda: write_json(path, content)  # noqa: E731
    options.save = save
    layer = load_layer(options.sequences, options.held_out, options.tokens)
    _warm_up(layer)
    compare(layer, content, options)
    print_results(content, options.seconds)
    save()


def _warm_up(layer: Layer) -> None:
    """First calls of every kernel, outside the timed runs."""
    solve_peer(LBFGS(10), layer, 0.5)
    solve_peer(Adam(1e-3, 8), layer, 0.5)
    solve_ours(layer, 0.5)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("real_layer", __doc__, quick="4 + 4 sequences, seconds each")
    parser.add_argument("--seconds", type=float, help="the compared time (80)")
    parser.add_argument("--tune-seconds", type=float, help="of each setting in the first pass (10)")
    parser.add_argument("--sequences", type=int, help="fitted (32)")
    parser.add_argument("--held-out", type=int, help="scored (16)")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parse(parser, arguments)
    defaults = {"seconds": 80.0, "tune_seconds": 10.0, "sequences": 32, "held_out": 16}
    if options.quick:
        defaults = {"seconds": 5.0, "tune_seconds": 1.0, "sequences": 4, "held_out": 4}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()
