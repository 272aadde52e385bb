"""The picture of the README, drawn from the results in benchmarks/results/.

python -m benchmarks.picture
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import RESULTS, console

PICTURE = Path(__file__).parent.parent / "docs" / "benchmarks.png"
OURS = "attnreg"
FIRST = 0.05  # seconds at which the left curves begin
COLOURS = {OURS: "black", "L-BFGS": "tab:orange", "Adam": "tab:blue", "trust": "tab:green"}
COLOURS |= {"newton-cg": "tab:olive", "marquardt": "tab:purple", "scipy": "tab:red"}


def main() -> None:
    """Draws the real layer on the left and the planted problems on the right."""
    layer, planted = (
        json.loads((RESULTS / name).read_text()) for name in ("real_layer.json", "planted.json")
    )
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_layer(left, layer)
        _draw_planted(right, planted)
        figure.savefig(PICTURE, dpi=130)
    console.print(f"written: docs/{PICTURE.name}")


def _draw_layer(axes: Axes, content: dict[str, Any]) -> None:
    for name, run in content["runs"].items():
        seconds, errors = zip(*((s, e) for s, e, _ in run["curve"] if s > FIRST), strict=True)
        width = 2.2 if name == OURS else 1.0
        axes.plot(seconds, errors, color=_colour(name), linewidth=width, label=name)
    axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="relative training error")
    axes.set_title("real layer, 12 to 4 key/value heads", fontsize=10)
    axes.set_yticks([0.1, 0.2, 0.3, 0.5, 1.0], ["0.1", "0.2", "0.3", "0.5", "1"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _draw_planted(axes: Axes, content: dict[str, Any]) -> None:
    """Final losses of all seeds, one column for each conditioning."""
    cases = dict(sorted(content["minima"].items(), key=lambda item: float(item[0].split()[0])))
    methods = list(next(iter(next(iter(cases.values())).values()))["methods"])
    for i, seeds in enumerate(cases.values()):
        for k, method in enumerate(methods):
            losses = [case["methods"][method]["loss_over_floor"] for case in seeds.values()]
            x = i + (k - (len(methods) - 1) / 2) * 0.11
            label = method if i == 0 else None
            marker = {"s": 22, "color": _colour(method), "label": label, "alpha": 0.7}
            axes.scatter([x] * len(losses), losses, **marker)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    axes.set(yscale="log", ylabel="final loss / noise floor")
    names = [name.split(",")[0].replace(" decades", "") for name in cases]
    axes.set_xticks(range(len(names)), names)
    seconds = content["setting"]["minima_seconds"]
    axes.set_xlabel(f"decades of the inputs' singular values ({seconds:g} s a run)")
    axes.set_title("planted problems, one point a seed", fontsize=10)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3, axis="y")


def _colour(name: str) -> str:
    return next(colour for part, colour in COLOURS.items() if part in name)


if __name__ == "__main__":
    main()
