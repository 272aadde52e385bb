"""Recorded layers against plain hooks on the same model, and as problems."""

import itertools

import pytest
import torch

from attnreg import predict
from attnreg.storage import read_tensors
from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.capture import capture
from tests.transformers.families import FAMILIES, inputs, tapped

LENGTHS = [9, 9, 6]
SOME = ["llama", "mistral-window", "gpt2", "bert", "albert"]


def run(model, **changes):
    with torch.no_grad():
        return model(**(inputs() | changes))


def hooks(model):
    """Every hook that is on the model or a part of it."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    return [key for part in model.modules() for name in names for key in getattr(part, name)]


def assert_same(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for pair, other in zip(found, expected, strict=True):
        for a, b in zip(pair, other, strict=True):
            assert torch.equal(a, b)


def twin(model):
    """Plain hooks: for each application the rows of every sequence that are tokens."""
    found = []
    for x, y in tapped(model):
        found.append([(x[i, :n], y[i, :n]) for i, n in enumerate(LENGTHS)])
    return found


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt2", "bert"])
def test_values_are_those_of_plain_hooks(family):
    model = FAMILIES[family].make()
    with capture(model) as captured:
        run(model)
    assert captured.layers == (0, 1)
    for layer, expected in enumerate(twin(model)):
        assert_same(captured.pairs(layer), expected)
    assert hooks(model) == []


def test_albert_is_one_recording_for_each_module():
    """Two groups of two inner layers over four blocks: eight applications of four modules."""
    model = FAMILIES["albert"].make()
    blocks = adapter_for(model.config).blocks(model)
    expected = twin(model)
    assert len(expected) == len(blocks) == 8
    with capture(model) as captured:
        run(model)
    assert captured.layers == tuple(range(8))
    for layer, block in enumerate(blocks):
        joint = [pairs for other, pairs in zip(blocks, expected, strict=True) if other is block]
        assert len(joint) == 2
        assert_same(captured.pairs(layer), itertools.chain(*joint))
    with capture(model, [0]) as captured:
        run(model)
    assert captured.layers == tuple(i for i, block in enumerate(blocks) if block is blocks[0])
    assert len(captured.layers) == 2


@pytest.mark.parametrize("family", SOME)
def test_problem_and_weights_predict_the_outputs(family):
    """Float32 sums of some tens of products of size 1 to 10, relative to the outputs' size."""
    model = FAMILIES[family].make()
    adapter = adapter_for(model.config)
    with capture(model) as captured:
        run(model)
    for layer, block in enumerate(adapter.blocks(model)):
        shape = adapter.shape(model.config, layer)
        problem = captured.problem(layer, dtype=torch.float64)
        weights = {name: value.double() for name, value in adapter.read(block).items()}
        found = predict(shape.model(), weights, problem)
        for y, (_, expected) in zip(found, captured.pairs(layer), strict=True):
            assert (y - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_mask_of_the_problem():
    """A window that covers the longest sequence hides nothing, and is then left out."""
    model = FAMILIES["mistral-window"].make()
    ids = torch.randint(1, 50, (2, 4), generator=torch.Generator().manual_seed(2))
    for tokens, window in ((4, 3), (3, None), (2, None)):
        with capture(model, [1]) as captured, torch.no_grad():
            model(input_ids=ids[:, :tokens])
        problem = captured.problem(1)
        assert problem.causal
        assert problem.window == window
    model = FAMILIES["bert"].make()
    with capture(model, [1]) as captured:
        run(model)
    problem = captured.problem(1, ridge=0.5)
    assert not problem.causal
    assert problem.dtype == torch.float32
    assert (problem.ridge_x, problem.ridge_y) == (0.5, 0.5)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_ignored(family, side):
    """Beside padding, a sequence is what the model sees alone, but for rounding in float32.

    BERT counts padding on the left as positions, so that there it is given those of the tokens.
    """
    changes = {}
    if (family, side) == ("bert", "left"):
        changes["position_ids"] = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4, 5]])
    model = FAMILIES[family].make()
    ids = inputs()["input_ids"][2:, :6]
    zeros = torch.zeros(1, 3, dtype=torch.int64)
    with capture(model) as alone, torch.no_grad():
        model(input_ids=ids)
    parts = (ids, zeros) if side == "right" else (zeros, ids)
    mask = torch.cat([(part > 0).long() for part in parts], 1)
    with capture(model) as padded:
        run(model, input_ids=torch.cat(parts, 1), attention_mask=mask, **changes)
    for layer in (0, 1):
        (x, y), (x2, y2) = *alone.pairs(layer), *padded.pairs(layer)
        assert len(x2) == len(y2) == 6
        assert torch.allclose(x, x2, rtol=0, atol=1e-5 * float(x.abs().max()))
        assert torch.allclose(y, y2, rtol=0, atol=1e-5 * float(y.abs().max()))


def test_half_precision_is_kept_in_float32():
    model = FAMILIES["llama"].make(torch.bfloat16)
    with capture(model, [1]) as captured:
        run(model)
    x, y = tapped(model)[1]
    first = next(captured.pairs(1))
    assert first[0].dtype == first[1].dtype == torch.float32
    assert_same([first], [(x[0].float(), y[0].float())])


# ---------------------------------------------------------------------- contexts


def test_contexts_nest():
    model = FAMILIES["gpt2"].make()
    once = twin(model)
    with capture(model) as outer:
        run(model)
        with capture(model, [1]) as inner:
            run(model)
        run(model)
    assert inner.layers == (1,)
    assert_same(inner.pairs(1), once[1])
    for layer in (0, 1):
        assert_same(outer.pairs(layer), once[layer] * 3)
    assert hooks(model) == []


def test_a_call_that_raises_keeps_nothing_half():
    """The second block raises after the first was recorded; the call before it stays."""
    model = FAMILIES["llama"].make()
    once = twin(model)
    second = adapter_for(model.config).blocks(model)[1]
    recordings, handles = [], []

    def run_and_break():
        with capture(model) as captured:
            recordings.append(captured)
            run(model)
            handles.append(second.register_forward_pre_hook(fail))
            run(model)

    with pytest.raises(RuntimeError, match="broken"):
        run_and_break()
    handles[0].remove()
    assert hooks(model) == []
    (captured,) = recordings
    for layer in (0, 1):
        assert_same(captured.pairs(layer), once[layer])


def fail(module, args):
    raise RuntimeError("broken")


def test_recording_goes_on_after_a_call_that_raised():
    model = FAMILIES["llama"].make()
    once = twin(model)
    block = adapter_for(model.config).blocks(model)[0]
    with capture(model) as captured:
        handle = adapter_for(model.config).blocks(model)[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken"):
            run(model)
        handle.remove()
        first, _ = adapter_for(model.config).taps(block)
        with pytest.raises(ValueError, match="a part of LlamaForCausalLM was run alone"):
            first(torch.zeros(1, 2, 32))
        run(model)
    for layer in (0, 1):
        assert_same(captured.pairs(layer), once[layer])


def test_an_exception_of_the_user_leaves_no_hook(tmp_path):
    model = FAMILIES["bert"].make()
    recordings = []

    def run_and_raise():
        with capture(model, shards=tmp_path) as captured:
            recordings.append(captured)
            run(model)
            raise KeyError

    with pytest.raises(KeyError):
        run_and_raise()
    assert hooks(model) == []
    assert_same(recordings[0].pairs(0), twin(model)[0])


# ---------------------------------------------------------------------- shards


@pytest.mark.parametrize(("limit", "files"), [(1, 3), (10**9, 1)], ids=["each call", "at the end"])
def test_shards_equal_memory(tmp_path, limit, files):
    model = FAMILIES["llama"].make()
    folder = tmp_path / "new" / "shards"
    with (
        capture(model) as memory,
        capture(model, shards=folder, max_buffered_bytes=limit) as captured,
    ):
        for i in range(3):
            run(model, input_ids=inputs()["input_ids"].roll(i, 1))
    assert captured.shards == folder
    assert len(list(folder.iterdir())) == 2 * files
    for layer in (0, 1):
        assert len(list(folder.glob(f"layer-{layer:03d}-*.safetensors"))) == files
        assert_same(captured.pairs(layer), memory.pairs(layer))
        assert captured.problem(layer).digest() == memory.problem(layer).digest()
    _, metadata = read_tensors(min(folder.iterdir()))
    assert (metadata["kind"], metadata["layer"], metadata["part"]) == ("capture", 0, 0)


def test_damaged_shard_and_filled_folder(tmp_path):
    model = FAMILIES["llama"].make()
    with capture(model, shards=tmp_path) as captured:
        run(model)
    file = min(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"layer-000-00000\.safetensors is not a complete"):
        captured.problem(0)
    with (
        pytest.raises(ValueError, match="is not an empty folder; give the shards a new one"),
        capture(model, shards=tmp_path),
    ):
        pass
    assert hooks(model) == []


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2], "layer 2 does not exist; expected numbers from 0 to 1"),
        ([0, -1], "layer -1 does not exist"),
        ([True], "layer True does not exist"),
        ([], "layers is empty"),
    ],
)
def test_wrong_layers(layers, message):
    model = FAMILIES["llama"].make()
    with pytest.raises(ValueError, match=message), capture(model, layers):
        pass


def test_layers_without_a_recording():
    model = FAMILIES["llama"].make()
    with capture(model, [1]) as captured:
        pass
    with pytest.raises(ValueError, match="layer 1 has recorded nothing: run the model"):
        captured.problem(1)
    with pytest.raises(ValueError, match="layer 0 was not recorded; expected one of 1"):
        captured.problem(0)


IDS = torch.ones(1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "has a gap in sequence 0"),
        ({"attention_mask": torch.zeros(1, 4)}, "has no token in sequence 0"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"attention_mask is \(1, 1, 4, 4\)"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, "sequence 0 are not consecutive"),
    ],
    ids=["gap", "empty", "4d", "packed"],
)
def test_calls_that_cannot_be_recorded(given, message):
    model = FAMILIES["llama"].make()
    with capture(model) as captured:
        with pytest.raises(ValueError, match=message):
            model(input_ids=IDS, **given)
        with pytest.raises(ValueError, match="recorded nothing"):
            captured.problem(0)


def test_cache_and_training_are_refused():
    model = FAMILIES["llama"].make()
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    older = tuple((torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8)) for _ in range(2))
    for past in (cache, older):
        with (
            capture(model),
            pytest.raises(ValueError, match="a key/value cache of 4 positions"),
        ):
            model(input_ids=IDS[:, :1], past_key_values=past)
    with (
        capture(model.train()),
        pytest.raises(ValueError, match=r"training mode \(dropout\); call model\.eval\(\)"),
    ):
        model(input_ids=IDS)
