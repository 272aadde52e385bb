"""Precision of the matrix products of float32 tensors, as an explicit choice.

``float32``
    Products in float32.
``tf32``
    CUDA devices from compute capability 8.0 on round the factors of float32 products to 10 bits
    behind the point and add in float32.
``bf16``
    Both factors of every product are rounded to bfloat16 (7 bits), its result too; within a product
    the device adds in float32. The roundings are operations of their own, and cost what they cost.

Everything between the products stays in float32, products in float64 and Cholesky factors as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnreg.roofline.trace import FACTORS

PRECISIONS = ("float32", "tf32", "bf16")


def check_precision(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Whether a device has a precision.

    Args:
        name: One of :data:`PRECISIONS`.
        dtype: Of the data.
        device: Where the products are.

    Raises:
        ValueError: If it has not, or there is no such precision.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision is {name!r}; expected one of {', '.join(PRECISIONS)}")
    if name == "float32":
        return
    if dtype != torch.float32:
        raise ValueError(f"precision {name} is for float32 data; {dtype} was given")
    if name == "tf32" and not _has_tf32(device):
        raise ValueError(
            f"precision tf32 needs a CUDA device of compute capability 8.0 or more, and {device} "
            "is none; choose float32 or bf16"
        )


@contextlib.contextmanager
def matmul_precision(name: str, device: torch.device) -> Iterator[None]:
    """Sets the precision of matrix products of float32 tensors; what was set before comes back.

    Args:
        name: One of :data:`PRECISIONS`.
        device: Where the products are.

    Yields:
        Once, while it is set.
    """
    check_precision(name, torch.float32, device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        with _RoundedFactors() if name == "bf16" else contextlib.nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class _RoundedFactors(TorchDispatchMode):
    """Products of float32 matrices become products of bfloat16 matrices."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        positions = FACTORS.get(func)
        if positions is None or args[positions[0]].dtype != torch.float32:
            return func(*args, **kwargs)
        left, right = (args[position].bfloat16() for position in positions)
        product = torch.bmm(left, right) if left.dim() == 3 else torch.mm(left, right)
        if positions[0] == 1:
            return _add(func, args[0], product, **kwargs)
        return kwargs["out"].copy_(product) if "out" in kwargs else product.float()


def _add(
    func: Any,
    base: Tensor,
    product: Tensor,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """``beta base + alpha product`` as `func` gives it: in place, into ``out``, or new."""
    if func.overloadpacket.__name__.endswith("_"):
        return (base if beta == 1 else base.mul_(beta)).add_(product, alpha=alpha)
    scaled = base if beta == 1 else base * beta
    result = torch.add(scaled, product, alpha=alpha)
    return result if out is None else out.copy_(result)


def _has_tf32(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
