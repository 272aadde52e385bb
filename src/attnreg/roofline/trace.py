"""What a piece of code executes: its matrix products, Cholesky factors and entrywise operations.

Torch says which operations it runs, with the shapes of their operands. Of these count

* a matrix product: 2 for every multiplication with its addition;
* a Cholesky factor of size ``k``: ``k^3 / 3``;
* an entrywise operation: 1 an entry of its result (an exponential too), ``addcmul`` 2, ``softmax``
  5 (largest entry, subtraction, exponential, sum, division);
* a sum or a largest entry: 1 an entry of its operand; a product with a vector 2 an entry of the
  matrix.

Copies, conversions, choices of entries and triangular solves count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnreg.operations import cholesky

aten = torch.ops.aten
# Position of the two factors among the arguments; the others add to an existing output.
FACTORS = {
    aten.mm.default: (0, 1),
    aten.mm.out: (0, 1),
    aten.bmm.default: (0, 1),
    aten.bmm.out: (0, 1),
    aten.addmm.default: (1, 2),
    aten.addmm.out: (1, 2),
    aten.addmm_.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.baddbmm.out: (1, 2),
    aten.baddbmm_.default: (1, 2),
}
ENTRYWISE = dict.fromkeys(
    ("add", "sub", "mul", "div", "neg", "exp", "log", "sqrt", "reciprocal", "clamp_min", "abs"), 1
) | {"addcmul": 2, "_softmax": 5}
REDUCTIONS = dict.fromkeys(("sum", "mean", "amax", "amin", "max", "min"), 1) | {"dot": 2, "mv": 2}


@dataclass(frozen=True)
class Operand:
    """Layout of one factor, and the tensor itself where it is persistent."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
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


@dataclass(frozen=True)
class Factorisation:
    """One Cholesky factor."""

    matrix: Operand

    @property
    def flops(self) -> int:
        """A third of the cube of the size."""
        return cholesky(self.matrix.shape[-1])


@dataclass
class Trace:
    """What was executed.

    Attributes:
        calls: Matrix products and Cholesky factors, in order.
        entrywise: Operations of everything else that counts.
        names: Names of all operations that ran, without the underscore of those in place.
    """

    calls: list[Product | Factorisation]
    entrywise: int
    names: set[str]

    @property
    def products(self) -> list[Product]:
        """The matrix products alone."""
        return [call for call in self.calls if isinstance(call, Product)]

    @property
    def flops(self) -> int:
        """Operations of the calls."""
        return sum(call.flops for call in self.calls)


def trace(body: Callable[[], Any], persistent: Iterable[Tensor] = ()) -> Trace:
    """Runs a piece of code once and notes what it executes.

    Args:
        body: The code.
        persistent: Large tensors that stay in memory between its runs: where a factor is one of
            them it is noted, so that a replay reads it from memory too.

    Returns:
        What it executed.
    """
    recorder = _Recorder(persistent)
    with recorder:
        body()
    return recorder.found


class _Recorder(TorchDispatchMode):
    def __init__(self, persistent: Iterable[Tensor]) -> None:
        super().__init__()
        self.found = Trace([], 0, set())
        self._persistent = {tensor.untyped_storage().data_ptr() for tensor in persistent}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        positions = FACTORS.get(func)
        if positions is not None:
            left, right = (self._operand(args[position]) for position in positions)
            self.found.calls.append(Product(left, right, adds=positions[0] == 1))
        elif func.overloadpacket is aten.linalg_cholesky_ex:
            self.found.calls.append(Factorisation(self._operand(args[0])))
        result = func(*args, **(kwargs or {}))
        name = _name(func)
        self.found.names.add(name)
        if name in ENTRYWISE:
            self.found.entrywise += ENTRYWISE[name] * result.numel()
        elif name in REDUCTIONS:
            self.found.entrywise += REDUCTIONS[name] * args[0].numel()
        return result

    def _operand(self, tensor: Tensor) -> Operand:
        kept = tensor.untyped_storage().data_ptr() in self._persistent
        layout = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        return Operand(*layout, tensor if kept else None)


def _name(func: Any) -> str:
    """``add`` for ``aten.add_.Tensor``."""
    name: str = func.overloadpacket.__name__
    return name if name.startswith("_") else name.rstrip("_")
