"""GPT-2: queries, keys and values from one fused projection, learnt positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attnreg.transformers.adapters.base import Adapter, register
from attnreg.transformers.adapters.modules import (
    VERSION,
    GroupedConv1D,
    check_plain,
    check_sizes_only,
    check_weights,
    exchange,
    unchanged_config,
)
from attnreg.transformers.shapes import BIASES, ORIGINAL, AttentionShape, Sizes


@register
class GPT2Adapter(Adapter):
    """GPT-2. The stored fused matrix of a student is ``(W_Q, W_K, W_V)`` side by side."""

    model_types = ("gpt2",)

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        """The decoder's blocks."""
        return list(model.base_model.h)

    def attention(self, block: Any) -> nn.Module:
        """The block's ``attn``."""
        return cast("nn.Module", block.attn)

    def taps(self, block: Any) -> tuple[nn.Module, nn.Module]:
        """The fused and the output projection."""
        return block.attn.c_attn, block.attn.c_proj

    def shape(self, config: Any, layer: int, sizes: Sizes = ORIGINAL) -> AttentionShape:
        """See :meth:`Adapter.shape`."""
        if getattr(config, "add_cross_attention", False):
            raise ValueError(
                "layers that attend to another sequence (add_cross_attention) are not supported"
            )
        standard = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
        # what was asked for: the public attribute of transformers 4 says eager where nothing was
        asked = getattr(config, "_attn_implementation_internal", None)
        if VERSION < (5, 0) and not standard and asked != "eager":
            raise ValueError(
                "transformers 4 applies scale_attn_weights and scale_attn_by_inverse_layer_idx in "
                "eager attention only: load the model with attn_implementation='eager'"
            )
        width, full = config.hidden_size, config.num_attention_heads
        if width % full:
            raise ValueError(f"{full} heads do not divide the width {width}")
        size = width // full if sizes.head_dim is None else sizes.head_dim
        scale = size**-0.5 if config.scale_attn_weights else 1.0
        full = full if sizes.heads is None else sizes.heads
        return AttentionShape(
            width=width,
            heads=full,
            kv_heads=full if sizes.kv_heads is None else sizes.kv_heads,
            head_dim=size,
            scale=scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale,
            causal=True,
            biases=BIASES,
        )

    def read(self, block: Any) -> dict[str, Tensor]:
        """Copies of the weights, the fused projection taken apart."""
        fused, out = block.attn.c_attn, block.attn.c_proj
        check_plain(fused, Conv1D, GroupedConv1D)
        check_plain(out, Conv1D)
        queries = out.weight.shape[0]
        keys = (fused.weight.shape[1] - queries) // 2
        weights: dict[str, Tensor] = {}
        for symbol, parameter in (("W", fused.weight), ("b", fused.bias)):
            parts = parameter.detach().split([queries, keys, keys], dim=-1)
            weights |= {f"{symbol}_{x}": p.clone() for x, p in zip("QKV", parts, strict=True)}
        return weights | {"W_O": out.weight.detach().clone(), "b_O": out.bias.detach().clone()}

    def write(self, block: Any, weights: Mapping[str, Tensor], shape: AttentionShape) -> None:
        """See :meth:`Adapter.write`."""
        attention = block.attn
        derived = self.shape(
            attention.config,
            attention.layer_idx,
            shape.sizes,
        )
        check_sizes_only(shape, derived)
        check_weights(weights, shape)
        heads, groups, size = shape.heads, shape.kv_heads, shape.head_dim
        with torch.device("meta"):
            if groups == heads:
                fused = Conv1D(3 * heads * size, shape.width)
            else:
                fused = GroupedConv1D(shape.width, heads, groups, size)
            out = Conv1D(shape.width, heads * size)
        side_by_side = {
            name: torch.cat([weights[f"{symbol}_{x}"] for x in "QKV"], dim=-1)
            for name, symbol in (("weight", "W"), ("bias", "b"))
        }
        exchange(attention, "c_attn", fused, side_by_side)
        exchange(attention, "c_proj", out, {"weight": weights["W_O"], "bias": weights["b_O"]})
        attention.num_heads, attention.head_dim = heads, size
        attention.split_size = heads * size
        attention.embed_dim = heads * size  # 4.x reshapes the heads' outputs to it
        if hasattr(attention, "scaling"):
            attention.scaling = shape.scale

    def student_config(self, config: Any, shapes: Sequence[AttentionShape]) -> Any:
        """See :meth:`Adapter.student_config`."""
        return unchanged_config(self, config, shapes)
