"""What the package must know of a family of models: one small class for each, and the registry.

To add a family, write one file with a subclass of :class:`Adapter`, decorate it with
:func:`register` and import the file before use (those of this package are imported by its
``__init__``); nothing else changes. ``adapters/gpt2.py`` is an example to copy. A family of this
package also has a tiny model in ``tests/transformers/families.py``, over which every test runs.

Weights carry the names and the layout of :class:`attnreg.MultiHead`: ``W_Q`` (width x heads
head_dim), ``W_K`` and ``W_V`` (width x kv_heads head_dim), ``W_O`` (heads head_dim x width),
``b_Q, b_K, b_V, b_O`` where the layer has them, ``g_Q, g_K`` (head_dim) where it normalises queries
and keys; ``y = x W + b``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from attnreg.transformers.shapes import ORIGINAL, AttentionShape, Sizes


class Adapter(ABC):
    """One family of models in seven methods, all on live modules.

    Attributes:
        model_types: Values of ``config.model_type`` that it serves.
    """

    model_types: ClassVar[tuple[str, ...]]

    @abstractmethod
    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The transformer blocks in the order in which they are applied.

        A block that is applied several times (ALBERT) is listed as often.
        """

    @abstractmethod
    def attention(self, block: nn.Module) -> nn.Module:
        """The module below which all attention weights of a block are."""

    @abstractmethod
    def taps(self, block: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Two modules: the first's input is the attention's input, the second's output its output.

        The output is what ``W_O`` and ``b_O`` give, before any residual sum or norm.
        """

    @abstractmethod
    def shape(self, config: Any, layer: int, sizes: Sizes = ORIGINAL) -> AttentionShape:
        """The shape of a layer, from the configuration alone; with sizes, that of a student.

        The scale and the rotary frequencies are those that transformers derives for the sizes.

        Raises:
            ValueError: If a size is impossible, or the configuration has something that cannot be
                represented exactly.
        """

    @abstractmethod
    def read(self, block: nn.Module) -> dict[str, Tensor]:
        """Copies of the attention weights of a block, in their own dtype."""

    @abstractmethod
    def write(self, block: nn.Module, weights: Mapping[str, Tensor], shape: AttentionShape) -> None:
        """Puts weights of a possibly smaller shape into a block, which computes with them after.

        The forward method stays transformers' own: projections are exchanged and sizes set, never
        code copied.
        """

    @abstractmethod
    def student_config(self, config: Any, shapes: Sequence[AttentionShape]) -> Any:
        """The configuration with which transformers itself builds the student.

        Raises:
            NotExpressible: If there is none; the text says why in one line.
        """


class NotExpressible(Exception):
    """No configuration of transformers describes these shapes; ``attnreg.load`` loads them."""


_ADAPTERS: dict[str, Adapter] = {}


def register(adapter: type[Adapter]) -> type[Adapter]:
    """Class decorator: makes an adapter the one for its ``model_types``.

    Returns:
        The class itself.

    Raises:
        ValueError: If another adapter has one of the types.
    """
    for name in adapter.model_types:
        if name in _ADAPTERS:
            owner = type(_ADAPTERS[name]).__name__
            raise ValueError(f"model type {name!r} has an adapter already: {owner}")
    instance = adapter()
    _ADAPTERS.update(dict.fromkeys(adapter.model_types, instance))
    return adapter


def adapter_for(config: Any) -> Adapter:
    """The adapter of a configuration's ``model_type``.

    Returns:
        The registered instance.

    Raises:
        ValueError: If no adapter is registered for it.
    """
    name = getattr(config, "model_type", None)
    if name not in _ADAPTERS:
        known = ", ".join(sorted(_ADAPTERS))
        raise ValueError(
            f"model type {name!r} is not supported; expected one of {known}: another family is one "
            "file, see attnreg.transformers.adapters.base"
        )
    return _ADAPTERS[name]
