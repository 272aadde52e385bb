"""The matrix products and Cholesky factors of a trace, run again alone.

The same products in the same order on operands of the replay's own, into preallocated outputs, with
nothing between them: what is left of a computation when all else costs nothing. Operands that the
trace holds as persistent are used as they are, so that they come from memory as in the original;
all others share one buffer a layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from attnreg.roofline.trace import Factorisation, Operand, Product

Call = tuple[Callable[..., Any], tuple[Tensor, ...], Any]


class Replay:
    """Traced calls on buffers of their own; call it to run them all."""

    def __init__(self, calls: Iterable[Product | Factorisation]) -> None:
        self._buffers: dict[Any, Tensor] = {}
        self._calls = [self._prepare(call) for call in calls]

    def __call__(self) -> None:
        """Runs them all."""
        for function, arguments, out in self._calls:
            function(*arguments, out=out)

    def _prepare(self, call: Product | Factorisation) -> Call:
        if isinstance(call, Factorisation):
            return self._factorisation(call.matrix)
        left, right = self._factor(call.left, "left"), self._factor(call.right, "right")
        shape = (*left.shape[:-1], right.shape[-1])
        out = self._buffer(("out", shape, left.dtype), call.left, shape, None)
        batched = left.dim() == 3
        if call.adds:
            return (torch.baddbmm if batched else torch.addmm), (out, left, right), out
        return (torch.bmm if batched else torch.mm), (left, right), out

    def _factorisation(self, operand: Operand) -> Call:
        size, dtype, device = operand.shape[-1], operand.dtype, operand.device
        matrix = torch.eye(size, dtype=dtype, device=device).expand(operand.shape)
        info = torch.empty(operand.shape[:-2], dtype=torch.int32, device=device)
        return torch.linalg.cholesky_ex, (matrix,), (torch.empty_like(matrix), info)

    def _factor(self, operand: Operand, side: str) -> Tensor:
        if operand.tensor is not None:
            return operand.tensor
        key = (side, operand.shape, operand.stride, operand.dtype)
        return self._buffer(key, operand, operand.shape, operand.stride)

    def _buffer(
        self, key: Any, like: Operand, shape: tuple[int, ...], stride: tuple[int, ...] | None
    ) -> Tensor:
        if key not in self._buffers:
            dtype, device = like.dtype, like.device
            if stride is None:
                self._buffers[key] = torch.zeros(shape, dtype=dtype, device=device)
            else:
                last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
                # Small entries: an output that is added to again and again stays finite.
                memory = torch.full((last + 1,), 1e-3, dtype=dtype, device=device)
                self._buffers[key] = memory.as_strided(shape, stride)
        return self._buffers[key]
