"""Llama, Mistral, Qwen2 and Qwen3: grouped heads, rotary position embedding, no biases or some."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, MistralConfig

from attnreg.models.rotary import Rotary
from attnreg.transformers.adapters.base import Adapter, NotExpressible, register
from attnreg.transformers.adapters.modules import (
    VERSION,
    check_sizes_only,
    check_weights,
    exchange,
    put_linear,
    read_linear,
    uniform,
)
from attnreg.transformers.shapes import BIASES, ORIGINAL, AttentionShape, Sizes

_NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_PROJECTIONS = {"q_proj": "Q", "k_proj": "K", "v_proj": "V", "o_proj": "O"}


@register
class LlamaAdapter(Adapter):
    """The decoders that share Llama's block."""

    model_types = tuple(_NAMES)

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        """The decoder layers."""
        return list(model.base_model.layers)

    def attention(self, block: Any) -> nn.Module:
        """The block's ``self_attn``."""
        return cast("nn.Module", block.self_attn)

    def taps(self, block: Any) -> tuple[nn.Module, nn.Module]:
        """The query and the output projection."""
        return block.self_attn.q_proj, block.self_attn.o_proj

    def shape(self, config: Any, layer: int, sizes: Sizes = ORIGINAL) -> AttentionShape:
        """See :meth:`Adapter.shape`."""
        if VERSION < (5, 0) and (getattr(config, "pretraining_tp", None) or 1) > 1:
            raise ValueError(
                f"pretraining_tp {config.pretraining_tp} cuts the projections into slices: set it "
                "to 1, which computes the same"
            )
        size = _head_dim(config) if sizes.head_dim is None else sizes.head_dim
        return AttentionShape(
            width=config.hidden_size,
            heads=config.num_attention_heads if sizes.heads is None else sizes.heads,
            kv_heads=config.num_key_value_heads if sizes.kv_heads is None else sizes.kv_heads,
            head_dim=size,
            scale=size**-0.5,
            causal=True,
            window=_window(config, layer),
            biases=_biases(config),
            rotary=_rotary(config, size),
            norm_eps=config.rms_norm_eps if config.model_type == "qwen3" else None,
        )

    def read(self, block: Any) -> dict[str, Tensor]:
        """Copies of the weights; a norm's gain is ``g_Q`` or ``g_K``."""
        attention = block.self_attn
        weights: dict[str, Tensor] = {}
        for name, letter in _PROJECTIONS.items():
            weights |= read_linear(getattr(attention, name), letter)
        if hasattr(attention, "q_norm"):
            weights["g_Q"] = attention.q_norm.weight.detach().clone()
            weights["g_K"] = attention.k_norm.weight.detach().clone()
        return weights

    def write(self, block: Any, weights: Mapping[str, Tensor], shape: AttentionShape) -> None:
        """See :meth:`Adapter.write`."""
        attention = block.self_attn
        derived = self.shape(
            attention.config,
            attention.layer_idx,
            shape.sizes,
        )
        check_sizes_only(shape, derived)
        check_weights(weights, shape)
        for name, letter in _PROJECTIONS.items():
            put_linear(attention, name, weights[f"W_{letter}"], weights.get(f"b_{letter}"))
        if shape.norm_eps is not None:
            for name, gain in (("q_norm", "g_Q"), ("k_norm", "g_K")):
                with torch.device("meta"):
                    new = type(getattr(attention, name))(shape.head_dim, eps=shape.norm_eps)
                exchange(attention, name, new, {"weight": weights[gain]})
        if shape.head_dim != attention.head_dim:
            _own_rotary(attention, shape.head_dim)
        sizes = {
            "num_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "num_key_value_groups": shape.heads // shape.kv_heads,
            "head_dim": shape.head_dim,
            "scaling": shape.scale,
            "hidden_size": shape.heads * shape.head_dim,  # 4.x reshapes the heads' outputs to it
        }
        for name, value in sizes.items():
            if hasattr(attention, name):
                setattr(attention, name, value)

    def student_config(self, config: Any, shapes: Sequence[AttentionShape]) -> Any:
        """See :meth:`Adapter.student_config`; a Llama may become a Mistral, which allows more."""
        shape = uniform(config, shapes)
        try:
            return _built(type(config), config.to_dict(), shape)
        except NotExpressible as error:
            # Mistral's layers are Llama's without biases, and its configuration allows any size
            if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
                raise
            return _as_mistral(config, shape, str(error))


def _as_mistral(config: Any, shape: AttentionShape, reason: str) -> Any:
    """The configuration of a Mistral that computes what the Llama would."""
    values = config.to_dict() | {"model_type": "mistral", "sliding_window": None}
    names = [name.replace("Llama", "Mistral") for name in config.architectures or ()]
    values["architectures"] = names or None
    for name in ("attention_bias", "mlp_bias", "pretraining_tp"):
        values.pop(name, None)
    if VERSION < (4, 48) and values.pop("rope_scaling", None) is not None:
        raise NotExpressible(f"{reason}; MistralConfig of this version knows no rope_scaling")
    return _built(MistralConfig, values, shape)


def _built(kind: Any, values: Mapping[str, Any], shape: AttentionShape) -> Any:
    """A configuration of the sizes, if transformers builds a model with these sizes from it."""
    sizes = {
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    asked = f"{shape.heads} heads, {shape.kv_heads} key/value heads of {shape.head_dim}"
    if kind is LlamaConfig and shape.width % shape.heads:  # 4.x builds it, but 5.x cannot load it
        raise NotExpressible(f"LlamaConfig refuses {asked}: heads must divide {shape.width}")
    try:
        config = kind.from_dict(dict(values) | sizes)
        with torch.device("meta"):
            layer = AutoModel.from_config(config, attn_implementation="eager").layers[0].self_attn
    except Exception as error:  # its own kind of error in every version
        line = " ".join(str(error).split())
        raise NotExpressible(f"{kind.__name__} refuses {asked}: {line}") from None
    built = layer.q_proj.out_features, layer.k_proj.out_features, layer.head_dim
    expected = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.head_dim)
    if built != expected:
        raise NotExpressible(f"{kind.__name__} of this version builds other sizes than {asked}")
    return config


def _head_dim(config: Any) -> int:
    derived = config.hidden_size // config.num_attention_heads
    if config.model_type == "qwen2" and VERSION < (4, 48):  # does not read head_dim
        return derived
    return getattr(config, "head_dim", None) or derived


def _window(config: Any, layer: int) -> int | None:
    """The sliding window of a layer; a window that a version does not apply is refused."""
    window = getattr(config, "sliding_window", None)
    if config.model_type == "llama" or window is None:
        return None
    if config.model_type == "mistral":
        return window
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        raise ValueError(
            "this version of transformers does not apply the sliding window of qwen2 but in flash "
            "attention: use transformers 5, or use_sliding_window=False"
        )
    return window if kinds[layer] == "sliding_attention" else None


def _biases(config: Any) -> tuple[str, ...]:
    if config.model_type == "qwen2":
        return BIASES[:3]
    bias = config.model_type != "mistral" and getattr(config, "attention_bias", False)
    return BIASES if bias else ()


def _rotary_module(config: Any, head_dim: int) -> nn.Module:
    """Transformers' own rotary embedding for heads of another size."""
    kind = config.model_type
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    rotary = getattr(module, f"{_NAMES[kind]}RotaryEmbedding")
    with torch.device("cpu"):
        if "config" not in inspect.signature(rotary).parameters:
            return rotary(
                head_dim,
                max_position_embeddings=config.max_position_embeddings,
                base=config.rope_theta,
            )
        resized = copy.deepcopy(config)
        if head_dim != _head_dim(config):
            resized.head_dim = head_dim
        return rotary(config=resized)


def _rotary(config: Any, head_dim: int) -> Rotary:
    """The frequencies that transformers derives for heads of a size."""
    # those of type "dynamic" change beyond max_position_embeddings: these hold up to there
    module = _rotary_module(config, head_dim)
    kind = getattr(module, "rope_type", "default")
    if kind == "longrope":
        raise ValueError("rope type 'longrope' has frequencies that depend on the text's length")
    frequencies = cast("Tensor", module.inv_freq).tolist()
    if 2 * len(frequencies) != head_dim:
        raise ValueError(
            f"rotary embedding turns {2 * len(frequencies)} of {head_dim} coordinates; "
            f"transformers turns all of them in {config.model_type}: head_dim must be even and "
            "partial_rotary_factor 1"
        )
    return Rotary(tuple(frequencies), factor=float(getattr(module, "attention_scaling", 1.0)))


def _own_rotary(attention: Any, head_dim: int) -> None:
    """Gives a layer its own rotary embedding, for heads that are not of the model's size."""
    weight = attention.q_proj.weight
    rotary = _rotary_module(attention.config, head_dim)
    attention.rotary_emb = rotary if weight.is_meta else rotary.to(weight.device)
    if not hasattr(attention, "has_own_rotary"):
        attention.register_forward_pre_hook(_rotate, with_kwargs=True)
        attention.has_own_rotary = True


def _rotate(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook: the layer's own cosines and sines where the model's do not fit its heads."""
    given = kwargs.get("position_embeddings")
    if given is None or given[0].shape[-1] == attention.head_dim:
        return None
    own = attention.rotary_emb(given[0], kwargs["position_ids"])
    return args, kwargs | {"position_embeddings": own}
