"""The kernels whose speed is measured: what each runs, reads and writes.

A fit spends its time in these. On a multi-head layer: the features of a point, their Jacobian
products forward (JVP) and transposed (VJP), the products of the reduced Gauss-Newton matrix and
Hessian with a vector, and the joint gradient of one mini-batch. On the bilinear model of one
sequence: one dense damped Newton step, that is assembly of the Hessian, Cholesky factor and solve.

The least traffic of a kernel is that of a machine whose caches hold all that is made on the way:
each operand is read once, each result written once. Operands are the inputs, what is kept between
products (softmax matrices, queries, keys, values, features) and the vectors given; the readout's
normal matrix is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from attnreg.batching import Batch
from attnreg.curvature.dense import assemble_hessian
from attnreg.linear_solve.cholesky import DenseSolver
from attnreg.models import Bilinear, MultiHead
from attnreg.objective import Objective, Point
from attnreg.operations import Operations
from attnreg.problem import AttentionProblem
from attnreg.solvers.minibatches import features_of, minibatches, partial_gradient

Result = Tensor | tuple[Tensor, ...]

NOISE = 0.1
"""Of the dense step's targets, relative: it is taken near a minimum, at a definite Hessian."""

DAMPING = 1e-2
"""Of the dense step, relative to the mean of the Hessian's diagonal."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the two problems.

    Attributes:
        dim: Width of the layer's inputs and outputs.
        heads: Query heads.
        kv_heads: Key/value heads; None for as many.
        sequences: Number of sequences.
        length: Rows of a sequence.
        newton_dim: Width of the bilinear problem.
        newton_length: Rows of its one sequence.
    """

    dim: int = 384
    heads: int = 12
    kv_heads: int | None = None
    sequences: int = 64
    length: int = 128
    newton_dim: int = 32
    newton_length: int = 1024

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            ValueError: If one is not positive, or a problem has no more rows than columns.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"{field.name} is {value}; expected a positive number")
        if self.sequences * self.length <= self.dim:
            raise ValueError(
                f"{self.sequences} x {self.length} rows; expected more than dim={self.dim}: the "
                "readout would fit them exactly and leave a residual of rounding errors"
            )
        if self.newton_length <= self.newton_dim:
            raise ValueError(
                f"newton_length is {self.newton_length}; expected more than "
                f"newton_dim={self.newton_dim}: with fewer residuals than parameters the Hessian "
                "is singular"
            )


@dataclass(frozen=True)
class Kernel:
    """One kernel at one point.

    Attributes:
        name: For tables.
        run: Runs it; the results are fresh, or overwritten by the next run.
        reads: Its operands.
        writes: Tensors of the size of its results.
        operations: Where its operations are counted.
    """

    name: str
    run: Callable[[], Result]
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    operations: Operations

    @property
    def bytes(self) -> int:
        """The least traffic: all operands and all results once."""
        return _bytes(self.reads) + _bytes(self.writes)


def make_kernels(
    sizes: Sizes, dtype: torch.dtype, device: torch.device | str, seed: int
) -> list[Kernel]:
    """The kernels on random data, the same for every dtype and device up to rounding.

    Args:
        sizes: Of the problems.
        dtype: ``torch.float32`` or ``torch.float64``.
        device: Where.
        seed: Of data, weights and vectors.

    Returns:
        Seven kernels; those of one layer share their point.

    Raises:
        ValueError: If the sizes do not fit each other.
    """
    draw = _Draw(seed, dtype, device)
    return [*_layer_kernels(sizes, draw), _newton_kernel(sizes, draw)]


@dataclass
class _Draw:
    """Random tensors, drawn in float32 on the CPU so that dtypes and devices see the same ones."""

    seed: int
    dtype: torch.dtype
    device: torch.device | str

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, self.dtype)


def _layer_kernels(sizes: Sizes, draw: _Draw) -> list[Kernel]:
    if sizes.dim % sizes.heads:
        raise ValueError(f"heads={sizes.heads} does not divide dim={sizes.dim}")
    model = MultiHead(sizes.heads, sizes.kv_heads)
    shape = (sizes.sequences, sizes.length, sizes.dim)
    problem = AttentionProblem(draw(*shape), draw(*shape))
    weights = {name: draw(*value.shape) for name, value in model.start(problem, 0).items()}
    weights = {n: w / sizes.dim**0.5 if w.dim() == 2 else 0 * w for n, w in weights.items()}
    theta, readout = model.split(problem, weights)
    objective = Objective(problem, model)
    point = Point(objective, objective.features(theta))
    features, direction = point.features, draw(*theta.shape)
    cotangent = point.cotangent
    part = minibatches(problem.batches)[0]
    kept = [tensor for tensors in features.kept.values() for tensor in tensors]
    core = (*_inputs(problem.batches), *kept, features.columns)
    second = (*core, point.readout, direction)
    spent = objective.operations

    def kernel(
        name: str, run: Callable[[], Result], reads: Iterable[Tensor], *writes: Tensor
    ) -> Kernel:
        return Kernel(name, run, tuple(reads), writes, spent)

    return [
        kernel(
            "features",
            lambda: objective.features(theta).columns,
            (*_inputs(problem.batches), theta),
            features.columns,
            *kept,
        ),
        kernel("JVP", lambda: features.jvp(direction), (*core, direction), features.change),
        kernel("VJP", lambda: features.vjp(cotangent), (*core, cotangent), theta),
        kernel("Gauss-Newton", lambda: point.gauss_newton(direction), second, theta),
        kernel(
            "Hessian",
            lambda: point.hessian(direction),
            (*second, cotangent, point.residual),
            theta,
        ),
        kernel(
            "mini-batch",
            lambda: partial_gradient(objective, part, features_of(objective, part, theta), readout)[
                0
            ],
            (*_inputs([part]), part.B, part.weights, theta, readout),
            theta,
            readout,
        ),
    ]


def _newton_kernel(sizes: Sizes, draw: _Draw) -> Kernel:
    n, d = sizes.newton_length, sizes.newton_dim
    A, Y = draw(n, d), draw(d, d) / d**0.5
    X = (draw(d, d) / d).flatten()
    model = Bilinear()
    F = Objective(AttentionProblem(A, A), model).features(X).columns
    problem = AttentionProblem(A, F @ Y + NOISE * F.std() * draw(n, d))
    objective = Objective(problem, model)
    point = Point(objective, objective.features(X))
    damping = DAMPING * float(assemble_hessian(point).diagonal().mean())
    gradient = point.gradient

    def step() -> Tensor:
        solver = DenseSolver(assemble_hessian(point), objective.operations)
        return solver.solve(gradient, damping).direction

    kept = point.features.kept
    reads = (*_inputs(problem.batches), *kept["softmax"], *kept["values"], point.features.columns)
    reads = (*reads, point.readout, point.residual, point.cotangent, gradient)
    return Kernel("Newton step", step, reads, (gradient,), objective.operations)


def _inputs(batches: Iterable[Batch]) -> tuple[Tensor, ...]:
    return tuple(tensor for batch in batches for tensor in (batch.A1, batch.A2, batch.A3))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of all tensors; of those that are the same once."""
    distinct = {(t.data_ptr(), t.shape, t.stride()): t.nbytes for t in tensors}
    return sum(distinct.values())
