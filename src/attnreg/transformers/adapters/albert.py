"""ALBERT: one attention that is applied in many layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from attnreg.transformers.adapters.base import Adapter, register
from attnreg.transformers.adapters.bert import encoder_shape, write_encoder
from attnreg.transformers.adapters.modules import put_linear, read_linear, unchanged_config
from attnreg.transformers.shapes import ORIGINAL, AttentionShape, Sizes

_PROJECTIONS = {"query": "Q", "key": "K", "value": "V", "dense": "O"}


@register
class AlbertAdapter(Adapter):
    """ALBERT. All applications of one attention form one joint problem."""

    model_types = ("albert",)

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        """The layers in the order of application; the same module many times."""
        encoder = model.base_model.encoder
        count, groups = encoder.config.num_hidden_layers, encoder.albert_layer_groups
        order = [int(i / (count / len(groups))) for i in range(count)]  # as transformers has it
        return [layer for group in order for layer in groups[group].albert_layers]

    def attention(self, block: Any) -> nn.Module:
        """The layer's ``attention``: projections, output and its norm."""
        return cast("nn.Module", block.attention)

    def taps(self, block: Any) -> tuple[nn.Module, nn.Module]:
        """The query and the output projection."""
        return block.attention.query, block.attention.dense

    def shape(self, config: Any, layer: int, sizes: Sizes = ORIGINAL) -> AttentionShape:
        """See :meth:`Adapter.shape`."""
        return encoder_shape(config, sizes)

    def read(self, block: Any) -> dict[str, Tensor]:
        """Copies of the weights."""
        weights: dict[str, Tensor] = {}
        for name, letter in _PROJECTIONS.items():
            weights |= read_linear(getattr(block.attention, name), letter)
        return weights

    def write(self, block: Any, weights: Mapping[str, Tensor], shape: AttentionShape) -> None:
        """See :meth:`Adapter.write`; every application of the attention changes."""
        write_encoder(block.attention, weights, shape)
        put_linear(block.attention, "dense", weights["W_O"], weights["b_O"])

    def student_config(self, config: Any, shapes: Sequence[AttentionShape]) -> Any:
        """See :meth:`Adapter.student_config`."""
        return unchanged_config(self, config, shapes)
