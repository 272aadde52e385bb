"""Text as token windows: what a model is run on, to capture a layer or to be scored.

A file holds documents separated by blank lines. A document is tokenised whole and cut from its
beginning into consecutive windows of at most ``length`` tokens; each window has the tokenizer's
special tokens around it (a BOS in front, or ``[CLS] ... [SEP]``), as if it stood alone. Nothing is
drawn at random: the same text and tokenizer give the same windows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

HUB = "datasets:"
Source = str | Path | Iterable[str]


@dataclass(frozen=True)
class Windows:
    """Token windows in the order of the text.

    Attributes:
        ids: Token ids of each window, special tokens among them.
        digest: SHA-256 of ``ids``.
        source: Where the text comes from, in words.
        documents: Number of the document that each window is from; empty: each is its own.
        left_out: Tokens of the text that are in no window: after the first window of a document
            where only that was wanted, or too few for a window of their own. What lies behind the
            limit of :func:`read_windows` is not counted, since it is not read.
    """

    ids: tuple[tuple[int, ...], ...]
    digest: str
    source: str
    documents: tuple[int, ...] = ()
    left_out: int = 0

    @classmethod
    def of(
        cls,
        ids: Iterable[Iterable[int]],
        source: str = "token ids",
        documents: Iterable[int] = (),
        left_out: int = 0,
    ) -> Self:
        """Windows of given token ids, with their digest.

        Returns:
            The windows.
        """
        rows = tuple(tuple(row) for row in ids)
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return cls(rows, digest, source, tuple(documents), left_out)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Number of tokens, special ones among them."""
        return sum(map(len, self.ids))

    def facts(self) -> dict[str, Any]:
        """Numbers of windows and tokens, and the digest."""
        return {"windows": len(self), "tokens": self.tokens, "digest": self.digest}

    def split(self, fraction: float) -> tuple[Self, Self]:
        """Two parts, the second with about ``fraction`` of the documents.

        The documents of the second part are spread evenly through the text, and a document is
        never divided, unless there is one only: then its windows are spread likewise.

        Args:
            fraction: Share of the second, held-out part, between 0 and 1.

        Returns:
            The windows to fit on and the windows held out, each in the order of the text.

        Raises:
            ValueError: If the fraction is not between 0 and 1 or a part would be empty.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"the held-out fraction is {fraction}; expected between 0 and 1")
        numbers = self.documents if len(set(self.documents)) > 1 else range(len(self.ids))
        share = Fraction(fraction).limit_denominator(10**6)
        ranks = {number: rank for rank, number in enumerate(dict.fromkeys(numbers))}
        held_out = {
            number
            for number, rank in ranks.items()
            if math.floor((rank + 1) * share) > math.floor(rank * share)
        }
        if not held_out or len(held_out) == len(ranks):
            raise ValueError(
                f"{self.source} has {len(ranks)} document(s); a share of {fraction} of them leaves "
                "one part empty: give more text, or another fraction"
            )
        chosen = [number in held_out for number in numbers]
        return self._part(chosen, False), self._part(chosen, True)

    def _part(self, chosen: list[bool], wanted: bool) -> Self:
        rows = [i for i, one in enumerate(chosen) if one is wanted]
        documents = [self.documents[i] for i in rows] if self.documents else []
        name = f"{self.source} ({'held out' if wanted else 'to fit'})"
        return type(self).of([self.ids[i] for i in rows], name, documents)

    def batches(
        self, size: int, device: torch.device | str | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of windows in order, padded on the right with id 0.

        Args:
            size: Windows in a batch, at least 1.
            device: Where to put them; None means the CPU.

        Yields:
            Token ids and attention mask (1: a token, 0: padding), each (b, n) int64.

        Raises:
            ValueError: If the size is below 1.
        """
        if size < 1:
            raise ValueError(f"the batch size is {size}; expected at least 1")
        for start in range(0, len(self.ids), size):
            rows = self.ids[start : start + size]
            longest = max(map(len, rows))
            ids = torch.zeros(len(rows), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = torch.tensor(row)
                mask[i, : len(row)] = 1
            yield ids.to(device), mask.to(device)


def read_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a model folder, or of a name on the hub.

    Returns:
        What ``AutoTokenizer.from_pretrained`` gives.

    Raises:
        ValueError: If there is none that can be read.
    """
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(name)) for name in files):
        raise ValueError(
            f"{source} has no tokenizer (tokenizer.json); copy the tokenizer's files of the model "
            "into it"
        )
    try:
        return AutoTokenizer.from_pretrained(source)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the tokenizer of {source} cannot be read: {reason}") from error


def read_windows(
    source: Source,
    tokenizer: Any,
    *,
    length: int,
    limit: int | None = None,
    max_tokens: int | None = None,
    first_only: bool = False,
) -> Windows:
    """Reads text and cuts it into windows of at most ``length`` tokens.

    A last, shorter piece of a document is a window too where it has two tokens or more.

    Args:
        source: A text file (UTF-8; documents separated by blank lines); a folder, whose ``.txt``
            files are read in the order of their names; ``"datasets:NAME[:SPLIT[:COLUMN]]"`` with
            NAME ``name``, ``owner/name`` or ``owner/name/configuration``, split ``train`` and
            column ``text`` by default, which needs the package ``datasets``; or strings, one for
            each document.
        tokenizer: A tokenizer of transformers.
        length: Tokens of a full window, special tokens included.
        limit: Largest number of windows; reading stops there.
        max_tokens: Largest number of tokens in all windows; reading stops before the window that
            would exceed it.
        first_only: Whether only the first window of each document is wanted.

    Returns:
        The windows.

    Raises:
        ValueError: If there is no such text, it cannot be decoded, or it is shorter than one
            window.
    """
    _check_sizes(length, limit, max_tokens)
    cutter = _Cutter(tokenizer, length)
    name, texts = _open(source)
    ids: list[list[int]] = []
    documents: list[int] = []
    total = read = left_out = 0
    for number, text in enumerate(texts):
        pieces = cutter.cut(text)
        wanted = pieces[:1] if first_only else pieces
        kept = [piece for piece in wanted if len(piece) >= 2]
        read += sum(map(len, pieces))
        for piece in kept:
            if len(ids) == limit or (max_tokens is not None and total + len(piece) > max_tokens):
                return _checked(name, ids, documents, left_out)
            ids.append(piece)
            documents.append(number)
            total += len(piece)
        left_out += sum(len(piece) - cutter.special for piece in pieces[len(kept) :])
    if read < length:
        raise ValueError(
            f"{name} has {read} tokens, fewer than one window of {length}; give more text or "
            "shorter windows"
        )
    return _checked(name, ids, documents, left_out)


def _check_sizes(length: int, limit: int | None, max_tokens: int | None) -> None:
    if length < 2:
        raise ValueError(f"the window is {length} tokens; expected at least 2")
    for name, value in (("limit", limit), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1, or None for no limit")


def _checked(name: str, ids: list[list[int]], documents: list[int], left_out: int) -> Windows:
    if not ids:
        raise ValueError(
            f"{name} gives no window of two tokens within the limit; give more text or a larger "
            "limit"
        )
    return Windows.of(ids, name, documents, left_out)


def special_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts in front of and behind a text.

    Returns:
        Those in front and those behind.

    Raises:
        ValueError: If it changes the text between them.
    """
    plain, framed = _ids(tokenizer, "a", special=False), _ids(tokenizer, "a", special=True)
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return framed[:start], framed[start + len(plain) :]
    raise ValueError(
        f"the tokenizer gives {framed} with special tokens and {plain} without; expected the "
        "second within the first"
    )


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


class _Cutter:
    """Tokenises documents and cuts them; every piece has the special tokens around it."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self._tokenizer = tokenizer
        self._before, self._after = special_frame(tokenizer)
        self.special = len(self._before) + len(self._after)
        self._room = length - self.special
        if self._room < 1:
            raise ValueError(
                f"the window is {length} tokens, and the tokenizer's special tokens take "
                f"{self.special}; give longer windows"
            )

    def cut(self, text: str) -> list[list[int]]:
        plain = _ids(self._tokenizer, text, special=False)
        starts = range(0, len(plain), self._room)
        return [[*self._before, *plain[i : i + self._room], *self._after] for i in starts]


# -- sources


def _open(source: Source) -> tuple[str, Iterator[str]]:
    """A name for the source, and its documents."""
    if isinstance(source, str) and source.startswith(HUB):
        return source, _dataset(source)
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            return str(source), _folder(path)
        if not path.exists():
            raise ValueError(
                f"{source} does not exist; expected a text file, a folder of .txt files, or "
                "datasets:NAME"
            )
        return str(source), _file(path)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise ValueError(f"the text is a {type(source).__name__}; expected a path or strings")
    return "strings", _strings(source)


def _strings(texts: Iterable[str]) -> Iterator[str]:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {i} is a {type(text).__name__}; expected strings")
        if text.strip():
            yield text


def _folder(folder: Path) -> Iterator[str]:
    files = sorted(p for p in folder.rglob("*.txt") if p.is_file())
    if not files:
        raise ValueError(f"the folder {folder} has no .txt file; expected at least one")
    for file in files:
        yield from _file(file)


def _file(path: Path) -> Iterator[str]:
    """The blocks of lines between blank lines, read as they come."""
    block: list[str] = []
    empty = True
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for line in lines:
                if line.strip():
                    block.append(line)
                elif block:
                    empty = False
                    yield "".join(block).removesuffix("\n")
                    block = []
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason}); "
            "convert it to UTF-8"
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if block:
        yield "".join(block).removesuffix("\n")
    elif empty:
        raise ValueError(f"{path} is empty; expected text")


def _dataset(source: str) -> Iterator[str]:
    """The rows of a column, by the package ``datasets``, one at a time."""
    name, split, column, *rest = [*source.removeprefix(HUB).split(":"), "", ""][:4]
    owner_name, configuration = name, None
    if name.count("/") == 2:
        owner_name, configuration = name.rsplit("/", 1)
    if not name or name.count("/") > 2 or (rest and rest[0]):
        raise ValueError(
            f"{source!r} is not datasets:NAME[:SPLIT[:COLUMN]] with NAME name, owner/name or "
            "owner/name/configuration"
        )
    split, column = split or "train", column or "text"
    try:
        datasets = import_module("datasets")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{source} needs the package datasets: pip install datasets, or give a text file"
        ) from error
    try:
        rows = datasets.load_dataset(owner_name, configuration, split=split, streaming=True)
        for row in rows:
            if column not in row:
                raise ValueError(f"no column {column!r}; it has {', '.join(row)}")
            if isinstance(row[column], str) and row[column].strip():
                yield row[column]
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source} cannot be read: {reason}") from error
