"""A model folder is written whole or not at all."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from attnreg.transformers import writing
from attnreg.transformers.checkpoint import Checkpoint
from attnreg.transformers.shards import read_json
from attnreg.transformers.writing import write_folder
from tests.transformers.folders import (
    BUILDERS,
    DTYPES,
    IDS,
    by_transformers,
    edit_json,
    listing,
    outputs,
    save,
)


def unchanged(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for name in checkpoint.names:
        yield name, checkpoint.tensors([name])[name]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(save("llama", tmp_path / "in" / "model"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "converted"


def write(out: Path, checkpoint: Checkpoint, **options: Any) -> tuple[str, ...]:
    return write_folder(out, checkpoint, checkpoint.config, unchanged(checkpoint), {}, **options)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_tensors_keep_bits_dtype_and_size_of_files(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = save(family, tmp_path / "model", dtype)
    checkpoint = Checkpoint.open(folder)
    wide = ((name, tensor.double()) for name, tensor in unchanged(checkpoint))
    write_folder(tmp_path / "out", checkpoint, checkpoint.config, wide, {})
    sizes = {}
    for name in ("model", "out"):
        tensors: dict[str, Tensor] = {}
        paths = sorted((tmp_path / name).glob("*.safetensors"))
        for path in paths:
            tensors |= load_file(path)
            held = sum(tensor.nbytes for tensor in load_file(path).values())
            sizes[name] = max(sizes.get(name, 0), held)
        assert len(paths) > 1
        if name == "model":
            expected = tensors
    assert sizes["out"] <= sizes["model"]
    assert tensors.keys() == expected.keys()
    assert all(tensors[key].dtype == dtype for key in expected)
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    given = outputs(by_transformers(tmp_path / "out", dtype))
    assert torch.equal(given, outputs(by_transformers(folder, dtype)))
    assert read_json(tmp_path / "out" / "config.json") == read_json(folder / "config.json")


def test_one_file_stays_one_file_and_writing_is_reproducible(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save("bert", tmp_path / "model", shard="5GB"))
    for name in ("one", "two"):
        write(tmp_path / name, checkpoint)
    assert listing(tmp_path / "one") == listing(tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").is_file()
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_every_other_file_comes_along_and_no_other_weights(
    checkpoint: Checkpoint, out: Path, tmp_path: Path
) -> None:
    folder = checkpoint.folder
    kept = {"tokenizer.json": "{}", "vocab.txt": "a\nb", "1_Pooling/config.json": "{}",
            "2_Dense/model.safetensors": "dense", "LICENSE": "free"}  # fmt: skip
    left = {"pytorch_model.bin": "x", "tf_model.h5": "x", "onnx/model.onnx": "x", ".git/HEAD": "x",
            "model.fp16.safetensors": "x", "pytorch_model.bin.index.json": "x"}  # fmt: skip
    for name, text in (kept | left | {"README.md": "old card"}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (tmp_path / "blob").write_text("linked")
    (folder / "merges.txt").symlink_to(tmp_path / "blob")
    extra = {"README.md": b"new card"}
    left_behind = write_folder(out, checkpoint, checkpoint.config, unchanged(checkpoint), extra)
    assert {name: (out / name).read_text() for name in kept} == kept
    assert (out / "README.md").read_bytes() == b"new card"
    assert (out / "merges.txt").read_text() == "linked"
    assert not (out / "merges.txt").is_symlink()
    assert (out / "generation_config.json").is_file()
    assert not any((out / name).exists() for name in left)
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert set(left_behind) == set(left) | shards


def test_the_configuration_changes_where_the_model_does(checkpoint: Checkpoint, out: Path) -> None:
    """Keys of other versions and programs stay as they were."""
    edit_json(checkpoint.folder / "config.json", rope_theta=5000.0, note="mine")
    before = read_json(checkpoint.folder / "config.json")
    checkpoint = Checkpoint.open(checkpoint.folder)
    config = copy.deepcopy(checkpoint.config)
    config.num_key_value_heads = 1
    cut = (
        (name, tensor[:8] if ".k_proj" in name or ".v_proj" in name else tensor)
        for name, tensor in unchanged(checkpoint)
    )
    write_folder(out, checkpoint, config, cut, {})
    assert read_json(out / "config.json") == before | {"num_key_value_heads": 1}
    assert by_transformers(out, torch.float32).config.num_key_value_heads == 1


def test_another_class_gets_what_its_own_defaults_would_change(
    checkpoint: Checkpoint, out: Path
) -> None:
    text = read_json(checkpoint.folder / "config.json")
    text.pop("max_position_embeddings")  # Llama's default is 2048, Mistral's is not
    (checkpoint.folder / "config.json").write_text(json.dumps(text))
    checkpoint = Checkpoint.open(checkpoint.folder)
    values = checkpoint.config.to_dict() | {
        "model_type": "mistral", "sliding_window": None, "architectures": ["MistralForCausalLM"]
    }  # fmt: skip
    for name in ("attention_bias", "mlp_bias", "pretraining_tp"):
        values.pop(name, None)
    config = transformers.MistralConfig.from_dict(values)
    write_folder(out, checkpoint, config, unchanged(checkpoint), {})
    written = by_transformers(out, torch.float32)
    assert type(written).__name__ == "MistralForCausalLM"
    assert written.config.max_position_embeddings == 2048
    assert written.config.sliding_window is None
    assert "mlp_bias" not in read_json(out / "config.json")
    expected = outputs(by_transformers(checkpoint.folder, torch.float32))
    assert torch.equal(outputs(written), expected)


def test_all_weights_are_saved_in_the_dtype_asked_for(checkpoint: Checkpoint, out: Path) -> None:
    write(out, checkpoint, dtype=torch.bfloat16)
    assert Checkpoint.open(out).dtype == torch.bfloat16
    config = transformers.AutoConfig.from_pretrained(out)
    assert (getattr(config, "dtype", None) or config.torch_dtype) == torch.bfloat16
    for name, tensor in unchanged(checkpoint):
        assert torch.equal(Checkpoint.open(out).tensors([name])[name], tensor.bfloat16())


# -- the target


def test_a_folder_that_holds_something_is_refused(checkpoint: Checkpoint, out: Path) -> None:
    out.mkdir()
    write(out, checkpoint)  # an empty one is as good as none
    before = listing(out)
    with pytest.raises(ValueError, match="holds a model already; choose another folder or over"):
        write(out, checkpoint)
    assert listing(out) == before
    (out / "config.json").unlink()
    with pytest.raises(ValueError, match="holds files and is not a model folder"):
        write(out, checkpoint, overwrite=True)
    file = out.parent / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        write(file, checkpoint, overwrite=True)
    folder = checkpoint.folder
    for target in (folder, folder.parent, folder / "inside"):
        with pytest.raises(ValueError, match="is or holds the original model's folder"):
            write(target, checkpoint, overwrite=True)
    assert listing(out.parent) == sorted(["converted", "file"] + [
        f"converted/{name}" for name in before if name != "config.json"
    ])  # fmt: skip


def test_an_unfinished_folder_of_ours_and_a_model_to_overwrite_are_replaced(
    checkpoint: Checkpoint, out: Path
) -> None:
    (out / writing.JOURNAL).mkdir(parents=True)
    (out / writing.JOURNAL / "layer0").write_text("x")
    write(out, checkpoint)
    expected = listing(out)
    (out / "stale.txt").write_text("x")
    write(out, checkpoint, overwrite=True)
    assert listing(out) == expected
    assert [path.name for path in out.parent.iterdir()] == ["converted"]


# -- what goes wrong on the way


def _missing(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    yield from list(unchanged(checkpoint))[:-1]


def _unknown(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    yield from unchanged(checkpoint)
    yield "model.extra", torch.ones(2)


def _misshapen(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, tensor[:-1]) for name, tensor in unchanged(checkpoint))


def _infinite(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, tensor / 0) for name, tensor in unchanged(checkpoint))


def _stopped(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    yield from list(unchanged(checkpoint))[:20]
    raise KeyboardInterrupt


WRONG = {
    "a tensor short": (_missing, ValueError, "not a model: .*/converted lacks the tensor"),
    "a tensor too many": (_unknown, ValueError, "holds 'model.extra', which the model lacks"),
    "another shape": (_misshapen, ValueError, r"not a model: .*/converted holds .* of shape"),
    "not finite": (_infinite, ValueError, "holds numbers that are not finite"),
    "Ctrl-C": (_stopped, KeyboardInterrupt, "^$"),
}


@pytest.mark.parametrize(("tensors", "error", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("older", [False, True], ids=["new", "over an older one"])
def test_whatever_goes_wrong_leaves_nothing_behind(
    tensors: Any, error: Any, message: str, older: bool, checkpoint: Checkpoint, out: Path
) -> None:
    target = out if older else out / "deep" / "converted"
    if older:
        write(out, checkpoint)
    before = listing(out.parent)
    with pytest.raises(error, match=message) as caught:
        write_folder(target, checkpoint, checkpoint.config, tensors(checkpoint), {}, overwrite=True)
    assert "\n" not in str(caught.value)
    assert listing(out.parent) == before


def test_values_beyond_the_dtype_are_refused(checkpoint: Checkpoint, out: Path) -> None:
    big = ((name, tensor + 1e5) for name, tensor in unchanged(checkpoint))
    with pytest.raises(ValueError, match=r"not finite in torch.float16; save in another dtype"):
        write_folder(out, checkpoint, checkpoint.config, big, {}, dtype=torch.float16)
    assert listing(out.parent) == []


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_space_is_found_before_writing(
    checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> Iterator[tuple[str, Tensor]]:
        pytest.fail("asked for tensors")
        yield

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 0, 10**6))
    with pytest.raises(OSError, match=r"^cannot write .*: 1\.\d MB are needed and 1\.0 MB") as e:
        write_folder(out, checkpoint, checkpoint.config, never(), {})
    assert e.value.errno == errno.ENOSPC
    assert listing(out.parent) == []


@pytest.mark.parametrize(
    "full",
    [
        OSError(errno.ENOSPC, "No space left on device", "x"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
    ids=["the system's", "safetensors'"],
)
def test_a_disk_that_fills_up_on_the_way_is_one_line(
    full: Exception, checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = writing.save_file

    def fails_later(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise full
        real(*arguments, **options)

    monkeypatch.setattr(writing, "save_file", fails_later)
    with pytest.raises(OSError, match=r"^cannot write .*converted: no space left; make") as caught:
        write(out, checkpoint)
    assert caught.value.errno == errno.ENOSPC
    assert len(calls) == 3
    assert listing(out.parent) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 kB, where the tests may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("checked", [True, False], ids=["found before", "found on the way"])
def test_a_small_disk(
    checked: bool, checkpoint: Checkpoint, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not checked:
        monkeypatch.setattr(writing, "_require_space", lambda *_: None)
    with pytest.raises(OSError, match=r"^cannot write .*make space or choose another disk$"):
        write(small_disk / "converted", checkpoint)
    assert listing(small_disk) == []


# -- kills


@pytest.mark.filterwarnings("ignore:os.fork")  # of JAX, where a benchmark's test has imported it
def test_a_kill_leaves_no_folder_and_the_next_write_cleans_up(
    checkpoint: Checkpoint, out: Path
) -> None:
    child = os.fork()
    if child == 0:  # nothing of pytest may run here

        def killed() -> Iterator[tuple[str, Tensor]]:
            for number, pair in enumerate(unchanged(checkpoint)):
                if number == 20:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield pair

        try:
            write_folder(out, checkpoint, checkpoint.config, killed(), {})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = out.parent.iterdir()
    assert left.name.startswith(".converted.new-")
    assert any(left.glob("*.part"))
    write(out, checkpoint)
    assert [path.name for path in out.parent.iterdir()] == ["converted"]


def test_a_kill_between_the_two_renames_gives_the_old_folder_back(
    checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(out, checkpoint)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    out.rename(out.with_name(".converted.old-0123"))  # what the kill leaves
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    with pytest.raises(OSError, match=r"are needed and 0\.0 MB are free"):
        write(out, checkpoint)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["converted"]


# -- without this package

_PLAIN = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "attnreg":
            raise ModuleNotFoundError("blocked")

sys.meta_path.insert(0, Blocked())
import json, pathlib, torch, transformers
try:
    import attnreg
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("attnreg can be imported")
ids = torch.tensor(json.loads(sys.argv[1]))
results = []
for folder in sys.argv[3:]:
    name = json.loads((pathlib.Path(folder) / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    with torch.no_grad():
        results.append(model(ids)[0].float())
torch.save(results, sys.argv[2])
"""


def test_a_process_without_attnreg_loads_the_folder_and_gives_the_same(tmp_path: Path) -> None:
    folders, expected = [], []
    for family in BUILDERS:
        checkpoint = Checkpoint.open(save(family, tmp_path / family))
        write(tmp_path / f"{family}-out", checkpoint)
        folders.append(str(tmp_path / f"{family}-out"))
        expected.append(outputs(by_transformers(tmp_path / family, torch.float32)))
    arguments = [str(IDS.tolist()), str(tmp_path / "results.pt"), *folders]
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")
    for result, twin in zip(results, expected, strict=True):
        # Another process may use another number of threads and so another order of summation.
        torch.testing.assert_close(result, twin, rtol=1e-5, atol=1e-5)
