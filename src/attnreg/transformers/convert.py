"""Converts a model to smaller attention layers, one layer after another.

Every pass goes through the layers in order. Each is fitted on the inputs that the student itself
gives it, so that it makes up for what the layers before it lost. Its targets hold the drift of the
residual stream too: what the original adds to its hidden states plus what the student's hidden
states lack (measured: a lower loss than the original's outputs alone, at equal work). A refining
pass starts from the weights found. A block that the model applies several times (ALBERT) is one fit
over all its applications, in the first pass on the original's inputs and outputs.

Finished fits are in the journal (:mod:`attnreg.transformers.journal`). Hidden states are not: after
a kill they are computed again by the same steps, so that a run bounded by iterations ends with the
same folder to the byte, on one machine with one number of threads.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnreg.problem import AttentionProblem
from attnreg.transformers.card import REPORT, build_report, model_card
from attnreg.transformers.journal import Journal
from attnreg.transformers.layer_fit import LayerFit, fit_layer
from attnreg.transformers.layers_file import LAYERS_FILE, layers_file
from attnreg.transformers.shapes import AttentionShape
from attnreg.transformers.streaming import Blockwise
from attnreg.transformers.task import Group, Task, check_out, multi_head
from attnreg.transformers.writing import write_folder


@dataclass(frozen=True)
class Progress:
    """Where a conversion is.

    Attributes:
        done: Fits that are finished.
        total: Fits in all.
        sweep: Number of the pass, from 0.
        layers: Layers that are fitted now.
        error: Held-out relative error of the fit that has just finished; None: it has begun.
        iteration: Iteration of the running fit, and its relative error.
    """

    done: int
    total: int
    sweep: int
    layers: tuple[int, ...]
    error: float | None = None
    iteration: tuple[int, float] | None = None


Observer = Callable[[Progress], None]


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
            run = _Run(task, journal, observer)
            weights, records, scores = run.whole()
            finished = build_report(task, settings, journal.digest, command, records, scores)
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


@dataclass
class _Run:
    """The passes of one conversion."""

    task: Task
    journal: Journal
    observer: Observer | None
    done: int = 0
    total: int = field(init=False)
    runner: Blockwise = field(init=False)

    def __post_init__(self) -> None:
        task = self.task
        self.total = sum(group.changed for group in task.groups) * self.sweeps
        self.runner = Blockwise(
            task.checkpoint,
            [*task.fit.ids, *task.held_out.ids],
            device=task.options.device,
            spill=self.journal.folder,
        )

    @property
    def sweeps(self) -> int:
        return 1 + self.task.options.refinements

    def whole(
        self,
    ) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]], dict[str, float]]:
        """All passes.

        Returns:
            Weights by block, the records of the last fits, and the scores.

        Raises:
            OSError: If another program changes the journal meanwhile.
        """
        changed = [group for group in self.task.groups if group.changed]
        for sweep in range(self.sweeps):
            last = sweep == self.sweeps - 1
            if last or any(self.journal.read(_piece(sweep, group)) is None for group in changed):
                ends = self.sweep(sweep)
            else:
                self.done += len(changed)
        weights, records = {}, []
        for group in changed:
            found = self.journal.read(_piece(self.sweeps - 1, group))
            if found is None:
                raise OSError(f"{self.journal.folder} was changed while the conversion ran")
            weights[group.block], record = found
            first = self.journal.read(_piece(0, group))
            begun = record if first is None else first[1]
            extra = {"layers": list(group.applications), "first_start": begun["start"]}
            records.append({**extra, **record, "tried": begun["tried"]})
        return weights, records, self.scores(*ends)

    def sweep(self, sweep: int) -> tuple[Tensor, Tensor]:
        """One pass over the layers.

        Returns:
            Hidden states of the original and of the student after the last block.
        """
        original = self.runner.start()
        student = original.clone()
        for group in self.task.groups:
            original, student = self.advance(sweep, group, original, student)
        return original, student

    def advance(
        self, sweep: int, group: Group, original: Tensor, student: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fits a block unless the journal has it, and applies it."""
        runner, adapter = self.runner, self.task.adapter
        block = runner.block(group.block)
        weights = {name: value.float() for name, value in adapter.read(block).items()}
        found = self.journal.read(_piece(sweep, group)) if group.changed else None
        fitting = group.changed and found is None
        seen, outputs, before = [], [], []
        for application in group.applications:
            before.append(original)
            original, given, output = runner.apply(application, block, original, attention=fitting)
            if given is not None and output is not None:
                seen.append(given)
                outputs.append(output)
        if fitting:
            start = self.start_of(sweep, group)
            if sweep > 0 or len(group.applications) == 1:
                seen, outputs = self.students_view(group, student, start, before, outputs)
            fitted = self.fitted(sweep, group, weights, start, seen, outputs)
            self.journal.write(_piece(sweep, group), fitted.weights, fitted.record())
            found = self.journal.read(_piece(sweep, group))
        if group.changed:
            assert found is not None
            adapter.write(block, _on(found[0], runner.device), group.student)
            self.done += 1
            self.report(sweep, group, error=found[1]["held_out_error"])
        for application in group.applications:
            student, *_ = runner.apply(application, block, student)
        return original, student

    def start_of(self, sweep: int, group: Group) -> dict[str, Tensor] | None:
        """The weights of the pass before."""
        if sweep == 0:
            return None
        found = self.journal.read(_piece(sweep - 1, group))
        if found is None:
            raise OSError(f"{self.journal.folder} was changed while the conversion ran")
        return _on(found[0], self.runner.device)

    def students_view(
        self,
        group: Group,
        student: Tensor,
        start: dict[str, Tensor] | None,
        before: list[Tensor],
        outputs: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The student's own inputs at all applications, and the targets there."""
        block = self.runner.block(group.block)
        if start is not None:
            self.task.adapter.write(block, start, group.student)
        seen, targets = [], []
        for i, application in enumerate(group.applications):
            targets.append(outputs[i] + (before[i] - student))
            if i == len(group.applications) - 1:
                seen.append(self.runner.attention_input(application, block, student))
            else:
                student, given, _ = self.runner.apply(application, block, student, attention=True)
                assert given is not None
                seen.append(given)
        return seen, targets

    def fitted(
        self,
        sweep: int,
        group: Group,
        weights: dict[str, Tensor],
        start: dict[str, Tensor] | None,
        inputs: list[Tensor],
        targets: list[Tensor],
    ) -> LayerFit:
        options = self.task.options
        count, end = len(self.task.fit), len(self.runner.offsets) - 1
        parts = [
            layer_problem(self.runner, group.student, inputs, targets, low, high)
            for low, high in ((0, count), (count, end))
        ]
        self.report(sweep, group)
        return fit_layer(
            parts[0],
            parts[1],
            (multi_head(group.original), weights),
            multi_head(group.student),
            start=start,
            max_iterations=options.max_iterations,
            max_seconds=None if options.max_seconds is None else options.max_seconds / self.total,
            seed=options.seed,
            saved=self.task.dtype,
            progress=lambda iteration, error: self.report(
                sweep, group, iteration=(iteration, error)
            ),
        )

    def report(self, sweep: int, group: Group, **fields: Any) -> None:
        if self.observer is not None:
            self.observer(Progress(self.done, self.total, sweep, group.applications, **fields))

    def scores(self, original: Tensor, student: Tensor) -> dict[str, float]:
        """Scores on the held-out windows: losses of both, or the cosine of their embeddings."""
        count = len(self.task.fit)
        windows = range(count, count + len(self.task.held_out))
        if self.task.predicts:
            before, after = (self.runner.losses(rows, windows) for rows in (original, student))
            return {"before": float(before.mean()), "after": float(after.mean())}
        first, second = (self.runner.pooled(rows, windows) for rows in (original, student))
        return {"cosine": float(torch.cosine_similarity(first, second).mean())}

    def tensors(self, weights: dict[str, dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the student, a block at a time."""
        groups = {group.block: group for group in self.task.groups if group.changed}
        written = set()
        for name in self.task.checkpoint.names:
            owner = next((block for block in groups if name.startswith(f"{block}.")), None)
            if owner is None:
                yield name, self.task.checkpoint.tensors([name])[name]
            elif owner not in written:
                written.add(owner)
                block = self.runner.block(owner)
                found = _on(weights[owner], self.runner.device)
                self.task.adapter.write(block, found, groups[owner].student)
                yield from ((f"{owner}.{key}", value) for key, value in block.state_dict().items())


def _piece(sweep: int, group: Group) -> str:
    return f"pass{sweep}-layer{group.applications[0]}"


def _on(weights: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in weights.items()}


def layer_problem(
    runner: Blockwise,
    shape: AttentionShape,
    inputs: list[Tensor],
    targets: list[Tensor],
    first: int,
    last: int,
) -> AttentionProblem:
    """The problem of a student's layer.

    Args:
        runner: Knows where the windows' rows are.
        shape: The student's shape.
        inputs: For each application the rows that go into the attention.
        targets: The rows that should come out.
        first: The first window.
        last: The window after the last.

    Returns:
        The problem; windows of one application after those of another.
    """
    a = [row for rows in inputs for row in runner.sequences(rows, first, last)]
    b = [row for rows in targets for row in runner.sequences(rows, first, last)]
    follows = math.isclose(shape.scale, shape.head_dim**-0.5, rel_tol=1e-12)
    scale = None if follows else shape.scale  # None: each model's own, also the original's
    return AttentionProblem(a, b, mask=shape.mask(), scale=scale)  # type: ignore[arg-type]


def _finished(out: Path, digest: str) -> dict[str, Any] | None:
    """The report in a folder that this conversion has completed."""
    try:
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("digest") == digest else None
