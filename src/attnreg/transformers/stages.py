"""The stages of a conversion: sampling text, the fits in their order, the final pass.

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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnreg.transformers.calibration import Windows, read_tokenizer, special_frame
from attnreg.transformers.final_pass import Refinement
from attnreg.transformers.generation import generate_windows
from attnreg.transformers.journal import Journal
from attnreg.transformers.layer_fit import LayerFit, fit_layer, layer_problem
from attnreg.transformers.recombination import recombined_windows
from attnreg.transformers.streaming import Blockwise
from attnreg.transformers.task import Group, Task, multi_head, window_length

TEXT, FINAL = "text", "final"
"""Names in the journal of the sampled windows and of the final pass's result."""

FIT_SHARE = 0.5
"""Share of the fits in the time of a conversion with a final pass: the best of 0.25, 0.3 and 0.5 in
trials on a model 64 wide; wider ones may want more."""


@dataclass(frozen=True)
class Progress:
    """Where a conversion is.

    Attributes:
        done: Stages that are finished.
        total: Stages in all: sampling text, every fit, the final pass.
        stage: The stage: ``"text"``, ``"fit"`` or ``"final pass"``.
        layers: Layers that are fitted now.
        error: What the stage ended with: held-out relative error of the fit, or held-out loss of
            the final pass; None: it has not ended.
        iteration: Iteration of the running fit and its relative error; step of the final pass and
            the loss of its mini-batch; tokens sampled and 0.
    """

    done: int
    total: int
    stage: str
    layers: tuple[int, ...] = ()
    error: float | None = None
    iteration: tuple[int, float] | None = None


Observer = Callable[[Progress], None]


@dataclass
class Stages:
    """One conversion, from the model and the text to the student's weights.

    Args:
        task: What to do.
        journal: Keeps what is finished; its lock is held.
        observer: Called as the work proceeds.

    Attributes:
        final: The record of the final pass; None: there was none.
        generated: Windows beside the user's: what the original wrote, or spans of the text put
            together anew where it cannot write; None: none.
    """

    task: Task
    journal: Journal
    observer: Observer | None
    done: int = 0
    final: dict[str, Any] | None = None
    generated: Windows | None = None
    changed: list[Group] = field(init=False)
    count: int = field(init=False)  # of windows to fit on, the first of the runner's
    runner: Blockwise = field(init=False)

    def __post_init__(self) -> None:
        task = self.task
        self.changed = [group for group in task.groups if group.changed]
        fit = [*task.fit.ids]
        if task.options.generate:
            self.generated = self.sampled()
            fit += self.generated.ids
        self.count = len(fit)
        self.runner = Blockwise(
            task.checkpoint,
            [*fit, *task.held_out.ids],
            device=task.options.device,
            spill=self.journal.folder,
        )

    @property
    def total(self) -> int:
        """Stages in all."""
        options = self.task.options
        return bool(options.generate) + len(self.changed) + bool(self.task.final_steps)

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
        if self.task.final_steps:
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
        device = self.task.options.device
        return {name: value.to(device) for name, value in found[0].items()}, found[1]

    def sampled(self) -> Windows:
        """Windows beside the user's, by a model that writes unless the journal has them."""
        task = self.task
        if not task.predicts:
            self.report("text")
            frame = special_frame(read_tokenizer(task.checkpoint.folder))
            self.done += 1
            return recombined_windows(
                task.fit, task.options.generate, frame=frame, seed=task.options.seed
            )
        if self.journal.read(TEXT) is None:
            self.report("text")
            windows = generate_windows(
                task.checkpoint,
                task.fit,
                task.options.generate,
                length=window_length(task.checkpoint.config, task.options.window),
                seed=task.options.seed,
                device=task.options.device,
                progress=lambda tokens: self.report("text", iteration=(tokens, 0.0)),
            )
            rows = [torch.tensor(row) for row in windows.ids]
            lengths = torch.tensor([len(row) for row in rows])
            self.journal.write(TEXT, {"ids": torch.cat(rows), "lengths": lengths}, {})
        found, _ = self.kept(TEXT)
        self.done += 1
        rows = found["ids"].cpu().split(found["lengths"].tolist())
        return Windows.of([row.tolist() for row in rows], "sampled from the original")

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
            self.report("fit", group.applications, error=record["held_out_error"])
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
        count, end = self.count, len(self.runner.offsets) - 1
        parts = [
            layer_problem(self.runner, group.student, inputs, targets, low, high)
            for low, high in ((0, count), (count, end))
        ]
        self.report("fit", group.applications)
        return fit_layer(
            parts[0],
            parts[1],
            (multi_head(group.original), weights),
            multi_head(group.student),
            max_iterations=options.max_iterations,
            max_seconds=self.seconds(fit_share(self.task) / len(self.changed)),
            seed=options.seed,
            saved=self.task.dtype,
            fit_pairs=options.fit_pairs,
            progress=lambda iteration, error: self.report(
                "fit", group.applications, iteration=(iteration, error)
            ),
        )

    def seconds(self, share: float) -> float | None:
        """A share of the time that is allowed; None: no bound."""
        limit = self.task.options.max_seconds
        return None if limit is None else share * limit

    def report(self, stage: str, layers: tuple[int, ...] = (), **fields: Any) -> None:
        """Tells the observer."""
        if self.observer is not None:
            self.observer(Progress(self.done, self.total, stage, layers, **fields))

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
        self.report("final pass", error=self.final["held_out_loss"])
        student = runner.start()
        for group in task.groups:
            if group.changed:
                task.adapter.write(blocks[group.block], refined[group.block], group.student)
            for application in group.applications:
                student, *_ = runner.apply(application, blocks[group.block], student)
        return refined, student

    def refine(self, blocks: Mapping[str, nn.Module], original: Tensor) -> None:
        """Takes the steps of the final pass and keeps what they end with."""
        task, count = self.task, self.count
        self.report("final pass")
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
            steps=task.final_steps,
            seconds=self.seconds(1 - fit_share(task)),
            seed=task.options.seed,
            journal=self.journal,
            progress=lambda step, loss: self.report("final pass", iteration=(step, loss)),
        )
        tensors = {
            f"{group.block}.{name}": value
            for group in self.changed
            for name, value in task.adapter.read(blocks[group.block]).items()
        }
        self.journal.write(FINAL, tensors, done.record())

    def scores(self, original: Tensor, student: Tensor) -> dict[str, float]:
        """Scores on the held-out windows: losses of both, or the cosine of their embeddings."""
        windows = range(self.count, self.count + len(self.task.held_out))
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


def fit_share(task: Task) -> float:
    """Share of the fits in the time allowed; what they leave of it is given to nobody."""
    return FIT_SHARE if task.final_steps else 1.0
