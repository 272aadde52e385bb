"""What a conversion is to do, worked out and checked before the long work begins."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from attnreg.models import MultiHead
from attnreg.transformers.adapters import Adapter, NotExpressible, adapter_for
from attnreg.transformers.calibration import Source, Windows, read_tokenizer, read_windows
from attnreg.transformers.checkpoint import Checkpoint
from attnreg.transformers.plan import Plan
from attnreg.transformers.shapes import AttentionShape
from attnreg.validation import usable_device

DEFAULT_WINDOW = 512
FINAL_STEPS = 400
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """Everything about a conversion but the model, the text and the sizes.

    Attributes:
        window: Tokens of a window; None: as many as the model takes, at most 512.
        tokens: Calibration tokens to use at most; None: all.
        held_out: Share of the documents that nothing is fitted on: the held-out errors and the
            before/after numbers are from these.
        generate: Tokens to fit on beside the text, 0: none. A model that predicts the next token
            writes them itself; for any other, spans of the text are put together anew.
        final_steps: Steps of the final pass over the whole model; 0: it is left out. None: as
            :attr:`Task.final_steps` says.
        max_iterations: Bound on the iterations of each fit.
        max_seconds: Bound on the time of all fits, each of which gets the same share, and of the
            final pass; sampling text, making starts and running the model are not counted, fits of
            pairs are. With it a conversion is not reproducible to the bit.
        fit_pairs: Whether key/value heads are grouped by what short fits of all pairs lose, not by
            second moments (:mod:`attnreg.reduction.sharing`).
        seed: Seed of the fits, of sampled text and of the final pass.
        dtype: Name of the dtype to save in; None: the original's.
        device: Where to compute.
    """

    window: int | None = None
    tokens: int | None = None
    held_out: float = 0.1
    generate: int = 0
    final_steps: int | None = None
    max_iterations: int = 30
    max_seconds: float | None = None
    fit_pairs: bool = False
    seed: int = 0
    dtype: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: If one is out of range.
        """
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} was given; expected {', '.join(DTYPES)}")
        for name, least in (
            ("generate", 0),
            ("final_steps", 0),
            ("max_iterations", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} was given, at least {least} is expected")
        if self.generate == 1:
            raise ValueError("generate=1 was given; expected 0, or at least 2 tokens")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(
                f"max_seconds={self.max_seconds} was given, a positive number is expected"
            )
        usable_device(self.device)


@dataclass(frozen=True)
class Group:
    """A block and where the model applies it.

    Attributes:
        block: The block's name in the model.
        applications: Numbers of its applications, consecutive.
        original: The original's attention.
        student: The student's.
    """

    block: str
    applications: tuple[int, ...]
    original: AttentionShape
    student: AttentionShape

    @property
    def changed(self) -> bool:
        """Whether there is anything to fit."""
        return self.original != self.student


@dataclass(frozen=True)
class Task:
    """A checked conversion.

    Attributes:
        checkpoint: The original.
        adapter: The adapter of its family.
        groups: Its blocks in the order of their first application.
        fit: Windows to fit on.
        held_out: Windows for held-out errors and scores.
        options: Everything else.
        config: The configuration of the student.
        obstacle: Why plain transformers cannot build the student; None: it can.
    """

    checkpoint: Checkpoint
    adapter: Adapter
    groups: tuple[Group, ...]
    fit: Windows
    held_out: Windows
    options: Options
    config: Any
    obstacle: str | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that attention weights are saved in."""
        name = self.options.dtype
        return self.checkpoint.dtype if name is None else DTYPES[name]

    @property
    def predicts(self) -> bool:
        """Whether the model has a head for the next token, so that its loss can be told."""
        name = self.checkpoint.model_class.__name__
        return self.groups[0].original.causal and name.endswith(("ForCausalLM", "LMHeadModel"))

    @property
    def final_steps(self) -> int:
        """Steps of the final pass: by default :data:`FINAL_STEPS`, or 0 where no next token is.

        The embeddings of an encoder gained less from it than from as much time for the fits, where
        there was no text beside the user's (:mod:`.recombination`).
        """
        steps = self.options.final_steps
        return (FINAL_STEPS if self.predicts else 0) if steps is None else steps

    def shapes(self, *, student: bool) -> tuple[AttentionShape, ...]:
        """Shapes of all applications in order."""
        found = {
            number: group.student if student else group.original
            for group in self.groups
            for number in group.applications
        }
        return tuple(found[number] for number in sorted(found))

    def settings(self) -> dict[str, Any]:
        """What decides the result, for the journal and the model card; no paths and no times."""
        from attnreg import __version__

        return {
            "attnreg": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": model_digest(self.checkpoint),
            "calibration": [self.fit.digest, self.held_out.digest],
            "students": [shape.to_dict() for shape in self.shapes(student=True)],
            "options": asdict(self.options),
        }


def prepare(source: str | Path, plan: Plan, calibration: Source, options: Options) -> Task:
    """Opens the model and the text and works out the student.

    Args:
        source: A model folder, or the name of one on the hub.
        plan: The sizes of the student's layers.
        calibration: As :func:`attnreg.transformers.calibration.read_windows` takes it.
        options: Everything else.

    Returns:
        The task.

    Raises:
        ValueError: If the model, the text or the plan is refused.
    """
    checkpoint = Checkpoint.open(source)
    adapter = adapter_for(checkpoint.config)
    original = original_shapes(checkpoint)
    students = plan.shapes(adapter, checkpoint.config, original)
    groups = find_groups(checkpoint, original, students)
    fit, held_out = read_split(checkpoint, calibration, options)
    config, obstacle = checkpoint.config, None
    try:
        config = adapter.student_config(checkpoint.config, students)
    except NotExpressible as reason:
        obstacle = " ".join(str(reason).split())
    task = Task(checkpoint, adapter, groups, fit, held_out, options, config, obstacle)
    writes = task.predicts and options.generate
    if (writes or task.final_steps) and torch.device(options.device).type == "cpu":
        _check_memory(whole_model_bytes(task))
    return task


def whole_model_bytes(task: Task) -> int:
    """Bytes of the whole model in float32, with what the final pass keeps of what it moves."""
    total = sum(math.prod(entry.shape) for entry in task.checkpoint.entries.values())
    moved = sum(
        math.prod(size)
        for group in task.groups
        if group.changed
        for size in group.student.weights().values()
    )
    copies = 5 if task.final_steps else 0  # gradient, two moments, best, rounded
    return 4 * (total + copies * moved)


def _check_memory(needed: int) -> None:
    """Refuses what holds the whole model in float32 where the memory is smaller than that."""
    if not hasattr(os, "sysconf"):  # Windows
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"the final pass and sampling hold the whole model in float32, {needed / 1e9:.1f} GB, "
            f"and this machine has {memory / 1e9:.1f} GB; give --final-steps 0 and no --generate"
        )


def original_shapes(checkpoint: Checkpoint) -> tuple[AttentionShape, ...]:
    """The shapes of the attention of all applications of a block, in order."""
    if checkpoint.layers is not None:
        return checkpoint.layers
    adapter = adapter_for(checkpoint.config)
    count = len(adapter.blocks(checkpoint.skeleton()))
    return tuple(adapter.shape(checkpoint.config, layer) for layer in range(count))


def find_groups(
    checkpoint: Checkpoint,
    original: tuple[AttentionShape, ...],
    students: tuple[AttentionShape, ...],
) -> tuple[Group, ...]:
    """The blocks of a model with their applications.

    Args:
        checkpoint: The model.
        original: Shapes of all applications.
        students: The student's.

    Returns:
        The groups in order.

    Raises:
        ValueError: If a block's applications are not consecutive or are given different shapes.
    """
    model = checkpoint.skeleton()
    names = {id(module): name for name, module in model.named_modules()}
    applications: dict[str, list[int]] = {}
    for number, block in enumerate(adapter_for(checkpoint.config).blocks(model)):
        applications.setdefault(names[id(block)], []).append(number)
    groups = []
    for name, numbers in applications.items():
        if numbers != list(range(numbers[0], numbers[-1] + 1)):
            raise ValueError(
                f"{name} is applied as layers {', '.join(map(str, numbers))} with others between; "
                "only blocks that are applied one time after another can be converted"
            )
        if len({students[number] for number in numbers}) > 1:
            raise ValueError(
                f"layers {numbers[0]} to {numbers[-1]} are one block, {name}, applied "
                f"{len(numbers)} times; expected the same sizes for all of them"
            )
        first = numbers[0]
        groups.append(Group(name, tuple(numbers), original[first], students[first]))
    return tuple(groups)


def window_length(config: Any, wanted: int | None) -> int:
    """Tokens of a window.

    Args:
        config: A model's configuration.
        wanted: The number asked for; None: as many as the model takes, at most 512.

    Returns:
        The number.

    Raises:
        ValueError: If the model does not take as many.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        return min(DEFAULT_WINDOW, limit or DEFAULT_WINDOW)
    if limit is not None and wanted > limit:
        raise ValueError(f"window={wanted} was given, the model takes {limit} tokens at most")
    return wanted


def read_split(
    checkpoint: Checkpoint, calibration: Source, options: Options
) -> tuple[Windows, Windows]:
    """The text as windows.

    Returns:
        The windows to fit on and those held out.

    Raises:
        ValueError: If there is no tokenizer or the text is refused.
    """
    length = window_length(checkpoint.config, options.window)
    tokenizer = read_tokenizer(checkpoint.folder)
    windows = read_windows(calibration, tokenizer, length=length, max_tokens=options.tokens)
    size = checkpoint.config.vocab_size
    largest = max(max(row) for row in windows.ids)
    if largest >= size:
        raise ValueError(
            f"the tokenizer gives id {largest}, the model has {size} embeddings: they do not "
            "belong together"
        )
    return windows.split(options.held_out)


def multi_head(shape: AttentionShape) -> MultiHead:
    """The model of a layer of a shape."""
    return MultiHead(
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        bias=shape.biases,
        rotary=shape.rotary,
        norm_eps=shape.norm_eps,
    )


def model_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of the configuration and of the weight files."""
    files = {entry.file for entry in checkpoint.entries.values()}
    sha = hashlib.sha256()
    for path in [checkpoint.folder / "config.json", *sorted(files)]:
        with path.open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the weights on disk."""
    return sum(entry.bytes for entry in checkpoint.entries.values())


def check_out(out: Path, checkpoint: Checkpoint) -> None:
    """Finds out before the long work whether the result can be written.

    Args:
        out: The folder to write.
        checkpoint: The original.

    Raises:
        ValueError: If there is something under the name, or no room for it.
    """
    parent = Path(os.path.realpath(out)).parent
    if not parent.is_dir():
        raise ValueError(f"--out {out}: its folder {parent} does not exist; make it first")
    if os.path.realpath(out) == os.path.realpath(checkpoint.folder):
        raise ValueError(f"--out {out} is the original's folder; give another name")
    if os.path.lexists(out):
        raise ValueError(
            f"--out {out} is there already and not from this conversion; give another name, or "
            "delete it"
        )
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--out {out}: its folder {parent} cannot be written to")
    needed, free = stored_bytes(checkpoint), shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(
            f"no space left for --out {out}: about {needed / 1e6:.1f} MB are needed, "
            f"{free / 1e6:.1f} MB are free in {parent}; make space, or choose another disk"
        )
