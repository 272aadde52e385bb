"""Shapes as data, what is written where, and every refusal."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from attnreg.models.rotary import Rotary
from attnreg.transformers.adapters import Adapter, adapter_for, register
from attnreg.transformers.shapes import AttentionShape, Sizes
from tests.transformers.families import (
    AVAILABLE,
    GROUPED,
    SIZES,
    V5,
    outputs,
    shapes_of,
    write_random,
)


def config_of(kind, **values):
    sizes = GROUPED if kind in ("Llama", "Mistral", "Qwen2") else SIZES
    return getattr(transformers, f"{kind}Config")(**(sizes | values))


def refused(config, match, **sizes):
    with pytest.raises(ValueError, match=match) as caught:
        adapter_for(config).shape(config, 0, Sizes(**sizes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", AVAILABLE)
def test_a_shape_survives_json(family):
    for shape in shapes_of(AVAILABLE[family].make()):
        assert AttentionShape.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape


def test_shapes_of_a_window_and_of_biases():
    family = AVAILABLE["mistral-window"].make()
    assert [s.mask() for s in shapes_of(family)] == [("causal", 3)] * 2
    assert shapes_of(AVAILABLE["qwen2"].make())[0].biases == ("query", "key", "value")
    assert shapes_of(AVAILABLE["bert"].make())[0].mask() is None
    assert shapes_of(AVAILABLE["bert-decoder"].make())[0].mask() == "causal"
    if V5:
        window = AVAILABLE["qwen2-window"].make()
        assert [s.window for s in shapes_of(window)] == [None, 3]


def test_a_student_shape_without_rotary_needs_no_configuration():
    config = config_of("Bert")
    shape = adapter_for(config).shape(config, 0)
    small = {"kv_heads": 2, "head_dim": 6}
    assert shape.student(**small) == adapter_for(config).shape(config, 0, Sizes(**small))
    llama = config_of("Llama")
    shape = adapter_for(llama).shape(llama, 0)
    assert shape.student(kv_heads=1) == adapter_for(llama).shape(llama, 0, Sizes(kv_heads=1))
    with pytest.raises(ValueError, match="rotary frequencies"):
        shape.student(head_dim=6)


def test_impossible_sizes_and_unknown_values_are_refused():
    refused(
        config_of("Llama"),
        "3 key/value heads do not divide 4 heads: choose one of 1, 2, 4",
        kv_heads=3,
    )
    refused(config_of("Llama"), "head_dim must be even", head_dim=5)
    refused(config_of("Bert"), "at least 1", heads=0, kv_heads=1)
    values = AttentionShape(8, 2, 2, 4, 0.5, True).to_dict()
    with pytest.raises(ValueError, match="not the shape of an attention layer"):
        AttentionShape.from_dict(values | {"colour": 1})
    with pytest.raises(ValueError, match="not the shape of an attention layer"):
        AttentionShape.from_dict({"width": 8})
    with pytest.raises(ValueError, match="'gate'"):
        AttentionShape.from_dict(values | {"biases": ["gate"]})


def test_what_cannot_be_represented_is_refused_by_name():
    for kind in ("Bert", "Roberta", "Albert"):
        refused(config_of(kind, position_embedding_type="relative_key"), "'relative_key'")
    refused(config_of("Bert", is_decoder=True, add_cross_attention=True), "add_cross_attention")
    refused(config_of("GPT2", add_cross_attention=True), "add_cross_attention")
    factors = [1.0] * 4
    long = {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 2.0,
        "original_max_position_embeddings": 16,
    }
    refused(config_of("Llama", rope_scaling=long), "longrope")
    partial = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    values = {"rope_scaling": partial} if V5 else {"partial_rotary_factor": 0.5}
    refused(config_of("Llama", **values), "4 of 8 coordinates.*partial_rotary_factor 1")


@pytest.mark.skipif(V5, reason="transformers 5 computes what these settings say")
def test_what_transformers_4_does_not_compute_is_refused():
    refused(config_of("Llama", pretraining_tp=2), "pretraining_tp 2")
    refused(config_of("Qwen2", use_sliding_window=True, sliding_window=3), "sliding window")
    refused(config_of("GPT2", scale_attn_weights=False), "attn_implementation='eager'")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "albert"])
def test_a_projection_that_is_more_than_a_matrix_is_refused(family):
    class LowRank(torch.nn.Linear):
        pass

    model = AVAILABLE[family].make()
    adapter = adapter_for(model.config)
    block = adapter.blocks(model)[0]
    first, _ = adapter.taps(block)
    for owner in model.modules():
        for name, child in list(owner.named_children()):
            if child is first:
                setattr(owner, name, LowRank(2, 2))
    with pytest.raises(ValueError, match="is a LowRank, expected"):
        adapter.read(block)


def architectures(kind):
    """Every model class of a configuration class, by name."""
    for name in dir(transformers):
        if name.startswith(kind) and ("For" in name or name.endswith("Model")):
            cls = getattr(transformers, name)
            config = getattr(cls, "config_class", None)
            if config is getattr(transformers, f"{kind}Config") and "PreTrained" not in name:
                yield cls


@pytest.mark.parametrize("kind", sorted({family.config for family in AVAILABLE.values()}))
def test_blocks_of_every_architecture(kind):
    family = next(f for f in AVAILABLE.values() if f.config == kind)
    config = getattr(transformers, f"{kind}Config")(**family.values)
    found = list(architectures(kind))
    assert len(found) >= 4
    for cls in found:
        with torch.device("meta"):
            model = cls(config)
        adapter = adapter_for(config)
        blocks = adapter.blocks(model)
        assert len(blocks) == (8 if kind == "Albert" else 2), cls
        assert set(adapter.read(blocks[0])) == set(adapter.shape(config, 0).weights())


def test_every_registered_family_is_in_the_battery():
    tested = {getattr(transformers, f"{f.config}Config").model_type for f in AVAILABLE.values()}
    with pytest.raises(ValueError, match="expected one of") as caught:
        adapter_for(SimpleNamespace(model_type=None))
    known = set(str(caught.value).split("expected one of ")[1].split(":")[0].split(", "))
    assert known - tested == (set() if V5 else {"qwen3"})


def test_unknown_and_doubled_families_are_refused():
    with pytest.raises(ValueError, match="'mamba' is not supported; expected one of albert, bert"):
        adapter_for(SimpleNamespace(model_type="mamba"))
    twin = type("Twin", (type(adapter_for(config_of("Bert"))),), {"model_types": ("bert",)})
    with pytest.raises(ValueError, match="'bert' has an adapter already"):
        register(twin)
    assert len(Adapter.__abstractmethods__) <= 8


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "albert"])
def test_writing_what_does_not_fit_is_refused(family):
    model = AVAILABLE[family].make()
    adapter, shape = adapter_for(model.config), shapes_of(model)[0]
    block, before = adapter.blocks(model)[0], outputs(model)
    weights = adapter.read(block)
    with pytest.raises(ValueError, match=r"W_K \(5, 2\), expected \(32, "):
        adapter.write(block, weights | {"W_K": torch.zeros(5, 2)}, shape)
    with pytest.raises(ValueError, match="W_O missing"):
        adapter.write(block, {k: v for k, v in weights.items() if k != "W_O"}, shape)
    for change in (
        {"scale": 1.0},
        {"window": 2},
        {"norm_eps": 1e-6},
        {"rotary": Rotary((0.5,) * 4)},
        {"biases": ("output",)},
        {"width": 31},
    ):
        other = AttentionShape.from_dict(
            shape.to_dict() | {k: v for k, v in change.items() if k != "rotary"}
        )
        if "rotary" in change:
            other = AttentionShape(**(vars(shape) | change))
        sized = {name: torch.zeros(size) for name, size in other.weights().items()}
        with pytest.raises(ValueError, match="the module cannot compute"):
            adapter.write(block, sized, other)
    assert torch.equal(before, outputs(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "albert"])
@pytest.mark.parametrize("sizes", [{}, {"kv_heads": 1}, {"head_dim": 6}])
def test_weights_take_the_dtype_and_the_names_of_the_module(family, sizes):
    model = AVAILABLE[family].make(torch.bfloat16)
    names = set(model.state_dict())
    write_random(model, shapes_of(model, **sizes))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())
    assert set(model.state_dict()) == names
    assert outputs(model).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "albert"])
def test_a_module_on_the_meta_device_takes_the_weights_device(family):
    model = AVAILABLE[family].make()
    adapter, shapes = adapter_for(model.config), shapes_of(model, kv_heads=1, head_dim=6)
    with torch.device("meta"):
        empty = type(model)(model.config)
    write_random(model, shapes)
    for old, new, shape in zip(adapter.blocks(model), adapter.blocks(empty), shapes, strict=True):
        adapter.write(new, adapter.read(old), shape)
        assert all(torch.equal(v, adapter.read(old)[k]) for k, v in adapter.read(new).items())
