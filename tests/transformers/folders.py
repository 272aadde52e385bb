"""Tiny random models as folders, and what plain transformers computes from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
IDS = torch.arange(21)[None] * 7 % 60
OLD = transformers.__version__.startswith("4.")


def _llama() -> Any:
    config = transformers.LlamaConfig(
        **SMALL, intermediate_size=40, num_key_value_heads=2, tie_word_embeddings=True,
        rope_theta=5000.0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=40))


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _albert() -> Any:
    config = transformers.AlbertConfig(**SMALL, embedding_size=16, intermediate_size=40)
    return transformers.AlbertModel(config)


BUILDERS = {"llama": _llama, "bert": _bert, "gpt2": _gpt2, "albert": _albert}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "20KB"
) -> Path:
    """Writes a random model as ``save_pretrained`` does; every number drawn, gains included."""
    torch.manual_seed(3)
    model = BUILDERS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def by_transformers(folder: Path, dtype: torch.dtype) -> Any:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    options = {"torch_dtype" if OLD else "dtype": dtype}
    return getattr(transformers, name).from_pretrained(folder, **options).eval()


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    return model(IDS)[0]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def listing(folder: Path) -> list[str]:
    """Everything below a folder, hidden things too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
