"""Names of models on the hub: its cache, its network, and which files are asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest

from attnreg.transformers.checkpoint import Checkpoint
from tests.transformers.folders import save


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two families."""
    root = tmp_path_factory.mktemp("folders")
    for family in ("llama", "bert"):
        save(family, root / family)
    return root


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache in a temporary folder, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_without_network_a_hub_name_is_refused_with_what_to_do(offline_cache: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder 'owner/model'.*point at a local folder") as e:
        Checkpoint.open("owner/model")
    assert "\n" not in str(e.value)


def test_whatever_the_network_raises_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("connection reset\nby peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"RuntimeError: connection reset\); point at") as caught:
        Checkpoint.open("owner/model")
    assert "\n" not in str(caught.value)


def test_a_cached_model_of_the_hub_is_opened_offline(models: Path, offline_cache: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = offline_cache / "models--owner--model"
    for part in ("refs", "blobs", f"snapshots/{commit}"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted((models / "llama").iterdir())):
        blob = repository / "blobs" / f"blob{number}"
        shutil.copyfile(path, blob)
        (repository / "snapshots" / commit / path.name).symlink_to(blob)
    checkpoint = Checkpoint.open("owner/model")
    assert checkpoint.folder == repository / "snapshots" / commit
    assert checkpoint.names == Checkpoint.open(models / "llama").names


def test_only_what_is_needed_is_asked_of_the_hub(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        "config.json", "model.safetensors", "vocab.txt", "1_Pooling/config.json", "README.md",
        "2_Dense/pytorch_model.bin", "tokenizer.model", "pytorch_model.bin", "tf_model.h5",
        "onnx/model.onnx", "onnx/config.json", "consolidated.00.pth", "consolidated.safetensors",
    ]  # fmt: skip
    asked: dict[str, list[str]] = {}

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        chosen = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        asked[name] = list(chosen)
        return str(models / "bert")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Checkpoint.open("owner/model").folder == models / "bert"
    assert asked == {"owner/model": files[:7]}
