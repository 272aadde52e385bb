"""Summaries of files and results, as the command line prints them: a table, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from attnreg.arrays import dtype_name
from attnreg.problem import AttentionProblem
from attnreg.result import FitResult


def fit_summary(result: FitResult) -> dict[str, Any]:
    """What a fit came to."""
    errors = ("loss", "regularised_loss", "relative_error", "gradient_norm")
    last = result.history[-1] if result.history else None
    summary: dict[str, Any] = {
        "model": repr(result.model),
        "status": result.status.value,
        "status_text": result.status.text,
        "converged": result.converged,
        **{name: getattr(result, name) for name in errors},
        "iterations": last.iteration if last else 0,
        "passes": last.passes if last else 0,
        "seconds": last.seconds if last else 0.0,
        "solver": result.solver,
        "inner_iterations": sum(record.inner_iterations for record in result.history),
        "operations": dict(last.operations) if last else {},
        "seed": result.seed,
    }
    if result.minima is not None:
        summary["minima"] = asdict(result.minima) | {"text": result.minima.text}
    if result.certificate is not None:
        found = result.certificate
        summary["certificate"] = {
            "kind": found.kind.value,
            "gap": found.gap,
            "reason": found.reason,
        }
    return summary


def problem_summary(problem: AttentionProblem) -> dict[str, Any]:
    """Sizes and settings of a problem."""
    masks = ["causal"] if problem.causal else []
    masks += [] if problem.window is None else [f"window of {problem.window} keys"]
    masks += [] if problem.without_mask else ["given"]
    queries, keys = ([*sizes] for sizes in zip(*problem.lengths, strict=True))
    sizes = ("n_sequences", "n_rows", "d_query", "d_key", "d_value", "d_out")
    settings = ("structure", "self_attention", "total_weight", "scale", "ridge_x", "ridge_y")
    summary = {name: getattr(problem, name) for name in sizes}
    summary |= {"queries": [min(queries), max(queries)], "keys": [min(keys), max(keys)]}
    summary |= {name: getattr(problem, name) for name in settings}
    summary |= {"dtype": dtype_name(problem.dtype), "mask": masks}
    return summary | {"center": list(problem.center)}


def describe(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Dtype and shape of tensors by name."""
    return {
        name: f"{dtype_name(value.dtype)} {' x '.join(map(str, value.shape)) or 'number'}"
        for name, value in tensors.items()
    }


def show(summary: Mapping[str, Any], *, as_json: bool, quiet: bool = False) -> None:
    """Prints a summary as JSON or as a table, on standard output."""
    if as_json:
        typer.echo(json.dumps(summary, indent=2, allow_nan=False))
    elif not quiet:
        console = Console()
        tables = {name: value for name, value in summary.items() if _is_table(value)}
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in summary.items():
            if name not in tables:
                grid.add_row(Text(_words(name)), _cell(value))
        console.print(grid)
        for name, rows in tables.items():  # below, where they have the whole width
            console.print(Text(f"\n{_words(name)}", style="bold"))
            table = Table(box=None, pad_edge=False)
            for column in rows[0]:
                table.add_column(_words(column), overflow="fold")
            for row in rows:
                table.add_row(*map(_cell, row.values()))
            console.print(table)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: Any) -> Text:
    """One value of a summary as rich shows it; names and paths are never read as markup."""
    if isinstance(value, Mapping):
        return Text("\n".join(f"{name}  {item}" for name, item in value.items()) or "none")
    if isinstance(value, list):
        numbers = bool(value) and all(isinstance(item, int) for item in value)
        return Text((" to " if numbers else "\n").join(map(str, value)) or "none")
    if value is None or isinstance(value, bool):
        return Text({None: "none", True: "yes", False: "no"}[value])
    return Text(f"{value:.6g}" if isinstance(value, float) else str(value))
