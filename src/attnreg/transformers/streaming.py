"""Runs a model block by block, so that one block is in memory at a time.

What surrounds the blocks (embeddings, masks, position embeddings, final norm, head) is
transformers' own code with its own weights. In place of every block stands a stop. To apply block
``i`` to a batch, the surrounding model is run up to the ``i``-th stop, which gives the arguments
that transformers calls the block with; the block itself, filled from the folder, is then called
with these and with the stored hidden states. Blocks that the surrounding model passes on its way
cost nothing. Only the hidden states of all tokens before one block are kept: in memory, or mapped
from a file that has no name any more, so that nothing is left of it after a kill.

Token rows are those of the windows one after another, padding left out: ``(tokens, width)``.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.checkpoint import Checkpoint

BATCH_TOKENS = 8192  # of a batch through a block, padding included
HEAD_TOKENS = 2048  # of a batch through the head, whose logits are wide
MAPPED_BYTES = 2**30  # hidden states of this size and above are kept on disk


class _Reached(Exception):
    """No error: how a stop ends the surrounding model's forward."""

    def __init__(self, hidden: Tensor, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        super().__init__()
        self.hidden, self.arguments, self.named = hidden, arguments, named


class _Taken(Exception):
    """No error: how a block is left once its input is known."""


class _Stop(nn.Module):
    """Stands in a block's place; attributes that the surrounding model reads are the block's."""

    def __init__(self, runner: Blockwise, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["outside"] = (runner, block)  # not as submodules

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["outside"][1], name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """What the runner makes of the call."""
        if arguments:
            hidden, arguments = arguments[0], arguments[1:]
        else:
            hidden = named.pop("hidden_states")
        return self.__dict__["outside"][0].visit(hidden, arguments, named)


class Blockwise:
    """A model and the windows that it is run on.

    Args:
        checkpoint: The model folder.
        ids: Token ids of each window.
        device: Where to compute and to keep hidden states.
        spill: A folder for hidden states that are too large for memory; None: keep all in memory.
        dtype: What to compute in.

    Attributes:
        device: Where it computes.
        offsets: Where each window's rows begin, and the number of rows.
        applications: For each application of a block the name of the block.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: Sequence[Sequence[int]],
        *,
        device: str = "cpu",
        spill: Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._checkpoint, self._ids, self.device = checkpoint, ids, device
        self._spill, self._dtype = spill, dtype
        self.adapter = adapter_for(checkpoint.config)
        self.offsets = [0]
        for row in ids:
            self.offsets.append(self.offsets[-1] + len(row))
        model: Any = checkpoint.skeleton()
        self._model = model
        self._model.config.use_cache = False
        blocks = list(self.adapter.blocks(self._model))
        names = {id(module): name for name, module in self._model.named_modules()}
        self.applications = tuple(names[id(block)] for block in blocks)
        self._templates = dict(zip(self.applications, blocks, strict=True))
        for name, block in self._templates.items():
            self._model.set_submodule(name, _Stop(self, block))
        checkpoint.load_into(self._model, "", dtype)
        self._model.to(device)
        self._width = 0
        self._tuple = False  # whether a block returns a tuple; known once one has run
        self._count, self._target, self._final = 0, -1, torch.empty(0)
        self._live: Mapping[str, nn.Module] | None = None

    # ------------------------------------------------------------------ blocks

    def block(self, name: str) -> nn.Module:
        """A block with the original's weights; a new one each time."""
        block = copy.deepcopy(self._templates[name])
        self._checkpoint.load_into(block, name, self._dtype)
        return block.eval().to(self.device)

    def start(self) -> Tensor:
        """Hidden states before the first block."""
        rows: Tensor | None = None
        for batch in self.batches(BATCH_TOKENS):
            hidden = self._reach(batch, 0).hidden
            self._width = hidden.shape[-1]
            rows = self._allocate() if rows is None else rows
            self._store(batch, hidden, rows)
        assert rows is not None
        return rows

    def attention_input(self, application: int, block: nn.Module, rows: Tensor) -> Tensor:
        """What the attention of a block is given.

        Args:
            application: Number of the application.
            block: The block, with whatever attention weights.
            rows: Hidden states before it.

        Returns:
            The input of the attention, as rows; the block is not run any further.
        """
        found = self._allocate()

        def take(module: nn.Module, arguments: Any, named: Any) -> None:
            self._store(batch, _hidden(arguments, named), found)
            raise _Taken

        first, _ = self.adapter.taps(block)
        with _hooked(first.register_forward_pre_hook(take, with_kwargs=True)):
            for batch in self.batches(BATCH_TOKENS):
                with _ended_by(_Taken):
                    self._call(batch, application, block, rows)
        return found

    def apply(
        self, application: int, block: nn.Module, rows: Tensor, *, attention: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Applies a block to all windows.

        Args:
            application: Number of the application.
            block: The block.
            rows: Hidden states before it.
            attention: Whether its attention's input and output are wanted too.

        Returns:
            Hidden states after it, and the attention's input and output (None: not wanted).
        """
        after = self._allocate()
        taken = (self._allocate(), self._allocate()) if attention else None

        def before(module: nn.Module, arguments: Any, named: Any) -> None:
            if taken is not None:
                self._store(batch, _hidden(arguments, named), taken[0])

        def behind(module: nn.Module, arguments: Any, output: Any) -> None:
            if taken is not None:
                self._store(batch, output[0] if isinstance(output, tuple) else output, taken[1])

        first, last = self.adapter.taps(block)
        pre = first.register_forward_pre_hook(before, with_kwargs=True)
        with _hooked(pre), _hooked(last.register_forward_hook(behind)):
            for batch in self.batches(BATCH_TOKENS):
                self._store(batch, self._call(batch, application, block, rows), after)
        return (after, *(taken or (None, None)))

    def sequences(self, rows: Tensor, start: int, stop: int) -> list[Tensor]:
        """The rows of the windows ``start ... stop - 1``, one view each."""
        return [rows[low:high] for low, high in pairwise(self.offsets[start : stop + 1])]

    def batches(self, limit: int, windows: Sequence[int] | None = None) -> Iterator[list[int]]:
        """Windows of similar lengths.

        Args:
            limit: Tokens of a batch at most, padding included; one window may be longer.
            windows: Numbers of the windows; None: all.

        Yields:
            Numbers of the windows of a batch, the longest first.
        """
        batch: list[int] = []
        chosen = range(len(self._ids)) if windows is None else windows
        for window in sorted(chosen, key=lambda i: (-len(self._ids[i]), i)):
            if batch and len(self._ids[batch[0]]) * (len(batch) + 1) > limit:
                yield batch
                batch = []
            batch.append(window)
        if batch:
            yield batch

    # ------------------------------------------------------------------ the end of the model

    @torch.no_grad()
    def losses(self, rows: Tensor, windows: Sequence[int]) -> Tensor:
        """Negative log likelihood of every next token.

        Args:
            rows: Hidden states after the last block.
            windows: Numbers of the windows that are scored.

        Returns:
            ``(tokens - windows,)``, float64, nats, in the order of ``windows``.
        """
        parts: dict[int, Tensor] = {}
        for batch in self.batches(HEAD_TOKENS, windows):
            logits = self._finish(self._model, batch, rows).logits
            for logit, window in zip(logits, batch, strict=True):
                following = torch.tensor(self._ids[window][1:], device=logits.device)
                scores = logit[: len(following)].float()
                loss = nn.functional.cross_entropy(scores, following, reduction="none")
                parts[window] = loss.double().cpu()
        return torch.cat([parts[window] for window in windows])

    @torch.no_grad()
    def pooled(self, rows: Tensor, windows: Sequence[int]) -> Tensor:
        """Mean of each window's final hidden states.

        Args:
            rows: Hidden states after the last block.
            windows: Numbers of the windows that are pooled.

        Returns:
            ``(len(windows), width)``, float64.
        """
        parts: dict[int, Tensor] = {}
        for batch in self.batches(BATCH_TOKENS, windows):
            final = self._finish(self._model.base_model, batch, rows).last_hidden_state
            for hidden, window in zip(final, batch, strict=True):
                parts[window] = hidden[: len(self._ids[window])].double().mean(0).cpu()
        return torch.stack([parts[window] for window in windows])

    @torch.no_grad()
    def end(self, batch: Sequence[int], rows: Tensor, *, head: bool) -> Tensor:
        """What the model makes of stored hidden states.

        Args:
            batch: Numbers of windows.
            rows: Hidden states after the last block.
            head: Whether the logits are wanted and not the last hidden states.

        Returns:
            ``(tokens of the batch, vocabulary or width)``, windows one after another.
        """
        output = self._finish(self._model if head else self._model.base_model, batch, rows)
        return self._unpadded(batch, output.logits if head else output.last_hidden_state)

    def whole(self, batch: Sequence[int], blocks: Mapping[str, nn.Module], *, head: bool) -> Tensor:
        """Runs the whole model, with gradients for the blocks' parameters that ask for them.

        Args:
            batch: Numbers of windows.
            blocks: All blocks by name.
            head: Whether the logits are wanted and not the last hidden states.

        Returns:
            As :meth:`end`.
        """
        self._model.requires_grad_(False)
        self._count, self._target, self._live = 0, -1, blocks
        try:
            output = (self._model if head else self._model.base_model)(**self._inputs(batch))
        finally:
            self._live = None
        return self._unpadded(batch, output.logits if head else output.last_hidden_state)

    # ------------------------------------------------------------------ pieces

    def visit(self, hidden: Tensor, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What the stops do: end the forward at the target, pass all others by; or run blocks.

        Returns:
            The hidden states as a block returns them; the stored ones at the last application.

        Raises:
            _Reached: At the target.
        """
        if self._count == self._target:
            raise _Reached(hidden, arguments, named)
        self._count += 1
        if self._live is not None:
            return self._live[self.applications[self._count - 1]](hidden, *arguments, **named)
        if self._count == len(self.applications):
            hidden = self._final
        return (hidden,) if self._tuple else hidden

    def _inputs(self, batch: Sequence[int]) -> dict[str, Tensor]:
        longest = max(len(self._ids[window]) for window in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, window in enumerate(batch):
            ids[row, : len(self._ids[window])] = torch.tensor(self._ids[window])
            mask[row, : len(self._ids[window])] = 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    @torch.no_grad()
    def _reach(self, batch: Sequence[int], application: int) -> _Reached:
        self._count, self._target = 0, application
        self._final = torch.empty(0)
        try:
            self._model.base_model(**self._inputs(batch))
        except _Reached as reached:
            return reached
        raise AssertionError(f"the model ended before its application {application} of a block")

    @torch.no_grad()
    def _call(
        self, batch: Sequence[int], application: int, block: nn.Module, rows: Tensor
    ) -> Tensor:
        reached = self._reach(batch, application)
        hidden = self._load(batch, rows, like=reached.hidden)
        output = block(hidden, *reached.arguments, **reached.named)
        self._tuple = isinstance(output, tuple)
        return output[0] if self._tuple else output

    def _finish(self, model: Any, batch: Sequence[int], rows: Tensor) -> Any:
        inputs = self._inputs(batch)
        like = rows.new_zeros(*inputs["input_ids"].shape, self._width)
        self._count, self._target = 0, -1
        self._final = self._load(batch, rows, like=like)
        return model(**inputs)

    def _unpadded(self, batch: Sequence[int], values: Tensor) -> Tensor:
        lengths = [len(self._ids[window]) for window in batch]
        return torch.cat([row[:length] for row, length in zip(values, lengths, strict=True)])

    def _allocate(self) -> Tensor:
        shape = (self.offsets[-1], self._width)
        size = shape[0] * shape[1]
        if self._spill is None or size * self._dtype.itemsize < MAPPED_BYTES:
            return torch.empty(shape, dtype=self._dtype, device=self.device)
        with tempfile.NamedTemporaryFile(
            dir=self._spill, prefix=".attnreg-", suffix=".tmp"
        ) as file:
            file.truncate(size * self._dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=size, dtype=self._dtype).view(shape)

    def _store(self, batch: Sequence[int], hidden: Tensor, rows: Tensor) -> None:
        for values, window in zip(hidden, batch, strict=True):
            low, high = self.offsets[window], self.offsets[window + 1]
            rows[low:high] = values[: high - low]

    def _load(self, batch: Sequence[int], rows: Tensor, *, like: Tensor) -> Tensor:
        """Rows of a batch, padded with zeros to the shape of ``like``."""
        hidden = torch.zeros_like(like)
        for values, window in zip(hidden, batch, strict=True):
            low, high = self.offsets[window], self.offsets[window + 1]
            values[: high - low] = rows[low:high].to(like)
        return hidden


def _hidden(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a call."""
    found: Tensor = arguments[0] if arguments else named["hidden_states"]
    return found


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _ended_by(kind: type[Exception]) -> Iterator[None]:
    with suppress(kind):
        yield
