"""Exchanging the projections of an attention module for others of another size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attnreg.models.pooling import repeat_heads
from attnreg.models.rotary import Rotary
from attnreg.transformers.adapters.base import Adapter, NotExpressible
from attnreg.transformers.shapes import AttentionShape

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


class GroupedLinear(nn.Linear):
    """A key or value projection with few heads, each repeated for the heads of its group.

    The parameters are those of the few heads; the output is as wide as the forward method of a
    family without grouped heads expects.
    """

    def __init__(self, width: int, kv_heads: int, head_dim: int, repeats: int, bias: bool) -> None:
        super().__init__(width, kv_heads * head_dim, bias=bias)
        self.head_dim, self.repeats = head_dim, repeats

    def forward(self, input: Tensor) -> Tensor:
        """Keys or values, (..., heads head_dim)."""
        return repeat_heads(super().forward(input), self.head_dim, self.repeats)


class GroupedConv1D(Conv1D):
    """The fused projection of GPT-2 with few key/value heads, repeated like GroupedLinear's."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__((heads + 2 * kv_heads) * head_dim, width)
        self.head_dim, self.repeats = head_dim, heads // kv_heads
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]

    def forward(self, x: Tensor) -> Tensor:
        """Queries, keys and values, (..., 3 heads head_dim)."""
        query, key, value = super().forward(x).split(self.sizes, dim=-1)
        key, value = (repeat_heads(t, self.head_dim, self.repeats) for t in (key, value))
        return torch.cat((query, key, value), dim=-1)


def exchange(owner: nn.Module, name: str, new: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Puts ``new`` in place of a submodule, with ``values`` for its parameters.

    Where the old module is of the same kind and size its parameters stay the same objects. Dtype
    and device are the old parameters', the values' device where the old ones are on ``meta``.
    """
    old = getattr(owner, name)
    sizes = {key: tuple(value.shape) for key, value in values.items()}
    kept = type(old) is type(new) and all(
        getattr(old, key) == getattr(new, key)
        for key in ("head_dim", "repeats", "sizes")
        if hasattr(new, key)
    )
    kept = kept and {k: tuple(p.shape) for k, p in old.named_parameters()} == sizes
    with torch.no_grad():
        if kept and not old.weight.is_meta:
            for key, parameter in old.named_parameters():
                parameter.copy_(values[key])
            return
        for key, value in values.items():
            like = old.weight
            device = value.device if like.is_meta else like.device
            data = value.detach().to(device=device, dtype=like.dtype, copy=True).contiguous()
            setattr(new, key, nn.Parameter(data, requires_grad=like.requires_grad))
    setattr(owner, name, new.train(old.training))


def put_linear(owner: nn.Module, name: str, weight: Tensor, bias: Tensor | None) -> None:
    """A linear map ``y = x weight + bias`` in place of a submodule."""
    with torch.device("meta"):
        new = nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None)
    exchange(owner, name, new, _named(weight.T, bias))


def put_grouped(
    owner: nn.Module, name: str, weight: Tensor, bias: Tensor | None, shape: AttentionShape
) -> None:
    """A key or value projection in place of a submodule whose family knows no grouped heads."""
    if shape.kv_heads == shape.heads:
        put_linear(owner, name, weight, bias)
        return
    repeats = shape.heads // shape.kv_heads
    with torch.device("meta"):
        new = GroupedLinear(shape.width, shape.kv_heads, shape.head_dim, repeats, bias is not None)
    exchange(owner, name, new, _named(weight.T, bias))


def _named(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def read_linear(module: Any, letter: str) -> dict[str, Tensor]:
    """Copies of a linear module's ``W_letter`` and, where it has one, ``b_letter``."""
    check_plain(module, nn.Linear, GroupedLinear)
    found = {f"W_{letter}": module.weight.detach().T.contiguous().clone()}
    if module.bias is not None:
        found[f"b_{letter}"] = module.bias.detach().clone()
    return found


def check_plain(module: nn.Module, *kinds: type[nn.Module]) -> None:
    """Refuses a projection that holds more than a matrix: quantised, or wrapped by an adapter.

    Raises:
        ValueError: If its type is none of ``kinds``.
    """
    if type(module) not in kinds:
        raise ValueError(
            f"a projection is a {type(module).__name__}, expected {kinds[0].__name__}: load the "
            "model without quantisation, merge low-rank adapters into it"
        )


def check_weights(weights: Mapping[str, Tensor], shape: AttentionShape) -> None:
    """Refuses weights that are not those of the shape.

    Raises:
        ValueError: If names or sizes differ.
    """
    given = {name: tuple(value.shape) for name, value in weights.items()}
    expected = shape.weights()
    if given != expected:
        wrong = sorted(k for k in given.keys() | expected if given.get(k) != expected.get(k))
        raise ValueError(
            "weights do not fit the shape: "
            + "; ".join(f"{k} {given.get(k, 'missing')}, expected {expected.get(k)}" for k in wrong)
        )


def check_sizes_only(shape: AttentionShape, derived: AttentionShape) -> None:
    """Refuses a shape that differs in more than its sizes from what a module can compute.

    Args:
        shape: The shape asked for.
        derived: What the module computes with these sizes.

    Raises:
        ValueError: If they differ.
    """
    same = replace(shape, rotary=None, scale=1.0) == replace(derived, rotary=None, scale=1.0)
    same = same and math.isclose(shape.scale, derived.scale, rel_tol=1e-6)
    if same and _same_rotary(shape.rotary, derived.rotary):
        return
    raise ValueError(f"the module cannot compute {shape}; with these sizes it computes {derived}")


def _same_rotary(left: Rotary | None, right: Rotary | None) -> bool:
    if left is None or right is None:
        return left is right
    # 1e-5: powers in float32 differ in the last bits from one machine to another
    return (
        left.interleaved == right.interleaved
        and len(left.frequencies) == len(right.frequencies)
        and math.isclose(left.factor, right.factor, rel_tol=1e-5)
        and all(
            math.isclose(a, b, rel_tol=1e-5)
            for a, b in zip(left.frequencies, right.frequencies, strict=True)
        )
    )


def uniform(config: Any, shapes: Sequence[AttentionShape]) -> AttentionShape:
    """The first of shapes whose sizes are all the same.

    Returns:
        That shape.

    Raises:
        NotExpressible: If sizes differ from layer to layer.
    """
    sizes = sorted({(s.heads, s.kv_heads, s.head_dim) for s in shapes})
    if len(sizes) > 1:
        raise NotExpressible(
            f"{type(config).__name__} has one shape for all layers, these have (heads, key/value "
            f"heads, head_dim) {', '.join(map(str, sizes))}"
        )
    return shapes[0]


def unchanged_config(adapter: Adapter, config: Any, shapes: Sequence[AttentionShape]) -> Any:
    """The configuration itself, for families that express no other sizes than the original's.

    Returns:
        The configuration.

    Raises:
        NotExpressible: If the sizes are others.
    """
    shape = uniform(config, shapes)
    own = adapter.shape(config, 0)
    if (shape.heads, shape.kv_heads, shape.head_dim) != (own.heads, own.kv_heads, own.head_dim):
        raise NotExpressible(
            f"{type(config).__name__} knows neither key/value heads nor a head size of its own: "
            f"{shape.heads} heads, {shape.kv_heads} key/value heads of {shape.head_dim} load with "
            "attnreg.load"
        )
    return config
