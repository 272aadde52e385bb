r"""Steps of mini-batches: inputs in scaled coordinates, and orthogonal matrices of momentum.

With the second moment ``Q diag(lambda) Q^T`` of a block's inputs, the inputs ``A`` are replaced by
``A T`` with::

    T = Q diag(s),    s = (lambda / mean lambda)^(-power)

once, so that the block ``w`` becomes ``T^-1 w`` and a step needs no product for it. A step of a
head then is the polar factor ``M (M^T M)^(-1/2)`` of the running mean ``M`` of its gradient
(``rows x width``), the steepest descent in the spectral norm (Carlson, Cevher and others 2015; Muon
of Jordan and others 2024 takes it of whole matrices, in the given coordinates): every direction of
a head's queries, keys or values moves alike, however small its gradient. Heads are apart, since
that is where the curvature is; their grams are narrow, so that the factor is exact and costs less
than a tenth of a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnreg.batching import Batch
from attnreg.kronecker import ParameterBlock, split_blocks
from attnreg.objective import Objective
from attnreg.solvers.choice import ENOUGH

SCALED = 0.2
"""Power of the inputs' second moment; 1/2 would whiten them, and give noise the same weight. With
few residuals a weight there is noise wherever inputs vary little (:func:`scaled_power`)."""

MOMENTUM = 0.9

SMALLEST = 1e-6
"""Of the mean (inputs) or the largest (gradients): smaller eigenvalues count as this much."""

_Basis = tuple[Tensor, Tensor]
"""``Q`` ``(d, d)`` and ``s`` ``(d, 1)``."""


def scaled_power(residuals_a_weight: float) -> float:
    """The power with far to go: :data:`SCALED` from :data:`.choice.ENOUGH` on, with less data less.

    Args:
        residuals_a_weight: Of the fit.

    Returns:
        The power, in proportion to the data up to there.
    """
    return SCALED * min(1.0, residuals_a_weight / ENOUGH)


class ScaledInputs:
    """Coordinates ``T^-1 w`` of the parameter blocks whose inputs are data.

    The row of a bias is left as it is, and so are blocks without inputs.

    Args:
        objective: Gives the blocks and their inputs' second moments. Inputs that are the same
            tensor have the same coordinates, those of the first block that reads them.
        power: Of the second moment.

    Attributes:
        power: As given.
    """

    def __init__(self, objective: Objective, power: float = SCALED) -> None:
        self._blocks, self.power = objective.layout.blocks, power
        batch = objective.problem.batches[0]
        self._dtype, self._device = batch.B.dtype, batch.B.device
        shared: dict[int, _Basis] = {}
        self._names: dict[str, _Basis] = {}
        for block, left in zip(self._blocks, objective.left, strict=True):
            if block.inputs is None:
                continue
            inputs = getattr(batch, block.inputs)
            if id(inputs) not in shared:
                width = inputs.shape[2]
                shared[id(inputs)] = _basis(left.matrix[:width, :width], power)
            self._names[block.inputs] = shared[id(inputs)]

    def under(self, objective: Objective) -> ScaledInputs:
        """The same coordinates for another model of the same inputs."""
        other = copy(self)
        other._blocks = objective.layout.blocks
        return other

    def batch(self, batch: Batch) -> Batch:
        """The batch with its inputs times ``T``; inputs that are one tensor stay one."""
        made: dict[int, Tensor] = {}
        changes: dict[str, Any] = {}
        for name, (vectors, scales) in self._names.items():
            inputs = getattr(batch, name)
            if id(inputs) not in made:
                made[id(inputs)] = inputs @ (vectors * scales.mT)
            changes[name] = made[id(inputs)]
        return replace(batch, **changes)

    def enter(self, theta: Tensor) -> Tensor:
        """``T^-1 w`` of every block, flat."""
        return self._map(theta, lambda basis, w: basis[0].mT @ w / basis[1])

    def leave(self, theta: Tensor) -> Tensor:
        """The parameters themselves: ``T w'``."""
        return self._map(theta, lambda basis, w: basis[0] @ (basis[1] * w))

    def gradient(self, gradient: Tensor) -> Tensor:
        """The gradient by the parameters of one by ``T^-1 w``: ``T^-T g``."""
        return self._map(gradient, lambda basis, g: basis[0] @ (g / basis[1]))

    def pulled(self, gradient: Tensor) -> Tensor:
        """The gradient by ``T^-1 w`` of one by the parameters: ``T^T g``."""
        return self._map(gradient, lambda basis, g: basis[1] * (basis[0].mT @ g))

    def scales(self, block: ParameterBlock) -> Tensor:
        """Length of a unit of each row of a block in the given coordinates, ``(rows, 1)``."""
        if block.inputs is None:
            return torch.ones(block.rows, 1, dtype=self._dtype, device=self._device)
        scales = self._names[block.inputs][1]
        constant = scales.new_ones(block.rows - len(scales), 1)
        return torch.cat([scales, constant])

    def _map(self, vector: Tensor, change: Callable[[_Basis, Tensor], Tensor]) -> Tensor:
        parts = []
        for block, matrix in zip(self._blocks, split_blocks(vector, self._blocks), strict=True):
            if block.inputs is not None:
                basis = self._names[block.inputs]
                width = len(basis[1])
                matrix = torch.cat([change(basis, matrix[:width]), matrix[width:]])
            parts.append(matrix.reshape(-1))
        return torch.cat(parts)


@dataclass(frozen=True)
class ScaledBatches:
    """Mini-batches with scaled inputs, a second copy of these: runs on the same data share it.

    Attributes:
        inputs: The coordinates.
        batches: The mini-batches.
    """

    inputs: ScaledInputs
    batches: list[Batch]


def _basis(moment: Tensor, power: float) -> _Basis:
    values, vectors = torch.linalg.eigh(moment.double())
    mean = values.mean()
    if not float(mean) > 0.0:  # inputs of zero
        return vectors.to(moment.dtype), torch.ones_like(moment[:, :1])
    scales = (values / mean).clamp_min(SMALLEST).pow(-power)
    return vectors.to(moment.dtype), scales[:, None].to(moment.dtype)


class Steepest:
    """Steps of parameters in scaled coordinates, each head's along the polar factor of momentum.

    The root mean square of a block's step is a rate times that of the block at the start.

    Args:
        inputs: The coordinates.
        theta: The start in the given coordinates, flat; as many blocks of it move as there are
            rates, the first ones.
        blocks: Its blocks.
        rates: Of each block that moves.
        momentum: Share of the running mean that a step keeps.
    """

    def __init__(
        self,
        inputs: ScaledInputs,
        theta: Tensor,
        blocks: Sequence[ParameterBlock],
        rates: Sequence[float],
        momentum: float = MOMENTUM,
    ) -> None:
        self._blocks, self._keep = blocks, momentum
        self._momentum = torch.zeros_like(theta)
        self._scales = [inputs.scales(block) for block in blocks[: len(rates)]]
        self._lengths = [
            rate * (float(_size(w.double())) or w.shape[0] ** -0.5)
            for rate, w in zip(rates, split_blocks(theta, blocks), strict=False)
        ]

    def move(self, theta: Tensor, gradient: Tensor, factor: float) -> None:
        """One step of every block, at a share of its rate.

        Args:
            theta: In scaled coordinates; changed in place.
            gradient: By these.
            factor: The share.
        """
        self._momentum.lerp_(gradient, 1 - self._keep)
        direction = torch.lerp(gradient, self._momentum, self._keep)
        weights = split_blocks(theta, self._blocks)
        directions = split_blocks(direction, self._blocks)
        for i, rate in enumerate(self._lengths):
            step = polar_factors(directions[i], self._blocks[i].heads)
            size = _size(self._scales[i] * step)
            length = torch.where(size > 0.0, factor * rate / size, 0.0)
            weights[i].addcmul_(step, length, value=-1.0)


def _size(matrix: Tensor) -> Tensor:
    """Root mean square, a scalar that is left on the device."""
    return torch.linalg.vector_norm(matrix) / matrix.numel() ** 0.5


def polar_factors(matrix: Tensor, heads: int) -> Tensor:
    """``M_h (M_h^T M_h)^(-1/2)`` of the heads of ``(rows, heads * width)``, side by side.

    Returns:
        A matrix of the same shape; singular values that are next to none, and zeros, stay small.
    """
    by_head = matrix.unflatten(1, (heads, -1)).transpose(0, 1)
    gram = by_head.mT @ by_head
    values, vectors = torch.linalg.eigh(gram)
    tiny = torch.finfo(matrix.dtype).tiny
    floor = (values[:, -1:] * SMALLEST).clamp_min(tiny)
    roots = values.clamp_min(floor).rsqrt()
    factors = by_head @ ((vectors * roots[:, None]) @ vectors.mT)
    return factors.transpose(0, 1).flatten(1)
