"""Converts a model to smaller attention layers, one layer after another.

The layers are fitted in order, each on the inputs that the student itself gives it, so that it
makes up for what the layers before it lost. Its targets hold the drift of the residual stream too:
what the original adds to its hidden states plus what the student's hidden states lack (measured: a
lower loss than the original's outputs alone, at equal work). A block that the model applies several
times (ALBERT) is one fit over all its applications, on the original's inputs and outputs. Then
all layers together take the steps of the final pass (:mod:`attnreg.transformers.final_pass`).

Finished fits are in the journal (:mod:`attnreg.transformers.journal`). Hidden states are not: after
a kill they are computed again by the same steps, so that a run bounded by iterations ends with the
same folder to the byte, on one machine with one number of threads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnreg.transformers.card import REPORT, build_report, model_card
from attnreg.transformers.final_pass import Refinement
from attnreg.transformers.journal import Journal
from attnreg.transformers.layer_fit import LayerFit, fit_layer, layer_problem
from attnreg.transformers.layers_file import LAYERS_FILE, layers_file
from attnreg.transformers.streaming import Blockwise
from attnreg.transformers.task import Group, Options, Task, check_out, multi_head
from attnreg.transformers.writing import write_folder

FINAL = "final"
"""Name in the journal of the final pass's result."""

FIT_SHARE = 0.3
"""Share of the fits in the time of a conversion with a final pass: measured, see
``benchmarks/conversion.py``."""


@dataclass(frozen=True)
class Progress:
    """Where a conversion is.

    Attributes:
        done: Fits that are finished; the final pass counts as one.
        total: Fits in all.
        layers: Layers that are fitted now; empty: the final pass.
        error: What it ended with: held-out relative error of the fit, or held-out loss of the final
            pass; None: it has not ended.
        iteration: Iteration of the running fit and its relative error, or step of the final pass
            and the loss of its mini-batch.
    """

    done: int
    total: int
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
            finished = build_report(
                task, settings, journal.digest, command, records, run.final, scores
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


@dataclass
class _Run:
    """The fits and the final pass of one conversion."""

    task: Task
    journal: Journal
    observer: Observer | None
    done: int = 0
    final: dict[str, Any] | None = None
    changed: list[Group] = field(init=False)
    runner: Blockwise = field(init=False)

    def __post_init__(self) -> None:
        task = self.task
        self.changed = [group for group in task.groups if group.changed]
        self.runner = Blockwise(
            task.checkpoint,
            [*task.fit.ids, *task.held_out.ids],
            device=task.options.device,
            spill=self.journal.folder,
        )

    @property
    def total(self) -> int:
        """Fits, and the final pass."""
        return len(self.changed) + bool(self.task.options.final_steps)

    def whole(
        self,
    ) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]], dict[str, float]]:
        """All fits and the final pass.

        Returns:
            Weights by block, the records of the fits, and the scores.
        """
        original = student = self.runner.start()
        for group in self.task.groups:
            original, student = self.advance(group, original, student)
        pieces = {group.block: self.kept(_piece(group)) for group in self.changed}
        weights = {block: found for block, (found, _) in pieces.items()}
        records = [
            {"layers": list(group.applications), **pieces[group.block][1]} for group in self.changed
        ]
        if self.changed and self.task.options.final_steps:
            weights, student = self.refined(weights, original)
        return weights, records, self.scores(original, student)

    def kept(self, piece: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A piece that was written before, its tensors on the device.

        Returns:
            Its tensors and its record.

        Raises:
            OSError: If another program changed the journal meanwhile.
        """
        found = self.journal.read(piece)
        if found is None:
            raise OSError(f"{self.journal.folder} was changed while the conversion ran")
        return {name: value.to(self.runner.device) for name, value in found[0].items()}, found[1]

    # ------------------------------------------------------------------ fits

    def advance(self, group: Group, original: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Fits a block unless the journal has it, and applies it.

        Returns:
            Hidden states of the original and of the student after it.
        """
        runner, adapter = self.runner, self.task.adapter
        block = runner.block(group.block)
        weights = {name: value.float() for name, value in adapter.read(block).items()}
        fitting = group.changed and self.journal.read(_piece(group)) is None
        seen, targets, before = [], [], original
        for application in group.applications:
            original, given, output = runner.apply(application, block, original, attention=fitting)
            if given is not None and output is not None:
                seen.append(given)
                targets.append(output)
        if fitting:
            if len(group.applications) == 1:
                seen = [runner.attention_input(group.applications[0], block, student)]
                targets[0] += before - student
            fitted = self.fitted(group, weights, seen, targets)
            self.journal.write(_piece(group), fitted.weights, fitted.record())
        if group.changed:
            found, record = self.kept(_piece(group))
            adapter.write(block, found, group.student)
            self.done += 1
            self.report(group.applications, error=record["held_out_error"])
        for application in group.applications:
            student, *_ = runner.apply(application, block, student)
        return original, student

    def fitted(
        self,
        group: Group,
        weights: dict[str, Tensor],
        inputs: list[Tensor],
        targets: list[Tensor],
    ) -> LayerFit:
        """Fits one block."""
        options = self.task.options
        count, end = len(self.task.fit), len(self.runner.offsets) - 1
        parts = [
            layer_problem(self.runner, group.student, inputs, targets, low, high)
            for low, high in ((0, count), (count, end))
        ]
        self.report(group.applications)
        return fit_layer(
            parts[0],
            parts[1],
            (multi_head(group.original), weights),
            multi_head(group.student),
            start=None,
            max_iterations=options.max_iterations,
            max_seconds=self.seconds(fit_share(options) / len(self.changed)),
            seed=options.seed,
            saved=self.task.dtype,
            progress=lambda iteration, error: self.report(
                group.applications, iteration=(iteration, error)
            ),
        )

    def seconds(self, share: float) -> float | None:
        """A share of the time that is allowed; None: no bound."""
        limit = self.task.options.max_seconds
        return None if limit is None else share * limit

    def report(self, layers: tuple[int, ...], **fields: Any) -> None:
        """Tells the observer."""
        if self.observer is not None:
            self.observer(Progress(self.done, self.total, layers, **fields))

    # ------------------------------------------------------------------ the whole model

    def refined(
        self, weights: Mapping[str, Mapping[str, Tensor]], original: Tensor
    ) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
        """The final pass unless the journal has it.

        Returns:
            The weights by block, and the student's hidden states after the last block.
        """
        task, runner = self.task, self.runner
        blocks = {group.block: runner.block(group.block) for group in task.groups}
        if self.journal.read(FINAL) is None:
            for group in self.changed:
                task.adapter.write(blocks[group.block], weights[group.block], group.student)
            self.refine(blocks, original)
        found, self.final = self.kept(FINAL)
        refined = {
            group.block: {name: found[f"{group.block}.{name}"] for name in group.student.weights()}
            for group in self.changed
        }
        self.done += 1
        self.report((), error=self.final["held_out_loss"])
        student = runner.start()
        for group in task.groups:
            if group.changed:
                task.adapter.write(blocks[group.block], refined[group.block], group.student)
            for application in group.applications:
                student, *_ = runner.apply(application, blocks[group.block], student)
        return refined, student

    def refine(self, blocks: Mapping[str, nn.Module], original: Tensor) -> None:
        """Takes the steps of the final pass and keeps what they end with."""
        task, count = self.task, len(self.task.fit)
        self.report(())
        done = Refinement(
            self.runner,
            blocks,
            [group.block for group in self.changed],
            original,
            range(count),
            range(count, count + len(task.held_out)),
            predicts=task.predicts,
            saved=task.dtype,
        ).run(
            steps=task.options.final_steps,
            seconds=self.seconds(1 - fit_share(task.options)),
            seed=task.options.seed,
            journal=self.journal,
            progress=lambda step, loss: self.report((), iteration=(step, loss)),
        )
        tensors = {
            f"{group.block}.{name}": value
            for group in self.changed
            for name, value in task.adapter.read(blocks[group.block]).items()
        }
        self.journal.write(FINAL, tensors, done.record())

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
                self.task.adapter.write(block, weights[owner], groups[owner].student)
                yield from ((f"{owner}.{key}", value) for key, value in block.state_dict().items())


def _piece(group: Group) -> str:
    return f"layer{group.applications[0]}"


def fit_share(options: Options) -> float:
    """The share of the fits in the time that is allowed; the rest is the final pass's."""
    return FIT_SHARE if options.final_steps else 1.0


def _finished(out: Path, digest: str) -> dict[str, Any] | None:
    """The report in a folder that this conversion has completed."""
    try:
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("digest") == digest else None
