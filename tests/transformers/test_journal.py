"""The journal of a conversion: whole files only, one process only, one set of settings only."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from attnreg.transformers.journal import Journal

SETTINGS = {"seed": 0, "shapes": [[8, 4], [8, 2]], "model": "a" * 64}


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"W_Q": torch.randn(3, 4, generator=generator), "b_Q": torch.ones(4).double()}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out.partial"


def test_what_was_written_is_read_by_a_later_process(folder):
    record = {"error": 0.1 + 0.2, "name": "mean"}
    with Journal(folder, SETTINGS) as journal:
        assert journal.read("layer-0") is None
        journal.write("layer-0", tensors(), record)
    with Journal(folder, SETTINGS) as journal:
        found, read = journal.read("layer-0")
        assert journal.read("layer-1") is None
        assert journal.notes == []
    assert read == record
    assert {name: value.dtype for name, value in found.items()} == {
        "W_Q": torch.float32,
        "b_Q": torch.float64,
    }
    assert all(torch.equal(found[name], value) for name, value in tensors().items())


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_damaged_file_is_no_finished_work_and_there_is_a_note(folder, damage):
    with Journal(folder, SETTINGS) as journal:
        journal.write("layer-0", tensors(), {})
        journal.write("layer-1", tensors(1), {})
    path = folder / "layer-0.safetensors"
    content = path.read_bytes()
    path.write_bytes(
        {
            "flip": content[:-1] + bytes([content[-1] ^ 1]),
            "cut": content[: len(content) // 2],
            "empty": b"",
            "text": b"hello",
        }[damage]
    )
    with Journal(folder, SETTINGS) as journal:
        assert journal.read("layer-0") is None
        assert "layer-0.safetensors" in journal.notes[0]
        assert "damaged" in journal.notes[0]
        journal.write("layer-0", tensors(), {})
        assert journal.read("layer-0") is not None
        assert journal.read("layer-1") is not None


def test_a_file_of_another_journal_is_not_taken(folder, tmp_path):
    with Journal(tmp_path / "other", SETTINGS | {"seed": 1}) as journal:
        journal.write("layer-0", tensors(), {})
    with Journal(folder, SETTINGS) as journal:
        (tmp_path / "other" / "layer-0.safetensors").rename(folder / "layer-0.safetensors")
        assert journal.read("layer-0") is None
        assert len(journal.notes) == 1


def test_other_settings_are_refused_by_name_and_restart_discards(folder):
    with Journal(folder, SETTINGS) as journal:
        journal.write("layer-0", tensors(), {})
    changed = SETTINGS | {"seed": 1, "dtype": "float16"}
    with pytest.raises(ValueError, match=r"another dtype, seed: .*--restart") as refused:
        Journal(folder, changed).__enter__()
    assert "\n" not in str(refused.value)
    with Journal(folder, SETTINGS) as journal:  # the refusal has changed nothing
        assert journal.read("layer-0") is not None
    with Journal(folder, changed, restart=True) as journal:
        assert journal.read("layer-0") is None
        assert journal.notes == []
    with pytest.raises(ValueError, match="another dtype, seed"):
        Journal(folder, SETTINGS).__enter__()


def test_a_damaged_manifest_is_refused(folder):
    with Journal(folder, SETTINGS):
        pass
    for text in ("", "[1]", "{"):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"damaged manifest.json.*--restart"):
            Journal(folder, SETTINGS).__enter__()
    with Journal(folder, SETTINGS, restart=True):
        assert json.loads((folder / "manifest.json").read_text()) == SETTINGS


def test_other_folders_and_files_are_left_alone(folder):
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(ValueError, match=r"holds 'thesis.txt' and no manifest.json"):
            Journal(folder, SETTINGS, restart=restart).__enter__()
    assert (folder / "thesis.txt").read_text() == "mine"
    path = folder / "thesis.txt"
    with pytest.raises(ValueError, match="not a folder"):
        Journal(path, SETTINGS).__enter__()


def test_leftovers_of_a_killed_write_go(folder):
    with Journal(folder, SETTINGS):
        (folder / ".attnreg-0123456789ab.tmp").write_text("half")
    with Journal(folder, SETTINGS):
        assert not list(folder.glob(".attnreg-*"))


def test_remove(folder):
    with Journal(folder, SETTINGS) as journal:
        journal.write("layer-0", tensors(), {})
        journal.remove()
    assert not folder.exists()


HOLD = """
import sys
from pathlib import Path
from attnreg.transformers.journal import Journal
with Journal(Path(sys.argv[1]), {"seed": 0}):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(folder):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {holder.pid}"):
            Journal(folder, {"seed": 0}).__enter__()
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with Journal(folder, {"seed": 0}) as journal:
        assert journal.read("layer-0") is None
