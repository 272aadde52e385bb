"""The README's figures and its picture, from the results in benchmarks/results/.

python -m benchmarks.summary
"""

from __future__ import annotations

import json
import statistics
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
    """Prints the figures; draws the real layer on the left, the planted problems on the right."""
    names = ("planted", "real_layer", "product_cost", "tail")
    planted, layer, product, tail = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in names
    )
    for line in (*_planted(planted), *_layer(layer), *_product(product), *_tail(tail)):
        console.print(line)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_layer(left, layer)
        _draw_planted(right, planted)
        figure.savefig(PICTURE, dpi=130)
    console.print(f"written: docs/{PICTURE.name}")


def _planted(content: dict[str, Any]) -> list[str]:
    lines = []
    for name, seeds in content["minima"].items():
        pairs = [case["seconds_to_best"] for case in seeds.values()]
        ours = [pair["attnreg"] for pair in pairs if pair["attnreg"] is not None]
        ratios = [p["best_peer"] / p["attnreg"] for p in pairs if p["best_peer"] and p["attnreg"]]
        worse = sum(case["ours_against_best_peer"] == "worse" for case in seeds.values())
        line = f"planted, {name}: best minimum on {len(ours)} of {len(seeds)} seeds, worse than a "
        line += f"peer on {worse}, median {statistics.median(ours):.2f} s; a peer gets there on "
        line += f"{len(ratios)}"
        if ratios:
            line += f", {min(ratios):.1f} to {max(ratios):.1f} times later"
            line += f" (median {statistics.median(ratios):.1f})"
        lines.append(line)
    for name, case in content["speed"].items():
        bounds = [row["ratio_at_least"] for row in case["methods"].values()]
        reached = sum(row["seconds"] is not None for row in case["methods"].values())
        line = f"planted, {name}, seed 0: {reached} of {len(bounds)} methods get to the best"
        least = [bound for bound in bounds if bound is not None]
        lines.append(f"{line}, the others at least {min(least):.0f} times later" if least else line)
    return lines


def _layer(content: dict[str, Any]) -> list[str]:
    lines = [
        f"real layer: error {row['target']:.3f} of the best {family} reached "
        f"{row['ratio']:.1f} times sooner"
        for family, row in content["seconds_to"].items()
    ]
    held_out = {name: f"{run['held_out']:.2f}" for name, run in content["runs"].items()}
    return [*lines, f"real layer, held-out errors: {held_out}"]


def _product(content: dict[str, Any]) -> list[str]:
    lines = [
        f"product, n = {case['rows']}: {case['ratios']['product / forward']:.2f} x forward, "
        f"{case['ratios']['product / GEMMs']:.2f} x its matrix products"
        for case in content["cases"]
    ]
    return [*lines, f"product, n = 16384: peak {content['memory']['peak_gib']:.2f} GiB"]


def _tail(content: dict[str, Any]) -> list[str]:
    return [
        f"tail, seed {case['seed']}: "
        + ", ".join(f"{row['gradient_norm']:.0e}" for row in case["iterations"][-5:])
        for case in content["cases"]
    ]


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
