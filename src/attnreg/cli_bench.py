"""The command ``bench roofline``: how fast this machine runs the kernels of a fit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from attnreg.cli_conversion import INTERRUPTED, Device, Json, Quiet, check_figure
from attnreg.progress import LiveLine
from attnreg.summaries import show

if TYPE_CHECKING:
    from attnreg.roofline.measure import Roofline

DTYPES = {"float32": torch.float32, "float64": torch.float64}

Dim = Annotated[int, typer.Option(min=1, help="Width of the layer's inputs and outputs.")]
Heads = Annotated[int, typer.Option(min=1, help="Query heads.")]
KvHeads = Annotated[int | None, typer.Option(min=1, help="Key/value heads. Default: --heads.")]
SequenceCount = Annotated[int, typer.Option("--sequences", min=1, help="Number of sequences.")]
Length = Annotated[int, typer.Option(min=1, help="Rows of a sequence.")]
NewtonDim = Annotated[int, typer.Option(min=1, help="Width of the dense step's problem.")]
NewtonLength = Annotated[int, typer.Option(min=1, help="Rows of the dense step's problem.")]
Dtype = Annotated[str, typer.Option(help=f"Of the data: {' or '.join(DTYPES)}.")]
Precision = Annotated[
    str, typer.Option(help="Of products of float32 matrices: float32, tf32 or bf16.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Of the processor. Default: torch's.")]
Repeats = Annotated[int, typer.Option(min=1, help="Turns; the median counts.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the data.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Picture (needs matplotlib).")]

bench = typer.Typer(help="Measure this machine.", no_args_is_help=True, rich_markup_mode=None)


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    bench.command("roofline")(roofline_command)
    app.add_typer(bench, name="bench")


@bench.callback()
def _group() -> None:
    """Keeps the command's name where it is the only one."""


def roofline_command(
    dim: Dim = 384,
    heads: Heads = 12,
    kv_heads: KvHeads = None,
    sequences: SequenceCount = 64,
    length: Length = 128,
    newton_dim: NewtonDim = 32,
    newton_length: NewtonLength = 1024,
    dtype: Dtype = "float32",
    precision: Precision = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    repeats: Repeats = 5,
    seed: Seed = 0,
    plot: Plot = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare each kernel's rate with that of its matrix products alone.

    On random data of a multi-head layer: features, their Jacobian products (JVP, VJP),
    Gauss-Newton and Hessian products, the gradient of a mini-batch; and one dense Newton step of
    the bilinear model. The matrix products (and Cholesky factor) of a kernel are run alone too, in
    turns with it; the share is the rate achieved over theirs. GFLOP and GFLOP/s count these
    products only, "other" is all other arithmetic, MB the least traffic. The error is that of the
    kernel's result against the same in float64.

    --precision tf32 and bf16 round the factors of float32 products; tf32 needs a CUDA device.
    """
    from attnreg.roofline import Sizes, measure

    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; expected {' or '.join(DTYPES)}")
    check_figure("--plot", plot)
    sizes = Sizes(dim, heads, kv_heads, sequences, length, newton_dim, newton_length)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with LiveLine("drawing data", enabled=sys.stderr.isatty() and not quiet) as line:
            found = measure(
                sizes,
                dtype=DTYPES[dtype],
                precision=precision,
                device=device,
                repeats=repeats,
                seed=seed,
                observe=line.show,
            )
    except KeyboardInterrupt:
        typer.echo("attnreg: interrupted; nothing was measured", err=True)
        sys.exit(INTERRUPTED)
    finally:
        torch.set_num_threads(before)
    if plot is not None:
        from attnreg.roofline.picture import draw

        draw(found, plot)
    show(found.as_dict() if as_json else _table(found), as_json=as_json, quiet=quiet)


def _table(found: Roofline) -> dict[str, Any]:
    """The measurements as people read them."""
    giga, mega = 1e9, 1e6
    rows = [
        {
            "kernel": kernel.name,
            "GFLOP": _three(kernel.gemm_operations / giga),
            "other": _three(kernel.entrywise_operations / giga),
            "MB": _three(kernel.bytes / mega),
            "FLOP/B": _three(kernel.intensity),
            "ms": _three(1e3 * kernel.seconds),
            "GFLOP/s": _three(kernel.rate / giga),
            "alone": _three(kernel.gemm_rate / giga),
            "share": f"{kernel.share:.0%}",
            "error": f"{kernel.error:.0e}",
        }
        for kernel in found.kernels
    ]
    threads = f", {found.threads} threads" if found.threads > 1 else ", one thread"
    return {
        "device": found.device + (threads if found.device == "cpu" else ""),
        "data": f"{found.dtype}, products in {found.precision}",
        "large product": f"{_three(found.peak / giga)} GFLOP/s",
        "memory": f"{_three(found.bandwidth / giga)} GB/s",
        "notes": [f"{kernel.name}: {kernel.note}" for kernel in found.kernels if kernel.note],
        "kernels": rows,
    }


def _three(value: float) -> str:
    """About three digits, without an exponent."""
    if value < 1e-3:
        return "<0.001"
    if value < 1:
        return f"{value:.3f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
