"""attnreg.load: any model folder, also one that no configuration of transformers describes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnreg
import attnreg.transformers
from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.checkpoint import Checkpoint
from attnreg.transformers.layers_file import LAYERS_FILE, layers_file, read_layers
from attnreg.transformers.shapes import AttentionShape, Sizes
from attnreg.transformers.writing import write_folder
from tests.transformers.folders import BUILDERS, DTYPES, by_transformers, edit_json, outputs, save

# one size a layer, so that no configuration describes them (ALBERT has one layer only)
SIZES = {
    "llama": [{"kv_heads": 1}, {"heads": 2, "kv_heads": 2}, {"head_dim": 4}],
    "bert": [{"kv_heads": 1}, {"heads": 2, "kv_heads": 1}, {"head_dim": 4}],
    "gpt2": [{"kv_heads": 2}, {"heads": 2, "kv_heads": 2}, {"head_dim": 4}],
    "albert": [{"kv_heads": 2, "head_dim": 6}] * 3,
}


def convert(family: str, root: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Any]:
    """A folder with random students of several shapes, and the live model it was written from."""
    checkpoint = Checkpoint.open(save(family, root / "model", dtype))
    adapter = adapter_for(checkpoint.config)
    model: Any = by_transformers(checkpoint.folder, dtype)
    shapes = [
        adapter.shape(checkpoint.config, layer, Sizes(**sizes))
        for layer, sizes in enumerate(SIZES[family])
    ]
    for block, shape in dict(zip(adapter.blocks(model), shapes, strict=True)).items():
        weights = {name: 0.3 * torch.randn(size) for name, size in shape.weights().items()}
        adapter.write(block, {name: value.to(dtype) for name, value in weights.items()}, shape)
    tensors = model.state_dict().items()  # tied ones twice, of which one is written
    extra = {LAYERS_FILE: layers_file(shapes)}
    write_folder(root / "student", checkpoint, checkpoint.config, tensors, extra)
    return root / "student", model


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_shapes_that_no_configuration_describes(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    folder, model = convert(family, tmp_path, dtype)
    loaded = attnreg.load(folder)
    state: dict[str, Tensor] = model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert all(value.dtype == dtype for value in loaded.parameters())
    assert not loaded.training
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.name_or_path == str(folder)
    wide = attnreg.load(folder, dtype=torch.float64)
    assert all(value.dtype == torch.float64 for value in wide.parameters())
    assert torch.equal(wide.state_dict()[name := next(iter(state))], state[name].double())


@pytest.mark.parametrize("family", BUILDERS)
def test_plain_transformers_refuses_them_and_makes_nothing_up(family: str, tmp_path: Path) -> None:
    """Were the tensors named otherwise, it would draw random ones with no more than a warning."""
    folder, _ = convert(family, tmp_path)
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)mismatch|shape"):
        by_transformers(folder, torch.float32)


def test_generation_settings_and_a_second_conversion(tmp_path: Path) -> None:
    folder, model = convert("llama", tmp_path)
    edit_json(folder / "generation_config.json", max_new_tokens=7)
    assert attnreg.load(folder).generation_config.max_new_tokens == 7
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.layers == read_layers(folder / LAYERS_FILE)
    pairs = ((name, checkpoint.tensors([name])[name]) for name in checkpoint.names)
    extra = {LAYERS_FILE: layers_file(checkpoint.layers)}
    write_folder(tmp_path / "again", checkpoint, checkpoint.config, pairs, extra)
    assert torch.equal(outputs(attnreg.load(tmp_path / "again")), outputs(model))


def test_a_layer_of_its_own_size_is_read_alone(tmp_path: Path) -> None:
    """Its rotary frequencies are computed anew after it was emptied."""
    folder, model = convert("llama", tmp_path)
    checkpoint = Checkpoint.open(folder)
    skeleton: Any = checkpoint.skeleton()
    block = skeleton.model.layers[2].to("meta")
    checkpoint.load_into(block, "model.layers.2")
    assert not any(value.is_meta for value in (*block.parameters(), *block.buffers()))
    checkpoint.load_into(skeleton)
    assert torch.equal(outputs(skeleton), outputs(model))


@pytest.mark.parametrize("family", BUILDERS)
def test_a_plain_folder_is_loaded_by_transformers(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path / "model", torch.bfloat16)
    for dtype in (None, torch.float32):
        loaded = attnreg.load(str(folder), dtype=dtype)
        expected = by_transformers(folder, dtype or torch.bfloat16)
        assert type(loaded) is type(expected)
        assert {value.dtype for value in loaded.parameters()} == {dtype or torch.bfloat16}
        assert torch.equal(outputs(loaded), outputs(expected))


def _edit_layers(folder: Path, change: Any) -> None:
    content = json.loads((folder / LAYERS_FILE).read_text())
    change(content)
    (folder / LAYERS_FILE).write_text(json.dumps(content))


REFUSED = {
    "newer format": (lambda c: c.update(format=2), "format 2; this attnreg reads format 1: upg"),
    "no format": (lambda c: c.pop("format"), "has format None"),
    "no layers": (lambda c: c.pop("layers"), "does not describe layers"),
    "a layer short": (lambda c: c["layers"].pop(), "describes 2 layers, the model has 3"),
    "a key too many": (lambda c: c["layers"][0].update(depth=3), "does not describe layers"),
    "layers of text": (lambda c: c.update(layers=["x"]), "does not describe layers"),
    "no such size": (lambda c: c["layers"][0].update(kv_heads=3), "3 key/value heads do not div"),
    "another size": (
        lambda c: c["layers"][0].update(kv_heads=2),
        r"of shape .*; the model needs \(",
    ),
    "another scale": (lambda c: c["layers"][0].update(scale=0.5), "cannot compute"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_damaged_layers_file_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    folder, _ = convert("llama", tmp_path)
    _edit_layers(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        attnreg.load(folder)
    assert "\n" not in str(caught.value)


def test_one_block_applied_several_times_has_one_shape(tmp_path: Path) -> None:
    folder, _ = convert("albert", tmp_path)
    _edit_layers(folder, lambda content: content["layers"][1].update(kv_heads=4))
    with pytest.raises(ValueError, match="different shapes to a block that the model applies"):
        attnreg.load(folder)


def test_shapes_survive_json(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save("llama", tmp_path / "model"))
    shape = adapter_for(checkpoint.config).shape(checkpoint.config, 0)
    shapes = (shape, replace(shape, window=7, biases=("query",), norm_eps=1e-6, rotary=None))
    (tmp_path / LAYERS_FILE).write_bytes(layers_file(shapes))
    assert read_layers(tmp_path / LAYERS_FILE) == shapes
    assert all(isinstance(layer, AttentionShape) for layer in shapes)


def test_the_package_is_imported_without_transformers() -> None:
    code = "import attnreg, sys; attnreg.load; assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "transformers" else real(name, *rest),
    )
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'attnreg\[hf\]'$"):
        importlib.reload(attnreg.transformers)
