"""A real causal model with smaller attention: attnreg beside what one would otherwise do.

The model is the stories260k folder under ATTNREG_BEDS (5 layers, RoPE, 8 query heads over 4
key/value heads); methods and time are those of `benchmarks.conversion_bed`. Fitted on
calibration.txt in windows of 512 tokens, and on as many tokens as `--generate` says (60 000; 0 for
none) that the original writes in continuation of it. evaluation.txt only scores: each story from
its beginning, at most 512 tokens; excess in nats per token over the original.

    python -m benchmarks.conversion --students kv2 --seconds 5 20
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.conversion_bed import Bed, run

STUDENTS = {
    "kv2": {"kv_heads": 2},
    "kv1": {"kv_heads": 1},
    "heads6": {"heads": 6, "kv_heads": 3},
    "dim6": {"head_dim": 6},
}


def folder() -> Path:
    """The model's folder."""
    root = Path(os.environ.get("ATTNREG_BEDS", "../shared/beds"))
    found = root / "stories260k"
    if not found.is_dir():
        raise SystemExit(f"{found} does not exist: set ATTNREG_BEDS to the folder of the beds")
    return found


@torch.no_grad()
def nats(model_folder: Path, texts: Sequence[str]) -> float:
    """Nats per token of each text alone, at most 512 tokens of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor(tokenizer(text)["input_ids"][:512])
        logits = model(ids[None]).logits[0, :-1].double()
        total += float(functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    return total / count


def bed() -> Bed:
    """The bed, its original scored."""
    from attnreg.transformers.plan import Plan, Setting
    from attnreg.transformers.task import Options, prepare

    original = folder()
    text = (original / "evaluation.txt").read_text(encoding="utf-8")
    texts = [part for part in text.split("\n\n") if part.strip()]
    before = nats(original, texts)

    def task(sizes: Mapping[str, int], fields: Mapping[str, Any]) -> Any:
        calibration = str(original / "calibration.txt")
        return prepare(str(original), Plan(Setting(**sizes)), calibration, Options(**fields))

    def score(student: Path) -> dict[str, float]:
        after = nats(student, texts)
        return {"excess_nats": after - before, "perplexity": math.exp(after)}

    return Bed(
        name="conversion",
        title=f"stories260k, original perplexity {math.exp(before):.3f}",
        layers=5,
        students=STUDENTS,
        seconds=(10.0, 20.0),
        rates=(5e-3, 1e-2, 2e-2, 4e-2),
        windows=4,
        generate=60_000,
        prepare=task,
        score=score,
        facts={"original_nats": before},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the rows asked for and saves them."""
    run(bed(), __doc__, arguments)


if __name__ == "__main__":
    main()
