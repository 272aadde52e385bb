"""Planted problems of many sizes: every method in one run, for a performance profile.

Sizes, three conditionings of the inputs and three noise levels. On each case every method has the
same small start, data, float64, threads and seconds; attnreg adds starts of its own. A method with
several settings tries each for a quarter of the time, and the best goes on to the full time;
first-order methods, whose rate falls
to zero at the end of the time, are given ever shorter times as well where they arrive. A case is
solved by a method when its loss is within 1e-8 of the initial loss of the best loss that any method
found; its seconds are the median of the repeats that arrive (the rate of a cosine, and so the
minimum, differs a little from run to run). Compiling and first calls are not on the clock.

    python -m benchmarks.planted_suite --tier bench --minutes 17

Cases in the results file that were made with the same settings on the same machine are kept: an
interrupted run goes on with the same command, and runs with different `--widths` side by side add
to one file. Other settings, another machine and `--fresh` begin anew, and the file is written over.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.common import (
    PROCESSOR,
    Clock,
    command_line,
    console,
    machine,
    median,
    parse,
    print_table,
    results_of,
    resumed,
    show,
    thin,
    write_json,
)
from benchmarks.peers import OURS, Method, Peer, Trace, found, installed, run
from benchmarks.peers.ours import PLANTED
from benchmarks.planted_problem import Planted, planted

TOLERANCE = 1e-8  # of the initial loss
DECADES, NOISES = (0.0, 1.5, 3.0), (0.0, 0.1, 0.5)
TRIAL = 0.25  # of the time, for each setting
CURVE_POINTS = 40
WARM_UP = 0.05  # seconds of every setting for each new size

QUICK = ((4, 64, 1), (8, 64, 4))  # width, rows, sequences
BENCH = ((4, 64, 1), (8, 256, 2), (16, 64, 8), (16, 1024, 1), (32, 128, 8))
LARGE = ((8, 2048, 1), (16, 512, 4), (32, 64, 32), (64, 128, 16), (64, 2048, 1))
OURS_AS_PEER = Peer(OURS.name, PLANTED)


@dataclass(frozen=True)
class Case:
    """One planted problem."""

    width: int
    rows: int
    sequences: int
    decades: float
    noise: float
    seed: int = 0

    @property
    def name(self) -> str:
        """Name in tables and files."""
        size = f"d {self.width}, n {self.rows} x {self.sequences}"
        return f"{size}, {self.decades:g} decades, noise {self.noise:g}"

    def make(self) -> Planted:
        """The instance."""
        size = {"sequences": self.sequences, "rows": self.rows, "width": self.width}
        return planted(self.decades, self.seed, noise=self.noise, **size)


def cases(tier: str) -> list[Case]:
    """The cases of a tier: of each size every conditioning and every noise level once."""
    sizes = {"quick": QUICK, "bench": BENCH, "large": LARGE}[tier]
    count = len(NOISES)
    latin = [
        Case(*size, decades, NOISES[(i + k) % count])
        for k, decades in enumerate(DECADES)
        for i, size in enumerate(sizes)
    ]
    return latin[1:4] if tier == "quick" else latin  # both sizes, two conditionings


# ---------------------------------------------------------------------- one case


def run_case(case: Case, peers: Sequence[Peer], seconds: float, repeats: int) -> dict[str, Any]:
    """Every method on one case."""
    began = time.perf_counter(), time.process_time()
    instance = case.make()
    tolerance = TOLERANCE * instance.initial_loss
    best_settings: dict[str, Method] = {}
    traces: dict[str, Trace] = {}
    trials: dict[str, dict[str, float]] = {}
    for peer in (OURS_AS_PEER, *peers):
        method, trials[peer.name] = choose(peer, instance, seconds * TRIAL)
        best_settings[peer.name] = method
        traces[peer.name] = _solve(method, instance, seconds)
    winner = min(traces, key=lambda name: traces[name].loss)
    target = traces[winner].loss + tolerance
    rows = {}
    for peer in (OURS_AS_PEER, *peers):
        method, trace = best_settings[peer.name], traces[peer.name]
        times = _times(peer, method, trace, instance, seconds, target, repeats)
        rows[peer.name] = {
            "seconds": arrival(times),
            "repeats": times,
            "setting": method.name,
            "trials": trials[peer.name],
            "loss": trace.loss,
            "status": trace.status.name,
            "note": trace.note,
            "total_seconds": trace.total_seconds,
            "curve": thin(trace.seconds, trace.losses, CURVE_POINTS),
        }
    return {
        **asdict(case),
        "seconds": seconds,
        "cpu_share": _cpu_share(*began),
        "initial_loss": instance.initial_loss,
        "planted_loss": instance.planted_loss,
        "best_loss": traces[winner].loss,
        "best_method": winner,
        "rows": rows,
    }


def choose(peer: Peer, instance: Planted, seconds: float) -> tuple[Method, dict[str, float]]:
    """The best of a peer's settings after a short run each, and the losses of all.

    Of those that reach the same loss it is the one that was there first.
    """
    if len(peer.planted) == 1:
        return peer.planted[0], {}
    traces = [_solve(method, instance, seconds) for method in peer.planted]
    target = min(trace.loss for trace in traces) + TOLERANCE * instance.initial_loss
    times = [trace.seconds_to(target) for trace in traces]
    there = [i for i, reached in enumerate(times) if reached is not None]
    first = min(there, key=lambda i: times[i] or 0.0) if there else 0
    losses = {m.name: trace.loss for m, trace in zip(peer.planted, traces, strict=True)}
    return peer.planted[first], losses


def _times(
    peer: Peer,
    method: Method,
    trace: Trace,
    instance: Planted,
    seconds: float,
    target: float,
    repeats: int,
) -> list[float | None]:
    """Seconds to the target, repeated; [None] where it was not reached."""
    first = trace.seconds_to(target)
    if first is None:
        return [None]
    horizon = seconds
    while peer.scheduled:
        shorter = _solve(method, instance, horizon / 2, target).seconds_to(target)
        if shorter is None:
            break
        first, horizon = shorter, horizon / 2
    again = [
        _solve(method, instance, horizon, target).seconds_to(target) for _ in range(repeats - 1)
    ]
    return [first, *again]


def arrival(times: Sequence[float | None]) -> float | None:
    """Median of the runs that arrived: a minimum that was found once is there to be found."""
    there = [seconds for seconds in times if seconds is not None]
    return median(there) if there else None


def _cpu_share(wall: float, processor: float) -> float:
    """Processor seconds a second since then: less than the threads' number where others ran too."""
    return (time.process_time() - processor) / (time.perf_counter() - wall)


def _solve(method: Method, instance: Planted, seconds: float, target: float | None = None) -> Trace:
    return run(method, instance.arrays, instance.start, seconds, target).until(seconds)


# ---------------------------------------------------------------------- all cases


def warm_up(peers: Sequence[Peer], instance: Planted) -> None:
    """Imports, compiles and starts threads outside the timed runs."""
    for peer in (OURS_AS_PEER, *peers):
        for method in peer.planted:
            _solve(method, instance, WARM_UP)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    options = _options(arguments)
    if options.clock == "processor":
        Clock.timer = PROCESSOR
    peers, missing = installed(found())
    peers = [peer for peer in peers if options.only is None or options.only in peer.name]
    path = results_of("planted_suite", options.tier)
    setting = {
        "tier": options.tier,
        "seconds": options.seconds,
        "clock": options.clock,
        "repeats": options.repeats,
        "trial": TRIAL,
        "tolerance": TOLERANCE,
        "dtype": "float64",
        "peers": {peer.name: [m.name for m in peer.planted] for peer in (OURS_AS_PEER, *peers)},
    }
    content: dict[str, Any] = {"machine": machine(), "setting": setting, "missing": missing}
    planned = cases(options.tier)
    content["planned"] = len(planned)
    saved = options.only is None
    if options.fresh and saved:
        path.unlink(missing_ok=True)
    for name, reason in missing.items():
        console.print(f"[yellow]{name} is not run: {reason}[/yellow]")
    began, warm = time.perf_counter(), set()
    for case in planned:
        there = resumed(path, content, "cases") if saved else {}  # runs side by side add to it
        if case.name in there or (options.widths and case.width not in options.widths):
            continue
        if options.minutes is not None and time.perf_counter() - began > 60 * options.minutes:
            console.print(f"[yellow]{case.name} is left out: {options.minutes:g} min over[/yellow]")
            continue
        if (size := (case.width, case.rows, case.sequences)) not in warm:
            warm_up(peers, case.make())
            warm.add(size)
        made = run_case(case, peers, options.seconds, options.repeats)
        print_case(case.name, made)
        if saved:
            there = {**resumed(path, content, "cases"), case.name: made}
            content["cases"] = {c.name: there[c.name] for c in planned if c.name in there}
            write_json(path, content)


def print_case(name: str, case: Mapping[str, Any]) -> None:
    """One row a method, the fastest first."""
    rows = sorted(
        case["rows"].items(),
        key=lambda item: (item[1]["seconds"] is None, item[1]["seconds"], item[1]["loss"]),
    )
    lines = [
        (
            row["setting"],
            show(row["seconds"]),
            f"{(row['loss'] - case['best_loss']) / case['initial_loss']:.1e}",
            row["status"].lower(),
        )
        for _, row in rows
    ]
    print_table(name, ("method", "s to best", "gap at the end", "end"), lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("planted_suite", __doc__, quick="the same as --tier quick")
    parser.add_argument("--tier", choices=("quick", "bench", "large"), default="bench")
    parser.add_argument("--seconds", type=float, help="of a run (0.6, 2.5 or 20)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--widths", nargs="+", type=int, help="only cases of these widths d")
    parser.add_argument("--minutes", type=float, help="no case is begun after that")
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: for one thread on a core that others use too",
    )
    parser.add_argument("--only", help="only peers whose name contains this; saves nothing")
    parser.add_argument("--fresh", action="store_true", help="keep nothing of the results file")
    options = parse(parser, arguments, threads=1)
    if options.quick:
        options.tier, options.fresh = "quick", True
    widths = sorted({case.width for case in cases(options.tier)})
    if wrong := sorted(set(options.widths or ()) - set(widths)):
        parser.error(f"--widths: tier {options.tier} has {widths}, not {wrong}")
    if options.seconds is None:
        options.seconds = {"quick": 0.6, "bench": 2.5, "large": 20.0}[options.tier]
    return options


if __name__ == "__main__":
    main()
