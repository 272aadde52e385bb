"""Writes a model folder as a whole: it is complete under its name, or it is not there.

Everything goes to a hidden folder beside the target, is flushed to the disk, opened and checked as
any other model folder, and only then renamed. A kill leaves at most the hidden folder, which the
next write to the same target removes. One process at a time may write to a target.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from attnreg.transformers import shards
from attnreg.transformers.checkpoint import CONFIG, Checkpoint
from attnreg.transformers.layers_file import LAYERS_FILE

JOURNAL = ".attnreg"  # what a conversion may keep in its output folder until it is finished
_WEIGHTS = (*shards.PICKLED, ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")
_EXPORTS = ("onnx", "openvino", "coreml", "original")  # folders with the model in other formats
_SPARE = 2**20  # bytes for headers and directories


def write_folder(
    out: Path,
    checkpoint: Checkpoint,
    config: Any,
    tensors: Iterable[tuple[str, Tensor]],
    extra: Mapping[str, bytes],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Writes a model like another one, with other tensors and another configuration.

    Weights are gathered into files no larger than the largest of the checkpoint's, so that no more
    than one of them is in memory; a checkpoint in one file gives one file. Every other file of the
    checkpoint's folder comes along (tokenizer, vocabulary, generation settings, sub-folders), but
    for the weights in whatever format and hidden files. Of ``config.json`` the checkpoint's own
    text is kept but for what ``config`` changes.

    Args:
        out: The folder to write; its parents are made.
        checkpoint: Where the model comes from.
        config: The transformers configuration of the new model.
        tensors: Name and tensor of every weight, in the order in which they are written; of tied
            weights all names but the first are skipped. Saved in the dtype of the checkpoint's
            tensor of that name, or the checkpoint's own.
        extra: Further files by name, such as ``README.md`` and ``attnreg.json``, which take the
            place of the checkpoint's.
        dtype: The dtype to save all weights in; None keeps the checkpoint's.
        overwrite: Whether a model folder that is there already is replaced.

    Returns:
        The files of the checkpoint's folder that were left behind.

    Raises:
        ValueError: If ``out`` holds something and ``overwrite`` is not set, or it is no model
            folder; a value does not fit the dtype; the result is not a complete model.
        OSError: If there is no space left or the folder cannot be written. Nothing is left behind,
            and an older folder stays as it was.
    """
    out = Path(os.path.realpath(out))
    _require_target(out, checkpoint, overwrite)
    copied, left = _other_files(checkpoint.folder, extra)
    ratio = dtype.itemsize / checkpoint.dtype.itemsize if dtype else 1.0
    with _replacing_folder(out) as folder:
        files = sum((checkpoint.folder / name).stat().st_size for name in copied)
        texts = sum(len(content) for content in extra.values())
        weights = int(ratio * shards.total_bytes(checkpoint.entries.values()))
        _require_space(folder, out, weights + files + texts + _SPARE)
        for name in copied:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.folder / name, folder / name)  # links as files
        for name, content in extra.items():
            (folder / name).write_bytes(content)
        (folder / CONFIG).write_text(_config_text(checkpoint, config, dtype), encoding="utf-8")
        limit = int(ratio * _largest_file(checkpoint))
        _write_shards(folder, _converted(tensors, checkpoint, dtype), limit)
        _require_model(folder, out)
    return left


def _converted(
    tensors: Iterable[tuple[str, Tensor]], checkpoint: Checkpoint, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Tensors on the CPU in the dtype to save, each tied one once."""
    for name, tensor in tensors:
        if name in checkpoint.aliases:
            continue
        entry = checkpoint.entries.get(name)
        target = dtype or (entry.dtype if entry else checkpoint.dtype)
        if not tensor.is_floating_point():
            target = tensor.dtype
        saved = tensor.detach().to("cpu", target).contiguous()
        if saved.is_floating_point() and not bool(torch.isfinite(saved).all()):
            raise ValueError(
                f"{name!r} holds numbers that are not finite in {target}; "
                "save in another dtype (bfloat16 or float32)"
            )
        yield name, saved


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> None:
    """Writes weights in files of at most ``limit`` bytes (or one tensor), and their index."""
    parts: list[list[str]] = []
    total = 0
    for batch in _batches(tensors, limit):
        _save(batch, folder / f"{len(parts)}.part")
        parts.append(list(batch))
        total += sum(tensor.nbytes for tensor in batch.values())
    if len(parts) == 1:
        (folder / "0.part").rename(folder / shards.SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / shards.INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _batches(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if batch and size + tensor.nbytes > limit:
            yield batch
            batch, size = {}, 0
        batch[name] = tensor
        size += tensor.nbytes
    if batch:
        yield batch


def _save(batch: dict[str, Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file(batch, path, metadata={"format": "pt"})
    path.chmod(mode)  # what the umask asks for; safetensors hides files from other users


def _largest_file(checkpoint: Checkpoint) -> int:
    sizes: dict[Path, int] = {}
    for entry in checkpoint.entries.values():
        sizes[entry.file] = sizes.get(entry.file, 0) + entry.bytes
    return max(sizes.values())


def _config_text(checkpoint: Checkpoint, config: Any, dtype: torch.dtype | None) -> str:
    """The checkpoint's ``config.json`` with what differs between the two configurations."""
    # Keys of another version of transformers stay: the new folder loads wherever the old one did.
    before, after = checkpoint.config.to_dict(), config.to_dict()
    text = shards.read_json(checkpoint.folder / CONFIG)
    for key in before.keys() - after.keys():
        text.pop(key, None)
    other_class = type(config) is not type(checkpoint.config)  # with other defaults
    for key, value in after.items():
        if before.get(key, text) != value or (other_class and key not in text):
            text[key] = value
    text.pop("_name_or_path", None)
    if dtype is not None:
        names = [key for key in ("dtype", "torch_dtype") if key in text] or ["torch_dtype"]
        text.update(dict.fromkeys(names, str(dtype).removeprefix("torch.")))
    return json.dumps(text, indent=2, sort_keys=True) + "\n"


def _other_files(folder: Path, extra: Mapping[str, bytes]) -> tuple[list[str], tuple[str, ...]]:
    """The files that come along, and those left behind, relative to the folder."""
    replaced = {CONFIG, LAYERS_FILE, shards.INDEX, *extra}
    copied, left = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or str(name) in replaced:
            continue
        top_level_weights = len(name.parts) == 1 and (
            path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        )
        hidden = any(part.startswith(".") for part in name.parts)
        if top_level_weights or hidden or name.parts[0] in _EXPORTS:
            left.append(str(name))
        else:
            copied.append(str(name))
    return copied, tuple(left)


def _require_target(out: Path, checkpoint: Checkpoint, overwrite: bool) -> None:
    source = Path(os.path.realpath(checkpoint.folder))
    if out == source or source in out.parents or out in source.parents:
        raise ValueError(f"{out} is or holds the original model's folder; choose another")
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file; expected a folder to write a model to")
    content = {path.name for path in out.iterdir()}
    if content <= {JOURNAL}:
        return
    if CONFIG not in content:
        raise ValueError(f"{out} holds files and is not a model folder; choose another")
    if not overwrite:
        raise ValueError(f"{out} holds a model already; choose another folder or overwrite it")


def _require_space(folder: Path, out: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _write_error(
            errno.ENOSPC,
            f"cannot write {out}: {needed / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are "
            "free; make space or choose another disk",
        )


def _require_model(folder: Path, out: Path) -> None:
    """Opens the result as a reader will."""
    try:
        written = Checkpoint.open(folder)
    except ValueError as error:
        reason = str(error).replace(str(folder), str(out))
        raise ValueError(f"what was to be written is not a model: {reason}") from error
    if written.unused:
        raise ValueError(
            f"what was to be written to {out} holds {written.unused[0]!r}, which the model lacks"
        )


@contextmanager
def _replacing_folder(out: Path) -> Iterator[Path]:
    """A hidden folder that takes the place of ``out`` once it is complete."""
    made = _made_parents(out)
    folder = out.with_name(f".{out.name}.new-{secrets.token_hex(6)}")
    finished = False
    try:
        _recover(out)
        folder.mkdir()
        yield folder
        _flush(folder)
        _exchange(folder, out)
        finished = True
    except (OSError, SafetensorError) as error:
        raise _one_line(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in [] if finished else made:
            parent.rmdir()


def _made_parents(out: Path) -> list[Path]:
    """Makes the folders above ``out``; returns those that were not there, innermost first."""
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _one_line(out, error) from error
    return missing


def _recover(out: Path) -> None:
    """Removes what a killed write has left; an old folder that was moved aside comes back."""
    for path in sorted(out.parent.glob(f".{_literal(out.name)}.old-*")):
        if out.exists():
            shutil.rmtree(path)
        else:
            path.rename(out)
    for path in out.parent.glob(f".{_literal(out.name)}.new-*"):
        shutil.rmtree(path)


def _literal(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _exchange(folder: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old-{secrets.token_hex(6)}")
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handles of folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _one_line(out: Path, error: Exception) -> OSError:
    """One clear line for whatever stopped a write."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    if text.startswith("cannot write"):
        return _write_error(code, text)
    if code == errno.ENOSPC or "No space left" in text:  # safetensors gives the text alone
        code, text = errno.ENOSPC, "no space left; make space or choose another disk"
    return _write_error(code, f"cannot write {out}: {text}")


def _write_error(code: int, text: str) -> OSError:
    error = OSError(text)  # of one argument: its text has no number in front
    error.errno = code
    return error
