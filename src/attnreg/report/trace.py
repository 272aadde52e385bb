"""Error against time of one method."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Trace:
    """Relative error on the fitted data against seconds, and the errors at the end."""

    name: str
    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    fitted_error: float = math.nan
    held_out_error: float = math.nan

    def add(self, seconds: float, error: float) -> None:
        """Adds one point."""
        self.seconds.append(seconds)
        self.errors.append(error)

    def finish(self, fitted_error: float, held_out_error: float) -> None:
        """Sets the errors at the end."""
        self.fitted_error, self.held_out_error = fitted_error, held_out_error

    def summary(self) -> dict[str, object]:
        """Everything, for JSON."""
        return {
            "method": self.name,
            "fitted_error": self.fitted_error,
            "held_out_error": self.held_out_error,
            "seconds": self.seconds,
            "errors": self.errors,
        }
