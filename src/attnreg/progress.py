"""A live line on the terminal while a fit runs."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attnreg.problem import AttentionProblem
from attnreg.records import Callback, IterationRecord


class LiveLine:
    """A text, a bar, elapsed time and time left, on standard error; a context.

    Args:
        text: Shown until the first update.
        enabled: Whether anything is shown.
    """

    def __init__(self, text: str = "reading", *, enabled: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self._task = self._progress.add_task(text, total=None)

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

    def show(self, text: str, completed: float, total: float) -> None:
        """Exchanges the text and moves the bar."""
        self._progress.update(self._task, description=text, completed=completed, total=total)

    def stop(self) -> None:
        """Ends the line."""
        self._progress.stop()


class ProgressDisplay(LiveLine):
    """Loss, error, gradient and time of a running fit, on standard error.

    The line fits into 80 columns. The bar is the share of the way, in powers of ten, from the
    first gradient norm to the tolerance, or of the time limit where that is further along.

    Args:
        problem: Gives the relative error.
        tol: Tolerance of the fit.
        max_seconds: Time limit, or None.
        enabled: Whether anything is shown.
    """

    def __init__(
        self, problem: AttentionProblem, tol: float, max_seconds: float | None, *, enabled: bool
    ) -> None:
        self._problem, self._tol, self._max_seconds = problem, tol, max_seconds
        self._first = 0.0
        super().__init__("fit", enabled=enabled)

    def observer(self, history: list[IterationRecord], callback: Callback | None) -> Callback:
        """What a run is given: keeps each record, shows it and asks the user's callback."""

        def observe(record: IterationRecord) -> bool | None:
            history.append(record)
            self.update(record)
            return callback(record) if callback is not None else None

        return observe

    def update(self, record: IterationRecord) -> None:
        """Shows one record."""
        self._first = self._first or record.gradient_norm
        error = self._problem.relative_error(record.loss)
        text = f"{record.iteration:4d}  loss {record.loss:.4e} error {error:.4f}"
        text += f" gradient {record.gradient_norm:.0e}"
        self.show(text, self._share(record), 1.0)

    def _share(self, record: IterationRecord) -> float:
        share = 0.0
        if record.gradient_norm > 0.0 and self._first > self._tol:
            way = math.log(self._first / self._tol)
            share = math.log(self._first / record.gradient_norm) / way
        if self._max_seconds is not None:
            share = max(share, record.seconds / self._max_seconds)
        return min(max(share, 0.0), 1.0)
