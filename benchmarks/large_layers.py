"""Real layers with redundant data: all-MiniLM-L6-v2's layers from 12 to 4 key/value heads.

Everybody has the same start (mean-pooled heads), calibration text, float32, threads and seconds.
Calibration and validation are different sequences of the two texts of `benchmarks.minilm`, the
held-out error is on a third text, the docstrings of Python's standard library. The errors are
||prediction - B||_F / ||B - column mean||_F.

A peer tries each setting for a part of the time; those with the best validation error go on to the
full time, and the best of these is its row. First-order peers have fused attention, mini-batches of
4 or 16 sequences, four rates or five, and a cosine that ends with the time. Peers' weights are kept
at fixed fractions of the time and scored off the clock, once as they are and once with W_O and b_O
solved in closed form on the calibration data, also off the clock: the better by validation counts.
attnreg is fitted anew for each of these fractions and for five between them, since it is told its
time beforehand; its readouts are on the clock, and its seconds are those that it took. Where
residuals a weight are few it has two finalists, `fit`, and `fit_validated` with its judging on the
clock. Tier large has one more fit of attnreg, given three times the time: no row, but what is left
to gain at the end of the others. Tier gpu has the data of large in a twentieth of its time, and
repeats.

    python -m benchmarks.large_layers --tier large
    python -m benchmarks.large_layers --tier gpu --device cuda --precision tf32

Rows in the results file that were made with the same settings on the same machine are kept: an
interrupted run goes on with the same command, and runs with different `--layers` or `--only` side
by side add to one file. A row with fewer finalists than the tier has is completed. `--fresh` begins
anew.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attnreg.judging import scarce
from attnreg.roofline.precision import PRECISIONS, check_precision, matmul_precision
from benchmarks.common import (
    Clock,
    add_device,
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
from benchmarks.layer_problem import Bed, load_layer, medians, third_text
from benchmarks.peers import OURS, Method, Peer, Trace, Validated, found, installed, run

FRACTIONS = (0.05, 0.1, 0.2, 1 / 3, 2 / 3)  # of the time, beside its end
OUR_FRACTIONS = tuple(sorted({*FRACTIONS, 0.15, 3 / 16, 1 / 4, 2 / 5, 1 / 2}))
SCORED = ("calibration", "validation", "held_out")
TARGETS = {"the best of Adam, AdamW and Muon": ("Adam", "AdamW", "Muon"), "SOAP": ("SOAP",)}
LONGER = {"large": 3.0}  # times the time, for one more fit of attnreg
REPEATED = 30.0  # seconds of a row below which it is repeated
WARM_UP = 0.5


@dataclass(frozen=True)
class Tier:
    """How much is run."""

    layers: tuple[int, ...]
    sequences: int  # of 128 tokens, to fit on
    scored: int  # to validate on, and as many of the third text
    seconds: float
    trial: float  # of the seconds, for each setting
    finalists: int
    repeats: int
    tokens: int = 128


TIERS = {
    "quick": Tier((3,), 32, 16, 4.0, 0.125, 1, 1),
    "bench": Tier((3,), 256, 64, 12.0, 0.15, 1, 3),
    "large": Tier((0, 3, 5), 1088, 128, 120.0, 0.1, 4, 3),
    "gpu": Tier((0, 3, 5), 1088, 128, 6.0, 0.1, 2, 3),
}


def load_bed(number: int, tier: Tier, device: str = "cpu") -> Bed:
    """Captures a layer of the model on all texts, on the CPU, and puts it on a device."""
    layer = load_layer(tier.sequences, tier.scored, tier.tokens, number)
    third = third_text(layer, number, tier.scored, tier.tokens)
    data = (part.to(device) for part in (layer.train, layer.held_out, third))
    return Bed(layer.to(device).pooled, dict(zip(SCORED, data, strict=True)))


# ---------------------------------------------------------------------- rows


def peer_row(
    peer: Peer, bed: Bed, tier: Tier, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The best setting of a peer: its curve, and its errors at the end over the repeats.

    Args:
        peer: The peer.
        bed: The layer.
        tier: How much is run.
        before: A row with fewer finalists, whose trials and finals are kept.
    """
    trials: dict[str, float] = dict(before["trials"]) if before else {}
    finals: dict[str, float] = dict(before["finals"]) if before else {}
    for method in peer.layers if len(peer.layers) > 1 and not before else ():
        trace = run(method, bed.fitted, bed.start, tier.seconds * tier.trial)
        trials[method.name] = bed.validation(trace.weights)
    ranked = sorted(peer.layers, key=lambda method: trials.get(method.name, 0.0))
    traces: dict[str, tuple[Method, Trace, dict[str, Any]]] = {}
    for method in ranked[: tier.finalists]:
        if method.name in finals:
            continue
        trace = run(method, bed.fitted, bed.start, tier.seconds, fractions=FRACTIONS)
        end = bed.best_errors(trace.snapshots[-1][1])
        finals[method.name], traces[method.name] = end["validation"], (method, trace, end)
    best = min(finals, key=lambda name: finals[name])
    row = _final(*traces[best], bed, tier) if best in traces else dict(before or {})
    return {**row, "trials": trials, "finals": finals}


def lacking(rows: Mapping[str, Any], peers: Sequence[Peer], tier: Tier) -> set[str]:
    """Methods without a row, or with one of fewer finalists than the tier has."""
    wanted = {peer.name: min(tier.finalists, len(peer.layers)) for peer in peers}
    names = {name for name, count in wanted.items() if _finalists(rows.get(name)) < count}
    return names | ({OURS.name} - set(rows))


def _finalists(row: Mapping[str, Any] | None) -> int:
    return 0 if row is None else len(row.get("finals", ()))


def _final(
    method: Method, trace: Trace, end: dict[str, Any], bed: Bed, tier: Tier
) -> dict[str, Any]:
    """The row of a run whose end has been scored."""
    seconds, _ = trace.snapshots[-1]
    curve = [[at, bed.best_errors(weights)] for at, weights in trace.snapshots[:-1]]
    ends = [end]
    while len(ends) < tier.repeats and tier.seconds < REPEATED:
        again = run(method, bed.fitted, bed.start, tier.seconds)
        ends.append(bed.best_errors(again.weights))
    return {
        "setting": method.name,
        "seconds": trace.total_seconds,
        "steps": len(trace.seconds),
        "note": trace.note,
        "errors": medians(ends, SCORED),
        "readout": end["readout"],
        "curve": [*curve, [seconds, end]],
    }


def our_row(bed: Bed, tier: Tier) -> dict[str, Any]:
    """The better way of attnreg, by its validation error at the end."""
    methods: list[Method] = [OURS]
    if scarce(bed.fitted.attention(), bed.start):
        methods.append(Validated(bed.judging))
    rows = [_our_fits(method, bed, tier) for method in methods]
    best = min(rows, key=lambda row: row["errors"]["validation"])
    return best | {"finals": {row["setting"]: row["errors"]["validation"] for row in rows}}


def _our_fits(method: Method, bed: Bed, tier: Tier) -> dict[str, Any]:
    """attnreg's fits, one for each time."""
    curve = []
    for fraction in (*OUR_FRACTIONS, 1.0):
        ends, times = [], []
        repeated = tier.seconds * fraction < REPEATED
        for _ in range(tier.repeats if repeated else 1):
            trace = run(method, bed.fitted, bed.start, tier.seconds * fraction)
            times.append(trace.total_seconds)
            ends.append(bed.errors(trace.weights))
        curve.append([median(times), medians(ends, SCORED)])
    return {
        "setting": method.name,
        "seconds": curve[-1][0],
        "steps": trace.derivatives,
        "note": trace.note,
        "errors": curve[-1][1],
        "readout": "as it is",
        "curve": curve,
    }


def our_longer_fit(bed: Bed, seconds: float) -> dict[str, Any]:
    """attnreg's errors after more than the compared time."""
    trace = run(OURS, bed.fitted, bed.start, seconds)
    return {"seconds": trace.total_seconds, "errors": bed.errors(trace.weights)}


def verdicts(layer: Mapping[str, Any]) -> dict[str, Any]:
    """How much sooner attnreg is at each target's validation error, and the errors at the end."""
    ours, rows = layer["rows"].get(OURS.name), layer["rows"]
    found_: dict[str, Any] = {}
    for target, names in TARGETS.items():
        there = [rows[name] for name in names if name in rows]
        if ours is None or not there:
            continue
        best = min(there, key=lambda row: row["errors"]["validation"])
        bound, budget = best["errors"]["validation"], best["seconds"]
        seconds = next((s for s, errors in ours["curve"] if errors["validation"] <= bound), None)
        found_[target] = {
            "setting": best["setting"],
            "validation": bound,
            "seconds": seconds,
            "sooner": None if seconds is None else budget / seconds,
            "ours_at_the_end": ours["errors"]["validation"],
            "lower_at_the_end": 1 - ours["errors"]["validation"] / bound,
        }
    return found_


# ---------------------------------------------------------------------- all of them


def run_layer(
    name: str, bed: Bed, peers: Sequence[Peer], tier: Tier, rows: dict[str, Any], keep: Callable
) -> None:
    """Fills `rows` with those that are lacking, and calls `keep` after each."""
    work = {
        peer.name: lambda peer=peer: peer_row(peer, bed, tier, rows.get(peer.name))
        for peer in peers
    }
    work[OURS.name] = lambda: our_row(bed, tier)
    for method in (OURS, *(peer.layers[0] for peer in peers)):
        run(method, bed.fitted, bed.start, WARM_UP)
    for row, make in work.items():
        if row in lacking(rows, peers, tier):
            rows[row] = make()
            console.print(f"[dim]{name}, {rows[row]['setting']} done[/dim]")
            keep()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    options = _options(arguments)
    tier = Tier(**{**asdict(TIERS[options.tier]), **_given(options)})
    everybody, missing = installed(found())
    peers = [p for p in everybody if p.layers and (not options.only or options.only in p.name)]
    path, elsewhere = _place(options)
    content: dict[str, Any] = {
        "machine": machine(),
        "setting": {"tier": options.tier, **asdict(tier), "layers": None, "dtype": "float32"}
        | elsewhere
        | {"tried": {peer.name: [m.name for m in peer.layers] for peer in everybody}},
        "missing": missing,
        "not_run": {peer.name: peer.why_no_layers for peer in everybody if not peer.layers},
    }
    if options.fresh:
        path.unlink(missing_ok=True)
    content["layers"] = resumed(path, content, "layers")
    clock, times = Clock(), LONGER.get(options.tier)
    for number in tier.layers:
        name = f"layer {number}"
        layer = content["layers"].setdefault(name, {"rows": {}})
        if not lacking(layer["rows"], peers, tier) and (times is None or "longer" in layer):
            continue
        if options.minutes is not None and clock.seconds() > 60 * options.minutes:
            console.print(f"[yellow]{name} is left out: {options.minutes:g} min over[/yellow]")
            continue
        bed = load_bed(number, tier, options.device)
        layer["start"] = bed.errors(bed.start)
        keep = partial(_write, path, content, name)
        with matmul_precision(options.precision, torch.device(options.device)):
            run_layer(name, bed, peers, tier, layer["rows"], keep)
            if times is not None and "longer" not in layer:
                layer["longer"] = our_longer_fit(bed, tier.seconds * times)
        layer["verdicts"] = verdicts(layer)
        keep()
        print_layer(name, layer)


def _write(path: Path, content: dict[str, Any], own: str) -> None:
    """Writes the file with what other runs have added to it: layers, and rows of this one."""
    layer, layers = content["layers"][own], resumed(path, content, "layers")
    for entry, made in layers.get(own, {}).items():
        layer.setdefault(entry, made)
    rows = layer["rows"]
    for name, made in layers.get(own, layer)["rows"].items():
        if name not in rows or _finalists(made) > _finalists(rows[name]):
            rows[name] = made
    content["layers"] = dict(sorted({**layers, own: layer}.items()))
    write_json(path, content)


def print_layer(name: str, layer: Mapping[str, Any]) -> None:
    """One row a method, the lowest validation error first."""
    rows = sorted(layer["rows"].values(), key=lambda row: row["errors"]["validation"] or math.inf)
    lines = [
        (
            row["setting"],
            show(row["seconds"]),
            *(show(row["errors"][text], 4) for text in SCORED),
            row["readout"],
        )
        for row in rows
    ]
    if "longer" in layer:
        longer = layer["longer"]
        errors = (show(longer["errors"][text], 4) for text in SCORED)
        lines.append(("attnreg, given longer", show(longer["seconds"]), *errors, "as it is"))
    lines.append(("start", "-", *(show(layer["start"][text], 4) for text in SCORED), "as it is"))
    print_table(name, ("method", "s", *SCORED, "readout"), lines)
    for target, entry in layer["verdicts"].items():
        console.print(
            f"{target} ({entry['setting']}): validation {entry['validation']:.4f}, attnreg there "
            f"{show(entry['sooner'])} times sooner, at the end lower by "
            f"{entry['lower_at_the_end']:.1%}"
        )


def _place(options: argparse.Namespace) -> tuple[Path, dict[str, str]]:
    """The file of results, and what its settings say of device and precision if not the CPU's."""
    if (options.device, options.precision) == ("cpu", "float32"):
        return results_of("large_layers", options.tier), {}
    on_gpu = options.device.startswith("cuda")
    name = torch.cuda.get_device_name(options.device) if on_gpu else options.device
    tier = f"{options.tier}-{options.device.split(':')[0]}-{options.precision}"
    return results_of("large_layers", tier), {"device": name, "precision": options.precision}


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = ("layers", "sequences", "scored", "seconds")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("large_layers", __doc__, quick="the same as --tier quick")
    parser.add_argument("--tier", choices=tuple(TIERS), default="bench")
    parser.add_argument("--layers", nargs="+", type=int, help="3; 0 3 5 in tiers large and gpu")
    parser.add_argument("--sequences", type=int, help="fitted (32, 256 or 1088)")
    parser.add_argument("--scored", type=int, help="to validate on, and held out (16, 64 or 128)")
    parser.add_argument("--seconds", type=float, help="of a row (4, 12, 120 or 6)")
    parser.add_argument("--minutes", type=float, help="no layer is begun after that")
    parser.add_argument("--only", help="only peers whose name contains this")
    parser.add_argument("--fresh", action="store_true", help="keep nothing of the results file")
    add_device(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of products")
    options = parse(parser, arguments)
    try:
        check_precision(options.precision, torch.float32, torch.device(options.device))
    except ValueError as error:
        parser.error(str(error))
    if options.quick:
        options.tier, options.fresh = "quick", True
    return options


if __name__ == "__main__":
    main()
