"""Which students plain transformers builds, with the logits of the module that was written."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from attnreg.transformers.adapters import NotExpressible, adapter_for
from attnreg.transformers.shapes import Sizes
from tests.transformers.families import (
    AVAILABLE,
    STUDENTS,
    V5,
    outputs,
    shapes_of,
    write_random,
)

DECODERS = [
    "llama",
    "llama-biased",
    "llama-linear",
    "llama-dynamic",
    "llama-yarn",
    "llama-llama3",
    "mistral",
    "mistral-window",
    "qwen2",
    "qwen2-window",
    "qwen3",
]
# 32 wide, 4 heads and 2 key/value heads of 8. Sizes that Llama's configuration refuses: 3 and 6
# heads, which do not divide the width; Mistral's takes them, unless there are biases or, in 4.45,
# scaled frequencies. Qwen2 of 4.45 builds heads of width / heads only.
UNEVEN = ("heads", "all")


def expected(family: str, student: str) -> str | None:
    """The name of the configuration, None where no class of this version builds the student."""
    kind = AVAILABLE[family].config
    if kind == "Llama" and student in UNEVEN:
        scaled = family not in ("llama", "llama-biased")
        return None if family == "llama-biased" or (scaled and not V5) else "MistralConfig"
    if kind == "Qwen2" and not V5 and student != "kv":
        return None
    return f"{kind}Config"


@pytest.mark.parametrize("family", [name for name in DECODERS if name in AVAILABLE])
@pytest.mark.parametrize("student", STUDENTS)
def test_plain_transformers_builds_the_student(family, student):
    model = AVAILABLE[family].make()
    model.config.architectures = [type(model).__name__]
    adapter, shapes = adapter_for(model.config), shapes_of(model, **STUDENTS[student])
    write_random(model, shapes)
    name = expected(family, student)
    if name is None:
        with pytest.raises(NotExpressible, match=r"Config (refuses|of this version)|rope_scaling"):
            adapter.student_config(model.config, shapes)
        return
    config = adapter.student_config(model.config, shapes)
    assert type(config).__name__ == name
    assert config.architectures == [name.replace("Config", "ForCausalLM")]
    assert [adapter_for(config).shape(config, i) for i in range(len(shapes))] == shapes
    # the module that was written, in the attention that it has: sdpa
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    assert type(plain).__name__ == config.architectures[0]
    plain.load_state_dict(model.state_dict())
    # float32, the same operations in another memory layout
    torch.testing.assert_close(outputs(plain), outputs(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta", "albert"])
@pytest.mark.parametrize("student", STUDENTS)
def test_families_without_sizes_of_their_own(family, student):
    model = AVAILABLE[family].make()
    adapter = adapter_for(model.config)
    assert adapter.student_config(model.config, shapes_of(model)) is model.config
    with pytest.raises(NotExpressible, match=r"attnreg\.load"):
        adapter.student_config(model.config, shapes_of(model, **STUDENTS[student]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_of_different_sizes_are_not_expressible(family):
    config = AVAILABLE[family].make().config
    adapter = adapter_for(config)
    shapes = [adapter.shape(config, 0), adapter.shape(config, 1, Sizes(kv_heads=1))]
    with pytest.raises(NotExpressible, match="one shape for all layers"):
        adapter.student_config(config, shapes)
