"""The README's figures and its picture, from the results in benchmarks/results/.

python -m benchmarks.summary
"""

from __future__ import annotations

import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import RESULTS, console

PICTURE = Path(__file__).parent.parent / "docs" / "benchmarks.png"
OURS = "attnreg"
FIRST = 0.05  # seconds at which the left curves begin
WORSE = 0.01  # of the initial loss: a best loss so far above the planted one is named
COLOURS = {OURS: "black", "L-BFGS": "tab:orange", "Adam": "tab:blue", "trust": "tab:green"}
COLOURS |= {"newton-cg": "tab:olive", "marquardt": "tab:purple", "scipy": "tab:red"}


def main() -> None:
    """Prints the figures; draws the real layer on the left, the planted problems on the right."""
    results = {}
    for name, lines in LINES.items():
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            command = name.replace("-", " --tier ")
            console.print(f"{name}: no results; run python -m benchmarks.{command}")
            continue
        results[name] = json.loads(path.read_text())
        for line in lines(results[name]):
            console.print(line)
    planted, layer = results["planted"], results["real_layer"]
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


def _certificates(content: dict[str, Any]) -> list[str]:
    found = content["summary"]
    shares = {
        f"condition {label}": f"{issued} of {of}"
        for label, (issued, of) in found["issued_of_converged_by_condition"].items()
    }
    doctored, large = content["doctored"], content["large"]
    return [
        f"certificates: {found['problems']} problems, {found['issued']} issued, "
        f"{found['violations']} violations; {len(doctored['accepted'])} of {doctored['tried']} "
        "doctored ones accepted",
        f"certificates at converged points: {shares}, median gap over loss "
        f"{found['gap_over_loss']['median']:.0e}, over the true gap "
        f"{found['gap_over_true_gap']['median']:.2f}",
        f"certificate, n = {large['rows']}, d = {large['width']}: {large['kind']} in "
        f"{large['seconds']:.1f} s",
    ]


def _certificate_layer(content: dict[str, Any]) -> list[str]:
    return [
        f"certificate, {case['name']}, d = {case['width']}: {case['kind']} in "
        f"{case['seconds']:.0f} s"
        for case in content["cases"]
    ]


def _convergence(content: dict[str, Any]) -> list[str]:
    slopes = [case["line"]["b"] for case in content["cases"]]
    few = [
        case
        for case in content["cases"]
        if (rows := [r for r in case["solvers"]["newton-sketch"]["rows_sampled"] if r])
        and max(rows) <= case["rows"] / 10
    ]
    return [
        f"newton-sketch: {min(slopes):.2f} to {max(slopes):.2f} iterations a decade of the gap on "
        f"{len(slopes)} problems; at most a tenth of the rows sampled on {len(few)}"
    ]


def _inner_iterations(content: dict[str, Any]) -> list[str]:
    lines = []
    for share, bound in content["bounds"].items():
        most = [entry["largest"][share] for entry in content["entries"]]
        lines.append(
            f"newton-cg, ridge {share} of the top: {min(most)} to {max(most)} products, bound "
            f"{bound:.0f}"
        )
    return lines


def _complexity(content: dict[str, Any]) -> list[str]:
    lines = []
    for method, found in content["summary"].items():
        fits = {
            name: ", ".join(f"{axis}^{fit[axis][0]:.2f} +- {fit[axis][1]:.2f}" for axis in "nd")
            for name, fit in found["fits"].items()
        }
        ratios = {name: round(ratio, 2) for name, ratio in found["largest_ratio"].items()}
        lines.append(f"iteration, {method}: {fits}, at most x its matrix products: {ratios}")
    return lines


def _growth(content: dict[str, Any]) -> list[str]:
    found, lines = content["summary"], []
    for name, fit in found["fits"].items():
        powers = [f"{axis}^{power:.2f} +- {error:.2f}" for axis, (power, error) in fit.items()]
        lines.append(f"growth, {name}: {', '.join(powers)}")
    low, high = found["ratio"]
    line = f"growth, {found['cells']} cells: {low:.2f} to {high:.2f} x its matrix products"
    return [*lines, line]


def _roofline(content: dict[str, Any]) -> list[str]:
    lines = []
    for precision, run in content["runs"].items():
        for kernel in run["kernels"]:
            share = f"{100 * kernel['share']:.0f} % of its products' rate"
            rates = f"{kernel['rate'] / 1e9:.0f} of {kernel['gemm_rate'] / 1e9:.0f} GFLOP/s"
            line = f"roofline, {precision}, {kernel['name']}: {share}, {rates}"
            lines.append(f"{line}, error {kernel['error']:.0e}")
    return lines


def _sketch(content: dict[str, Any]) -> list[str]:
    failures = [case["rates"]["1"]["failures"] for case in content["cases"]]
    seeds = content["setting"]["seeds"]
    return [f"sketch: {sum(failures)} of {len(failures) * seeds} samples outside 1 +- eps"]


def _conversion(content: dict[str, Any]) -> list[str]:
    """A line a student and score; seeds side by side."""
    lines = []
    for student in dict.fromkeys(row["student"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["student"] == student]
        for score in ("excess_nats", "cosine", "third_cosine"):
            found: dict[str, list[str]] = {}
            for row in (row for row in rows if score in row):
                seconds, tokens = row["seconds_a_layer"], row["generated_tokens"]
                name = f"{row['method']} {seconds:g} s" if seconds else row["method"]
                name += f", {tokens // 1000}k tokens more" if seconds and tokens else ""
                found.setdefault(name, []).append(f"{row[score]:.4f}")
            entries = "; ".join(f"{name}: {' '.join(values)}" for name, values in found.items())
            if entries:
                lines.append(f"conversion, {student}, {score.replace('_', ' ')}: {entries}")
    return lines


def _suite(content: dict[str, Any]) -> list[str]:
    label = f"suite {content['setting']['tier']}"
    nearest, above = [], []
    first = cut_off = 0
    for name, case in content["cases"].items():
        rows = case["rows"]
        times = {peer: row["seconds"] or math.inf for peer, row in rows.items()}
        ours = times.pop(OURS)
        best = min(times, key=lambda peer: times[peer])
        first += ours < times[best]
        cut_off += rows[OURS]["status"] == "TIME"
        if ours == math.inf:
            nearest.append(f"{label}, {name}: {best} is there, attnreg is not")
        elif times[best] < math.inf:
            nearest.append(f"{label}, {name}: {best} at {times[best] / ours:.1f} times the seconds")
        lowest = case["best_loss"] / case["initial_loss"]
        planted = case["planted_loss"] / case["initial_loss"]
        if lowest - planted > WORSE:
            status = rows[OURS]["status"].lower()
            above.append(f"{label}, {name}: lowest {lowest:.2f}, planted {planted:.2f}, {status}")
    counts = f"first on {first}, cut off on {cut_off}, peers on {len(nearest)}"
    return [f"{label}: of {len(content['cases'])} cases {counts}", *nearest, *above]


def _large(content: dict[str, Any]) -> list[str]:
    lines, tier = [], content["setting"]["tier"]
    for name, layer in content["layers"].items():
        for target, verdict in layer["verdicts"].items():
            sooner = "never" if verdict["sooner"] is None else f"{verdict['sooner']:.1f} times"
            lower = verdict["lower_at_the_end"]
            lines.append(f"{tier}, {name}, {target}: sooner {sooner}, lower {lower:.1%}")
        end = layer["rows"][OURS]["errors"]["validation"]
        adam = layer["rows"]["Adam"]["errors"]["validation"]
        lines.append(f"{tier}, {name}: {1 - end / adam:.1%} below Adam")
        if "longer" in layer:
            gained = 1 - layer["longer"]["errors"]["validation"] / end
            lines.append(f"{tier}, {name}: {gained:.1%} lower in more time")
    return lines


def _grouping(content: dict[str, Any]) -> list[str]:
    lines = []
    for name, layer in content["layers"].items():
        ends = {groups: row["errors"]["validation"] for groups, row in layer["rows"].items()}
        drawn = sorted(end for groups, end in ends.items() if groups.startswith("random"))
        lines.append(
            f"grouping, {name}: pairs {ends['pairs']:.3f}, moments {ends['moments']:.3f}, "
            f"neighbours {ends['neighbours']:.3f}, random {drawn[0]:.3f} to {drawn[-1]:.3f}; pairs "
            f"{1 - ends['pairs'] / ends['moments']:.1%} below moments"
        )
    return lines


def _little(content: dict[str, Any], label: str = "little data") -> list[str]:
    cells = [
        (f"{name}, {count} sequences", cell["rows"])
        for name, counts in content["layers"].items()
        for count, cell in counts.items()
    ]
    lines, first = [], 0
    for name, rows in cells:
        ours, peers = rows["attnreg, validated"], content["setting"]["tried"]
        gains = {
            ending: [
                1 - ours[text] / min(rows[peer + ending][text] for peer in peers)
                for text in ("same_texts", "third_text")
            ]
            for ending in ("", ", ridged")
        }
        first += min(gains[""]) > 0
        alone, ridged = ([f"{100 * gain:.1f}%" for gain in found] for found in gains.values())
        lines.append(
            f"{label}, {name}: below the best peer by {alone[0]} on the same texts, {alone[1]} "
            f"on the third; with a ridge on its end by {ridged[0]}, {ridged[1]}"
        )
    return [f"{label}: below all peers on {first} of {len(cells)}", *lines]


def _multimodal(content: dict[str, Any]) -> list[str]:
    lines = []
    for width, found in content["widths"].items():
        ours, peer = found["summary"]["ours"], found["summary"]["peer"]
        lines.append(
            f"multi-modal, d = {width}: solution found on {ours['found']} of {ours['instances']}, "
            f"median {ours['median_seconds']:.2f} s, at most {ours['most_seconds']:.1f} s; 100 "
            f"L-BFGS starts: {peer['found']} of {peer['instances']}, median "
            f"{peer['median_seconds']:.0f} s (batched at least "
            f"{peer['median_seconds_batched_bound']:.0f} s)"
        )
    return lines


LINES = {
    "planted": _planted,
    "planted_suite": _suite,
    "planted_suite-large": _suite,
    "large_layers": _large,
    "large_layers-large": _large,
    "grouping": _grouping,
    "little_data": _little,
    "little_data-averaged": partial(_little, label="averaged heads"),
    "real_layer": _layer,
    "product_cost": _product,
    "roofline": _roofline,
    "tail": _tail,
    "certificates": _certificates,
    "certificate_layer": _certificate_layer,
    "convergence": _convergence,
    "inner_iterations": _inner_iterations,
    "growth": _growth,
    "complexity": _complexity,
    "sketch": _sketch,
    "multimodal": _multimodal,
    "conversion": _conversion,
    "conversion_minilm": _conversion,
}


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
