"""Writes the tables of docs/benchmarks.md, and its pictures, from the JSON in benchmarks/results/.

Only what stands between the two markers is written; the text around them is kept.

    python -m benchmarks.table            # of `make bench` and `make bench-large`, into the page
    python -m benchmarks.table --quick    # of `make bench-quick`, printed
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import profiles
from benchmarks.common import console, results_of, show
from benchmarks.peers import OURS

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "benchmarks.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
RATIOS = (1.0, 2.0, 10.0)
TITLES = {"quick": "`make bench-quick`", "bench": "`make bench`", "large": "`make bench-large`"}
LITTLE = {
    "bench": "Little data, `python -m benchmarks.little_data`",
    "averaged": "Little data from averaged heads, `python -m benchmarks.little_data --averaged`",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="print the quick run's tables")
    options = parser.parse_args(arguments)
    if options.quick:
        console.print(tables(("quick",)), markup=False)
        return
    for tier in ("bench", "large"):
        for kind, draw in (
            ("planted_suite", profiles.draw_planted),
            ("large_layers", profiles.draw_layers),
        ):
            if (content := read(kind, tier)) is not None:
                draw(content, DOCS / picture(kind, tier))
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), tables(("bench", "large"))))
    console.print(f"written: docs/{PAGE.name}")


def tables(tiers: Iterable[str]) -> str:
    """The Markdown of all results that there are."""
    parts = []
    for tier in tiers:
        suite, layers = read("planted_suite", tier), read("large_layers", tier)
        if suite is not None:
            parts.append(planted_tables(suite, tier))
        if layers is not None:
            parts.append(layer_tables(layers, tier))
        if tier == "bench":
            found = ((name, read("little_data", name)) for name in LITTLE)
            parts += [little_table(little, name) for name, little in found if little is not None]
    return "\n\n".join(parts)


def replaced(page: str, text: str) -> str:
    """The page with a text between its markers.

    Raises:
        ValueError: If it has not the two markers, one after the other.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}, in this order")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def read(kind: str, tier: str) -> dict[str, Any] | None:
    """The results of a benchmark's tier, None where there are none."""
    path = results_of(kind, tier)
    found = json.loads(path.read_text()) if path.is_file() else None
    return found if found and found["cases" if kind == "planted_suite" else "layers"] else None


def picture(kind: str, tier: str) -> str:
    """Name of a picture."""
    return f"{kind}{'' if tier == 'bench' else '-' + tier}.png"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its first column is left-aligned, the others right-aligned."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))


# ---------------------------------------------------------------------- planted


def planted_tables(content: Mapping[str, Any], tier: str) -> str:
    """Profiles by method, seconds by case, and what attnreg lost."""
    found = profiles.ratios(profiles.suite_times(content))
    setting = content["setting"]
    parts = [
        f"### Planted problems, {TITLES[tier]}",
        f"{len(content['cases'])} of {content['planned']} cases, {setting['seconds']:g} "
        f"{setting['clock']} seconds a run, "
        f"medians of {setting['repeats']} where the target was reached. {_machine(content)}",
        _missing(content),
        markdown(
            ("method", "fastest", "within 2x", "within 10x", "solved", "cut off by the clock"),
            _profile_rows(content, found),
        ),
        "Seconds to within 1e-8 of the best loss that anybody found (a dash: never), the three "
        "fastest peers of each case and the settings they took:",
        markdown(("case", OURS.name, "first", "second", "third"), _case_rows(content)),
        "**Lost by attnreg**: " + (_sentence(lost(content)) or "no case."),
    ]
    if tier != "quick":
        parts.insert(3, f"![profile and errors against time]({picture('planted_suite', tier)})")
    return "\n\n".join(part for part in parts if part)


def _profile_rows(
    content: Mapping[str, Any], found: Mapping[str, Sequence[float]]
) -> list[tuple[str, ...]]:
    cut = {
        name: sum(case["rows"][name]["status"] == "TIME" for case in content["cases"].values())
        for name in found
    }
    ranked = sorted(found, key=lambda name: [-profiles.profile(found[name], r) for r in RATIOS])
    return [
        (
            _strong(name),
            *(f"{profiles.profile(found[name], ratio):.0%}" for ratio in RATIOS),
            f"{sum(map(math.isfinite, found[name]))} of {len(found[name])}",
            f"{cut[name]}",
        )
        for name in ranked
    ]


def _case_rows(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    lines = []
    for name, case in content["cases"].items():
        peers = [
            (row["seconds"], row["setting"])
            for method, row in case["rows"].items()
            if method != OURS.name and row["seconds"] is not None
        ]
        cells = [f"{show(seconds)} {setting}" for seconds, setting in sorted(peers)[:3]]
        ours = show(case["rows"][OURS.name]["seconds"])
        lines.append((name, ours, *cells, *["-"] * (3 - len(cells))))
    return lines


def lost(content: Mapping[str, Any]) -> list[str]:
    """A line for each case in which attnreg is not the fastest, or not there at all."""
    lines = []
    for name, case in content["cases"].items():
        times = {method: row["seconds"] for method, row in case["rows"].items()}
        ours = times.pop(OURS.name)
        if ours is None:
            row = case["rows"][OURS.name]
            gap = (row["loss"] - case["best_loss"]) / case["initial_loss"]
            lines.append(f"{name}: not there (gap {gap:.0e}), {case['best_method']} is")
            continue
        there = [(seconds, peer) for peer, seconds in times.items() if seconds is not None]
        first, peer = min(there, default=(math.inf, ""))
        if first < ours:
            lines.append(f"{name}: {ours / first:.2g} times the seconds of {peer}")
    return lines


# ---------------------------------------------------------------------- layers


def layer_tables(content: Mapping[str, Any], tier: str) -> str:
    """Errors on all three texts by method, and attnreg against its targets."""
    setting = content["setting"]
    tokens = setting["sequences"] * setting["tokens"]
    head = [
        f"### Real layers, {TITLES[tier]}",
        f"{tokens:,} calibration tokens, {setting['seconds']:g} s a row. {_machine(content)}",
        _missing(content),
        "Planted problems only: "
        + _sentence(f"{name} ({reason})" for name, reason in content["not_run"].items()),
    ]
    if tier != "quick":
        head.append(f"![validation error against time]({picture('large_layers', tier)})")
    for name, layer in content["layers"].items():
        head += _layer_parts(name, layer)
    return "\n\n".join(part for part in head if part)


def _layer_parts(name: str, layer: Mapping[str, Any]) -> list[str]:
    rows = sorted(layer["rows"].items(), key=lambda item: _number(item[1]["errors"]["validation"]))
    lines = [
        (
            _strong(method),
            row["setting"],
            show(row["seconds"]),
            *_errors(row["errors"]),
            row["readout"],
            _trials(row),
        )
        for method, row in rows
    ]
    if "longer" in layer:
        longer = layer["longer"]
        seconds, errors = show(longer["seconds"]), _errors(longer["errors"])
        lines.append((OURS.name, "given longer", seconds, *errors, "as it is", ""))
    lines.append(("start", "mean-pooled heads", "", *_errors(layer["start"]), "as it is", ""))
    columns = ("method", "setting", "s", "calibration", "validation", "held out", "readout")
    verdicts = [_verdict(target, entry) for target, entry in layer.get("verdicts", {}).items()]
    return [
        f"**{name.capitalize()}**",
        markdown((*columns, "settings tried, validation error"), lines),
        "\n".join(f"- {line}" for line in verdicts),
    ]


def little_table(content: Mapping[str, Any], tier: str) -> str:
    """Errors on sequences that chose nothing, by layer and number of sequences."""
    lines, columns = [], list[str]()
    for name, cells in content["layers"].items():
        for count, cell in cells.items():
            rows = cell["rows"]
            columns = columns or list(rows)
            sizes = (name, count, show(cell["residuals_a_weight"], 2), show(cell["seconds"]))
            found = []
            for text in ("same_texts", "third_text"):
                lowest = min(row[text] for row in rows.values())
                found.append([(row[text], row[text] == lowest) for row in rows.values()])
            pairs = zip(*found, strict=True)
            lines.append((*sizes, *(", ".join(map(_bold, pair)) for pair in pairs)))
    head = ("layer", "sequences", "residuals a weight", "s", *columns)
    tried = _sentence(f"{name} {len(names)}" for name, names in content["setting"]["tried"].items())
    return "\n\n".join(
        [
            f"### {LITTLE[tier]}",
            "Errors on sequences that chose nothing, of the same two texts and of the third. "
            f"Settings tried: {tried}. {_machine(content)}",
            markdown(head, lines),
        ]
    )


def _bold(entry: tuple[float, bool]) -> str:
    error, lowest = entry
    return f"**{show(error)}**" if lowest else show(error)


def _verdict(target: str, entry: Mapping[str, Any]) -> str:
    share = entry["lower_at_the_end"]
    side = "lower" if share >= 0 else "**higher**"
    end = f"at the end attnreg's {entry['ours_at_the_end']:.4f} is {abs(share):.1%} {side}"
    when = "**never reached by attnreg**"
    if entry["sooner"] is not None:
        word = "sooner" if entry["sooner"] >= 1 else "**(later)**"
        when = f"reached in {show(entry['seconds'])} s, {show(entry['sooner'])} times {word}"
    return f"{target} ({entry['setting']}), validation {entry['validation']:.4f}: {when}; {end}."


def _errors(errors: Mapping[str, float | None]) -> list[str]:
    return [show(errors[text], 4) for text in ("calibration", "validation", "held_out")]


def _trials(row: Mapping[str, Any]) -> str:
    found, finals = row.get("trials", {}), row.get("finals", {})
    if not found and len(finals) > 1:
        found = finals
    return _sentence(f"{name} {show(error)}" for name, error in found.items())


# ---------------------------------------------------------------------- words


def _machine(content: Mapping[str, Any]) -> str:
    machine = content["machine"]
    packages = _sentence(f"{name} {version}" for name, version in machine["packages"].items())
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{machine['processor']}, {threads}, Python {machine['python']}, {packages}."


def _missing(content: Mapping[str, Any]) -> str:
    return _sentence(f"Not run: {name} ({reason})" for name, reason in content["missing"].items())


def _sentence(parts: Iterable[str]) -> str:
    return "; ".join(parts)


def _strong(name: str) -> str:
    return f"**{name}**" if name == OURS.name else name


def _number(value: float | None) -> float:
    return math.inf if value is None else value


if __name__ == "__main__":
    main()
