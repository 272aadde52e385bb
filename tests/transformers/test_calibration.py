"""Text as token windows, against what one would write by hand."""

import hashlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from attnreg.transformers.calibration import Windows, read_tokenizer, read_windows
from tests.transformers.texts import WORDS, model_folder

BOS, CLS, SEP = 60, 61, 62


def words(frame="$A"):
    """Word ``wI`` is token I; ``frame`` places the special tokens."""
    special = {"<s>": BOS, "[CLS]": CLS, "[SEP]": SEP}
    tokenizer = Tokenizer(models.WordLevel(WORDS | special, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=list(special.items())
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def text(*numbers):
    return " ".join(f"w{i}" for i in numbers)


def windows(*sizes):
    """Windows of one document each, of the given sizes."""
    return Windows.of([range(10 * i + 1, 10 * i + 1 + size) for i, size in enumerate(sizes)])


# ---------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("frame", "expected", "documents"),
    [
        ("$A", [(1, 2, 3, 4), (5, 6), (7, 8, 9, 10)], (0, 0, 1)),
        (
            "<s> $A",
            [(BOS, 1, 2, 3), (BOS, 4, 5, 6), (BOS, 7, 8, 9), (BOS, 10)],
            (0, 0, 1, 1),
        ),
        (
            "[CLS] $A [SEP]",
            [(CLS, i, i + 1, SEP) for i in (1, 3, 5, 7, 9)],
            (0, 0, 0, 1, 1),
        ),
    ],
    ids=["plain", "bos", "cls-sep"],
)
def test_documents_are_cut_from_their_beginning(frame, expected, documents):
    found = read_windows([text(*range(1, 7)), text(*range(7, 11))], words(frame), length=4)
    assert found.ids == tuple(expected)
    assert found.documents == documents
    assert found.tokens == sum(map(len, expected))
    assert found.left_out == 0


def test_a_piece_of_one_token_is_left_out_and_counted():
    found = read_windows([text(*range(1, 6)), text(7)], words(), length=4)
    assert found.ids == ((1, 2, 3, 4),)
    assert found.left_out == 2
    assert len(found) == 1


def test_a_file_is_documents_between_blank_lines(tmp_path):
    """Blank lines of spaces too; a byte order mark and line ends of Windows are no text."""
    path = tmp_path / "some.txt"
    path.write_bytes(b"\xef\xbb\xbf\r\nw1 w2\r\nw3\r\n \t\r\n\r\nw4 w5\r\n\r\n")
    found = read_windows(path, words(), length=3)
    assert found.ids == ((1, 2, 3), (4, 5))
    assert found.documents == (0, 1)
    assert found.source == str(path)
    assert read_windows(str(path), words(), length=3) == found


def test_a_folder_is_its_text_files_in_the_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text(text(3, 4), encoding="utf-8")
    (tmp_path / "a.txt").write_text(text(1, 2), encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text(text(5, 6), encoding="utf-8")
    (tmp_path / "a.md").write_text(text(7, 8), encoding="utf-8")
    found = read_windows(tmp_path, words(), length=2)
    assert found.ids == ((1, 2), (3, 4), (5, 6))
    assert found.documents == (0, 1, 2)


def test_an_iterator_is_read_only_as_far_as_needed():
    def endless():
        for i in range(1, 50):
            assert i < 6, "read on behind the limit"
            yield text(i, i + 1)

    found = read_windows(endless(), words(), length=2, limit=3)
    assert found.ids == ((1, 2), (2, 3), (3, 4))
    assert found.source == "strings"


def test_limits():
    texts = [text(*range(1, 8)), "  ", text(*range(8, 13))]
    every = read_windows(texts, words(), length=3)
    assert every.ids == ((1, 2, 3), (4, 5, 6), (8, 9, 10), (11, 12))
    assert every.left_out == 1
    assert read_windows(texts, words(), length=3, limit=4).ids == every.ids
    assert read_windows(texts, words(), length=3, limit=2).ids == every.ids[:2]
    assert read_windows(texts, words(), length=3, max_tokens=9).ids == every.ids[:3]
    assert read_windows(texts, words(), length=3, max_tokens=8).ids == every.ids[:2]
    first = read_windows(texts, words(), length=3, first_only=True)
    assert first.ids == ((1, 2, 3), (8, 9, 10))
    assert first.left_out == 4 + 2


def test_digest_is_of_the_ids_alone(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text(text(1, 2, 3), encoding="utf-8")
    found = read_windows(path, words(), length=3)
    assert found.digest == hashlib.sha256(json.dumps([[1, 2, 3]]).encode()).hexdigest()
    assert found.digest == read_windows([text(1, 2, 3)], words(), length=3).digest
    assert found.digest == Windows.of([torch.tensor([1, 2, 3]).tolist()]).digest
    assert found.digest != Windows.of([[1, 2], [3]]).digest


# ---------------------------------------------------------------------- split and batches


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_split_is_disjoint_by_documents(fraction):
    texts = [text(*range(1 + i, 3 + i + 3 * (i % 4))) for i in range(20)]
    found = read_windows(texts, words(), length=3)
    fit, held_out = found.split(fraction)
    assert not set(fit.documents) & set(held_out.documents)
    assert set(fit.documents) | set(held_out.documents) == set(range(20))
    assert len(set(held_out.documents)) == round(20 * fraction)
    pairs = list(zip(found.documents, found.ids, strict=True))
    for part in (fit, held_out):
        rows = [pair for pair in pairs if pair[0] in part.documents]
        assert rows == list(zip(part.documents, part.ids, strict=True))  # whole and in order
        assert part.digest == Windows.of(part.ids).digest
    assert (fit, held_out) == found.split(fraction)


def test_split_of_one_document_is_by_windows():
    found = read_windows([text(*range(1, 41))], words(), length=4)
    fit, held_out = found.split(0.2)
    assert held_out.ids == (found.ids[4], found.ids[9])
    assert fit.ids == found.ids[:4] + found.ids[5:9]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_split_refuses_a_fraction(fraction):
    with pytest.raises(ValueError, match="expected between 0 and 1"):
        windows(2, 3).split(fraction)


@pytest.mark.parametrize("fraction", [0.1, 1e-9])
def test_split_refuses_an_empty_part(fraction):
    with pytest.raises(ValueError, match=r"has 2 document\(s\).*one part empty"):
        windows(2, 3).split(fraction)


def test_batches_are_padded_on_the_right():
    given = windows(3, 2, 4, 1, 2)
    batches = list(given.batches(2))
    assert [tuple(ids.shape) for ids, _ in batches] == [(2, 3), (2, 4), (1, 2)]
    rows = []
    for ids, mask in batches:
        assert ids.dtype == mask.dtype == torch.int64
        for row, keep in zip(ids.tolist(), mask.tolist(), strict=True):
            size = sum(keep)
            assert keep == [1] * size + [0] * (len(row) - size)
            assert row[size:] == [0] * (len(row) - size)
            rows.append(tuple(row[:size]))
    assert tuple(rows) == given.ids
    with pytest.raises(ValueError, match="batch size is 0; expected at least 1"):
        next(given.batches(0))


# ---------------------------------------------------------------------- refusals


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(ValueError, match=r"none\.txt does not exist; expected a text file"):
        read_windows(tmp_path / "none.txt", words(), length=2)
    with pytest.raises(ValueError, match=r"has no \.txt file"):
        read_windows(tmp_path, words(), length=2)
    for content in ("", "\n \n\t\n"):
        (tmp_path / "empty.txt").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"empty\.txt is empty; expected text"):
            read_windows(tmp_path / "empty.txt", words(), length=2)
    with pytest.raises(ValueError, match="strings has 0 tokens, fewer than one window of 2"):
        read_windows([], words(), length=2)


def test_undecodable_text(tmp_path):
    (tmp_path / "latin.txt").write_bytes("w1 w2 caf\xe9 w3".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text \(byte 0xe9: .*convert"):
        read_windows(tmp_path / "latin.txt", words(), length=2)


def test_text_too_short():
    with pytest.raises(ValueError, match="has 4 tokens, fewer than one window of 5; give more"):
        read_windows([text(1, 2), text(3, 4)], words(), length=5)
    with pytest.raises(ValueError, match="gives no window of two tokens within the limit"):
        read_windows([text(1, 2, 3)], words(), length=3, max_tokens=2)
    with pytest.raises(ValueError, match="special tokens take 2; give longer windows"):
        read_windows([text(1, 2, 3)], words("[CLS] $A [SEP]"), length=2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "the text is a int; expected a path or strings"),
        ({"text": "w1"}, "the text is a dict; expected"),
        (["w1 w2", 7], "text 1 is a int; expected strings"),
        ("datasets:", "is not datasets:NAME"),
        ("datasets:a/b/c/d", "is not datasets:NAME"),
        ("datasets:a:b:c:d", "is not datasets:NAME"),
    ],
)
def test_wrong_sources(source, message):
    with pytest.raises(ValueError, match=message):
        read_windows(source, words(), length=2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"length": 1}, "the window is 1 tokens; expected at least 2"),
        ({"length": 2, "limit": 0}, "limit is 0; expected at least 1"),
        ({"length": 2, "max_tokens": 0}, "max_tokens is 0; expected at least 1"),
    ],
)
def test_wrong_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        read_windows([text(1, 2)], words(), **sizes)


def test_tokenizer_of_a_folder(tmp_path):
    folder = model_folder("llama", tmp_path / "model")
    found = read_windows([text(4, 5)], read_tokenizer(folder), length=2)
    assert found.ids == ((4, 5),)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"bare has no tokenizer \(tokenizer\.json\); copy"):
        read_tokenizer(tmp_path / "bare")


# ---------------------------------------------------------------------- datasets


def test_datasets_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what makes an import fail
    with pytest.raises(ValueError, match="needs the package datasets: pip install datasets"):
        read_windows("datasets:stories", words(), length=2)


def test_rows_of_a_dataset(monkeypatch):
    """A stand-in for the package: it notes its arguments and has two columns."""
    calls = []

    def load_dataset(name, configuration, *, split, streaming):
        calls.append((name, configuration, split, streaming))
        yield from ({"text": text(i, i + 1), "story": text(i + 1, i)} for i in (1, 3))
        yield {"text": None, "story": ""}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = read_windows("datasets:owner/name/small:test:story", words(), length=2)
    assert found.ids == ((2, 1), (4, 3))
    assert read_windows("datasets:name", words(), length=2).ids == ((1, 2), (3, 4))
    assert calls == [("owner/name", "small", "test", True), ("name", None, "train", True)]
    with pytest.raises(ValueError, match="no column 'body'; it has text, story"):
        read_windows("datasets:name::body", words(), length=2)
