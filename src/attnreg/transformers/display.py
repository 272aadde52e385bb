"""Live lines on standard error: where a conversion or a measurement is, and the time left."""

from __future__ import annotations

from attnreg.progress import LiveLine
from attnreg.transformers.convert import Progress as Where
from attnreg.transformers.sensitivity import Measured


class ConversionDisplay(LiveLine):
    """Layer, error and time left of a conversion.

    Args:
        max_iterations: Of one fit; its share of the bar follows the iterations.
        final_steps: Of the final pass.
        enabled: Whether anything is shown.
    """

    def __init__(self, max_iterations: int, final_steps: int, *, enabled: bool) -> None:
        super().__init__(enabled=enabled)
        self._bounds = max(max_iterations, 1), max(final_steps, 1)
        self._error = float("nan")

    def update(self, where: Where) -> None:
        """Shows where the conversion is."""
        part = 0.0
        if where.iteration is not None:
            number, self._error = where.iteration
            part = min(number / self._bounds[not where.layers], 1.0)
        elif where.error is not None:
            self._error = where.error
        if where.layers:
            ends = sorted({where.layers[0], where.layers[-1]})
            text, kind = f"layer {'-'.join(map(str, ends))}", "error"
        else:
            text, kind = "final pass", "loss"
        text += f" ({where.done}/{where.total})"
        if self._error == self._error:
            text += f" {kind} {self._error:.4f}"
        done = where.done + part
        self.show(text, done, where.total)


class MeasureDisplay(LiveLine):
    """Measurements done, and the last error."""

    def update(self, done: int, total: int, last: Measured) -> None:
        """Shows one measurement."""
        text = f"layer {last.layers[0]}, {last.setting} ({done}/{total}) error {last.error:.4f}"
        self.show(text, done, total)


class WindowsDisplay(LiveLine):
    """Windows that two models were scored on."""

    def update(self, done: int, total: int) -> None:
        """Shows how many are done."""
        text = f"window {done}/{total}"
        self.show(text, done, total)
