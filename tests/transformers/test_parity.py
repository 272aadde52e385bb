"""Every family: what an adapter reads computes what transformers computes, and back."""

import copy

import pytest
import torch

import attnreg
from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.shapes import Sizes
from tests.transformers.families import (
    AVAILABLE,
    STUDENTS,
    exact,
    inputs,
    outputs,
    reference,
    shapes_of,
    tapped,
    write_random,
)

# float32: sums of some tens of products of size 1 to 10; float64: the same, where transformers'
# own float32 steps are exchanged (families.exact)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
families = pytest.mark.parametrize("family", AVAILABLE)


def assert_computes(model, shapes, dtype):
    """The tapped outputs are the reference's, relative to their size."""
    adapter, valid = adapter_for(model.config), inputs()["attention_mask"]
    taps = tapped(model)
    assert len(taps) == len(shapes)
    for block, shape, (x, y) in zip(adapter.blocks(model), shapes, taps, strict=True):
        weights = adapter.read(block)
        assert {name: tuple(value.shape) for name, value in weights.items()} == shape.weights()
        error = (reference(x, weights, shape, valid) - y)[valid.bool()]
        assert error.abs().max() <= TOLERANCE[dtype] * max(1.0, float(y.abs().max()))


@families
@both
def test_what_is_read_computes_the_layer(family, dtype):
    model = AVAILABLE[family].make(dtype)
    if dtype == torch.float64:
        model = exact(model)
    assert_computes(model, shapes_of(model), dtype)


@families
@both
@pytest.mark.parametrize("student", [None, "all"])
def test_our_layer_computes_the_same(family, dtype, student):
    """The package on the tapped inputs, with the shape's model, mask and scale."""
    model = AVAILABLE[family].make(dtype)
    shapes = shapes_of(model, **(STUDENTS[student] if student else {}))
    if student:
        write_random(model, shapes)
    if dtype == torch.float64:
        model = exact(model)
    adapter, lengths = adapter_for(model.config), inputs()["attention_mask"].sum(1).tolist()
    for block, shape, (x, y) in zip(adapter.blocks(model), shapes, tapped(model), strict=True):
        problem = attnreg.AttentionProblem(
            [rows[:n] for rows, n in zip(x, lengths, strict=True)],
            B=[rows[:n] for rows, n in zip(y, lengths, strict=True)],
            mask=shape.mask(),
            scale=shape.scale,
        )
        found = attnreg.predict(shape.model(), adapter.read(block), problem)
        for ours, rows, n in zip(found, y, lengths, strict=True):
            limit = TOLERANCE[dtype] * max(1.0, float(y.abs().max()))
            assert float((torch.as_tensor(ours) - rows[:n]).abs().max()) <= limit


@families
def test_writing_back_changes_no_bit(family):
    model = AVAILABLE[family].make()
    adapter, before = adapter_for(model.config), outputs(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    for block, shape in zip(adapter.blocks(model), shapes_of(model), strict=True):
        weights = adapter.read(block)
        for parameter in adapter.attention(block).parameters():
            if parameter.ndim == 2:
                parameter.data.zero_()
        assert not torch.equal(before, outputs(model))
        adapter.write(block, weights, shape)
    assert torch.equal(before, outputs(model))
    assert parameters == {name: id(p) for name, p in model.named_parameters()}


@families
@pytest.mark.parametrize(
    ("student", "dtype"),
    [(name, torch.float64) for name in STUDENTS] + [("all", torch.float32)],
    ids=[*STUDENTS, "all-f32"],
)
def test_a_student_computes_what_its_shape_says(family, student, dtype):
    model = AVAILABLE[family].make(dtype)
    shapes = shapes_of(model, **STUDENTS[student])
    write_random(model, shapes)
    if dtype == torch.float64:
        model = exact(model)
    assert_computes(model, shapes, dtype)


@families
def test_layers_of_different_sizes_and_back(family):
    """Every layer its own size, twice, then the original's weights again."""
    model = AVAILABLE[family].make()
    adapter, original, before = adapter_for(model.config), shapes_of(model), outputs(model)
    weights = [adapter.read(block) for block in adapter.blocks(model)]
    shared = family == "albert"
    for names in (["head_dim", "all"], ["grouped", "head_dim"]):
        sizes = [STUDENTS[names[0 if shared else i % 2]] for i in range(len(original))]
        shapes = [adapter.shape(model.config, i, Sizes(**s)) for i, s in enumerate(sizes)]
        write_random(model, shapes)
        assert_computes(model, shapes, torch.float32)
        clone = copy.deepcopy(model)
        assert torch.equal(outputs(clone), outputs(model))
    for block, values, shape in zip(adapter.blocks(model), weights, original, strict=True):
        adapter.write(block, values, shape)
    assert torch.equal(before, outputs(model))


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2", "gpt2"])
def test_a_student_with_a_cache_computes_the_same(family):
    """Token by token with transformers' key/value cache, and all at once."""
    model = AVAILABLE[family].make()
    write_random(model, shapes_of(model, heads=6, kv_heads=2, head_dim=4))
    ids, cache, steps = inputs()["input_ids"][:1], None, []
    with torch.no_grad():
        whole = model(ids).logits
        for i in range(ids.shape[1]):
            step = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            steps.append(step.logits)
    # float32, sums in another order
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)
