"""Performance profiles, and the pictures of the table: profiles and error against time.

The profile of a method at a ratio t is the share of cases that it solves within t times the
seconds of the fastest (Dolan and More, 2002). At t = 1 it is the share where it is the fastest, and
its height at the right is the share that it solves at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.peers import OURS

Times = Mapping[str, Mapping[str, float | None]]
"""Seconds by case and method; None where a method does not solve a case."""

LARGEST = 100.0  # ratio at the right of the picture
FLOOR = 1e-12  # of the gaps that are drawn
PANELS = 3  # planted cases drawn
STYLES = ("-", "--", ":")


def ratios(times: Times) -> dict[str, list[float]]:
    """Seconds over those of the fastest by method, a number a case; infinite where not solved.

    Cases that nobody solves are left out.
    """
    methods = list(dict.fromkeys(name for row in times.values() for name in row))
    found: dict[str, list[float]] = {name: [] for name in methods}
    for row in times.values():
        solved = [seconds for seconds in row.values() if seconds is not None]
        if not solved:
            continue
        for name in methods:
            seconds = row.get(name)
            found[name].append(math.inf if seconds is None else seconds / min(solved))
    return found


def profile(values: Sequence[float], ratio: float) -> float:
    """The share of cases within a ratio."""
    return sum(value <= ratio for value in values) / len(values) if values else 0.0


def suite_times(content: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Times of a file of `benchmarks.planted_suite`."""
    return {
        name: {method: row["seconds"] for method, row in case["rows"].items()}
        for name, case in content["cases"].items()
    }


# ---------------------------------------------------------------------- pictures


def draw_planted(content: Mapping[str, Any], path: Path) -> None:
    """The profile on the left, the gap against time of some cases beside it."""
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(13, 3.8), layout="constrained")
        left, *others = figure.subplots(1, 1 + PANELS)
        _draw_profile(left, ratios(suite_times(content)))
        cases = list(content["cases"].items())
        shown = min(PANELS, len(cases))
        chosen = [cases[i * (len(cases) - 1) // max(shown - 1, 1)] for i in range(shown)]
        for axes, (name, case) in zip(others, chosen, strict=False):
            _draw_gaps(axes, name, case)
        for axes in others[len(chosen) :]:
            axes.set_visible(False)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
        figure.savefig(path, dpi=130)


def draw_layers(content: Mapping[str, Any], path: Path) -> None:
    """Validation error against time, a panel a layer."""
    layers = content["layers"]
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(4.6 * max(len(layers), 2), 3.8), layout="constrained")
        panels = figure.subplots(1, len(layers), squeeze=False)[0]
        methods = sorted({method for layer in layers.values() for method in layer["rows"]})
        for axes, (name, layer) in zip(panels, layers.items(), strict=True):
            for method, row in _ours_last(dict(sorted(layer["rows"].items()))):
                index = methods.index(method)  # one colour in all panels
                points = [(s, e["validation"]) for s, e in row["curve"] if e["validation"]]
                seconds, errors = zip(*points, strict=True)
                axes.plot(seconds, errors, marker=".", label=method, **_style(index, method))
            axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="validation error")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.set_title(name, fontsize=10)
            axes.grid(alpha=0.3, which="both")
        panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path, dpi=130)


def _draw_profile(axes: Axes, found: Mapping[str, Sequence[float]]) -> None:
    for index, (name, values) in enumerate(_ours_last(found)):
        finite = sorted(value for value in values if value <= LARGEST)
        steps = [1.0, *finite, LARGEST]
        heights = [profile(values, value) for value in steps]
        axes.step(steps, heights, where="post", label=name, **_style(index, name))
    axes.set(xscale="log", xlim=(1, LARGEST), ylim=(-0.02, 1.02))
    axes.set(xlabel="seconds / seconds of the fastest", ylabel="share of cases solved")
    axes.set_title("performance profile, gap 1e-8", fontsize=10)
    axes.grid(alpha=0.3)


def _draw_gaps(axes: Axes, name: str, case: Mapping[str, Any]) -> None:
    for index, (method, row) in enumerate(_ours_last(case["rows"])):
        if row["curve"]:
            seconds, losses = zip(*row["curve"], strict=True)
            gaps = [(loss - case["best_loss"]) / case["initial_loss"] for loss in losses]
            heights = [max(gap, FLOOR) for gap in gaps]
            axes.plot(seconds, heights, drawstyle="steps-post", **_style(index, method))
    axes.axhline(1e-8, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="seconds", ylim=(FLOOR, 2))
    axes.set_ylabel("gap to the best / initial loss")
    axes.set_title(name, fontsize=9)
    axes.grid(alpha=0.3)


def _ours_last(rows: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Rows in their order, attnreg's drawn over the others."""
    return sorted(rows.items(), key=lambda item: item[0] == OURS.name)


def _style(index: int, name: str) -> dict[str, Any]:
    if name == OURS.name:
        return {"color": "black", "linewidth": 2.2}
    colours = mpl.colormaps["tab10"].colors
    return {"color": colours[index % 10], "linestyle": STYLES[index // 10], "linewidth": 1.1}
