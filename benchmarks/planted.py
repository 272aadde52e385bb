"""Planted noisy problems: how soon a method is at the best minimum known, and which it finds.

Two parts, both from the same small start for all methods (X0 = 0.01 randn, Y0 = 0; from the
least-squares Y0 at that X0 torch L-BFGS ends in worse minima on all of the seeds tried):

    speed    seconds until the loss is within 1e-8 of the initial loss of the best loss that any
             method found; medians over repeats for attnreg and the two fastest peers
    minima   final losses over seeds, in units of the noise floor: who found the better minimum,
             and the seconds to the best one

A method that never comes within the tolerance has no time; the ratio is then only known to exceed
budget / ours. Where methods end in different minima the first table alone would hide who is fast,
so a second ratio compares both at the peer's own final loss.

    python -m benchmarks.planted --quick
    python -m benchmarks.planted --parts speed --decades 0 3 --seconds 120

With --resume, cases that are in the results file already, made with the same settings on the same
machine, are kept and not run again; their code may be older. It also joins two processes' cases.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    RESULTS,
    command_line,
    console,
    machine,
    median,
    parse,
    print_table,
    resumed,
    show,
    thin,
    write_json,
)
from benchmarks.peers import OURS, Method, Status, Trace, found, installed, run
from benchmarks.planted_problem import NOISE, ROWS, SEQUENCES, START_SCALE, WIDTH, Planted, planted

TOLERANCE = 1e-8  # of the initial loss
REPEATED_PEERS = 2
DECADES = (0.0, 1.5, 3.0)
MINIMA = (  # one of each kind, where only the final loss matters
    "torch L-BFGS (30)",
    "pytorch-minimize trust-ncg",
    "pytorch-minimize newton-cg",
    "torch-levenberg-marquardt (adaptive)",
    "scipy trf (dense, lsmr)",
    "Adam (0.01)",
)
QUICK_SIZE = {"sequences": 4, "rows": 48, "width": 8}


# ---------------------------------------------------------------------- speed


def speed_case(
    instance: Planted, peers: Sequence[Method], seconds: float, repeats: int
) -> dict[str, Any]:
    """Runs all methods once, and attnreg and the fastest peers again, interleaved."""
    tolerance = TOLERANCE * instance.initial_loss
    traces = {method.name: _solve(method, instance, seconds) for method in (OURS, *peers)}
    winner = min(traces, key=lambda name: traces[name].loss)
    best = traces[winner].loss
    target = best + tolerance
    times = {name: [trace.seconds_to(target)] for name, trace in traces.items()}
    reached = [method for method in peers if times[method.name][0] is not None]
    reached.sort(key=lambda method: times[method.name][0] or 0.0)
    again = [OURS, *reached[:REPEATED_PEERS]]
    for _ in range(repeats - 1):
        for method in again:
            if times[method.name][0] is not None:
                trace = _solve(method, instance, seconds, target)
                times[method.name].append(trace.seconds_to(target))
    rows = {
        name: _speed_row(name, trace, traces[OURS.name], times, instance, seconds)
        for name, trace in traces.items()
    }
    return {
        "initial_loss": instance.initial_loss,
        "noise_floor": instance.noise_floor,
        "planted_loss": instance.planted_loss,
        "best_loss": best,
        "best_method": winner,
        "best_is_converged": traces[winner].status is not Status.TIME,  # else it would sink on
        "target_loss": target,
        "methods": rows,
    }


def _speed_row(
    name: str,
    trace: Trace,
    ours: Trace,
    times: Mapping[str, list[float | None]],
    instance: Planted,
    seconds: float,
) -> dict[str, Any]:
    tolerance = TOLERANCE * instance.initial_loss
    pairs = list(zip(times[name], times[OURS.name], strict=False))
    ratios = [None if peer is None else peer / mine for peer, mine in pairs if mine is not None]
    our_time = median(times[OURS.name])
    at_own = trace.seconds_to(trace.loss + tolerance)
    ours_there = ours.seconds_to(trace.loss + tolerance)
    return {
        "seconds": median(times[name]),
        "seconds_repeats": times[name],
        "ratio": median(ratios) if ratios else None,
        "ratio_at_least": seconds / our_time if our_time and times[name][0] is None else None,
        "seconds_to_own_final": at_own,
        "ours_seconds_to_it": ours_there,
        "ratio_at_own_final": at_own / ours_there if at_own and ours_there else None,
        **_outcome(trace, instance),
        "curve": thin(trace.seconds, trace.losses),
    }


def print_speed(case: str, content: Mapping[str, Any]) -> None:
    """One row a method, the fastest first."""
    rows = sorted(
        content["methods"].items(),
        key=lambda item: (item[1]["seconds"] is None, item[1]["seconds"], item[1]["loss"]),
    )
    lines = []
    for name, row in rows:
        bound = row["ratio_at_least"]
        ratio = f"> {show(bound)}" if bound is not None else show(row["ratio"])
        lines.append(
            (
                name,
                show(row["seconds"]),
                ratio,
                f"{row['loss_over_floor']:.6f}",
                show(row["seconds_to_own_final"]),
                show(row["ours_seconds_to_it"]),
                row["status"].lower(),
            )
        )
    columns = ("method", "s to best", "/ ours", "final / floor", "s to own", "ours s to it", "end")
    note = "" if content["best_is_converged"] else " (the best run was cut off by the clock)"
    print_table(f"{case}: seconds to the best loss + 1e-8 initial{note}", columns, lines)


# ---------------------------------------------------------------------- minima


def minima_case(instance: Planted, peers: Sequence[Method], seconds: float) -> dict[str, Any]:
    """Final losses of all methods on one instance, and how attnreg's compares with the best."""
    tolerance = TOLERANCE * instance.initial_loss
    traces = {method.name: _solve(method, instance, seconds) for method in (OURS, *peers)}
    target = min(trace.loss for trace in traces.values()) + tolerance
    rows = {
        name: {**_outcome(trace, instance), "seconds_to_best": trace.seconds_to(target)}
        for name, trace in traces.items()
    }
    ours = rows[OURS.name]["loss"]
    times = {name: row["seconds_to_best"] for name, row in rows.items()}
    our_time = times.pop(OURS.name)
    peer_time = min((time for time in times.values() if time is not None), default=None)
    best_peer = min(row["loss"] for name, row in rows.items() if name != OURS.name)
    better, worse = ours < best_peer - tolerance, ours > best_peer + tolerance
    return {
        "noise_floor": instance.noise_floor,
        "initial_loss": instance.initial_loss,
        "planted_loss": instance.planted_loss,
        "ours_against_best_peer": "better" if better else "worse" if worse else "equal",
        "seconds_to_best": {"attnreg": our_time, "best_peer": peer_time, "budget": seconds},
        "methods": rows,
    }


def print_minima(name: str, cases: Mapping[str, Mapping[str, Any]]) -> None:
    """One row a method, one column a seed."""
    seeds = list(cases)
    methods = list(next(iter(cases.values()))["methods"])
    lines = []
    for method in methods:
        losses = [cases[seed]["methods"][method]["loss_over_floor"] for seed in seeds]
        best = sum(
            cases[seed]["methods"][method]["loss"]
            <= min(row["loss"] for row in cases[seed]["methods"].values())
            + TOLERANCE * cases[seed]["initial_loss"]
            for seed in seeds
        )
        lines.append((method, f"{best}/{len(seeds)}", *(f"{loss:.4f}" for loss in losses)))
    verdicts = [cases[seed]["ours_against_best_peer"] for seed in seeds]
    lines.append(("attnreg against the best peer", "", *verdicts))
    times = [cases[seed]["seconds_to_best"] for seed in seeds]
    for who, key in (("attnreg", "attnreg"), ("best peer", "best_peer")):
        lines.append((f"seconds to the best: {who}", "", *(show(time[key]) for time in times)))
    print_table(f"{name}: final loss / noise floor", ("method", "best", *seeds), lines)


# ---------------------------------------------------------------------- common


def _solve(method: Method, instance: Planted, seconds: float, target: float | None = None) -> Trace:
    return run(method, instance.arrays, instance.start, seconds, target)


def _outcome(trace: Trace, instance: Planted) -> dict[str, Any]:
    return {
        "loss": trace.loss,
        "loss_over_floor": trace.loss / instance.noise_floor,
        "status": trace.status.name,
        "note": trace.note,
        "total_seconds": trace.total_seconds,
        "evaluations": len(trace.losses),
        "derivatives": trace.derivatives,
    }


def warm_up(methods: Sequence[Method]) -> None:
    """Imports, compiles and starts threads outside the timed runs."""
    instance = planted(0.0, 0, sequences=2, rows=16, width=4)
    for method in methods:
        _solve(method, instance, 0.5)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    options = _options(arguments)
    size = QUICK_SIZE if options.quick else {}
    peers, _ = installed(found())
    speed_peers = [
        setting
        for peer in peers
        for setting in peer.planted
        if options.only is None or options.only in setting.name
    ]
    minima_peers = [peer for peer in speed_peers if peer.name in MINIMA]
    path = RESULTS / ("planted-quick.json" if options.quick else "planted.json")
    content: dict[str, Any] = {
        "machine": machine(),
        "processes": options.processes,
        "setting": {
            "sequences": SEQUENCES, "rows": ROWS, "width": WIDTH, **size,
            "noise": NOISE, "start_scale": START_SCALE, "tolerance": TOLERANCE,
            "seconds": options.seconds, "minima_seconds": options.minima_seconds,
            "repeats": options.repeats, "dtype": "float64",
        },
        "speed": {},
        "minima": {},
    }  # fmt: skip
    if options.resume:
        _resume(content, path)
    warm_up((OURS, *speed_peers))
    for logit_std in options.logit_std:
        for decades in options.decades:
            name = f"{decades:g} decades, logit std {logit_std:g}"
            if "speed" in options.parts and name not in content["speed"]:
                instance = planted(decades, options.first_seed, logit_std, **size)
                case = speed_case(instance, speed_peers, options.seconds, options.repeats)
                content["speed"][name] = case
                print_speed(name, case)
                _save(content, path, resume=options.resume)
            if "minima" in options.parts:
                cases: dict[str, Any] = content["minima"].setdefault(name, {})
                for seed in range(options.first_seed, options.first_seed + options.seeds):
                    if f"seed {seed}" in cases:
                        continue
                    instance = planted(decades, seed, logit_std, **size)
                    cases[f"seed {seed}"] = minima_case(
                        instance, minima_peers, options.minima_seconds
                    )
                    console.print(f"[dim]{name}, seed {seed} done[/dim]")
                    # After each case: a long run may be interrupted.
                    _save(content, path, resume=options.resume)
                print_minima(name, cases)


def _resume(content: dict[str, Any], path: Path) -> None:
    """Takes over the cases of a file that was made with the same settings on the same machine."""
    content["speed"] |= resumed(path, content, "speed")
    for name, cases in resumed(path, content, "minima").items():
        content["minima"].setdefault(name, {}).update(cases)


def _save(content: dict[str, Any], path: Path, *, resume: bool) -> None:
    """Writes the cases; with `resume` beside those that another process wrote meanwhile."""
    if resume:
        _resume(content, path)
    write_json(path, content)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("planted", __doc__, quick="small problems, one minute")
    parser.add_argument("--parts", nargs="+", choices=("speed", "minima"))
    parser.add_argument("--decades", nargs="+", type=float, help="of the inputs (0 1.5 3)")
    parser.add_argument("--logit-std", nargs="+", type=float, default=[4.0])
    parser.add_argument("--seeds", type=int, help="instances of the minima part (10)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="budget of a run, speed part (120)")
    parser.add_argument("--minima-seconds", type=float, help="budget of a run, minima part (60)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--resume", action="store_true", help="keep cases of the results file")
    parser.add_argument("--processes", type=int, default=1, help="run side by side, for the record")
    parser.add_argument("--only", help="only peers whose name contains this")
    options = parse(parser, arguments)
    defaults = {"seeds": 10, "seconds": 120.0, "minima_seconds": 60.0, "decades": list(DECADES)}
    if options.quick:
        defaults = {"seeds": 2, "seconds": 1.0, "minima_seconds": 1.0, "decades": [0.0, 3.0]}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.parts = options.parts or ["speed", "minima"]
    return options


if __name__ == "__main__":
    main()
