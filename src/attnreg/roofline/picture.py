"""The roofline picture; needs matplotlib.

A dot is what a kernel achieves, the ring above it what its matrix products achieve alone.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnreg.roofline.measure import Measurement, Roofline

GIGA = 1e9
STEP = 0.82
"""Of the levels at which the names of the kernels stand."""

TICKS = [digit * 10**power for power in range(-3, 8) for digit in (1, 2, 5)]


def draw(roofline: Roofline, path: Path) -> None:
    """Writes the picture: the two roofs, and a dot and a ring for each kernel.

    Args:
        roofline: The measurements.
        path: A file in an existing folder; its ending is the format.

    Raises:
        ValueError: If the ending names no format.
    """
    kernels = sorted(roofline.kernels, key=lambda kernel: kernel.intensity)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.set(xscale="log", yscale="log")
        _draw_roofs(axes, roofline)
        level = min(kernel.rate for kernel in kernels) / GIGA
        for i, kernel in enumerate(kernels):
            level *= STEP
            _draw_kernel(axes, kernel, f"C{i}", level)
        bottom, top = STEP * level, 1.6 * roofline.peak / GIGA
        ticks = [tick for tick in TICKS if bottom <= tick <= top]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.set_ylim(bottom, top)
        axes.set_xlabel("operations of matrix products a byte of the least traffic")
        axes.set_ylabel("GFLOP/s of matrix products")
        sizes = roofline.sizes
        axes.set_title(
            f"{roofline.device}, {roofline.dtype}, products in {roofline.precision}: "
            f"d = {sizes.dim}, {sizes.heads} heads, {sizes.sequences} x {sizes.length} tokens",
            fontsize=10,
        )
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=130)


def _draw_roofs(axes: Axes, roofline: Roofline) -> None:
    ridge = roofline.peak / roofline.bandwidth
    intensities = [kernel.intensity for kernel in roofline.kernels]
    left, right = min(ridge / 8, min(intensities) / 2), 4 * max(ridge, *intensities)
    peak = roofline.peak / GIGA
    axes.plot(
        [left, ridge, right],
        [left * roofline.bandwidth / GIGA, peak, peak],
        color="black",
        linewidth=1.5,
    )
    axes.text(right, 1.06 * peak, f"large product, {peak:.0f} GFLOP/s ", ha="right")
    axes.text(1.1 * ridge, 0.72 * peak, f"memory, {roofline.bandwidth / GIGA:.0f} GB/s")
    axes.set_xlim(left, right)


def _draw_kernel(axes: Axes, kernel: Measurement, colour: str, level: float) -> None:
    """A dot with its name at a level below all dots."""
    x, rate, plain = kernel.intensity, kernel.rate / GIGA, kernel.gemm_rate / GIGA
    axes.plot([x, x], [level, plain], color=colour, linewidth=0.8)
    axes.plot([x], [plain], "o", color=colour, markerfacecolor="none", markersize=6)
    axes.plot([x], [rate], "o", color=colour, markersize=6)
    text = f"{kernel.name}, {kernel.share:.0%} "
    axes.text(x, level, text, ha="right", va="center", color=colour)
