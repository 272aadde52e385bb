"""The command line: a table of commands, each a few lines over the library.

Exit status: 0 done, 2 bad input (one line, no traceback), 3 the fit stopped before its tolerance
(its result is saved all the same) or nothing strong enough could be certified, 130 interrupted
before there was anything to save. Results go to standard output, the live display and errors to
standard error.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from torch import Tensor

from attnreg import __version__, cli_bench, cli_conversion, cli_evaluation
from attnreg.certificate import Certificate, Kind, verify
from attnreg.early_stopping import fit_validated
from attnreg.fitting import SOLVERS, fit
from attnreg.masks import and_causal
from attnreg.models import Bilinear, Model, MultiHead
from attnreg.problem import AttentionProblem
from attnreg.records import Status
from attnreg.result import FitResult
from attnreg.storage import read_tensors, write_tensors
from attnreg.summaries import describe, fit_summary, problem_summary, show

BAD_INPUT, NOT_CONVERGED, NOT_CERTIFIED, INTERRUPTED = 2, 3, 3, 130
HISTORY_COLUMNS = ("iteration", "loss", "gradient_norm", "phase", "rows", "accepted")

app = typer.Typer(
    help="Attention regression: fit softmax(scale A1 X A2^T + mask) A3 Y, or a multi-head layer, "
    "to the inputs and outputs of an attention layer.",
    epilog="Exit status: 0 done, 2 bad input, 3 a fit stopped before its tolerance or a "
    "certificate is not strong enough.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attnreg {__version__}")
        sys.exit(0)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, no table.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No live display and no table.")]
OutFile = Annotated[Path, typer.Option(metavar="FILE", help="Safetensors file to write.")]
Heads = Annotated[int | None, typer.Option(help="Query heads: fit a multi-head layer with biases.")]
KvHeads = Annotated[int | None, typer.Option(help="Key/value heads. Default: --heads.")]
HeadDim = Annotated[int | None, typer.Option(help="Width of a head. Default: width of A1 / heads.")]
VHeadDim = Annotated[int | None, typer.Option(help="Width of a value head. Default: --head-dim.")]
NoBias = Annotated[bool, typer.Option("--no-bias", help="A multi-head layer without biases.")]
Scale = Annotated[float | None, typer.Option(help="Logit scale. Default: the file's or model's.")]
RidgeX = Annotated[float | None, typer.Option(help="Regulariser of X, or of W_Q and W_K.")]
RidgeY = Annotated[float | None, typer.Option(help="Regulariser of Y, or of W_V and W_O.")]
Causal = Annotated[bool, typer.Option("--causal", help="Query i sees keys 0 to i only.")]
Init = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Start from a saved fit (and take its model unless --heads is given) or from named "
        "parameters: X, Y, or W_Q, b_Q, ... For a multi-head fit with a ridge these weights are "
        "also what the ridge pulls towards, unless --center or the problem says otherwise.",
    ),
]
Center = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What the ridges pull towards, as for --init. To continue a multi-head fit with a "
        "ridge, give the file that was --init at first: --init would move the pull.",
    ),
]
Validation = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="More sequences, as in PROBLEM_FILE, that nothing is fitted on: mini-batches run as "
        "long as the error on them falls, and they choose a ridge on W_O (Y), towards that of "
        "--init or towards zero.",
    ),
]
Tol = Annotated[float, typer.Option(help="Bound on the gradient, relative to the targets.")]
MaxSeconds = Annotated[float | None, typer.Option(help="Stop after this many seconds.")]
MaxIterations = Annotated[int, typer.Option(help="Stop after this many iterations.")]
SolverName = Annotated[str, typer.Option("--solver", metavar="NAME", help=f"{', '.join(SOLVERS)}.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of start and samples.")]
ProblemFile = Annotated[
    Path,
    typer.Argument(help="AttentionProblem, or tensors A1, B and perhaps A2, A3, mask, weights."),
]
FitFile = Annotated[Path, typer.Argument(help="A file that fit wrote.")]
InputsFile = Annotated[Path, typer.Argument(help="A1 and perhaps A2, A3, mask; or a problem.")]
AnyFile = Annotated[Path, typer.Argument(help="Any safetensors file.")]
Folder = Annotated[Path, typer.Option(metavar="FOLDER", help="For the figures; made if missing.")]
DemoSeconds = Annotated[float | None, typer.Option(help="Time for each method. Default: short.")]
Required = Annotated[
    Kind, typer.Option(help="The weakest statement with which the exit status is 0.")
]
Given = Annotated[
    Path | None,
    typer.Option("--certificate", metavar="FILE", help="Check this certificate too."),
]
CertificateOut = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="JSON file for the certificate.")
]
Rigorous = Annotated[
    bool,
    typer.Option("--rigorous", help="Ball arithmetic, for small problems: no rounding is assumed."),
]
Starts = Annotated[int, typer.Option(help="Descend from so many starts at once, for small X.")]
Certify = Annotated[
    bool,
    typer.Option("--certify", help="Go on until the certified gap, relative, is within --tol."),
]
Tolerance = Annotated[float, typer.Option(help="Bound on the gradient for STATIONARY, relative.")]
Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
]

Start = FitResult | dict[str, Tensor]  # a saved fit or named parameters
Prediction = Tensor | list[Tensor]


@app.command("fit")
def fit_command(
    problem_file: ProblemFile,
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
    starts: Starts = 1,
    center: Center = None,
    validation: Validation = None,
    solver: SolverName = SOLVERS[0],
    tol: Tol = 1e-8,
    max_seconds: MaxSeconds = None,
    max_iterations: MaxIterations = 500,
    seed: Seed = 0,
    certify: Certify = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a problem and save the result.

    Options override the settings in the problem file, and --causal adds to its mask. Without
    --heads the bilinear model of X and Y is fitted. A problem without a scale has scale 1
    (bilinear) or head_dim^-0.5 (multi-head).

    The fit has converged when the dual norm of the reduced gradient in the natural metric is at
    most --tol times ||B - mean||^2. Exit status: 0 converged, or chosen by --validation, 2 bad
    input, 3 stopped before the tolerance; the result is saved then too, also after Ctrl-C.
    """
    _check_out(out, problem_file, *([] if validation is None else [validation]))
    problem = AttentionProblem.load(problem_file)
    start = None if init is None else _load_start(init)
    sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "v_head_dim": v_head_dim}
    model = _choose_model(heads, sizes, no_bias, start)
    problem = _override(problem, causal, scale=scale, ridge_x=ridge_x, ridge_y=ridge_y)
    pull, notes = _choose_center(problem, model, start, center)
    problem = _override(problem, False, center=pull)
    shared: dict[str, Any] = {
        "init": start,
        "max_iterations": max_iterations,
        "max_seconds": max_seconds,
        "seed": seed,
        "progress": sys.stderr.isatty() and not quiet,
    }
    try:
        if validation is not None:
            _check_validated(solver, starts, certify)
            other = _override(AttentionProblem.load(validation), causal, scale=scale)
            result = fit_validated(problem, other, model, **shared)
        else:
            result = fit(
                problem, model, solver=solver, starts=starts, tol=tol, certify=certify, **shared
            )
    except KeyboardInterrupt:
        _stop("interrupted before the first iteration; nothing was saved", INTERRUPTED)
    result.save(out)
    summary = fit_summary(result) | {"notes": [*notes, *result.notes], "out": str(out)}
    show(summary, as_json=as_json, quiet=quiet)
    sys.exit(0 if result.converged or result.status is Status.VALIDATED else NOT_CONVERGED)


@app.command("verify")
def verify_command(
    problem_file: ProblemFile,
    fit_file: FitFile,
    certificate: Given = None,
    require: Required = Kind.LOCAL,
    rigorous: Rigorous = False,
    tolerance: Tolerance = 1e-8,
    scale: Scale = None,
    ridge_x: RidgeX = None,
    ridge_y: RidgeY = None,
    causal: Causal = False,
    center: Center = None,
    out: CertificateOut = None,
    as_json: Json = False,
) -> None:
    """Say what can be proven of a fit, without trusting the solver.

    Give the options that were given to fit: with other ridges it is another problem. With
    --certificate that file is compared with what is computed here.

    Exit status: 0 certified (--require or stronger), 2 bad input, or a certificate that is
    doctored or belongs to something else, 3 not certified.
    """
    if out is not None:
        _check_out(out, problem_file, fit_file, *([] if certificate is None else [certificate]))
    given = None if certificate is None else Certificate.load(certificate)
    result = FitResult.load(fit_file)
    problem = AttentionProblem.load(problem_file)
    problem = _override(problem, causal, scale=scale, ridge_x=ridge_x, ridge_y=ridge_y)
    pull, _ = _choose_center(problem, result.model, None, center)
    problem = _override(problem, False, center=pull)
    found = verify(problem, result, tolerance=tolerance, rigorous=rigorous)
    if given is not None:
        given.check(found)
    if out is not None:
        found.save(out)
    summary = found.as_dict() | {"checked": None if given is None else str(certificate)}
    if problem.digest() != result.problem_digest:
        summary["note"] = "the fit was made on another problem or with other settings"
    show(summary, as_json=as_json)
    sys.exit(0 if found.kind.implies(require) else NOT_CERTIFIED)


@app.command("predict")
def predict_command(
    fit_file: FitFile,
    inputs_file: InputsFile,
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
    show({"out": str(out), "tensors": describe(tensors), "notes": notes}, as_json=as_json)


@app.command("info")
def info_command(file: AnyFile, as_json: Json = False) -> None:
    """Say what a file holds."""
    tensors, metadata = read_tensors(file)
    kind = metadata.get("kind", "tensors")
    summary: dict[str, Any] = {"kind": kind}
    if kind == "problem":
        summary |= problem_summary(AttentionProblem.load(file))
    elif kind == "fit":
        result = FitResult.load(file)
        summary |= fit_summary(result) | {"notes": list(result.notes)}
        summary |= {name: getattr(result, name) for name in ("tol", "scale", "problem_digest")}
        summary["history"] = [
            {name: getattr(record, name) for name in HISTORY_COLUMNS}
            for record in result.history[-5:]
        ]
    summary |= {"tensors": describe(tensors), "digest": metadata.get("digest")}
    show(summary, as_json=as_json)


@app.command("demo")
def demo_command(
    out: Folder = Path("demo-output"), seconds: DemoSeconds = None, as_json: Json = False
) -> None:
    """Fit a real captured layer and compare."""
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"--seconds is {seconds}; expected a finite number above 0")
    try:
        from attnreg.demo import run

        run(out, seconds, as_json)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("matplotlib", "transformers"):
            raise
        _stop(f"the demo needs {missing}: pip install 'attnreg[hf,plots]'", BAD_INPUT)


cli_conversion.add_to(app)
cli_evaluation.add_to(app)
cli_bench.add_to(app)


@app.callback(no_args_is_help=True)
def _options(version: Version = False) -> None:
    """Every command begins here; --version has ended before."""


def main() -> None:
    """The program ``attnreg``: what the library refuses becomes one line and exit status 2."""
    try:
        app(prog_name="attnreg")
    except (ValueError, OSError) as error:
        _stop(str(error), BAD_INPUT)


# -- reading


def _check_out(out: Path, *inputs: Path) -> None:
    """Finds out before the long work whether its result can be written."""
    target = Path(os.path.realpath(out))
    if target.exists() and not target.is_file():
        raise ValueError(f"--out {out} is not a regular file; give the name of a file to write")
    if any(target == Path(os.path.realpath(path)) for path in inputs):
        raise ValueError(f"--out {out} is an input too; give the output another name")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write to its folder: {error.strerror}") from error


def _check_validated(solver: str, starts: int, certify: bool) -> None:
    """Options that do not go with --validation."""
    wrong = [f"--solver {solver}"] if solver not in (SOLVERS[0], "stochastic") else []
    wrong += [f"--starts {starts}"] if starts != 1 else []
    wrong += ["--certify"] if certify else []
    if wrong:
        raise ValueError(
            f"{' and '.join(wrong)} given with --validation, which fits by mini-batches from one "
            "start and minimises no loss; leave out one or the other"
        )


def _load_start(path: Path) -> Start:
    """A saved fit, or the named parameters of a plain safetensors file."""
    tensors, metadata = read_tensors(path)
    kind = metadata.get("kind", "fit")
    if kind != "fit":
        raise ValueError(f"{path} holds a {kind}; expected a fit or named parameters")
    return FitResult.load(path) if metadata else tensors


def _choose_model(
    heads: int | None, sizes: Mapping[str, Any], no_bias: bool, start: Start | None
) -> Model:
    if heads is None:
        given = [f"--{name.replace('_', '-')}" for name, size in sizes.items() if size is not None]
        given += ["--no-bias"] if no_bias else []
        if given:
            raise ValueError(f"{' and '.join(given)} given without --heads; give --heads too")
        return start.model if isinstance(start, FitResult) else Bilinear()
    model = MultiHead(heads, **sizes, bias=not no_bias)
    if isinstance(start, FitResult) and start.model != model:
        raise ValueError(
            f"--init is a fit of {start.model}, the options ask for {model}; leave out --heads and "
            "the other sizes to take those of --init"
        )
    return model


def _choose_center(
    problem: AttentionProblem, model: Model, start: Start | None, center: Path | None
) -> tuple[dict[str, Tensor] | None, list[str]]:
    """Where the ridges pull to; None leaves it to the problem. A note says if it is the start."""
    source, notes = None if center is None else _load_start(center), list[str]()
    ridged = problem.ridge_x > 0 or problem.ridge_y > 0
    if source is None and isinstance(model, MultiHead) and ridged and not problem.center:
        if start is None:
            raise ValueError(
                "a multi-head ridge is the distance to given weights: give them with --init or "
                "--center, or set --ridge-x 0 --ridge-y 0"
            )
        source, notes = start, ["the ridges pull towards the weights of --init"]
    if source is None:
        return None, notes
    parameters = source.parameters if isinstance(source, FitResult) else source
    return {name: value.to(problem.dtype) for name, value in parameters.items()}, notes


def _override(problem: AttentionProblem, causal: bool, **settings: Any) -> AttentionProblem:
    """The problem with the settings that are not None, and a causal mask besides its own."""
    changes = {name: value for name, value in settings.items() if value is not None}
    if causal and not problem.causal:
        changes["mask"] = and_causal(problem.mask)
    return problem.replace(**changes) if changes else problem


def _predict(result: FitResult, path: Path, causal: bool) -> tuple[Prediction, list[str]]:
    tensors, metadata = read_tensors(path)
    if not metadata and "B" not in tensors:
        if not {"A1"} <= set(tensors) <= {"A1", "A2", "A3", "mask"}:
            names = ", ".join(sorted(tensors)) or "nothing"
            raise ValueError(f"{path} holds {names}; expected A1 and besides only A2, A3 and mask")
        mask = tensors.pop("mask", None)
        return result.predict(**tensors, mask=and_causal(mask) if causal else mask), []
    problem = _override(AttentionProblem.load(path), causal or (result.causal and not metadata))
    if problem.scale == result.scale:
        return result.predict(problem), []
    note = f"the fit's scale {result.scale} was used, not the inputs' {problem.scale}"
    return result.predict(problem.replace(scale=result.scale)), [note] if metadata else []


def _stop(message: str, code: int) -> NoReturn:
    typer.echo(f"attnreg: {' '.join(message.splitlines())}", err=True)
    sys.exit(code)
