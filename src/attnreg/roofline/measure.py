"""Times each kernel and its own matrix products in turns, and the two roofs of the machine.

"Plain" are the matrix products (and the Cholesky factor) that a kernel executes, of the same
shapes, layouts and precision, run again alone (:mod:`.replay`). Kernel and plain products take
turns, and the share is the median of the ratios within a turn, so that a machine that changes its
speed changes both. The roofs are the rate of a large square product and the rate at which a sum of
two large vectors is streamed into a third one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from attnreg.roofline.kernels import Kernel, Result, Sizes, make_kernels
from attnreg.roofline.precision import check_precision, matmul_precision
from attnreg.roofline.replay import Replay
from attnreg.roofline.trace import trace
from attnreg.validation import usable_device

SQUARE = {"cpu": 2048}
SQUARE_ELSEWHERE = 8192
STREAM_BYTES = {"cpu": 1 << 28}
STREAM_BYTES_ELSEWHERE = 1 << 30

INDEFINITE = (
    "rounding leaves its matrix indefinite: an eigendecomposition, which is not counted, took the "
    "place of the Cholesky factor"
)

Observer = Callable[[str, int, int], None]
"""Told what is measured now, how many steps are done, and of how many."""


@dataclass(frozen=True)
class Measurement:
    """One kernel.

    Attributes:
        name: Of the kernel.
        gemm_operations: Of matrix products and Cholesky factors, as :mod:`.trace` counts them.
        entrywise_operations: Of softmax, sums and all other arithmetic, as :mod:`.trace` counts.
        operations: Of products by kind, as the package counts them (:mod:`attnreg.operations`).
        bytes: The least traffic.
        seconds: Median of the turns.
        gemm_seconds: Of the plain products alone.
        share: Rate achieved over that of the plain products.
        error: Of the result against that in float64, relative, in the norm of all its numbers.
        note: What else to know; usually nothing.
    """

    name: str
    gemm_operations: int
    entrywise_operations: int
    operations: dict[str, int]
    bytes: int
    seconds: float
    gemm_seconds: float
    share: float
    error: float
    note: str

    @property
    def rate(self) -> float:
        """Achieved, in operations of matrix products a second."""
        return self.gemm_operations / self.seconds

    @property
    def gemm_rate(self) -> float:
        """Of the plain products."""
        return self.gemm_operations / self.gemm_seconds

    @property
    def intensity(self) -> float:
        """Operations of matrix products a byte of the least traffic."""
        return self.gemm_operations / self.bytes

    def as_dict(self) -> dict[str, Any]:
        """All numbers by name."""
        rates = {name: getattr(self, name) for name in ("rate", "gemm_rate", "intensity")}
        return asdict(self) | rates


@dataclass(frozen=True)
class Roofline:
    """All kernels beneath the roofs of the machine.

    Attributes:
        sizes: Of the problems.
        dtype: Of the data.
        precision: Of the products.
        device: Where.
        threads: Of the processor.
        repeats: Turns.
        seed: Of the data.
        peak: Operations a second of a large square matrix product, the best of the turns.
        bandwidth: Bytes a second of a streamed sum, the best of the turns.
        kernels: The measurements.
    """

    sizes: Sizes
    dtype: str
    precision: str
    device: str
    threads: int
    repeats: int
    seed: int
    peak: float
    bandwidth: float
    kernels: tuple[Measurement, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it by name; the kernels as a list."""
        own = {k: v for k, v in vars(self).items() if k not in ("sizes", "kernels")}
        kernels = [kernel.as_dict() for kernel in self.kernels]
        return {"sizes": asdict(self.sizes)} | own | {"kernels": kernels}


def measure(
    sizes: Sizes,
    *,
    dtype: torch.dtype = torch.float32,
    precision: str = "float32",
    device: torch.device | str = "cpu",
    repeats: int = 5,
    seed: int = 0,
    observe: Observer | None = None,
) -> Roofline:
    """Measures all kernels.

    Args:
        sizes: Of the problems.
        dtype: ``torch.float32`` or ``torch.float64``.
        precision: Of float32 matrix products, see :mod:`.precision`.
        device: Where.
        repeats: Turns, at least 1; one more warms up.
        seed: Of the data.
        observe: Told about each step.

    Returns:
        The measurements.

    Raises:
        ValueError: If the device cannot be used or has not this precision, or sizes do not fit
            each other.
    """
    place = usable_device(device)
    check_precision(precision, dtype, place)
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; expected at least 1")
    kernels = make_kernels(sizes, dtype, place, seed)
    tell = observe or (lambda name, done, total: None)
    references = []
    for i, kernel in enumerate(make_kernels(sizes, torch.float64, place, seed)):
        tell(f"{kernel.name} in float64", i, 2 * len(kernels))
        references.append(as_vector(kernel.run()))
    found = []
    for i, (kernel, reference) in enumerate(zip(kernels, references, strict=True)):
        tell(kernel.name, len(kernels) + i, 2 * len(kernels))
        found.append(measure_kernel(kernel, reference, precision, place, repeats))
    with matmul_precision(_of_plain(precision), place):
        peak = _peak(torch.bfloat16 if precision == "bf16" else dtype, place, repeats)
    name = str(dtype).removeprefix("torch.")
    return Roofline(
        sizes,
        name,
        precision,
        str(place),
        torch.get_num_threads(),
        repeats,
        seed,
        peak,
        _bandwidth(place, repeats),
        tuple(found),
    )


def measure_kernel(
    kernel: Kernel, reference: Tensor, precision: str, device: torch.device, repeats: int
) -> Measurement:
    """Counts and times one kernel.

    Args:
        kernel: The kernel.
        reference: Its result in float64, as :func:`as_vector` gives it.
        precision: Of its products.
        device: Where it runs.
        repeats: Turns.

    Returns:
        The measurement.
    """

    def run() -> Result:
        with matmul_precision(precision, device):
            return kernel.run()

    def plain() -> None:
        with matmul_precision(_of_plain(precision), device):
            replay()

    before = kernel.operations.as_dict()
    executed = trace(run, kernel.reads)  # sees the products as the precision makes them
    operations = {k: v - before[k] for k, v in kernel.operations.as_dict().items() if v > before[k]}
    definite = "_linalg_eigh" not in executed.names
    difference = (as_vector(run()) - reference).norm() / reference.norm()
    replay = Replay(executed.calls)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for body, taken in zip((run, plain), times, strict=True):
            taken.append(_seconds(body, device))
    own, gemm = (taken[1:] for taken in times)  # the first warms up
    return Measurement(
        kernel.name,
        executed.flops,
        executed.entrywise,
        operations,
        kernel.bytes,
        statistics.median(own),
        statistics.median(gemm),
        statistics.median(b / a for a, b in zip(own, gemm, strict=True)),
        float(difference),
        "" if definite else INDEFINITE,
    )


def as_vector(result: Result) -> Tensor:
    """All numbers of a kernel's result, float64, on the CPU."""
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.flatten().to("cpu", torch.float64) for part in parts])


def _of_plain(precision: str) -> str:
    """Precision of the plain products: those of bfloat16 matrices have nothing to be rounded."""
    return "float32" if precision == "bf16" else precision


def _peak(dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    size = SQUARE.get(device.type, SQUARE_ELSEWHERE)
    left, right = (torch.full((size, size), 1e-3, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / _best(lambda: torch.mm(left, right, out=out), device, repeats)


def _bandwidth(device: torch.device, repeats: int) -> float:
    count = STREAM_BYTES.get(device.type, STREAM_BYTES_ELSEWHERE) // 4
    a, b, out = (torch.ones(count, device=device) for _ in range(3))
    return 3 * a.nbytes / _best(lambda: torch.add(a, b, out=out), device, repeats)


def _best(body: Callable[[], Any], device: torch.device, repeats: int) -> float:
    return min(_seconds(body, device) for _ in range(repeats + 1))


def _seconds(body: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    body()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
