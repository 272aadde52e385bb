"""The safetensors files of a model folder: what they hold, checked by their headers, and reading.

A folder holds ``model.safetensors`` or, in several files, ``model.safetensors.index.json`` with a
``weight_map`` from the name of a tensor to its file. A header says where each tensor lies, so that
opening a folder reads kilobytes; a file that is shorter or longer than its header says is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """One stored tensor, without its values.

    Attributes:
        file: The safetensors file.
        name: Its name in that file.
        shape: Its shape.
        dtype: Its dtype on disk.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return prod(self.shape) * self.dtype.itemsize


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: An existing file.

    Returns:
        The object.

    Raises:
        ValueError: If it cannot be read, or holds anything but a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(
            f"{path} is not valid JSON ({error}); copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def read_entries(folder: Path) -> dict[str, Entry]:
    """What the weight files of a folder hold.

    Args:
        folder: A folder with ``model.safetensors`` or its index.

    Returns:
        Entries by stored name, in the order of files and names.

    Raises:
        ValueError: If there are no safetensors weights, the index is damaged, a file that it names
            is missing, damaged or lacks a tensor, or a dtype is not supported.
    """
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise ValueError(_no_weights(folder))
    weight_map = _weight_map(folder / INDEX)
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise ValueError(
                f"{folder / shard} is missing, though {INDEX} names it; "
                "copy or download the folder again"
            )
        header = _header(folder / shard)
        for name in (name for name, file in weight_map.items() if file == shard):
            if name not in header:
                raise ValueError(
                    f"{folder / shard} lacks the tensor {name!r}, though {INDEX} places it there; "
                    "copy or download the folder again"
                )
            entries[name] = header[name]
    return entries


def read_values(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """Reads tensors, one file at a time and one tensor at a time.

    Args:
        entries: What to read, by whatever name the caller uses.

    Yields:
        Name and tensor, in memory of its own, in the dtype on disk.

    Raises:
        ValueError: If a file has become unreadable since its header was read.
    """
    for path in dict.fromkeys(entry.file for entry in entries.values()):
        with _opened(path) as file:
            for name, entry in entries.items():
                if entry.file == path:
                    yield name, _value(file, entry)


def total_bytes(entries: Iterable[Entry]) -> int:
    """Size of tensors on disk, without headers."""
    return sum(entry.bytes for entry in entries)


def _value(file: Any, entry: Entry) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(entry.name).clone()  # the file's mapping ends with it
    except (SafetensorError, OSError) as error:
        raise ValueError(_damaged(entry.file, error)) from error
    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
        raise ValueError(f"{entry.file} has changed while it was read; start again")
    return tensor


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(_damaged(path, error)) from error


def _header(path: Path) -> dict[str, Entry]:
    entries = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            stored = file.get_slice(name)
            dtype = stored.get_dtype()
            if dtype not in _DTYPES:
                raise ValueError(
                    f"{path} holds {name!r} as {dtype}; expected one of {', '.join(_DTYPES)}: "
                    "quantised models are not supported, take the unquantised one"
                )
            entries[name] = Entry(path, name, tuple(stored.get_shape()), _DTYPES[dtype])
    return entries


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map; copy or download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith("safetensors"):
            raise ValueError(
                f"{path} places {name!r} in {file!r}; expected a safetensors file of this folder"
            )
    return weight_map


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        return (
            f"{folder} has pickled weights only ({pickled[0]}), which are not read as they can run "
            "code; load it with transformers and save it with save_pretrained, as safetensors"
        )
    return f"{folder} has no weights; expected {SINGLE} or {INDEX}"


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is damaged or truncated ({error}); copy or download it again"
