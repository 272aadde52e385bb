"""Little data: the layers of all-MiniLM-L6-v2 from 12 to 4 key/value heads, few residuals a weight.

Everybody has the same start, the best that `attnreg compress` makes of the original's weights
(`W_O` solved by least squares), and the same sequences, float32, threads and seconds. The errors
are ||prediction - B||_F / ||B - column mean||_F on the fitted sequences, on those that choose
(validation), on others of the same two texts, and on a third text; the last two chose nothing.

Peers: every setting of `benchmarks.peers` for all of the time, the best by validation, its weights
scored as they are and with W_O and b_O solved on the fitted sequences, off the clock: the better by
validation counts. attnreg in three ways: by curvature, by mini-batches, and as far as the
validation sequences say (`attnreg.fit_validated`), whose scoring is on its clock.

    python -m benchmarks.little_data

Layers are kept as they are done; an interrupted run goes on, and runs with different `--layers`
side by side add to one file. `--fresh` begins anew.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

import attnreg
from attnreg.transformers.starts import best_start, solve_readout
from benchmarks import minilm
from benchmarks.common import (
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
from benchmarks.layer_problem import (
    ORIGINAL,
    STUDENT,
    WEIGHTS,
    Data,
    load_layer,
    relative_error,
    with_outputs,
)
from benchmarks.peers import Peer, found, installed, run

NAMES = ("Adam", "Muon", "SOAP")
OURS = "attnreg, validated"
TEXTS = ("fitted", "validation", "same_texts", "third_text")

Weights = Mapping[str, Tensor]


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
    "quick": Setting((3,), (32,), (2.0,), 16),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    options = _options(arguments)
    tier = "quick" if options.quick else "bench"
    setting = SETTINGS[tier]
    everybody, missing = installed(found())
    peers = [peer for peer in everybody if peer.name in NAMES]
    tried = {peer.name: [method.name for method in peer.layers] for peer in peers}
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
        if name not in resumed(path, content, "layers"):
            rows = _layer(number, setting, peers)
            content["layers"] = dict(
                sorted({**resumed(path, content, "layers"), name: rows}.items())
            )
            write_json(path, content)
        _print(name, resumed(path, content, "layers")[name])


def _layer(number: int, setting: Setting, peers: Sequence[Peer]) -> dict[str, Any]:
    """Rows by number of sequences."""
    most = max(setting.sequences)
    layer = load_layer(most, 2 * setting.scored, setting.tokens, number)
    chunks = minilm.third_text(setting.tokens)[: setting.scored]
    third = minilm.layer_inputs(minilm.load_model(), number, chunks)
    other = layer.held_out
    judging, scoring = (
        Data(other.A[part], other.B[part])
        for part in (slice(setting.scored), slice(setting.scored, None))
    )
    texts = {"validation": judging, "same_texts": scoring}
    texts["third_text"] = with_outputs(third.clone(), layer.weights)
    original = {name: layer.weights[name] for name in WEIGHTS}
    found_ = {}
    for count, seconds in zip(setting.sequences, setting.seconds, strict=True):
        fitted = Data(layer.train.A[:count].clone(), layer.train.B[:count].clone())
        start = best_start(fitted.attention(), ORIGINAL, original, STUDENT)
        cell = _Cell({"fitted": fitted, **texts}, start.weights, seconds)
        rows = {"start": cell.scored(start.weights) | {"setting": start.name}}
        rows |= {peer.name: cell.best(peer) for peer in peers}
        rows |= {name: cell.ours(make) for name, make in cell.ways().items()}
        weights = sum(value.numel() for value in start.weights.values())
        found_[str(count)] = {
            "seconds": seconds,
            "residuals_a_weight": fitted.B.numel() / weights,
            "rows": rows,
        }
        console.print(f"[dim]layer {number}, {count} sequences done[/dim]")
    return found_


class _Cell:
    """One number of sequences of one layer."""

    def __init__(self, texts: Mapping[str, Data], start: Weights, seconds: float) -> None:
        self._texts, self._start, self._seconds = texts, start, seconds
        self._fitted = texts["fitted"]

    def scored(self, weights: Weights) -> dict[str, Any]:
        """Errors by text."""
        return {name: relative_error(weights, data) for name, data in self._texts.items()}

    def best(self, peer: Peer) -> dict[str, Any]:
        """The best setting of a peer, its readout as it is or solved."""
        rows = []
        for method in peer.layers:
            weights = run(method, self._fitted, self._start, self._seconds).weights
            solved = solve_readout(self._fitted.attention(), STUDENT, weights)[1]
            for readout, way in (("as it is", weights), ("solved", solved)):
                rows.append(self.scored(way) | {"setting": method.name, "readout": readout})
        best: dict[str, Any] = min(rows, key=lambda row: row["validation"])
        return best | {"tried": {row["setting"]: row["validation"] for row in rows}}

    def ways(self) -> dict[str, Callable[[attnreg.AttentionProblem], attnreg.FitResult]]:
        """attnreg's, by name."""
        shared: dict[str, Any] = {"init": self._start, "max_seconds": self._seconds}
        shared["max_iterations"] = 10**6
        judging = self._texts["validation"].attention()
        return {
            "attnreg, curvature": lambda p: attnreg.fit(p, STUDENT, **shared),
            "attnreg, mini-batches": lambda p: attnreg.fit(
                p, STUDENT, solver="stochastic", **shared
            ),
            OURS: lambda p: attnreg.fit_validated(p, judging, STUDENT, **shared),
        }

    def ours(self, make: Callable[[attnreg.AttentionProblem], attnreg.FitResult]) -> dict[str, Any]:
        """Errors of one of them, and the seconds that it took."""
        began = time.perf_counter()
        result = make(self._fitted.attention())
        seconds = time.perf_counter() - began
        setting = {"setting": result.notes[-1] if result.notes else "", "seconds": seconds}
        return self.scored(result.parameters) | setting


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
    parser.add_argument("--fresh", action="store_true", help="begin the file anew")
    return parse(parser, arguments, threads=1)


if __name__ == "__main__":
    main()
