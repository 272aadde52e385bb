"""What every benchmark shares: the clock, the machine's description, JSON files and tables."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.table import Table

from attnreg.validation import usable_device

PROCESSOR = time.process_time
"""Timer of runs on a core that others use too; it adds up threads, so that it is for one."""

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "attnreg",
    "torch",
    "numpy",
    "scipy",
    "pytorch-minimize",
    "torch-levenberg-marquardt",
    "pytorch-optimizer",
    "optimistix",
    "jax",
)
console = Console(width=None if sys.stdout.isatty() else 120)


class Clock:
    """Clock that can be stopped while something is measured that no user would compute.

    It shows the wall's seconds, or with :data:`PROCESSOR` as its timer those of the processor.
    """

    timer: ClassVar[Callable[[], float]] = time.perf_counter

    def __init__(self) -> None:
        self._start = self.timer()
        self._paused = 0.0

    def seconds(self) -> float:
        """Seconds since the start, without the pauses."""
        return self.timer() - self._start - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock for the body."""
        begin = self.timer()
        try:
            yield
        finally:
            self._paused += self.timer() - begin


def command_line(name: str, description: str | None, *, quick: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; `quick` says what a quick run leaves out."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--threads", type=int, help="of torch")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option for a device, refused in one line where there is none such."""
    parser.add_argument("--device", type=_device, default="cpu", help="such as cuda")


def _device(name: str) -> str:
    try:
        usable_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, threads: int | None = None
) -> argparse.Namespace:
    """Parsed options, once the threads are set; `threads` where none are given."""
    options = parser.parse_args(arguments)
    if options.threads or threads:
        torch.set_num_threads(options.threads or threads)
    return options


def save(name: str, content: Mapping[str, Any], *, quick: bool) -> None:
    """Writes a benchmark's results; those of a quick run have a file of their own."""
    write_json(RESULTS / f"{name}{'-quick' if quick else ''}.json", content)


def results_of(name: str, tier: str) -> Path:
    """The file of a benchmark's tier; "bench" is the one without a suffix."""
    return RESULTS / (f"{name}.json" if tier == "bench" else f"{name}-{tier}.json")


def resumed(path: Path, content: Mapping[str, Any], part: str) -> dict[str, Any]:
    """A part of a file that was made with the same settings on the same machine; else nothing."""
    before = json.loads(path.read_text()) if path.exists() else {}
    same = all(before.get(key) == json_of(content[key]) for key in ("machine", "setting"))
    return before[part] if same and part in before else {}


def json_of(value: Any) -> Any:
    """A value as it comes back from a file: tuples are lists, infinite numbers None."""
    return json.loads(json.dumps(_finite(value), allow_nan=False))


def machine() -> dict[str, Any]:
    """Hardware, versions and threads of this process, for the JSON files."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # one name may have several
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "threads": torch.get_num_threads(),
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file that is complete or not there; infinite and NaN numbers become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(content), indent=1, allow_nan=False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    console.print(f"[dim]written: benchmarks/results/{path.name}[/dim]")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose first column is left-aligned and whose others are right-aligned."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def median(values: Iterable[float | None]) -> float | None:
    """Median where a value that is None counts as infinite; None where that is the median."""
    middle = statistics.median([math.inf if value is None else value for value in values])
    return None if math.isinf(middle) else middle


def show(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def thin(
    seconds: Sequence[float], loss: Sequence[float], points: int = 400
) -> list[tuple[float, float]]:
    """The best loss so far against time at no more than about `points` times, ends kept."""
    best, curve = math.inf, []
    stride = max(1, len(seconds) // points)
    for index, (time_, value) in enumerate(zip(seconds, loss, strict=True)):
        best = min(best, value)
        if index % stride == 0 or index == len(seconds) - 1:
            curve.append((round(time_, 4), best))
    return curve


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
