"""One file format for everything attnreg saves: safetensors with checksummed JSON metadata.

A file is written whole or not at all: the content goes to a temporary file in the same folder,
is flushed to the disk and then renamed over the target, so that a crash, a full disk or Ctrl-C
leaves the old file as it was. The safetensors header holds one entry, ``"attnreg"``: the caller's
metadata as JSON, the format version, and the SHA-256 digest of tensors and metadata, which
:func:`read_tensors` checks. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

FORMAT_VERSION = 1
_HEADER_KEY = "attnreg"
_RESERVED = ("format_version", "digest")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors and metadata to one safetensors file, atomically.

    Args:
        path: The file to write; an existing file is replaced only once the new one is complete.
        tensors: Tensors by name, on any device.
        metadata: JSON-able values by name; ``"kind"`` says what the file holds (``"problem"``,
            ``"fit"``). ``"format_version"`` and ``"digest"`` are added here.

    Raises:
        ValueError: If the metadata are not JSON-able or use a reserved name.
        OSError: If the file cannot be written (full disk, no such folder, no permission). No
            temporary file is left, and an old file stays as it was.
    """
    reserved = [name for name in _RESERVED if name in metadata]
    if reserved:
        raise ValueError(f"metadata has {reserved[0]!r}, which write_tensors adds; leave it out")
    digest = content_digest(tensors, metadata)
    header = _canonical_json({**metadata, "format_version": FORMAT_VERSION, "digest": digest})
    arrays = {name: _host(tensor).numpy() for name, tensor in tensors.items()}
    with _replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(arrays, temporary, {_HEADER_KEY: header})
        temporary.chmod(mode)  # what the umask asks for; safetensors hides files from other users


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, atomically as :func:`write_tensors`.

    Args:
        path: The file to write.
        text: Its content, written as UTF-8.

    Raises:
        OSError: If the file cannot be written.
    """
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file and check it against its digest.

    Args:
        path: A file written by :func:`write_tensors`, or any other safetensors file.

    Returns:
        The tensors by name, on the CPU, and the metadata: what was given to
        :func:`write_tensors` with ``"format_version"`` and ``"digest"``, or ``{}`` where the file
        is not from attnreg.

    Raises:
        ValueError: If the file is missing, not a file, truncated, not safetensors, damaged, or
            written by a newer attnreg.
    """
    name = os.fspath(path)
    if not os.path.exists(path):
        raise ValueError(f"{name} does not exist; expected a safetensors file")
    if not os.path.isfile(path):
        raise ValueError(f"{name} is not a regular file; expected a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{name} is not a complete safetensors file ({error}); "
            "it may be truncated or of another format: write or copy it again"
        ) from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {_reason(error)}") from error
    return tensors, _checked_metadata(name, tensors, header)


def content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of the tensors and of the metadata.

    Args:
        tensors: Tensors by name; their order and device do not matter.
        metadata: JSON-able values by name.

    Returns:
        64 hexadecimal digits. Metadata that are not JSON-able are a ValueError.
    """
    sha = hashlib.sha256(_canonical_json(metadata).encode())
    for name in sorted(tensors):
        tensor = _host(tensors[name])
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


@contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` once it is complete."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".attnreg-{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {os.fspath(path)}: {_reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _checked_metadata(
    name: str, tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> dict[str, Any]:
    """The metadata in a safetensors header once its digest has been found right."""
    damaged = ValueError(
        f"{name} is damaged: its content does not match the SHA-256 digest it was saved with; "
        "save or copy it again"
    )
    if _HEADER_KEY not in header:
        if any('"format_version"' in text for text in header.values()):
            raise damaged
        return {}
    try:
        metadata = json.loads(header[_HEADER_KEY])
        version, digest = metadata["format_version"], metadata["digest"]
        content = {key: value for key, value in metadata.items() if key not in _RESERVED}
        intact = digest == content_digest(tensors, content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged from error
    if not intact:
        raise damaged
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{name} has format version {version!r}; this attnreg reads version "
            f"{FORMAT_VERSION}: upgrade attnreg"
        )
    return metadata


def _canonical_json(metadata: Mapping[str, Any]) -> str:
    try:
        plain = json.loads(json.dumps(dict(metadata), allow_nan=False))  # keys become strings
        return json.dumps(plain, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be JSON-able and finite: {error}") from error


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _reason(error: Exception) -> str:
    """The cause in a few words: the system's text where there is one."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return text.removeprefix("Error while serializing: ")
