"""The command line: a table of commands, each a few lines over the library.

Exit status: 0 converged or done, 2 bad input (one line on standard error, no traceback), 3 the
fit stopped before its tolerance (its result is saved all the same), 130 interrupted before there
was anything to save. The table or the JSON object goes to standard output, the live display and
errors to standard error.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from attnreg import __version__
from attnreg.arrays import dtype_name
from attnreg.fitting import fit
from attnreg.models import Bilinear, Model, MultiHead
from attnreg.problem import AttentionProblem
from attnreg.result import FitResult
from attnreg.storage import read_tensors, write_tensors

BAD_INPUT = 2
NOT_CONVERGED = 3
INTERRUPTED = 130
HISTORY_TAIL = 5
"""Iterations that ``info`` shows."""

app = typer.Typer(
    name="attnreg",
    help="Attention regression: fit softmax(scale A1 X A2^T + mask) A3 Y, or a multi-head layer, "
    "to the inputs and outputs of an attention layer.",
    epilog="Exit status: 0 done, 2 bad input, 3 a fit stopped before its tolerance.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="No live display and no table; errors and --json stay.")
]
OutFile = Annotated[Path, typer.Option(metavar="FILE", help="Safetensors file to write.")]
Heads = Annotated[
    int | None,
    typer.Option(help="Fit a multi-head layer W_Q, W_K, W_V, W_O with this many query heads."),
]
KvHeads = Annotated[
    int | None, typer.Option(help="Key/value heads, a divisor of --heads. Default: --heads.")
]
HeadDim = Annotated[
    int | None,
    typer.Option(help="Width of a query and key head. Default: columns of A1 / --heads."),
]
VHeadDim = Annotated[int | None, typer.Option(help="Width of a value head. Default: --head-dim.")]
NoBias = Annotated[bool, typer.Option("--no-bias", help="A multi-head layer without biases.")]
Scale = Annotated[
    float | None,
    typer.Option(help="Factor of the logits. Default: the file's; else 1, or head_dim^-0.5."),
]
RidgeX = Annotated[
    float | None, typer.Option(help="Strength of the regulariser of X, or of W_Q and W_K.")
]
RidgeY = Annotated[
    float | None, typer.Option(help="Strength of the regulariser of Y, or of W_V and W_O.")
]
Causal = Annotated[
    bool, typer.Option("--causal", help="Query i sees keys 0 to i only, besides the file's mask.")
]
Init = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Start from a saved fit (its model is taken unless --heads is given) or from a "
        "safetensors file of named parameters (X and Y; W_Q, b_Q, ...). For a multi-head fit "
        "with a ridge, of a problem without a centre, these weights are also the centre that "
        "the ridge pulls towards, unless --center is given.",
    ),
]
Center = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Parameters that the ridges pull towards: a saved fit or named parameters. Needed to "
        "continue a multi-head fit with a ridge without moving its centre.",
    ),
]
Tol = Annotated[
    float,
    typer.Option(help="Converged when the gradient's dual norm is at most this, relative to B."),
]
MaxSeconds = Annotated[float | None, typer.Option(help="Stop after this many seconds.")]
MaxIterations = Annotated[int, typer.Option(help="Stop after this many iterations.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same fit.")]


@app.command("fit")
def fit_command(
    problem_file: Annotated[
        Path,
        typer.Argument(
            metavar="PROBLEM",
            help="A saved AttentionProblem, or a safetensors file with tensors A1 and B and "
            "optionally A2, A3, mask and weights.",
            show_default=False,
        ),
    ],
    out: OutFile,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    v_head_dim: VHeadDim = None,
    no_bias: NoBias = False,
    scale: Scale = None,
    ridge_x: RidgeX = None,
    ridge_y: RidgeY = None,
    causal: Causal = False,
    init: Init = None,
    center: Center = None,
    tol: Tol = 1e-8,
    max_seconds: MaxSeconds = None,
    max_iterations: MaxIterations = 500,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a problem and save the result.

    Options override the settings in the problem file. Without --heads the bilinear model of X and
    Y is fitted. Exit status: 0 converged, 2 bad input, 3 stopped before the tolerance; the result
    is saved then too, also after Ctrl-C.
    """
    _check_out(out, problem_file)
    problem = AttentionProblem.load(problem_file)
    start = None if init is None else _load_start(init)
    model = _choose_model(heads, kv_heads, head_dim, v_head_dim, no_bias, start)
    pull = None if center is None else _parameters(_load_start(center))
    problem = _override(problem, scale, ridge_x, ridge_y, causal, pull)
    problem, notes = _center_at_start(problem, model, start)
    try:
        result = fit(
            problem,
            model,
            init=start,
            tol=tol,
            max_iterations=max_iterations,
            max_seconds=max_seconds,
            seed=seed,
            progress=sys.stderr.isatty() and not quiet,
        )
    except KeyboardInterrupt:
        _stop("interrupted before the first iteration; nothing was saved", INTERRUPTED)
    result.save(out)
    summary = _fit_summary(result)
    summary |= {"notes": [*notes, *result.notes], "out": str(out)}
    _show(summary, as_json=as_json, quiet=quiet)
    _exit(0 if result.converged else NOT_CONVERGED)


@app.command("predict")
def predict_command(
    fit_file: Annotated[Path, typer.Argument(metavar="FIT", help="A file that fit wrote.")],
    inputs_file: Annotated[
        Path,
        typer.Argument(
            metavar="INPUTS",
            help="Tensors A1 and optionally A2, A3 and mask, or any problem that fit takes.",
        ),
    ],
    out: OutFile,
    causal: Causal = False,
    as_json: Json = False,
) -> None:
    """Compute a fitted layer's output on new inputs.

    The logit scale is the fit's; the mask is that of the inputs, so give --causal again if the fit
    had it. The output is the tensor "prediction", or "prediction.0", "prediction.1", ... for a
    saved problem whose sequences are a list.
    """
    _check_out(out, fit_file, inputs_file)
    result = FitResult.load(fit_file)
    prediction, notes = _predict(result, inputs_file, causal)
    tensors = (
        {"prediction": prediction}
        if isinstance(prediction, Tensor)
        else {f"prediction.{i}": part for i, part in enumerate(prediction)}
    )
    write_tensors(out, tensors, {"kind": "prediction", "notes": notes})
    summary = {"out": str(out), "tensors": _describe_tensors(tensors), "notes": notes}
    _show(summary, as_json=as_json)


@app.command("info")
def info_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Any safetensors file.")],
    as_json: Json = False,
) -> None:
    """Say what a file holds: a problem, a fit, a prediction or plain tensors."""
    tensors, metadata = read_tensors(file)
    kind = metadata.get("kind", "tensors")
    summary: dict[str, Any] = {"kind": kind}
    if kind == "problem":
        summary |= _problem_summary(AttentionProblem.load(file))
    elif kind == "fit":
        result = FitResult.load(file)
        summary |= _fit_summary(result)
        summary |= {"tol": result.tol, "scale": result.scale}
        summary |= {"problem_digest": result.problem_digest, "notes": list(result.notes)}
        summary["history"] = [
            {
                "iteration": record.iteration,
                "seconds": record.seconds,
                "loss": record.loss,
                "gradient_norm": record.gradient_norm,
                "phase": record.phase,
                "accepted": record.accepted,
            }
            for record in result.history[-HISTORY_TAIL:]
        ]
    summary["tensors"] = _describe_tensors(tensors)
    summary["digest"] = metadata.get("digest")
    _show(summary, as_json=as_json)


@app.command("demo")
def demo_command(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for the figures; made where missing.")
    ] = Path("demo-output"),
    seconds: Annotated[
        float | None, typer.Option(help="Time for each method. Default: about a minute in all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit a real captured attention layer, beside L-BFGS and Adam, and draw the figures."""
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"--seconds is {seconds}; expected a finite number above 0")
    try:
        from attnreg.demo import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        _stop("the demo needs matplotlib: pip install 'attnreg[plots]'", BAD_INPUT)
    run(out, seconds, as_json)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(f"attnreg {__version__}")
        _exit(0)


def main() -> None:
    """The program ``attnreg``: what the library refuses becomes one line and exit status 2."""
    try:
        app(prog_name="attnreg")
    except (ValueError, OSError) as error:
        typer.echo(f"attnreg: {' '.join(str(error).splitlines())}", err=True)
        sys.exit(BAD_INPUT)


# -- reading


def _check_out(out: Path, *inputs: Path) -> None:
    """Finds out before the long work whether its result can be written."""
    target = Path(os.path.realpath(out))
    if target.exists() and not target.is_file():
        raise ValueError(f"--out {out} is not a regular file; give the name of a file to write")
    if any(target == Path(os.path.realpath(path)) for path in inputs):
        raise ValueError(f"--out {out} is an input too; give the output another name")
    if not target.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {target.parent}; create it first")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"--out {out}: the folder {target.parent} cannot be written to: {error.strerror}"
        ) from error


def _load_start(path: Path) -> FitResult | dict[str, Tensor]:
    """A saved fit, or the named parameters of a plain safetensors file."""
    tensors, metadata = read_tensors(path)
    if metadata.get("kind") == "fit":
        return FitResult.load(path)
    if metadata:
        raise ValueError(
            f"{path} holds a {metadata.get('kind')}; expected a saved fit or named parameters"
        )
    return tensors


def _parameters(start: FitResult | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return start.parameters if isinstance(start, FitResult) else start


def _choose_model(
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
    v_head_dim: int | None,
    no_bias: bool,
    start: FitResult | Mapping[str, Tensor] | None,
) -> Model:
    if heads is None:
        sizes = {"--kv-heads": kv_heads, "--head-dim": head_dim, "--v-head-dim": v_head_dim}
        given = [name for name, value in sizes.items() if value is not None]
        given += ["--no-bias"] if no_bias else []
        if given:
            raise ValueError(f"{' and '.join(given)} given without --heads; give --heads too")
        return start.model if isinstance(start, FitResult) else Bilinear()
    model = MultiHead(heads, kv_heads, head_dim, v_head_dim, bias=not no_bias)
    if isinstance(start, FitResult) and start.model != model:
        raise ValueError(
            f"--init is a fit of {start.model}, the options ask for {model}; leave out --heads and "
            "the other sizes to take those of --init"
        )
    return model


def _override(
    problem: AttentionProblem,
    scale: float | None,
    ridge_x: float | None,
    ridge_y: float | None,
    causal: bool,
    center: Mapping[str, Tensor] | None,
) -> AttentionProblem:
    """The problem with the settings that were given on the command line."""
    options = {"scale": scale, "ridge_x": ridge_x, "ridge_y": ridge_y}
    changes: dict[str, Any] = {name: v for name, v in options.items() if v is not None}
    if causal and not problem.causal:
        changes["mask"] = _and_causal(problem.mask)
    if center is not None:
        changes["center"] = {name: v.to(problem.dtype) for name, v in center.items()}
    return problem.replace(**changes) if changes else problem


def _center_at_start(
    problem: AttentionProblem, model: Model, start: FitResult | Mapping[str, Tensor] | None
) -> tuple[AttentionProblem, list[str]]:
    """A multi-head ridge without a centre pulls towards the start; a note says so."""
    ridged = problem.ridge_x > 0 or problem.ridge_y > 0
    if not isinstance(model, MultiHead) or not ridged or problem.center:
        return problem, []
    if start is None:
        raise ValueError(
            "a multi-head ridge is the distance to given weights, and there are none; give them "
            "with --init or --center, or set --ridge-x 0 --ridge-y 0"
        )
    problem = _override(problem, None, None, None, False, _parameters(start))
    return problem, ["the ridges pull towards the weights of --init"]


def _and_causal(mask: Any) -> Any:
    return "causal" if mask is None else ("causal", mask)


def _predict(
    result: FitResult, path: Path, causal: bool
) -> tuple[Tensor | list[Tensor], list[str]]:
    tensors, metadata = read_tensors(path)
    if not metadata and "B" not in tensors:
        if not {"A1"} <= set(tensors) <= {"A1", "A2", "A3", "mask"}:
            names = ", ".join(sorted(tensors)) or "nothing"
            raise ValueError(f"{path} holds {names}; expected A1 and besides only A2, A3 and mask")
        mask = tensors.pop("mask", None)
        return result.predict(**tensors, mask=_and_causal(mask) if causal else mask), []
    problem = _override(AttentionProblem.load(path), None, None, None, causal, None)
    if problem.scale == result.scale:
        return result.predict(problem), []
    notes = []
    if metadata:
        notes.append(f"the fit's scale {result.scale} was used, not the inputs' {problem.scale}")
    return result.predict(problem.replace(scale=result.scale)), notes


# -- showing


def _fit_summary(result: FitResult) -> dict[str, Any]:
    last = result.history[-1] if result.history else None
    return {
        "model": repr(result.model),
        "status": result.status.value,
        "status_text": result.status.text,
        "converged": result.converged,
        "loss": result.loss,
        "regularised_loss": result.regularised_loss,
        "relative_error": result.relative_error,
        "gradient_norm": result.gradient_norm,
        "iterations": last.iteration if last else 0,
        "passes": last.passes if last else 0,
        "seconds": last.seconds if last else 0.0,
        "seed": result.seed,
    }


def _problem_summary(problem: AttentionProblem) -> dict[str, Any]:
    mask = problem.mask
    masks = ["causal"] if problem.causal else []
    masks += [] if mask is None or isinstance(mask, str) else ["given"]
    queries, keys = ([*sizes] for sizes in zip(*problem.lengths, strict=True))
    sizes = ("n_sequences", "n_rows", "d_query", "d_key", "d_value", "d_out")
    return {
        **{name: getattr(problem, name) for name in sizes},
        "queries": [min(queries), max(queries)],
        "keys": [min(keys), max(keys)],
        "structure": problem.structure,
        "dtype": dtype_name(problem.dtype),
        "self_attention": problem.self_attention,
        "mask": masks,
        "total_weight": problem.total_weight,
        "scale": problem.scale,
        "ridge_x": problem.ridge_x,
        "ridge_y": problem.ridge_y,
        "center": list(problem.center),
    }


def _describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        name: f"{dtype_name(value.dtype)} {' x '.join(map(str, value.shape)) or 'number'}"
        for name, value in tensors.items()
    }


def _show(summary: Mapping[str, Any], *, as_json: bool, quiet: bool = False) -> None:
    if as_json:
        typer.echo(json.dumps(_finite(summary), indent=2, allow_nan=False))
    elif not quiet:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in summary.items():
            grid.add_row(Text(name.replace("_", " ")), _cell(value))
        Console().print(grid)


def _cell(value: Any) -> Text | Table:
    """One value of a summary as rich shows it; names and paths are never read as markup."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        table = Table(*(name.replace("_", " ") for name in value[0]), box=None, pad_edge=False)
        for row in value:
            table.add_row(*(_cell(item) for item in row.values()))
        return table
    if isinstance(value, Mapping):
        return Text("\n".join(f"{name}  {item}" for name, item in value.items()) or "none")
    if isinstance(value, list):
        numbers = bool(value) and all(isinstance(item, int) for item in value)
        return Text((" to " if numbers else "\n").join(map(str, value)) or "none")
    if value is None:
        return Text("default" if value is None else str(value))
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    return Text(f"{value:.6g}" if isinstance(value, float) else str(value))


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null stands for them."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _stop(message: str, code: int) -> Any:
    typer.echo(f"attnreg: {message}", err=True)
    return _exit(code)


def _exit(code: int) -> Any:
    raise typer.Exit(code)
