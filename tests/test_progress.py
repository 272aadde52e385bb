"""The live line of a running fit."""

import io

import pytest
from rich.console import Console

from attnreg import AttentionProblem, IterationRecord
from attnreg.progress import ProgressDisplay
from tests.twins import normal


def record(**changes):
    values = {
        "iteration": 1234,
        "seconds": 75.0,
        "loss": 1.23456e-123,
        "regularised": 1.0,
        "gradient_norm": 1.2e-123,
        "damping": 1e-100,
        "path": 0.0,
        "inner_iterations": 200,
        "passes": 123456,
        "phase": "gauss-newton",
        "accepted": True,
    }
    return IterationRecord(**(values | changes))


def test_the_line_fits_into_80_columns(monkeypatch):
    """Bar, time and time left are there beside the longest numbers."""
    output = io.StringIO()
    console = Console(file=output, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr("attnreg.progress.Console", lambda **_: console)
    problem = AttentionProblem(normal(5, 3), normal(5, 2))
    with ProgressDisplay(problem, 1e-8, 150.0, enabled=True) as display:
        display.update(record())
    line = next(x for x in reversed(output.getvalue().splitlines()) if "loss" in x)
    for part in ("1234", "loss 1.2346e-123", "error 0.0000", "gradient 1e-123", "0:00:00", "left"):
        assert part in line
    assert "\N{HORIZONTAL ELLIPSIS}" not in line


@pytest.mark.parametrize(("norm", "share"), [(1.0, 0.0), (1e-4, 0.5), (1e-8, 1.0), (1e-12, 1.0)])
def test_the_bar_is_the_way_of_the_gradient(norm, share):
    problem = AttentionProblem(normal(5, 3), normal(5, 2))
    with ProgressDisplay(problem, 1e-8, None, enabled=False) as display:
        display.update(record(gradient_norm=1.0))
        display.update(record(gradient_norm=norm))
    assert display._progress.tasks[0].completed == pytest.approx(share)
