"""Tiny random models of every supported family, and attention written out in float64."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.shapes import Sizes

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
V5 = VERSION >= (5, 0)

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Family:
    """A configuration; ``head`` is the architecture without the name of the configuration.

    ``double`` is the implementation that attends in float64: Llama's eager softmax is in float32,
    and transformers 4.45 cannot make the causal mask of GPT-2's and BERT's sdpa in float64.
    """

    config: str
    values: dict[str, Any]
    head: str = "ForCausalLM"
    attention: str = "sdpa"
    double: str = "sdpa"
    oldest: tuple[int, int] = (4, 45)

    def make(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model with weights large enough for the attention to matter."""
        kind = getattr(transformers, f"{self.config}Config")
        attention = self.double if dtype == torch.float64 else self.attention
        config = kind(**self.values, attn_implementation=attention, pad_token_id=0)
        torch.manual_seed(0)
        model = getattr(transformers, self.config + self.head)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "orm" in name or "ln_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                else:
                    parameter.normal_(std=0.3)
        return model.to(dtype)


FAMILIES = {
    "llama": Family("Llama", GROUPED),
    "llama-eager": Family("Llama", GROUPED, attention="eager"),
    "llama-biased": Family("Llama", GROUPED | {"attention_bias": True}),
    "llama-wide": Family("Llama", GROUPED | {"head_dim": 12}),
    "llama-linear": Family(
        "Llama", GROUPED | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    ),
    "llama-dynamic": Family(
        "Llama", GROUPED | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    ),
    "llama-yarn": Family("Llama", GROUPED | {"rope_scaling": YARN}),
    "llama-llama3": Family("Llama", GROUPED | {"rope_scaling": LLAMA3}),
    "mistral": Family("Mistral", GROUPED | {"sliding_window": None}),
    "mistral-window": Family("Mistral", GROUPED | {"sliding_window": 3}),
    "qwen2": Family("Qwen2", GROUPED),
    "qwen2-window": Family(
        "Qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        oldest=(5, 0),
    ),
    "qwen3": Family("Qwen3", GROUPED | {"head_dim": 8}, oldest=(5, 0)),
    "gpt2": Family("GPT2", SIZES, head="LMHeadModel", double="eager"),
    "gpt2-inverse": Family(
        "GPT2",
        SIZES | {"scale_attn_by_inverse_layer_idx": True},
        head="LMHeadModel",
        attention="eager",
        double="eager",
    ),
    "gpt2-unscaled": Family(
        "GPT2",
        SIZES | {"scale_attn_weights": False},
        head="LMHeadModel",
        attention="eager",
        double="eager",
    ),
    "bert": Family("Bert", SIZES, head="ForMaskedLM"),
    "bert-eager": Family("Bert", SIZES, head="ForMaskedLM", attention="eager"),
    "bert-base": Family("Bert", SIZES, head="Model"),
    "bert-decoder": Family(
        "Bert", SIZES | {"is_decoder": True}, head="LMHeadModel", double="eager"
    ),
    "roberta": Family("Roberta", SIZES, head="ForMaskedLM"),
    "albert": Family(
        "Albert",
        SIZES
        | {
            "embedding_size": 16,
            "num_hidden_layers": 4,
            "num_hidden_groups": 2,
            "inner_group_num": 2,
        },
        head="ForMaskedLM",
    ),
}
STUDENTS = {
    "kv": {"kv_heads": 1},
    "heads": {"heads": 3, "kv_heads": 3},
    "grouped": {"heads": 2, "kv_heads": 1},
    "head_dim": {"head_dim": 6},
    "all": {"heads": 6, "kv_heads": 2, "head_dim": 4},
}
AVAILABLE = {name: family for name, family in FAMILIES.items() if family.oldest <= VERSION}


def inputs() -> dict[str, torch.Tensor]:
    """Three sequences of 9, 9 and 6 tokens, padded on the right."""
    ids = torch.randint(2, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def outputs(model: nn.Module) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head, at real tokens."""
    given = inputs()
    with torch.no_grad():
        found = model(**given)
    return getattr(found, "logits", found[0])[given["attention_mask"].bool()]


def tapped(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of the attention of every block, in the order of application."""
    adapter = adapter_for(model.config)
    seen: list[list[torch.Tensor]] = [[], []]
    hooks = []
    for block in {id(block): block for block in adapter.blocks(model)}.values():
        first, last = adapter.taps(block)
        hooks.append(first.register_forward_pre_hook(lambda _, args: seen[0].append(args[0])))
        hooks.append(last.register_forward_hook(lambda _, args, out: seen[1].append(out)))
    outputs(model)
    for hook in hooks:
        hook.remove()
    return list(zip(*seen, strict=True))


def reference(x, weights, shape, valid):
    """The layer's output (batch, n, width), in float64, one line for one step."""
    n, d = x.shape[1], shape.head_dim
    w = {name: value.double() for name, value in weights.items()}

    def heads(name, count):  # (batch, count, n, d)
        rows = x.double() @ w[f"W_{name}"] + w.get(f"b_{name}", 0.0)
        rows = rows.reshape(len(x), n, count, d).transpose(1, 2)
        if name in "QK" and shape.norm_eps is not None:
            squares = (rows**2).mean(-1, keepdim=True)
            rows = rows / (squares + shape.norm_eps) ** 0.5 * w[f"g_{name}"]
        if name in "QK" and shape.rotary is not None:
            frequencies = torch.tensor(shape.rotary.frequencies, dtype=torch.float64)
            angles = torch.arange(n)[:, None] * frequencies
            left, right = rows.chunk(2, dim=-1)
            turned = torch.complex(left, right) * torch.polar(torch.ones_like(angles), angles)
            rows = torch.cat((turned.real, turned.imag), dim=-1) * shape.rotary.factor
        return rows.repeat_interleave(shape.heads // count, dim=1)

    query = heads("Q", shape.heads)
    key, value = heads("K", shape.kv_heads), heads("V", shape.kv_heads)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    seen = valid[:, None, None, :].bool() & (j <= i if shape.causal else j == j)
    if shape.window is not None:
        seen = seen & (j > i - shape.window)
    logits = query @ key.transpose(-1, -2) * shape.scale
    attention = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    mixed = (attention @ value).transpose(1, 2).reshape(len(x), n, -1)
    return mixed @ w["W_O"] + w.get("b_O", 0.0)


class ExactRotary(nn.Module):
    """The same frequencies as a rotary module of transformers, cosines in the model's own dtype.

    Transformers computes angles in float32 also for a model in float64.
    """

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.frequencies = old.inv_freq.double()
        self.factor = getattr(old, "attention_scaling", 1.0)

    def forward(self, x, position_ids):
        angles = position_ids[..., None] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.factor).to(x.dtype), (angles.sin() * self.factor).to(x.dtype)


def exact(model: nn.Module) -> nn.Module:
    """A float64 model without the steps that transformers does in float32 within attention."""
    for name, module in list(model.named_modules()):
        owner, _, leaf = name.rpartition(".")
        if type(module).__name__.endswith("RotaryEmbedding"):
            setattr(model.get_submodule(owner), leaf, ExactRotary(module))
        if leaf in ("q_norm", "k_norm"):
            new = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
            new.weight = module.weight
            setattr(model.get_submodule(owner), leaf, new)
    return model


def shapes_of(model, **sizes):
    adapter = adapter_for(model.config)
    blocks = adapter.blocks(model)
    return [adapter.shape(model.config, i, Sizes(**sizes)) for i in range(len(blocks))]


def write_random(model, shapes, seed=2):
    """Random weights of the shapes; the last application decides where a block is shared."""
    adapter = adapter_for(model.config)
    generator = torch.Generator().manual_seed(seed)
    for block, shape in zip(adapter.blocks(model), shapes, strict=True):
        weights = {
            name: torch.randn(size, generator=generator) * 0.3
            for name, size in shape.weights().items()
        }
        adapter.write(block, weights, shape)
