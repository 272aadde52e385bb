"""One layer: record it, start a smaller one from its weights, fit it, look at the errors.

python examples/one_layer.py MODEL_FOLDER text.txt [LAYER]
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer

import attnreg
from attnreg.reduction.starts import best_start
from attnreg.result import relative_error
from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.calibration import read_windows
from attnreg.transformers.capture import capture


def main(folder: str, text: str, layer: int = 0) -> None:
    model = AutoModel.from_pretrained(folder).eval()
    windows = read_windows(text, AutoTokenizer.from_pretrained(folder), length=128, limit=48)
    with capture(model, [layer]) as captured, torch.no_grad():
        for input_ids, attention_mask in windows.batches(8):
            model(input_ids=input_ids, attention_mask=attention_mask)
    problem = captured.problem(layer)
    held_out, validation = (problem.subset(range(i, problem.n_sequences, 8)) for i in (0, 4))
    fitted = problem.subset(i for i in range(problem.n_sequences) if i % 4)

    adapter = adapter_for(model.config)
    shape = adapter.shape(model.config, layer)
    weights = adapter.read(adapter.blocks(model)[layer])
    student = shape.student(kv_heads=shape.kv_heads // 2).model()
    start = best_start(fitted, shape.model(), weights, student)
    print(f"starts: { {name: round(error, 3) for name, error in start.tried.items()} }")
    result = attnreg.fit_validated(
        fitted, validation, student, init=start.unsolved, max_seconds=20, progress=True
    )
    print(result.notes[0])

    for name, parameters in (("start", start.weights), ("fit", result.parameters)):
        error = relative_error(held_out, student, parameters)
        print(f"{name}: relative error on held-out text {error:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]))
