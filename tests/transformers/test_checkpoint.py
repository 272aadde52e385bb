"""A model folder is checked when it is opened, and read a layer at a time."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from attnreg.transformers import shards
from attnreg.transformers.checkpoint import Checkpoint
from tests.transformers.folders import (
    BUILDERS,
    DTYPES,
    by_transformers,
    edit_json,
    outputs,
    save,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharded folders of every family; tests that change one copy it."""
    root = tmp_path_factory.mktemp("folders")
    for family in BUILDERS:
        save(family, root / family)
    return root


@pytest.fixture
def llama(folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders / "llama", tmp_path / "llama"))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All stored tensors, by safetensors itself."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_filled_skeleton_is_the_model_of_transformers(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = save(family, tmp_path / "model", dtype)
    expected = by_transformers(folder, dtype)
    checkpoint = Checkpoint.open(folder)
    model = checkpoint.skeleton()
    assert all(parameter.is_meta for parameter in model.parameters())
    checkpoint.load_into(model)
    state, twin = model.state_dict(), expected.state_dict()
    assert list(state) == list(twin)
    assert all(torch.equal(state[name], twin[name]) for name in twin)
    assert all(value.dtype == dtype for value in state.values())
    assert checkpoint.dtype == dtype
    assert torch.equal(outputs(model), outputs(expected))


@pytest.mark.parametrize("family", BUILDERS)
def test_names_are_those_of_the_model_and_tied_ones_stand_once(family: str, folders: Path) -> None:
    checkpoint = Checkpoint.open(folders / family)
    model = by_transformers(folders / family, torch.float32)
    every = set(model.state_dict())
    assert set(checkpoint.names) | set(checkpoint.aliases) == every
    assert not set(checkpoint.names) & set(checkpoint.aliases)
    assert set(checkpoint.names) == set(stored(folders / family))
    for alias, name in checkpoint.aliases.items():
        assert model.get_parameter(alias) is model.get_parameter(name)
    assert (family == "albert") == (not checkpoint.aliases)
    assert checkpoint.unused == ()


def test_tied_weights_stay_one_parameter(folders: Path) -> None:
    checkpoint = Checkpoint.open(folders / "llama")
    model = checkpoint.skeleton()
    checkpoint.load_into(model.get_submodule("lm_head"), "lm_head")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta
    assert model.model.norm.weight.is_meta


def test_a_layer_is_read_from_its_own_files_only(llama: Path) -> None:
    expected = by_transformers(llama, torch.float32).model.layers[1].state_dict()
    checkpoint = Checkpoint.open(llama)
    prefix = "model.layers.1"
    needed = {checkpoint.entries[f"{prefix}.{name}"].file for name in expected}
    others = set(llama.glob("*.safetensors")) - needed
    assert len(others) > 1
    for path in others:
        path.unlink()
    model = checkpoint.skeleton()
    block = model.get_submodule(prefix)
    checkpoint.load_into(block, prefix)
    state = block.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert sum(not parameter.is_meta for parameter in model.parameters()) == len(expected)
    tensors = checkpoint.tensors(f"{prefix}.{name}" for name in expected)
    assert list(tensors) == [f"{prefix}.{name}" for name in expected]
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.tensors(checkpoint.names)


@pytest.mark.parametrize("family", BUILDERS)
def test_a_module_that_was_emptied_is_filled_again(family: str, folders: Path) -> None:
    checkpoint = Checkpoint.open(folders / family)
    model = checkpoint.skeleton()
    checkpoint.load_into(model)
    expected = outputs(model)
    base = getattr(model, model.base_model_prefix, model)
    name = next(name for name, module in model.named_modules() if module is base)
    base.to("meta")
    checkpoint.load_into(base, name)
    model.tie_weights()  # moving a module replaces its parameters, so it unties
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    assert torch.equal(outputs(model), expected)


def test_weights_are_read_in_a_compute_dtype(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", torch.bfloat16)
    checkpoint = Checkpoint.open(folder)
    model = checkpoint.skeleton()
    checkpoint.load_into(model, dtype=torch.float64)
    raw = stored(folder)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float64
        assert torch.equal(value, raw[checkpoint.aliases.get(name, name)].double())
    assert checkpoint.tensors(["lm_head.weight"])["lm_head.weight"].dtype == torch.bfloat16


def test_what_is_filled_already_is_left(folders: Path) -> None:
    checkpoint = Checkpoint.open(folders / "gpt2")
    model = checkpoint.skeleton()
    checkpoint.load_into(model.transformer.h[0], "transformer.h.0")
    changed = model.transformer.h[0].ln_1.weight
    with torch.no_grad():
        changed.fill_(7)
    checkpoint.load_into(model)
    assert bool((changed == 7).all())
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_names_without_prefix_and_of_old_versions_are_understood(
    folders: Path, tmp_path: Path
) -> None:
    """GPT-2 on the hub has neither the prefix nor the head; BERT's gains were called gamma."""
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    shutil.copy(folders / "gpt2" / "config.json", gpt2)
    bare = {
        name.removeprefix("transformer."): value for name, value in stored(folders / "gpt2").items()
    }
    mask = {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    save_file(bare | mask, gpt2 / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(gpt2)
    assert checkpoint.unused == ("h.0.attn.bias",)
    assert checkpoint.names == Checkpoint.open(folders / "gpt2").names
    model = checkpoint.skeleton()
    checkpoint.load_into(model)
    assert torch.equal(outputs(model), outputs(by_transformers(folders / "gpt2", torch.float32)))

    bert = tmp_path / "bert"
    bert.mkdir()
    shutil.copy(folders / "bert" / "config.json", bert)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in stored(folders / "bert").items()
    }
    save_file(old, bert / "model.safetensors", {"format": "pt"})
    model = Checkpoint.open(bert).skeleton()
    Checkpoint.open(bert).load_into(model)
    assert torch.equal(outputs(model), outputs(by_transformers(folders / "bert", torch.float32)))


def test_tied_weights_stored_twice_must_agree(llama: Path) -> None:
    tensors = stored(llama)
    for path in (*llama.glob("*.safetensors"), llama / shards.INDEX):
        path.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, llama / shards.SINGLE, {"format": "pt"})
    checkpoint = Checkpoint.open(llama)
    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, llama / shards.SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match=r"different values for .* which the configuration ties"):
        Checkpoint.open(llama)


# -- refusals


def _first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def _truncate(folder: Path) -> None:
    data = _first_shard(folder).read_bytes()
    _first_shard(folder).write_bytes(data[:-3])


def _cut_header(folder: Path) -> None:
    _first_shard(folder).write_bytes(_first_shard(folder).read_bytes()[:20])


def _empty_shard(folder: Path) -> None:
    _first_shard(folder).write_bytes(b"")


def _garbled_header(folder: Path) -> None:
    data = bytearray(_first_shard(folder).read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    _first_shard(folder).write_bytes(bytes(data))


def _longer(folder: Path) -> None:
    with _first_shard(folder).open("ab") as file:
        file.write(b"more")


def _lost_tensor(folder: Path) -> None:
    path = _first_shard(folder)
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path, {"format": "pt"})


def _other_shape(folder: Path) -> None:
    path = _first_shard(folder)
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name] = tensors[name][..., :-1].contiguous()
    save_file(tensors, path, {"format": "pt"})


def _quantised_dtype(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    _first_shard(folder).write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")


def _unlisted_tensor(folder: Path) -> None:
    index = json.loads((folder / shards.INDEX).read_text())
    index["weight_map"].pop("model.norm.weight")
    (folder / shards.INDEX).write_text(json.dumps(index))


def _outside(folder: Path) -> None:
    index = json.loads((folder / shards.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (folder / shards.INDEX).write_text(json.dumps(index))


def _pickled_only(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / shards.INDEX):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def _no_weights(folder: Path) -> None:
    _pickled_only(folder)
    (folder / "pytorch_model.bin").unlink()


REFUSED = {
    "truncated shard": (_truncate, "model-00001-of-.* is damaged or truncated"),
    "cut in the header": (_cut_header, "model-00001-of-.* is damaged or truncated"),
    "empty shard": (_empty_shard, "model-00001-of-.* is damaged or truncated"),
    "garbled header": (_garbled_header, "model-00001-of-.* is damaged or truncated"),
    "bytes too many": (_longer, "model-00001-of-.* is damaged or truncated"),
    "missing shard": (lambda folder: _first_shard(folder).unlink(), "00001.* is missing, though"),
    "shard without its tensor": (_lost_tensor, "lacks the tensor .*places it there"),
    "other shape": (_other_shape, r"of shape .*; the model needs \("),
    "eight-bit weights": (_quantised_dtype, "F8_E4M3.*quantised models are not supported"),
    "tensor in no shard": (_unlisted_tensor, "lacks the tensor 'model.norm.weight' that Llama"),
    "shard elsewhere": (_outside, "'../model.safetensors'; expected a safetensors file of this"),
    "damaged index": (
        lambda folder: (folder / shards.INDEX).write_text('{"weight_map": '),
        "index.json is not valid JSON",
    ),
    "index without map": (
        lambda folder: (folder / shards.INDEX).write_text("{}"),
        "has no weight_map",
    ),
    "pickled weights": (_pickled_only, r"pickled weights only \(pytorch_model.bin\).*safetensors"),
    "no weights": (_no_weights, "has no weights; expected model.safetensors"),
    "no configuration": (
        lambda folder: (folder / "config.json").unlink(),
        "has no config.json; expected the folder of a Hugging Face model",
    ),
    "configuration not JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json is not valid JSON",
    ),
    "configuration a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "config.json holds a list; expected a JSON object",
    ),
    "configuration not text": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
        "config.json is not valid JSON",
    ),
    "unknown family": (
        lambda folder: edit_json(folder / "config.json", model_type="mamba"),
        "model type 'mamba' is not supported; expected one of .*llama",
    ),
    "code of its own": (
        lambda folder: edit_json(folder / "config.json", auto_map={"AutoModel": "m.M"}),
        "needs trust_remote_code.* never run",
    ),
    "quantised": (
        lambda folder: edit_json(folder / "config.json", quantization_config={"bits": 4}),
        "is a quantised model; take the unquantised one",
    ),
    "unknown architecture": (
        lambda folder: edit_json(folder / "config.json", architectures=["LlamaForWishes"]),
        "names the architecture 'LlamaForWishes', which transformers .* does not have",
    ),
    "not an architecture": (
        lambda folder: edit_json(folder / "config.json", architectures=["pipeline"]),
        "names the architecture 'pipeline', which transformers .* does not have",
    ),
    "heads that do not fit": (
        lambda folder: edit_json(folder / "config.json", num_key_value_heads=4),
        r"of shape \(16, 32\); the model needs \(32, 32\)",
    ),
    "too few layers stored": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=4),
        "lacks the tensor 'model.layers.3",
    ),
    "configuration without sense": (
        lambda folder: edit_json(folder / "config.json", hidden_size="wide"),
        "transformers cannot",
    ),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(damage: object, message: str, llama: Path) -> None:
    Checkpoint.open(llama)
    damage(llama)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint.open(llama)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_refused(llama: Path) -> None:
    path = _first_shard(llama)
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    checkpoint = Checkpoint.open(llama)
    with pytest.raises(ValueError, match=f"is damaged: '{name}' holds numbers that are not finite"):
        checkpoint.load_into(checkpoint.skeleton())


def test_a_tensor_that_is_not_there_is_refused_by_name(folders: Path) -> None:
    checkpoint = Checkpoint.open(folders / "llama")
    with pytest.raises(ValueError, match=r"has no tensor 'model.layers.9.mlp'"):
        checkpoint.tensors(["model.layers.9.mlp"])
    with pytest.raises(ValueError, match=r"has no tensor 'wrong.0.self_attn"):
        checkpoint.load_into(checkpoint.skeleton().model.layers, "wrong")


@pytest.mark.parametrize("source", ["./missing", "a/b/c", "/no/such/folder", "..", Path("owner/m")])
def test_a_path_that_is_not_there_never_asks_the_hub(
    source: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ValueError, match=r"there is no folder|has no config.json"):
        Checkpoint.open(source)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("x")
    with pytest.raises(ValueError, match="is a file; expected the folder of a model"):
        Checkpoint.open(tmp_path / "model")
