"""Convert an encoder to a third of its key/value heads and compare sentence embeddings.

    python examples/encoder.py MODEL_FOLDER calibration.txt OUT

No configuration of transformers describes a BERT with grouped key/value heads, so the folder loads
with attnreg.load.
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer

import attnreg
from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.checkpoint import Checkpoint
from attnreg.transformers.convert import convert
from attnreg.transformers.display import ConversionDisplay
from attnreg.transformers.plan import Plan, Setting
from attnreg.transformers.task import Options, prepare

SENTENCES = ["A cat sat on the mat.", "Gradient descent converges slowly.", "It rained all night."]


@torch.no_grad()
def embed(model: torch.nn.Module, tokenizer: object) -> torch.Tensor:
    found = [model.base_model(**tokenizer(text, return_tensors="pt"))[0] for text in SENTENCES]
    return torch.stack([hidden[0].mean(0) for hidden in found])


def main(model: str, calibration: str, out: str) -> None:
    config = Checkpoint.open(model).config
    kv_heads = adapter_for(config).shape(config, 0).kv_heads
    task = prepare(model, Plan(Setting(kv_heads=kv_heads // 3)), calibration, Options())
    with ConversionDisplay(task, enabled=sys.stderr.isatty()) as display:
        done = convert(task, out, observer=display.update)
    print(f"held-out cosine: {done.cosine:.4f}")
    tokenizer = AutoTokenizer.from_pretrained(model)
    before = embed(AutoModel.from_pretrained(model).eval(), tokenizer)
    after = embed(attnreg.load(out).eval(), tokenizer)
    for sentence, cosine in zip(SENTENCES, torch.cosine_similarity(before, after), strict=True):
        print(f"{cosine:.4f}  {sentence}")


if __name__ == "__main__":
    main(*sys.argv[1:])
