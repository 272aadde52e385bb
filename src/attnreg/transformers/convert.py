"""Converts a model to smaller attention layers and writes the folder of the result."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnreg.transformers.card import REPORT, build_report, model_card
from attnreg.transformers.journal import Journal
from attnreg.transformers.layers_file import LAYERS_FILE, layers_file
from attnreg.transformers.stages import Observer, Stages
from attnreg.transformers.task import Task, check_out
from attnreg.transformers.writing import write_folder


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Attributes:
        out: The folder.
        report: What stands in the folder's report, with layers and numbers before and after.
        notes: Things a reader should know that are not in the folder.
        seconds: Wall time of this process.
    """

    out: Path
    report: dict[str, Any]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def excess(self) -> float | None:
        """Nats per held-out token above the original; None where the model predicts no tokens."""
        found: float | None = self.report["after"].get("excess_nats")
        return found

    @property
    def cosine(self) -> float | None:
        """Mean cosine between held-out embeddings of both; None where the model predicts tokens."""
        found: float | None = self.report["after"].get("cosine")
        return found


def convert(
    task: Task,
    out: str | Path,
    *,
    restart: bool = False,
    command: str = "",
    observer: Observer | None = None,
) -> Conversion:
    """Carries out a task and writes the folder.

    What is finished is kept in ``OUT.partial`` until the folder is complete; the same task and
    folder go on from there. A folder that this task has written is left as it is.

    Args:
        task: What to do.
        out: The folder to write; its parent must exist.
        restart: Whether an unfinished conversion to the same folder is discarded.
        command: The command line, for the model card.
        observer: Called as the work proceeds.

    Returns:
        The conversion.

    Raises:
        ValueError: If ``out`` is something else, or another process or other settings have an
            unfinished conversion there.
        OSError: If the disk is full or cannot be written.
    """
    began = time.perf_counter()
    out = Path(out)
    settings = task.settings()
    journal = Journal(partial_folder(out), settings, restart=restart)
    finished = _finished(out, journal.digest)
    if finished is None:
        check_out(out, task.checkpoint)
    with journal:
        if finished is None:
            run = Stages(task, journal, observer)
            weights, records, scores = run.whole()
            finished = build_report(
                task, settings, journal.digest, command, records, run.final, run.generated, scores
            )
            extra = {
                "README.md": model_card(finished).encode(),
                REPORT: (json.dumps(finished, indent=1, allow_nan=False) + "\n").encode(),
            }
            readme = task.checkpoint.folder / "README.md"
            if readme.is_file():
                extra["README.original.md"] = readme.read_bytes()
            if task.obstacle is not None:
                extra[LAYERS_FILE] = layers_file(task.shapes(student=True))
            dtype = None if task.options.dtype is None else task.dtype
            tensors = run.tensors(weights)
            write_folder(out, task.checkpoint, task.config, tensors, extra, dtype=dtype)
        journal.remove()
    return Conversion(out, finished, tuple(journal.notes), time.perf_counter() - began)


def partial_folder(out: Path) -> Path:
    """Where an unfinished conversion to a folder is kept."""
    return out.with_name(f"{out.name}.partial")


def _finished(out: Path, digest: str) -> dict[str, Any] | None:
    """The report in a folder that this conversion has completed."""
    try:
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("digest") == digest else None
