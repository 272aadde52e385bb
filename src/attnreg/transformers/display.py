"""Live lines on standard error: where a conversion or a measurement is, and the time left."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from attnreg.transformers.convert import Progress as Where
from attnreg.transformers.sensitivity import Measured


class _Display:
    """A bar with a text, elapsed time and time left.

    Args:
        enabled: Whether anything is shown.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self._task = self._progress.add_task("reading", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the live line."""
        self._progress.stop()


class ConversionDisplay(_Display):
    """Layer, error and time left of a conversion.

    Args:
        max_iterations: Of one fit; its share of the bar follows the iterations.
        enabled: Whether anything is shown.
    """

    def __init__(self, max_iterations: int, *, enabled: bool) -> None:
        super().__init__(enabled=enabled)
        self._max_iterations = max(max_iterations, 1)
        self._error = float("nan")

    def update(self, where: Where) -> None:
        """Shows where the conversion is."""
        part = 0.0
        if where.iteration is not None:
            number, self._error = where.iteration
            part = min(number / self._max_iterations, 1.0)
        elif where.error is not None:
            self._error = where.error
        layer = "-".join(str(n) for n in sorted({where.layers[0], where.layers[-1]}))
        text = f"pass {where.sweep + 1} layer {layer} ({where.done}/{where.total})"
        if self._error == self._error:
            text += f" error {self._error:.4f}"
        done = where.done + part
        self._progress.update(self._task, description=text, completed=done, total=where.total)


class MeasureDisplay(_Display):
    """Measurements done, and the last error."""

    def update(self, done: int, total: int, last: Measured) -> None:
        """Shows one measurement."""
        text = f"layer {last.layers[0]}, {last.setting} ({done}/{total}) error {last.error:.4f}"
        self._progress.update(self._task, description=text, completed=done, total=total)


class WindowsDisplay(_Display):
    """Windows that two models were scored on."""

    def update(self, done: int, total: int) -> None:
        """Shows how many are done."""
        text = f"window {done}/{total}"
        self._progress.update(self._task, description=text, completed=done, total=total)
