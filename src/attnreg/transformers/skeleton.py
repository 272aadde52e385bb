"""Models without weights: modules whose parameters are on the meta device, and filling them.

A parameter on the meta device has a shape and a dtype but no values, so a model of any size is
built in a moment. Buffers that are not stored (frequencies, position numbers, causal masks) are
computed as the constructor does: they are small, and no file has them. Filling a parameter keeps
its identity, so tied weights stay tied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnreg.transformers.adapters import Adapter
from attnreg.transformers.shapes import AttentionShape


class _MetaEmpty(TorchFunctionMode):
    """Sends ``torch.empty``, with which layers allocate their weights, to the meta device."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


def build_skeleton(build: Callable[[], nn.Module]) -> nn.Module:
    """A module whose parameters, and only these, are on the meta device.

    Args:
        build: Constructs the module; what it initialises costs nothing.

    Returns:
        The module, in evaluation mode.
    """
    with _MetaEmpty():
        module = build()
    for parameter in module.parameters():
        if not parameter.is_meta:  # made from ones or zeros: gains and biases
            exchange(parameter, torch.empty_like(parameter, device="meta"))
    return module.eval()


def exchange(parameter: nn.Parameter, values: Tensor) -> None:
    """Puts values, device and dtype into a parameter that keeps its identity."""
    fresh = nn.Parameter(values.detach(), requires_grad=parameter.requires_grad)
    torch.utils.swap_tensors(parameter, fresh)


def resize_attention(
    model: nn.Module, adapter: Adapter, shapes: Sequence[AttentionShape], source: str
) -> None:
    """Gives the attention of every block of a skeleton its own shape.

    Args:
        model: A skeleton; its blocks are changed.
        adapter: The adapter of its family.
        shapes: One for each application of a block.
        source: Where the shapes come from, for messages.

    Raises:
        ValueError: If there is another number of shapes than of applications, or a block that is
            applied several times is given different shapes.
    """
    blocks = adapter.blocks(model)
    if len(blocks) != len(shapes):
        raise ValueError(
            f"{source} describes {len(shapes)} layers, the model has {len(blocks)}; "
            "write the folder again"
        )
    resized: dict[int, AttentionShape] = {}
    for block, shape in zip(blocks, shapes, strict=True):
        if id(block) not in resized:
            weights = {
                name: torch.empty(size, device="meta") for name, size in shape.weights().items()
            }
            adapter.write(block, weights, shape)
            resized[id(block)] = shape
        elif resized[id(block)] != shape:
            raise ValueError(
                f"{source} gives different shapes to a block that the model applies several times"
            )
    model.eval()
