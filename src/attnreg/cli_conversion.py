"""The commands ``compress`` and ``plan``; what needs transformers is imported when they run."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnreg.storage import write_text
from attnreg.summaries import show

if TYPE_CHECKING:
    from attnreg.transformers.convert import Conversion
    from attnreg.transformers.plan import Plan, Setting
    from attnreg.transformers.task import Task

TOO_LOSSY, INTERRUPTED = 3, 130

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model folder, or a name on the hub.")
]
OutFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder to write; must not exist.")
]
Text = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        help="Text file (documents separated by blank lines), folder of .txt files, or "
        "datasets:NAME[:SPLIT[:COLUMN]].",
    ),
]
KvHeads = Annotated[int | None, typer.Option(min=1, help="Key/value heads of every layer.")]
Heads = Annotated[int | None, typer.Option(min=1, help="Query heads of every layer.")]
HeadDim = Annotated[int | None, typer.Option(min=1, help="Width of a head in every layer.")]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="Sizes by layer, TOML or JSON.")
]
Layers = Annotated[
    str | None, typer.Option(metavar="LIST", help="Only these layers, such as 0,2-4.")
]
Window = Annotated[
    int | None, typer.Option(min=2, help="Tokens of a window. Default: the model's, at most 512.")
]
Tokens = Annotated[int | None, typer.Option(min=1, help="Calibration tokens at most.")]
HeldOut = Annotated[float, typer.Option(help="Share of the documents that is held out.")]
Generate = Annotated[
    int,
    typer.Option(
        metavar="TOKENS",
        min=0,
        help="More text to fit on beside TEXT, where that is short: the original writes it itself "
        "or, where it cannot, spans of TEXT are put together anew.",
    ),
]
FinalSteps = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Steps of the final pass over the whole model; 0: none. Default: 400 for a model "
        "that predicts the next token, 0 for others.",
    ),
]
MaxIterations = Annotated[int, typer.Option(min=0, help="Bound on the iterations of each fit.")]
MaxSeconds = Annotated[
    float | None,
    typer.Option(
        help="Bound on the time of all fits and the final pass; the result then depends on it."
    ),
]
FitPairs = Annotated[
    bool,
    typer.Option(
        "--fit-pairs",
        help="Group key/value heads by short fits of all pairs: some hundred steps more a layer.",
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Seed of fits, sampled text and final pass.")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="Saved as float32, float16 or bfloat16. Default: the model's own."),
]
Device = Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")]
MaxExcess = Annotated[
    float | None,
    typer.Option(metavar="NATS", help="Exit status 3 if a held-out token costs more above this."),
]
MinCosine = Annotated[
    float | None,
    typer.Option(help="Exit status 3 if the held-out embeddings' mean cosine is below this."),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Discard an unfinished conversion to the same folder.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and print what would be done.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, no table.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No live display and no table.")]
Budget = Annotated[
    float, typer.Option(metavar="SHARE", help="Largest key/value cache, of the original's.")
]
PlanOut = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="TOML file for compress --plan.")
]
Figure = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Picture of the profile (needs matplotlib).")
]
KvChoices = Annotated[
    list[int] | None, typer.Option("--kv-heads", min=1, help="To try; may be given again.")
]
HeadChoices = Annotated[
    list[int] | None, typer.Option("--heads", min=1, help="To try; may be given again.")
]
HeadDimChoices = Annotated[
    list[int] | None, typer.Option("--head-dim", min=1, help="To try; may be given again.")
]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    app.command("compress")(compress_command)
    app.command("plan")(plan_command)


def compress_command(
    model: ModelName,
    calibration: Text,
    out: OutFolder = None,
    kv_heads: KvHeads = None,
    heads: Heads = None,
    head_dim: HeadDim = None,
    plan: PlanFile = None,
    layers: Layers = None,
    window: Window = None,
    tokens: Tokens = None,
    held_out: HeldOut = 0.1,
    generate: Generate = 0,
    final_steps: FinalSteps = None,
    max_iterations: MaxIterations = 30,
    max_seconds: MaxSeconds = None,
    fit_pairs: FitPairs = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = "cpu",
    max_excess: MaxExcess = None,
    min_cosine: MinCosine = None,
    restart: Restart = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model to fewer key/value heads, fewer heads or narrower heads.

    Every layer is fitted in turn to the outputs of the original; then those of a model that
    predicts the next token take the steps of the final pass together, towards what the original
    predicts. The result is an ordinary model folder with a model card; where no configuration of
    transformers can describe it, it loads with attnreg.load and says so. After a kill the same
    command goes on from what is in DIR.partial; with the number of iterations as the only bound
    the folder is then the same to the byte (same machine and number of threads).

    Exit status: 0 done, 2 bad input, 3 done but with a larger loss than --max-excess or
    --min-cosine allows; the folder is written all the same.
    """
    need_transformers()
    from attnreg.transformers.tables import command_line, conversion_summary, dry_run_summary
    from attnreg.transformers.task import Options, prepare

    options = Options(
        window=window,
        tokens=tokens,
        held_out=held_out,
        generate=generate,
        final_steps=final_steps,
        max_iterations=max_iterations,
        max_seconds=max_seconds,
        fit_pairs=fit_pairs,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    sizes = _plan(kv_heads, heads, head_dim, plan, layers)
    if out is None and not dry_run:
        raise ValueError("--out is missing; give the folder to write, or --dry-run")
    task = prepare(model, sizes, calibration, options)
    _check_bounds(task, max_excess, min_cosine)
    if dry_run:
        show(dry_run_summary(task), as_json=as_json, quiet=quiet)
        sys.exit(0)
    assert out is not None
    given = {"kv-heads": kv_heads, "heads": heads, "head-dim": head_dim, "layers": layers}
    command = command_line(model, calibration, out, given, plan, options)
    conversion = _convert(task, out, restart, command, sys.stderr.isatty() and not quiet)
    verdict = _verdict(conversion, max_excess, min_cosine)
    show(conversion_summary(conversion, verdict, as_json), as_json=as_json, quiet=quiet)
    if verdict is not None:
        typer.echo(f"attnreg: {verdict}; {out} was written all the same", err=True)
        sys.exit(TOO_LOSSY)


def plan_command(
    model: ModelName,
    calibration: Text,
    kv_budget: Budget = 0.5,
    kv_heads: KvChoices = None,
    heads: HeadChoices = None,
    head_dim: HeadDimChoices = None,
    out: PlanOut = None,
    figure: Figure = None,
    window: Window = None,
    tokens: Tokens = None,
    held_out: HeldOut = 0.1,
    max_iterations: MaxIterations = 0,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what each layer loses at each size, and find the plan that meets a budget.

    Each layer is taken alone, on the original's inputs: the best start from its weights, with
    --max-iterations of the solver after it (0: its W_O moved towards the solved one as far as
    held-out error says). The plan has the least sum of the squared relative
    errors of the layers' outputs, each layer counting the same; it is exact if errors add up.
    """
    need_transformers()
    from attnreg.transformers.checkpoint import Checkpoint
    from attnreg.transformers.display import MeasureDisplay
    from attnreg.transformers.sensitivity import choose, choose_even, measure
    from attnreg.transformers.tables import profile_summary
    from attnreg.transformers.task import Options, read_split

    if not 0 < kv_budget <= 1:
        raise ValueError(f"--kv-budget is {kv_budget}; expected a share above 0 and at most 1")
    check_figure("--figure", figure)
    checkpoint = Checkpoint.open(model)
    options = Options(
        window, tokens, held_out, max_iterations=max_iterations, seed=seed, device=device
    )
    windows = read_split(checkpoint, calibration, options)
    settings = _settings(kv_heads or [], heads or [], head_dim or [])
    with MeasureDisplay(enabled=sys.stderr.isatty() and not quiet) as display:
        try:
            profile = measure(checkpoint, *windows, settings, options, display.update)
        except KeyboardInterrupt:
            display.stop()
            typer.echo("attnreg: interrupted; a plan keeps nothing of unfinished work", err=True)
            sys.exit(INTERRUPTED)
    chosen, even = choose(profile, kv_budget), choose_even(profile, kv_budget)
    plan = chosen.plan()
    if out is not None:
        note = f"attnreg plan {Path(model).name}: {chosen.share:.3g} of the key/value cache"
        write_text(out, plan.toml(note))
    if figure is not None:
        from attnreg.report.sensitivity import save_profile

        save_profile(figure, profile, chosen.measured)
    show(profile_summary(profile, chosen, even, out, as_json), as_json=as_json, quiet=quiet)


# -- parts


def need_transformers() -> None:
    """Refuses in one line if the extra is missing, and silences transformers."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError(f"this command needs {error.name}: pip install 'attnreg[hf]'") from error
    transformers.utils.logging.set_verbosity_error()  # what is refused is one line
    transformers.utils.logging.disable_progress_bar()


def _plan(
    kv_heads: int | None,
    heads: int | None,
    head_dim: int | None,
    file: Path | None,
    layers: str | None,
) -> Plan:
    from attnreg.transformers.plan import Plan, Setting, parse_layers, read_plan

    default = Setting(kv_heads, heads, head_dim)
    only = None if layers is None else parse_layers(layers)
    if file is None:
        return Plan(default, only=only)
    if default.given():
        raise ValueError(
            f"--plan and sizes for every layer ({default}) were given; expected one of the two"
        )
    plan = read_plan(file)
    return Plan(plan.default, plan.layers, only)


def _settings(kv_heads: list[int], heads: list[int], head_dim: list[int]) -> list[Setting]:
    from attnreg.transformers.plan import Setting

    choices: list[list[int | None]] = [
        [*values] if values else [None] for values in (kv_heads, heads, head_dim)
    ]
    found = [Setting(*sizes) for sizes in product(*choices)]
    return [setting for setting in found if setting.given()]


def _check_bounds(task: Task, max_excess: float | None, min_cosine: float | None) -> None:
    """Refuses a bound on a number that the model will not have."""
    predicts = task.predicts
    if max_excess is not None and not predicts:
        raise ValueError(
            "--max-excess bounds the loss of next tokens, which this model does not predict; "
            "give --min-cosine"
        )
    if min_cosine is not None and predicts:
        raise ValueError(
            "--min-cosine bounds the change of embeddings, and this model predicts tokens; give "
            "--max-excess"
        )


def _convert(task: Task, out: Path, restart: bool, command: str, live: bool) -> Conversion:
    from attnreg.transformers.convert import convert, partial_folder
    from attnreg.transformers.display import ConversionDisplay

    with ConversionDisplay(task, enabled=live) as display:
        try:
            return convert(task, out, restart=restart, command=command, observer=display.update)
        except KeyboardInterrupt:
            display.stop()
            typer.echo(
                f"attnreg: interrupted; the same command goes on from {partial_folder(out)}",
                err=True,
            )
            sys.exit(INTERRUPTED)


def _verdict(
    conversion: Conversion, max_excess: float | None, min_cosine: float | None
) -> str | None:
    """Why a conversion is too lossy; None if it is not."""
    excess, cosine = conversion.excess, conversion.cosine
    if max_excess is not None and excess is not None and not excess <= max_excess:
        return (
            f"the excess is {excess:.4g} nats a held-out token, above --max-excess {max_excess:g}"
        )
    if min_cosine is not None and cosine is not None and not cosine >= min_cosine:
        return f"the mean cosine is {cosine:.4f}, below --min-cosine {min_cosine:g}"
    return None


def check_figure(option: str, figure: Path | None) -> None:
    """Refuses a picture that could not be drawn or written."""
    if figure is None:
        return
    if not figure.resolve().parent.is_dir():
        raise ValueError(f"{option} {figure}: its folder does not exist; make it first")
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise ValueError(f"{option} needs matplotlib: pip install 'attnreg[plots]'") from error
    formats = FigureCanvasBase.get_supported_filetypes()
    if figure.suffix[1:].lower() not in formats:
        raise ValueError(f"{option} {figure}: its ending is none of {', '.join(sorted(formats))}")
