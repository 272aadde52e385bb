"""What the commands ``compress`` and ``plan`` print, and the command line in a model card."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnreg.transformers.card import cache_bytes, parameters, sizes
from attnreg.transformers.convert import Conversion
from attnreg.transformers.estimate import estimate
from attnreg.transformers.sensitivity import Choices, Measured
from attnreg.transformers.task import Options, Task


def conversion_summary(
    conversion: Conversion, verdict: str | None, as_json: bool
) -> dict[str, Any]:
    """What a conversion came to.

    Args:
        conversion: The conversion.
        verdict: Why it is too lossy; None if it is not.
        as_json: Whether the whole report is wanted, not only what a table shows.

    Returns:
        JSON-able values.
    """
    report = conversion.report
    extra = {
        "out": str(conversion.out),
        "seconds": conversion.seconds,
        "too_lossy": verdict,
        "notes": list(conversion.notes),
    }
    if as_json:
        return report | extra
    layers = [
        {
            "layer": ", ".join(map(str, layer["layers"])),
            "original": _sizes(layer["original"]),
            "student": _sizes(layer["student"]),
            "start": layer["start"],
            "fitted": layer["error"],
            "held_out": layer["held_out_error"],
        }
        for layer in report["layers"]
    ]
    numbers = {
        name: f"{_number(report['before'].get(name))} -> {_number(value)}"
        for name, value in report["after"].items()
        if value is not None and name in report["before"]
    }
    numbers |= {
        name: value
        for name, value in report["after"].items()
        if value is not None and name not in report["before"]
    }
    names = ("model", "architecture", "loads_with", "obstacle")
    head = {name: report[name] for name in names if report[name] is not None}
    if report["final_pass"] is not None:
        final = report["final_pass"]
        head["final_pass"] = (
            f"{final['steps']} steps, held-out loss {final['start_loss']:.4g} -> "
            f"{final['held_out_loss']:.4g}"
        )
    return {**head, "heads/kv heads/width": layers, **numbers, **extra}


def dry_run_summary(task: Task) -> dict[str, Any]:
    """What a conversion would do."""
    needs = estimate(task)
    layers = [
        {
            "layer": ", ".join(map(str, group.applications)),
            "original": _sizes(sizes(group.original)),
            "student": _sizes(sizes(group.student)),
            "parameters": parameters(group.student) - parameters(group.original),
            "kv_bytes_per_token": cache_bytes(group.student, task.dtype.itemsize),
        }
        for group in task.groups
    ]
    return {
        "model": task.checkpoint.folder.name,
        "student": type(task.config).__name__,
        "loads_with": "transformers" if task.obstacle is None else "attnreg.load",
        "obstacle": task.obstacle,
        "layers": layers,
        "windows": [len(task.fit), len(task.held_out)],
        "tokens": [task.fit.tokens, task.held_out.tokens],
        "options": asdict(task.options),
        "estimated_seconds": needs.seconds,
        "estimated_memory_bytes": needs.memory,
        "estimated_disk_bytes": needs.disk,
    }


def profile_summary(
    profile: Sequence[Sequence[Measured]],
    chosen: Choices,
    even: Choices | None,
    out: Path | None,
    as_json: bool,
) -> dict[str, Any]:
    """A sensitivity profile and the plan made from it.

    Args:
        profile: Measurements of each block.
        chosen: The plan.
        even: The best plan with one setting for all layers, if any is within the budget.
        out: Where the plan was written.
        as_json: Whether sizes are wanted as numbers too.

    Returns:
        JSON-able values.
    """

    def row(one: Measured) -> dict[str, Any]:
        return {
            "layer": ", ".join(map(str, one.layers)),
            "setting": str(one.setting),
            "kv_numbers_per_token": one.cost,
            "error": one.error,
            "start": one.start,
        }

    rows = [row(one) | {"chosen": one in chosen.measured} for layer in profile for one in layer]
    if as_json:
        for line, one in zip(rows, [m for layer in profile for m in layer], strict=True):
            line |= {"layers": list(one.layers), "sizes": one.setting.given()}
    summary: dict[str, Any] = {
        "profile": rows,
        "plan": {str(one.layers[0]): str(one.setting) for one in chosen.measured},
        "share_of_cache": chosen.share,
        "sum_of_squared_errors": chosen.loss,
    }
    if even is not None:
        summary["best_even_setting"] = str(even.measured[0].setting)
        summary["its_sum_of_squared_errors"] = even.loss
    return summary | {"out": None if out is None else str(out)}


def command_line(
    model: str,
    calibration: str,
    out: Path,
    sizes: dict[str, Any],
    plan: Path | None,
    options: Options,
) -> str:
    """A command line of ``compress`` with what decides the result; names without their folders."""
    words = ["attnreg", "compress", Path(model).name]
    named = {"calibration": Path(calibration).name, **sizes}
    named["plan"] = None if plan is None else plan.name
    named |= {name.replace("_", "-"): value for name, value in asdict(options).items()}
    for name, value in named.items():
        if value is None or value is False:
            continue
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join([*words, "--out", out.name])


def _sizes(values: dict[str, int]) -> str:
    return "/".join(str(values[name]) for name in ("heads", "kv_heads", "head_dim"))


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}"
