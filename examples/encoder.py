"""Convert an encoder to a third of its key/value heads and compare sentence embeddings.

    python examples/encoder.py MODEL_FOLDER calibration.txt OUT

No configuration of transformers describes a BERT with grouped key/value heads, so the folder loads
with attnreg.load.
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer

import attnreg
from attnreg.transformers.convert import convert
from attnreg.transformers.plan import Plan, Setting
from attnreg.transformers.task import Options, prepare

SENTENCES = ["A cat sat on the mat.", "Gradient descent converges slowly.", "It rained all night."]


@torch.no_grad()
def embed(model: torch.nn.Module, tokenizer: object) -> torch.Tensor:
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


def main(model: str, calibration: str, out: str) -> None:
    kv_heads = prepare(model, Plan(), calibration, Options()).groups[0].original.kv_heads
    task = prepare(model, Plan(Setting(kv_heads=kv_heads // 3)), calibration, Options())
    print(f"held-out cosine: {convert(task, out).cosine:.4f}")
    tokenizer = AutoTokenizer.from_pretrained(model)
    before = embed(AutoModel.from_pretrained(model).eval(), tokenizer)
    after = embed(attnreg.load(out).eval(), tokenizer)
    for sentence, cosine in zip(SENTENCES, torch.cosine_similarity(before, after), strict=True):
        print(f"{cosine:.4f}  {sentence}")


if __name__ == "__main__":
    main(*sys.argv[1:])
