"""What a conversion has finished, kept so that a killed run goes on where it was.

A journal is a folder: ``manifest.json`` with the settings that decide the result, one checksummed
safetensors file for each finished piece of work, and a lock. Every file is written whole or not at
all (:mod:`attnreg.storage`), so a kill at any moment costs the piece in hand and nothing else. The
lock is the operating system's and falls with the process that holds it, however that ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout
from torch import Tensor

from attnreg.storage import read_tensors, write_tensors, write_text

MANIFEST, LOCK, OWNER = "manifest.json", "lock", "owner"
"""File names in a journal; all others are pieces of work."""


class Journal:
    """Finished pieces of work of one conversion; a context manager that holds the lock.

    Args:
        folder: Where it is kept; made if missing, its parent must exist.
        settings: JSON-able values that decide the result. A journal with others is refused.
        restart: Whether a journal that is there already is discarded.

    Attributes:
        folder: Where it is kept.
        digest: SHA-256 of the settings.
        notes: What was found damaged and is done again, one line each.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._text = _canonical(settings)
        self.digest = hashlib.sha256(self._text.encode()).hexdigest()
        self._restart = restart
        self._lock = FileLock(folder / LOCK, timeout=0)

    def __enter__(self) -> Self:
        """Takes the lock, then reads or writes the manifest.

        Returns:
            The journal.

        Raises:
            ValueError: If another process holds the lock, the journal is one of other settings,
                or ``folder`` is something else.
            OSError: If the folder cannot be written.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(
                f"{self.folder} is not a folder; move it away, or choose another --out"
            )
        self.folder.mkdir(exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"{self.folder} is in use by {self._owner()}; wait for its end, stop it, or choose "
                "another --out"
            ) from None
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A finished piece of work.

        Args:
            name: As given to :meth:`write`.

        Returns:
            Its tensors and its record; None if there is none, or if its file is damaged or of
            another journal (then there is a note).
        """
        path = self._path(name)
        if not path.exists():
            return None
        try:
            tensors, metadata = read_tensors(path)
        except ValueError:
            metadata = {}
        if metadata.get("journal") != self.digest:
            note = f"{path.name} of the journal is damaged: this piece is done again"
            self.notes += [] if note in self.notes else [note]
            return None
        return tensors, metadata["record"]

    def write(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keeps a finished piece of work.

        Args:
            name: A short name, part of a file name.
            tensors: Its tensors by name.
            record: JSON-able values.

        Raises:
            OSError: If the file cannot be written.
        """
        metadata = {"kind": "journal", "journal": self.digest, "record": dict(record)}
        write_tensors(self._path(name), tensors, metadata)

    def remove(self) -> None:
        """Deletes the folder: the work is done. The lock is held until the context ends."""
        self._clear()
        shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _owner(self) -> str:
        try:
            return f"process {int((self.folder / OWNER).read_text(encoding='ascii'))}"
        except (OSError, ValueError):
            return "another process"

    def _begin(self) -> None:
        manifest = self.folder / MANIFEST
        if self._restart:
            self._clear()
        for leftover in self.folder.glob(".attnreg-*.tmp"):  # of a write that was killed
            leftover.unlink()
        if manifest.exists():
            self._check(manifest)
        else:
            strange = sorted(set(os.listdir(self.folder)) - {LOCK, OWNER})
            if strange:
                raise ValueError(
                    f"{self.folder} holds {strange[0]!r} and no {MANIFEST}, so it is no journal of "
                    "a conversion; move it away, or choose another --out"
                )
            write_text(manifest, self._text)
        (self.folder / OWNER).write_text(str(os.getpid()), encoding="ascii")

    def _clear(self) -> None:
        """Deletes what a journal has written, the manifest last."""
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            return
        for path in self.folder.glob("*.safetensors"):
            path.unlink()
        manifest.unlink()

    def _check(self, manifest: Path) -> None:
        text = manifest.read_text(encoding="utf-8", errors="replace")
        if text == self._text:
            return
        try:
            before, now = json.loads(text), json.loads(self._text)
            changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
            what = f"was begun with another {', '.join(changed)}"
        except (ValueError, AttributeError):
            what = f"has a damaged {MANIFEST}"
        raise ValueError(
            f"the unfinished conversion in {self.folder} {what}: give the settings it was begun "
            "with to go on, or --restart to discard it"
        )


def _canonical(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), sort_keys=True, indent=1, allow_nan=False) + "\n"
