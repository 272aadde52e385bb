"""BERT and RoBERTa (MiniLM's sentence encoders are BERTs): full heads with biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from attnreg.transformers.adapters.base import Adapter, register
from attnreg.transformers.adapters.modules import (
    check_sizes_only,
    check_weights,
    put_grouped,
    put_linear,
    read_linear,
    unchanged_config,
)
from attnreg.transformers.shapes import BIASES, ORIGINAL, AttentionShape, Sizes


@register
class BertAdapter(Adapter):
    """The encoders (and, with ``is_decoder``, decoders) that share BERT's block."""

    model_types = ("bert", "roberta")

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        """The encoder's layers."""
        return list(model.base_model.encoder.layer)

    def attention(self, block: Any) -> nn.Module:
        """The block's ``attention``: projections, output and its norm."""
        return cast("nn.Module", block.attention)

    def taps(self, block: Any) -> tuple[nn.Module, nn.Module]:
        """The query and the output projection."""
        return block.attention.self.query, block.attention.output.dense

    def shape(self, config: Any, layer: int, sizes: Sizes = ORIGINAL) -> AttentionShape:
        """See :meth:`Adapter.shape`."""
        return encoder_shape(config, sizes)

    def read(self, block: Any) -> dict[str, Tensor]:
        """Copies of the weights."""
        weights: dict[str, Tensor] = {}
        for name, letter in (("query", "Q"), ("key", "K"), ("value", "V")):
            weights |= read_linear(getattr(block.attention.self, name), letter)
        return weights | read_linear(block.attention.output.dense, "O")

    def write(self, block: Any, weights: Mapping[str, Tensor], shape: AttentionShape) -> None:
        """See :meth:`Adapter.write`."""
        inner = block.attention.self
        write_encoder(inner, weights, replace(shape, causal=False) if inner.is_decoder else shape)
        put_linear(block.attention.output, "dense", weights["W_O"], weights["b_O"])

    def student_config(self, config: Any, shapes: Sequence[AttentionShape]) -> Any:
        """See :meth:`Adapter.student_config`."""
        return unchanged_config(self, config, shapes)


def encoder_shape(config: Any, sizes: Sizes) -> AttentionShape:
    """The shape of BERT's attention: biases, full heads, no positions in the attention.

    Returns:
        The shape, of the sizes given.

    Raises:
        ValueError: If there are relative positions or attention to another sequence.
    """
    position = getattr(config, "position_embedding_type", None) or "absolute"
    if position != "absolute":
        raise ValueError(
            f"position_embedding_type {position!r} puts positions into the logits, which is not "
            "supported; expected 'absolute'"
        )
    if getattr(config, "add_cross_attention", False):
        raise ValueError(
            "layers that attend to another sequence (add_cross_attention) are not supported"
        )
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{config.num_attention_heads} heads do not divide the width {config.hidden_size}"
        )
    full = config.num_attention_heads if sizes.heads is None else sizes.heads
    size = (
        config.hidden_size // config.num_attention_heads
        if sizes.head_dim is None
        else sizes.head_dim
    )
    return AttentionShape(
        width=config.hidden_size,
        heads=full,
        kv_heads=full if sizes.kv_heads is None else sizes.kv_heads,
        head_dim=size,
        scale=size**-0.5,
        causal=bool(getattr(config, "is_decoder", False)),
        biases=BIASES,
    )


def write_encoder(inner: Any, weights: Mapping[str, Tensor], shape: AttentionShape) -> None:
    """Exchanges ``query``, ``key`` and ``value`` of a module like BERT's and sets its sizes.

    Raises:
        ValueError: If the weights do not fit the shape, or it has what the module cannot compute.
    """
    derived = AttentionShape(
        width=inner.query.in_features,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        scale=shape.head_dim**-0.5,
        causal=False,
        biases=BIASES,
    )
    check_sizes_only(shape, derived)
    check_weights(weights, shape)
    put_linear(inner, "query", weights["W_Q"], weights["b_Q"])
    put_grouped(inner, "key", weights["W_K"], weights["b_K"], shape)
    put_grouped(inner, "value", weights["W_V"], weights["b_V"], shape)
    inner.num_attention_heads = shape.heads
    inner.attention_head_size = shape.head_dim
    inner.all_head_size = shape.heads * shape.head_dim
    if hasattr(inner, "scaling"):
        inner.scaling = shape.scale
