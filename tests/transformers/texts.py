"""Tiny models with a tokenizer, and text for them."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.transformers.folders import save

WORDS = {f"w{i}": i for i in range(60)}


def model_folder(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB"
) -> Path:
    """A random model with a tokenizer of 60 words."""
    save(family, folder, dtype, shard)
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def write_text(path: Path, documents: int = 20, longest: int = 30, seed: int = 0) -> Path:
    """Documents of 15 to 30 words."""
    draw = random.Random(seed)
    texts = [
        " ".join(f"w{draw.randrange(1, 60)}" for _ in range(draw.randrange(15, longest + 1)))
        for _ in range(documents)
    ]
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
