"""Errors of a converted model's attention layers, each given the original's input.

The original runs once with its attentions' inputs and outputs recorded. In one run of the converted
model every attention has its input replaced by the original's, so that a layer's error is its own
and not that of the layers before it. What a head contributes is ``mixed_h W_O[h]``: its mixed
values times its rows of ``W_O``, which does not depend on the basis within the head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.capture import first_tensor
from attnreg.transformers.scores import OutputError

HEAD_DIM_NAMES = ("head_dim", "attention_head_size")


@dataclass
class Recording:
    """One call of a model, by application of an attention in order, each (b, n, width).

    Attributes:
        inputs: What goes into the projections.
        mixed: What goes into ``W_O``: the heads' mixed values side by side.
        outputs: What ``W_O`` gives.
    """

    inputs: list[Tensor] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@contextmanager
def recorded(model: nn.Module, replace: list[Tensor] | None = None) -> Iterator[Recording]:
    """Records the attentions of one call of a model inside the context, padding included.

    Args:
        model: A model of a supported family.
        replace: Inputs that the attentions are given, by application; None: their own.

    Yields:
        The recording.
    """
    config: Any = model.config
    adapter = adapter_for(config)
    found = Recording()
    given = iter(replace or ())

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.inputs.append(first_tensor(args, kwargs).detach())

    def mix(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.mixed.append(first_tensor(args, kwargs).detach())

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        found.outputs.append(first_tensor(output, {}).detach())

    def exchange(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _with_first_tensor(module, args, kwargs, next(given))

    with ExitStack() as hooks:

        def hook(module: nn.Module, before: Any) -> None:
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            hooks.callback(handle.remove)

        for block in {id(block): block for block in adapter.blocks(model)}.values():
            first, last = adapter.taps(block)
            if replace is not None:
                hook(adapter.attention(block), exchange)
            hook(first, enter)
            hook(last, mix)
            hooks.callback(last.register_forward_hook(leave).remove)
        yield found


def _with_first_tensor(module: nn.Module, args: Any, kwargs: Any, new: Tensor) -> Any:
    """The arguments of a module with another value for the first one of its forward."""
    if args:
        return (new.to(args[0]), *args[1:]), kwargs
    name = next(iter(inspect.signature(module.forward).parameters))
    return args, {**kwargs, name: new.to(kwargs[name])}


class LayerErrors:
    """Sums for the error of every layer and, where the numbers are equal, of every head.

    Args:
        original: A model of a supported family.
        converted: One with as many layers.
    """

    def __init__(self, original: nn.Module, converted: nn.Module) -> None:
        outs, sizes = [], []
        for model in (original, converted):
            config: Any = model.config
            adapter = adapter_for(config)
            blocks = adapter.blocks(model)
            outs.append([adapter.read(block)["W_O"] for block in blocks])
            sizes.append([_head_dim(adapter.attention(block)) for block in blocks])
        self._out = list(zip(*outs, strict=True))
        self._sizes = list(zip(*sizes, strict=True))
        self._layers = [OutputError() for _ in self._out]
        self._heads = [
            [OutputError() for _ in range(_common_heads(out, size))]
            for out, size in zip(self._out, self._sizes, strict=True)
        ]

    def add(self, original: Recording, converted: Recording, mask: Tensor) -> None:
        """Adds one call of each, with the same inputs; ``mask`` (b, n) is 0 at padding."""
        rows = mask.bool()
        for i, layer in enumerate(self._layers):
            layer.add(original.outputs[i][rows], converted.outputs[i][rows])
            mixed = [found.mixed[i][rows] for found in (original, converted)]
            for h, head in enumerate(self._heads[i]):
                parts = [slice(h * d, (h + 1) * d) for d in self._sizes[i] if d is not None]
                head.add(
                    *(
                        m[:, part].double() @ out[part].double()
                        for m, part, out in zip(mixed, parts, self._out[i], strict=True)
                    )
                )

    def values(self) -> tuple[LayerError, ...]:
        """The errors of all layers in order."""
        return tuple(
            LayerError(i, layer.value, tuple(head.value for head in heads) or None)
            for i, (layer, heads) in enumerate(zip(self._layers, self._heads, strict=True))
        )


@dataclass(frozen=True)
class LayerError:
    """Relative errors of one application of an attention, its input being the original's.

    Attributes:
        layer: Number of the layer.
        error: ``||converted - original||_F / ||original - mean||_F`` of its outputs.
        heads: The same for what each head adds to the output; None where the numbers of heads
            differ.
    """

    layer: int
    error: float
    heads: tuple[float, ...] | None


def _head_dim(attention: nn.Module) -> int | None:
    """Width of a head of a live module, which may differ from its configuration's."""
    for module in attention.modules():
        for name in HEAD_DIM_NAMES:
            value = getattr(module, name, None)
            if isinstance(value, int):
                return value
    return None


def _common_heads(out: tuple[Tensor, Tensor], sizes: tuple[int | None, int | None]) -> int:
    """The number of heads if both have the same, else 0."""
    counts = {
        None if size is None or len(weight) % size else len(weight) // size
        for weight, size in zip(out, sizes, strict=True)
    }
    count = counts.pop()
    return 0 if counts or count is None else count


def cache_bytes(model: nn.Module) -> int:
    """Bytes of keys and values that all attentions of a model keep for a token."""
    config: Any = model.config
    adapter = adapter_for(config)
    with torch.no_grad():
        weights = [adapter.read(block) for block in adapter.blocks(model)]
    return sum((w["W_K"].shape[1] + w["W_V"].shape[1]) * w["W_K"].dtype.itemsize for w in weights)
