"""The matrix products inside a piece of code, recorded once and run again alone.

`record` notes every matrix product that torch executes, with the layout of its operands. `Replay`
runs the same products in the same order on operands of its own, into preallocated outputs, with
nothing between them: what is left of a computation when all else costs nothing. Operands that the
caller names as persistent (large matrices that stay in memory between products) are used as they
are, so that they come from memory as in the original; all others share one buffer a layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Position of the two factors among the arguments; the others add to an existing output.
FACTORS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.addmm.out: (1, 2),
    aten.addmm_.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.baddbmm_.default: (1, 2),
}


@dataclass(frozen=True)
class Operand:
    """Layout of one factor, and the tensor itself where it is persistent."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    tensor: Tensor | None


@dataclass(frozen=True)
class Product:
    """One matrix product: its factors, and whether it adds to its output."""

    left: Operand
    right: Operand
    adds: bool

    @property
    def flops(self) -> int:
        """Two a multiply-add."""
        return 2 * math.prod(self.left.shape) * self.right.shape[-1]


class _Recorder(TorchDispatchMode):
    def __init__(self, persistent: Iterable[Tensor]) -> None:
        super().__init__()
        self.products: list[Product] = []
        self._persistent = {tensor.untyped_storage().data_ptr() for tensor in persistent}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        positions = FACTORS.get(func)
        if positions is not None:
            left, right = (self._operand(args[position]) for position in positions)
            self.products.append(Product(left, right, adds=positions[0] == 1))
        return func(*args, **(kwargs or {}))

    def _operand(self, tensor: Tensor) -> Operand:
        kept = tensor.untyped_storage().data_ptr() in self._persistent
        return Operand(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor if kept else None)


def record(body: Callable[[], Any], persistent: Iterable[Tensor] = ()) -> list[Product]:
    """The matrix products that `body` executes, in order."""
    recorder = _Recorder(persistent)
    with recorder:
        body()
    return recorder.products


class Replay:
    """Recorded products on buffers of their own; call it to run them all."""

    def __init__(self, products: Iterable[Product]) -> None:
        self._buffers: dict[Any, Tensor] = {}
        self._calls = [self._prepare(product) for product in products]

    def __call__(self) -> None:
        for function, arguments, out in self._calls:
            function(*arguments, out=out)

    def _prepare(self, product: Product) -> tuple[Callable[..., Any], tuple[Tensor, ...], Tensor]:
        left, right = self._factor(product.left, "left"), self._factor(product.right, "right")
        shape = (*left.shape[:-1], right.shape[-1])
        out = self._buffer(("out", shape, left.dtype), shape, None, left.dtype)
        batched = left.dim() == 3
        if product.adds:
            return (torch.baddbmm if batched else torch.addmm), (out, left, right), out
        return (torch.bmm if batched else torch.mm), (left, right), out

    def _factor(self, operand: Operand, side: str) -> Tensor:
        if operand.tensor is not None:
            return operand.tensor
        key = (side, operand.shape, operand.stride, operand.dtype)
        return self._buffer(key, operand.shape, operand.stride, operand.dtype)

    def _buffer(
        self, key: Any, shape: tuple[int, ...], stride: tuple[int, ...] | None, dtype: torch.dtype
    ) -> Tensor:
        if key not in self._buffers:
            if stride is None:
                self._buffers[key] = torch.zeros(shape, dtype=dtype)
            else:
                last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
                # Small entries: an output that is added to again and again stays finite.
                memory = torch.full((last + 1,), 1e-3, dtype=dtype)
                self._buffers[key] = memory.as_strided(shape, stride)
        return self._buffers[key]
