"""Live lines on standard error: where a conversion or a measurement is, and the time left."""

from __future__ import annotations

import math

from attnreg.progress import LiveLine
from attnreg.transformers.sensitivity import Measured
from attnreg.transformers.stages import Progress as Where
from attnreg.transformers.task import Task


class ConversionDisplay(LiveLine):
    """Layer, error and time left of a conversion.

    Args:
        task: The conversion; the bar follows its bounds.
        enabled: Whether anything is shown.
    """

    def __init__(self, task: Task, *, enabled: bool) -> None:
        super().__init__(enabled=enabled)
        self._bounds = {
            "text": task.options.generate,
            "fit": task.options.max_iterations,
            "final pass": task.final_steps,
        }

    def update(self, where: Where) -> None:
        """Shows where the conversion is."""
        number, error = where.iteration or (0, float("nan"))
        part = min(number / max(self._bounds[where.stage], 1), 1.0)
        error = error if where.error is None else where.error
        if where.stage == "text":
            self.show(f"sampling text ({part:.0%})", where.done + part, where.total)
            return
        ends = sorted({where.layers[0], where.layers[-1]}) if where.layers else []
        text = f"layer {'-'.join(map(str, ends))}" if ends else where.stage
        text += f" ({where.done}/{where.total})"
        if not math.isnan(error):
            text += f" {'error' if ends else 'loss'} {error:.4f}"
        self.show(text, where.done + part, where.total)


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
