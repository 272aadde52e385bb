"""Records the input and the output of attention layers while a model runs.

Two hooks on a layer (:meth:`Adapter.taps`) see what goes into its projections and what ``W_O``
gives. What a call of the model recorded is kept when the call has ended well: a call that raises
adds nothing to any layer. Rows of padding are left out, so that a sequence is what the model would
have seen alone. The hooks are gone when the context ends, however it ends.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnreg.problem import AttentionProblem
from attnreg.storage import read_tensors, write_tensors
from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.shapes import AttentionShape

MAX_BUFFERED_BYTES = 2**28
"""What all layers together keep in memory before it goes to the shards."""

Pair = tuple[Tensor, Tensor]
"""Input (n, width) and output (n, width) of a layer for one sequence."""


class Captured:
    """What was recorded; filled while the context of :func:`capture` is open.

    Layers that are one module applied several times (ALBERT) are one recording: the sequences of
    all applications, in the order in which they ran.

    Attributes:
        layers: Numbers of the layers recorded, those included that share a module with one wanted.
        shards: Folder of the shards, or None where everything is in memory.
    """

    layers: tuple[int, ...]
    shards: Path | None

    def __init__(
        self,
        groups: Mapping[int, int],
        shapes: Mapping[int, AttentionShape],
        shards: Path | None,
        buffered: int,
    ) -> None:
        self.layers = tuple(groups)
        self.shards = shards
        self._groups, self._shapes, self._limit = dict(groups), dict(shapes), buffered
        self._pairs: dict[int, list[Pair]] = {group: [] for group in groups.values()}
        self._files: dict[int, list[Path]] = {group: [] for group in groups.values()}

    def pairs(self, layer: int) -> Iterator[Pair]:
        """Input and output of a layer, a sequence at a time, read from the shards where there are.

        Args:
            layer: Number of the layer.

        Yields:
            Two tensors (n, width), float32 or float64, on the CPU.

        Raises:
            ValueError: If the layer was not recorded or a shard is damaged.
        """
        group = self._group(layer)
        for file in self._files[group]:
            tensors, _ = read_tensors(file)
            for i in range(len(tensors) // 2):
                yield tensors[f"input.{i}"], tensors[f"output.{i}"]
        yield from self._pairs[group]

    def problem(
        self, layer: int, *, dtype: torch.dtype | None = None, ridge: float = 0.0
    ) -> AttentionProblem:
        """The regression problem of a layer: its inputs, outputs, mask and scale.

        Args:
            layer: Number of the layer.
            dtype: float32 or float64; None keeps what was recorded.
            ridge: Both ridges of the problem.

        Returns:
            A problem of self-attention with one sequence for each recorded one.

        Raises:
            ValueError: If the layer was not recorded or nothing has been run.
        """
        pairs = list(self.pairs(layer))
        if not pairs:
            raise ValueError(
                f"layer {layer} has recorded nothing: run the model inside the context"
            )
        shape = self._shapes[layer]
        wanted = dtype or pairs[0][0].dtype
        inputs = [a.to(wanted) for a, _ in pairs]
        outputs = [b.to(wanted) for _, b in pairs]
        if shape.window is not None and shape.window >= max(map(len, inputs)):
            shape = replace(shape, window=None)  # it hides nothing
        return AttentionProblem(
            inputs, outputs, mask=shape.mask(), scale=shape.scale, ridge_x=ridge, ridge_y=ridge
        )

    def _group(self, layer: int) -> int:
        if layer not in self._groups:
            known = ", ".join(map(str, self.layers))
            raise ValueError(f"layer {layer} was not recorded; expected one of {known}")
        return self._groups[layer]

    def _keep(self, found: Mapping[int, Sequence[Pair]]) -> None:
        for group, pairs in found.items():
            self._pairs[group] += pairs
        if self.shards is not None:
            share = self._limit / len(self._pairs)
            for group, pairs in self._pairs.items():
                if sum(a.nbytes + b.nbytes for a, b in pairs) > share:
                    self._write(group)

    def _write(self, group: int) -> None:
        """Moves what a layer has in memory to a file; it stays in memory if that fails."""
        pairs, files = self._pairs[group], self._files[group]
        if self.shards is None or not pairs:
            return
        file = self.shards / f"layer-{group:03d}-{len(files):05d}.safetensors"
        tensors = {f"input.{i}": a for i, (a, _) in enumerate(pairs)}
        tensors |= {f"output.{i}": b for i, (_, b) in enumerate(pairs)}
        write_tensors(file, tensors, {"kind": "capture", "layer": group, "part": len(files)})
        files.append(file)
        self._pairs[group] = []

    def _flush(self) -> None:
        for group in self._pairs:
            self._write(group)


@contextmanager
def capture(
    model: nn.Module,
    layers: Iterable[int] | None = None,
    *,
    shards: str | Path | None = None,
    max_buffered_bytes: int = MAX_BUFFERED_BYTES,
) -> Iterator[Captured]:
    """Records layers for whatever runs through the model inside the context.

    Call the model itself, in evaluation mode, with whole sequences: ``attention_mask`` (b, n) says
    where the padding is, left or right. Contexts nest, on the same model too.

    Args:
        model: A model of a supported family.
        layers: Numbers of the layers, from 0; None means all.
        shards: An empty or new folder, to which the recording goes as it grows; None keeps it in
            memory.
        max_buffered_bytes: With shards, about what is kept in memory.

    Yields:
        The recording. What has been recorded stays after the context, and after an exception.

    Raises:
        ValueError: If the family is not supported, there is no such layer, the folder holds
            something, or a call of the model cannot be recorded (a key/value cache, a mask that is
            not of padding, training mode).
    """
    config: Any = model.config
    adapter = adapter_for(config)
    blocks = adapter.blocks(model)
    groups = _groups(blocks, layers)
    shapes = {layer: adapter.shape(config, layer) for layer in groups}
    folder = None if shards is None else _empty_folder(Path(shards))
    captured = Captured(groups, shapes, folder, max_buffered_bytes)
    recorder = _Recorder(model, captured)
    with ExitStack() as hooks:
        handle = model.register_forward_pre_hook(recorder.begin, with_kwargs=True)
        hooks.callback(handle.remove)
        handle = model.register_forward_hook(recorder.end, always_call=True)
        hooks.callback(handle.remove)
        for group in dict.fromkeys(groups.values()):
            first, last = adapter.taps(blocks[group])
            enter, leave = recorder.taps(group)
            handle = first.register_forward_pre_hook(enter, with_kwargs=True)
            hooks.callback(handle.remove)
            hooks.callback(last.register_forward_hook(leave).remove)
        yield captured
    captured._flush()


class _Recorder:
    """The hooks: one call of the model at a time."""

    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self._model, self._captured = model, captured
        self._signature = inspect.signature(model.forward)
        self._open = False
        self._rows: list[slice] | None = None
        self._inputs: dict[int, Tensor] = {}
        self._found: dict[int, list[Pair]] = {}

    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if model.training:
            raise ValueError("the model is in training mode (dropout); call model.eval() first")
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        _refuse_cache(given.get("past_key_values"))
        mask = given.get("attention_mask")
        self._rows = None if mask is None else _token_rows(mask)
        _check_positions(given.get("position_ids"), self._rows)
        self._open, self._inputs, self._found = True, {}, {}

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Keeps what the call recorded, or drops it where the call raised: its output is None."""
        found, self._open, self._inputs, self._found = self._found, False, {}, {}
        if output is not None:
            self._captured._keep(found)

    def taps(self, group: int) -> tuple[Any, Any]:
        """The hook of the layer's input and that of its output."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._open:
                raise ValueError(
                    f"a part of {type(self._model).__name__} was run alone; expected calls of the "
                    "model given to capture, whose attention_mask says where the padding is"
                )
            self._inputs[group] = first_tensor(args, kwargs)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            inputs, outputs = self._inputs.pop(group), first_tensor(output, {})
            rows = self._rows or [slice(None)] * len(inputs)
            pairs = self._found.setdefault(group, [])
            for a, b, row in zip(inputs, outputs, rows, strict=True):
                pairs.append((_keepable(a[row]), _keepable(b[row])))

        return enter, leave


def first_tensor(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor of the arguments of a module, or of what it returned.

    Returns:
        The tensor.

    Raises:
        ValueError: If there is none.
    """
    values = (args,) if isinstance(args, Tensor) else (*args, *kwargs.values())
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise ValueError("a hooked module was called without a tensor; the adapter names another one")


def _keepable(rows: Tensor) -> Tensor:
    """A copy on the CPU in a precision that a problem takes."""
    wanted = rows.dtype if rows.dtype == torch.float64 else torch.float32
    return rows.detach().to("cpu", wanted, copy=True).contiguous()


def _groups(blocks: Sequence[nn.Module], layers: Iterable[int] | None) -> dict[int, int]:
    """For each layer to record the first layer that is the same module."""
    first: dict[int, int] = {}
    groups = {i: first.setdefault(id(block), i) for i, block in enumerate(blocks)}
    if layers is None:
        return groups
    wanted = list(layers)
    for layer in wanted:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer not in groups:
            raise ValueError(
                f"layer {layer!r} does not exist; expected numbers from 0 to {len(blocks) - 1}"
            )
    if not wanted:
        raise ValueError("layers is empty; expected at least one number, or None for all")
    chosen = {groups[layer] for layer in wanted}
    return {layer: group for layer, group in groups.items() if group in chosen}


def _empty_folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; give the shards a new one")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse_cache(past: Any) -> None:
    """A layer with a filled cache sees keys that are not among its inputs."""
    if past is None:
        return
    if hasattr(past, "get_seq_length"):
        length = past.get_seq_length()
    else:  # a tuple of (keys, values) for each layer, (b, heads, n, head_dim)
        length = past[0][0].shape[-2] if len(past) else 0
    if length:
        raise ValueError(
            f"the model was called with a key/value cache of {length} positions; expected whole "
            "sequences: call it with use_cache=False, not generate()"
        )


def _token_rows(mask: Any) -> list[slice]:
    """The rows of each sequence that are tokens: one run of ones, padding beside it."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask is {shape}; expected (sequences, tokens) of 0 and 1")
    found = []
    for i, row in enumerate(mask.detach().cpu() != 0):
        places = row.nonzero().flatten().tolist()
        if not places or places[-1] - places[0] + 1 != len(places):
            raise ValueError(
                f"attention_mask has {'a gap' if places else 'no token'} in sequence {i}; expected "
                "one run of tokens with padding on its left or right"
            )
        found.append(slice(places[0], places[-1] + 1))
    return found


def _check_positions(positions: Tensor | None, rows: list[slice] | None) -> None:
    """Several texts packed into one row would be fitted as one."""
    if positions is None:
        return
    for i, row in enumerate(positions):
        steps = row[rows[i] if rows and len(positions) == len(rows) else slice(None)].diff()
        if not bool((steps == 1).all()):
            raise ValueError(
                f"position_ids of sequence {i} are not consecutive; expected one text in a row"
            )
