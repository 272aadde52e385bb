"""Files are whole, checked, and never half written."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from attnreg.storage import FORMAT_VERSION, content_digest, read_tensors, write_tensors

METADATA = {"kind": "test", "numbers": [0.1, 1e-300, 3], "nothing": None, "nested": {"2": "two"}}


def some_tensors():
    return {
        "double": torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3),
        "single": torch.tensor([0.0, -0.0, float("inf"), float("nan")]),
        "half": torch.ones(3, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
        "counts": torch.arange(4),
        "number": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.safetensors"


@pytest.fixture
def old(path):
    """A file that is already there, and its bytes."""
    write_tensors(path, {"old": torch.ones(2)}, {"kind": "test"})
    return path.read_bytes()


def assert_untouched(path, old):
    assert path.read_bytes() == old
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_round_trip(path):
    write_tensors(path, some_tensors(), METADATA)
    tensors, metadata = read_tensors(path)
    assert tensors.keys() == some_tensors().keys()
    for name, expected in some_tensors().items():
        torch.testing.assert_close(tensors[name], expected, rtol=0, atol=0, equal_nan=True)
    digest = content_digest(some_tensors(), METADATA)
    assert metadata == {**METADATA, "format_version": FORMAT_VERSION, "digest": digest}


def test_path_may_be_a_string(path):
    write_tensors(str(path), {"a": torch.ones(1)}, {"kind": "test"})
    assert read_tensors(str(path))[1]["kind"] == "test"


def test_views_of_one_tensor_and_gradients_are_written(path):
    whole = torch.arange(12.0, requires_grad=True)
    views = {"first": whole[:6].view(2, 3), "second": whole[6:].view(2, 3).mT, "whole": whole}
    write_tensors(path, views, {"kind": "test"})
    tensors, _ = read_tensors(path)
    assert all(torch.equal(tensors[name], view) for name, view in views.items())


def test_same_content_gives_same_bytes(path, tmp_path):
    write_tensors(path, some_tensors(), METADATA)
    other = tmp_path / "other"
    reordered = dict(reversed(some_tensors().items()))
    write_tensors(other, reordered, dict(reversed(METADATA.items())))
    assert path.read_bytes() == other.read_bytes()


def test_metadata_stand_in_the_safetensors_header_as_json(path):
    write_tensors(path, some_tensors(), METADATA)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert list(header) == ["attnreg"]
    assert json.loads(header["attnreg"])["numbers"] == METADATA["numbers"]


def test_integer_keys_of_metadata_become_strings(path):
    write_tensors(path, {}, {"kind": "test", "by_number": {9: 1, 10: 2}})
    assert read_tensors(path)[1]["by_number"] == {"9": 1, "10": 2}


def test_foreign_safetensors_file_has_no_metadata(path):
    save_file({"a": torch.ones(2)}, path, {"format": "pt"})
    tensors, metadata = read_tensors(path)
    assert torch.equal(tensors["a"], torch.ones(2))
    assert metadata == {}


def test_file_mode_follows_the_umask(path):
    umask = os.umask(0o022)
    try:
        write_tensors(path, {"a": torch.ones(1)}, {"kind": "test"})
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o644


def test_symbolic_link_keeps_pointing_at_the_new_file(path, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path)
    write_tensors(link, {"a": torch.ones(1)}, {"kind": "test"})
    assert link.is_symlink()
    assert read_tensors(path)[1]["kind"] == "test"


@pytest.mark.parametrize(
    ("change", "metadata"),
    [
        ({"a": torch.tensor([1.0, 2.0, 3.5])}, {}),
        ({"a": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}, {}),
        ({"a": torch.tensor([[1.0, 2.0, 3.0]])}, {}),
        ({"b": torch.tensor([1.0, 2.0, 3.0])}, {}),
        ({"a": torch.tensor([1.0, 2.0, 3.0])}, {"x": 1}),
    ],
    ids=["value", "dtype", "shape", "name", "metadata"],
)
def test_digest_sees(change, metadata):
    original = content_digest({"a": torch.tensor([1.0, 2.0, 3.0])}, {})
    assert content_digest(change, metadata) != original


@pytest.mark.parametrize("metadata", [{"x": float("nan")}, {"x": float("inf")}, {"x": {1, 2}}])
def test_metadata_that_are_not_json_are_refused(path, metadata):
    with pytest.raises(ValueError, match="metadata must be JSON-able and finite"):
        write_tensors(path, {}, metadata)
    assert not path.exists()


@pytest.mark.parametrize("name", ["digest", "format_version"])
def test_reserved_metadata_are_refused(path, name):
    with pytest.raises(ValueError, match=f"metadata has '{name}', which write_tensors adds"):
        write_tensors(path, {}, {name: 1})


# -- files that cannot be read


def refused(path):
    with pytest.raises(ValueError, match=r"safetensors|damaged|attnreg") as caught:
        read_tensors(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_missing_file(path):
    assert "does not exist; expected a safetensors file" in refused(path)


def test_directory(tmp_path):
    assert "is not a regular file" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" * 100, b"\xff" * 64, b"{}" * 9])
def test_not_safetensors(path, content):
    path.write_bytes(content)
    assert "is not a complete safetensors file" in refused(path)


def test_truncated_at_every_length(path, old):
    for length in range(len(old)):
        path.write_bytes(old[:length])
        assert "is not a complete safetensors file" in refused(path)


def test_longer_than_it_should_be(path, old):
    path.write_bytes(old + b"\0")
    assert "is not a complete safetensors file" in refused(path)


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
def test_flipped_bit_in_any_byte_is_refused_or_harmless(path, flip):
    write_tensors(path, {"data": torch.tensor([1.5, -2.0])}, {"kind": "test", "x": [0.5]})
    content = path.read_bytes()
    tensors, metadata = read_tensors(path)
    refusals = 0
    for i in range(len(content)):
        damaged = bytearray(content)
        damaged[i] ^= flip
        path.write_bytes(damaged)
        try:
            found, header = read_tensors(path)
        except ValueError:
            refusals += 1
            continue
        assert header == metadata  # a blank that is padding
        assert torch.equal(found["data"], tensors["data"])
    assert refusals > 0.95 * len(content)


def test_flipped_byte_of_the_data(path, old):
    damaged = bytearray(old)
    damaged[-1] ^= 0x40
    path.write_bytes(damaged)
    assert "is damaged: its content does not match the SHA-256 digest" in refused(path)


@pytest.mark.parametrize(
    "header",
    ["[]", "not json", "{}", '{"format_version": 1}', '{"format_version": 1, "digest": 0}'],
)
def test_header_of_another_form(path, header):
    save_file({"a": torch.ones(1)}, path, {"attnreg": header})
    assert "is damaged" in refused(path)


def test_newer_format(path):
    tensors = {"a": torch.ones(1)}
    header = {"kind": "test", "format_version": FORMAT_VERSION + 1}
    header["digest"] = content_digest(tensors, {"kind": "test"})
    save_file(tensors, path, {"attnreg": json.dumps(header)})
    assert f"format version {FORMAT_VERSION + 1}" in refused(path)
    assert "upgrade attnreg" in refused(path)


# -- files that cannot be written


def test_full_disk_at_the_flush(path, old, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"^cannot write .*: No space left on device$"):
        write_tensors(path, some_tensors(), METADATA)
    assert_untouched(path, old)


def test_no_room_while_writing(path, old):
    """A limit on the size of files stands in for a disk that fills up halfway."""
    script = """
        import resource, signal, sys, torch
        from attnreg.storage import write_tensors
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            write_tensors(sys.argv[1], {"a": torch.zeros(1 << 18)}, {"kind": "test"})
        except OSError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    message = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert message.startswith(f"cannot write {path}: ")
    assert "File too large" in message
    assert message.count("\n") == 1
    assert_untouched(path, old)


def test_missing_folder(tmp_path):
    with pytest.raises(OSError, match=r"^cannot write .*nowhere.*: .*No such file or directory"):
        write_tensors(tmp_path / "nowhere" / "file", {"a": torch.ones(1)}, {"kind": "test"})


def test_target_is_a_directory(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError, match=r"cannot write .*folder: Is a directory"):
        write_tensors(target, {"a": torch.ones(1)}, {"kind": "test"})
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_interrupt_leaves_the_old_file_and_no_other(path, old, monkeypatch, call):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, some_tensors(), METADATA)
    assert_untouched(path, old)


def test_killed_in_the_middle_leaves_the_old_file(path, old):
    script = """
        import os, signal, sys, torch
        from attnreg.storage import write_tensors
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        write_tensors(sys.argv[1], {"a": torch.zeros(1000)}, {"kind": "test"})
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == old
    assert "old" in read_tensors(path)[0]
