"""The command ``evaluate``; what needs transformers is imported when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnreg.cli_conversion import Device, Json, Quiet, Text, Window, need_transformers
from attnreg.summaries import show

if TYPE_CHECKING:
    from attnreg.transformers.calibration import Windows
    from attnreg.transformers.checkpoint import Checkpoint
    from attnreg.transformers.evaluate import Evaluation, Masking

COMPARED_WINDOWS = 32
"""Windows whose text both tokenizers are compared on."""

Original = Annotated[
    str, typer.Argument(metavar="ORIGINAL", help="Model folder, or a name on the hub.")
]
Converted = Annotated[
    str, typer.Argument(metavar="CONVERTED", help="What attnreg compress made of it.")
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Tokens of the text at most.")]
FirstOnly = Annotated[
    bool, typer.Option("--first-only", help="Only the first window of each document.")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="Compute in float32, float16 or bfloat16. Default: each as it is saved."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the masked tokens.")]


def add_to(app: typer.Typer) -> None:
    """Adds the command to the program."""
    app.command("evaluate")(evaluate_command)


def evaluate_command(
    original: Original,
    converted: Converted,
    text: Text,
    window: Window = None,
    max_tokens: MaxTokens = None,
    first_only: FirstOnly = False,
    dtype: Dtype = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a converted model with its original on held-out text.

    Models that predict the next token: perplexity, excess nats per token, divergence of the
    predictions and agreement of the first choices. Masked language models: the same of masked
    tokens, and their accuracy. These and encoders without a head: cosine between the embeddings of
    a window. All: error of every layer and head, parameters, key/value cache, speed.
    """
    need_transformers()
    from attnreg.transformers.checkpoint import Checkpoint
    from attnreg.transformers.display import WindowsDisplay
    from attnreg.transformers.evaluate import evaluate
    from attnreg.transformers.loading import load
    from attnreg.transformers.task import DTYPES, Options

    options = Options(window=window, tokens=max_tokens, seed=seed, dtype=dtype, device=device)
    checkpoints = (Checkpoint.open(original), Checkpoint.open(converted))
    windows, masking = _read(checkpoints, text, options.window, max_tokens, first_only, seed)
    kind = None if dtype is None else DTYPES[dtype]
    left, right = (load(one.folder, dtype=kind).to(device) for one in checkpoints)
    with WindowsDisplay(enabled=sys.stderr.isatty() and not quiet) as display:
        found = evaluate(left, right, windows, masking=masking, observer=display.update)
    summary = _table(found) if not as_json else _report(found, checkpoints, windows)
    show(summary, as_json=as_json, quiet=quiet)


# -- parts


def _read(
    checkpoints: tuple[Checkpoint, Checkpoint],
    text: str,
    window: int | None,
    max_tokens: int | None,
    first_only: bool,
    seed: int,
) -> tuple[Windows, Masking | None]:
    """The text as windows, and how to mask it if the tokenizer has a mask token."""
    from attnreg.transformers.calibration import read_tokenizer, read_windows
    from attnreg.transformers.evaluate import Masking
    from attnreg.transformers.task import window_length

    tokenizers = [read_tokenizer(one.folder) for one in checkpoints]
    length = window_length(checkpoints[0].config, window)
    windows = read_windows(
        text, tokenizers[0], length=length, max_tokens=max_tokens, first_only=first_only
    )
    _check_tokenizers(tokenizers, windows, checkpoints)
    mask, special = tokenizers[0].mask_token_id, tuple(tokenizers[0].all_special_ids)
    return windows, None if mask is None else Masking(mask, special, seed)


def _check_tokenizers(
    tokenizers: list[Any], windows: Windows, checkpoints: tuple[Checkpoint, Checkpoint]
) -> None:
    """Refuses models that would be scored on different tokens."""
    left, right = tokenizers
    texts = [left.decode(list(ids)) for ids in windows.ids[:COMPARED_WINDOWS]]
    encoded = [[one(text, verbose=False)["input_ids"] for text in texts] for one in tokenizers]
    for what, same in (
        ("vocabularies", left.get_vocab() == right.get_vocab()),
        ("ids of the text", encoded[0] == encoded[1]),
    ):
        if not same:
            names = " and ".join(str(one.folder) for one in checkpoints)
            raise ValueError(
                f"the tokenizers of {names} differ in their {what}; expected the same: give a "
                "model and a conversion of it"
            )


def _report(
    found: Evaluation, checkpoints: tuple[Checkpoint, Checkpoint], windows: Windows
) -> dict[str, Any]:
    """Everything, with what it is the result of."""
    import torch
    import transformers

    from attnreg import __version__
    from attnreg.transformers.calibration import HUB
    from attnreg.transformers.task import model_digest

    report = found.to_dict()
    for side, one in zip(("original", "converted"), checkpoints, strict=True):
        named = {"model": one.folder.name, "digest": model_digest(one)}
        report[side] = named | report[side]
    source = windows.source  # a file without its folder, a data set as it was given
    name = source if source.startswith(HUB) else Path(source).name
    text = {"text": name, "left_out": windows.left_out}
    versions = {
        "attnreg": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return report | text | {"versions": versions}


def _table(found: Evaluation) -> dict[str, Any]:
    """What the table shows: one row for a score, one for a layer."""
    left, right = found.original.__dict__, found.converted.__dict__
    scores = [
        {"score": name.replace("_", " "), "original": left[name], "converted": right[name]}
        for name in left
        if left[name] is not None
    ]
    names = ("excess", "kl", "agreement", "cosine_mean", "cosine_min")
    both = {name: getattr(found, name) for name in names if getattr(found, name) is not None}
    layers = [
        {
            "layer": str(one.layer),
            "error": one.error,
            "heads": " ".join(f"{error:.3f}" for error in one.heads or ()) or "not the same",
        }
        for one in found.layers
    ]
    head = {"kind": found.kind, "windows": found.windows, "tokens": found.tokens}
    return {**head, "predicted": found.predicted, "scores": scores, **both, "layers": layers}
