"""Convert a causal model to half as many key/value heads and load it with transformers.

    python examples/causal_model.py MODEL_FOLDER calibration.txt OUT

The same from a shell:

    attnreg compress MODEL_FOLDER --kv-heads 2 --calibration calibration.txt --out OUT
"""

import sys

from transformers import AutoModelForCausalLM

from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.checkpoint import Checkpoint
from attnreg.transformers.convert import convert
from attnreg.transformers.display import ConversionDisplay
from attnreg.transformers.plan import Plan, Setting
from attnreg.transformers.task import Options, prepare


def main(model: str, calibration: str, out: str) -> None:
    config = Checkpoint.open(model).config
    kv_heads = adapter_for(config).shape(config, 0).kv_heads
    plan = Plan(Setting(kv_heads=kv_heads // 2))
    task = prepare(model, plan, calibration, Options(max_iterations=10, final_steps=100))
    with ConversionDisplay(task, enabled=sys.stderr.isatty()) as display:
        done = convert(task, out, observer=display.update)
    print(f"excess on held-out text: {done.excess:.4f} nats per token")
    if task.obstacle is None:
        student = AutoModelForCausalLM.from_pretrained(out)
        print(
            f"transformers loads it: {type(student).__name__}, {student.num_parameters()} weights"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
