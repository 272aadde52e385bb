"""Scores of two models against the same scores written out plainly, a window at a time."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional

import attnreg
from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.calibration import Windows, read_tokenizer, read_windows
from attnreg.transformers.capture import capture
from attnreg.transformers.evaluate import Masking, evaluate
from tests.transformers.families import (
    FAMILIES,
    SIZES,
    exact,
    reference,
    shapes_of,
    write_random,
)

BEDS = Path(os.environ.get("ATTNREG_BEDS", Path(__file__).parents[3] / "shared" / "beds"))
MASKING = Masking(token=3, special=(0, 1, 2), seed=5)
LENGTHS = (9, 4, 7, 2, 12)


def windows():
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(4, 50, (n,), generator=generator).tolist() for n in LENGTHS]
    return Windows.of(rows)


def pair(name, **sizes):
    """A model and one with other attention weights of possibly other sizes, in float64."""
    original, converted = (exact(FAMILIES[name].make(torch.float64)) for _ in range(2))
    write_random(converted, shapes_of(converted, **sizes))
    return original, converted


@torch.no_grad()
def singly(model, output, ids):
    return getattr(model(input_ids=torch.tensor([ids])), output)[0]


def hooks(model):
    found = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    return sum(len(a) + len(b) for a, b in found)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2", "bert", "bert-base", "albert"])
def test_a_model_loses_nothing_against_itself(name):
    model = FAMILIES[name].make()
    found = evaluate(model, model, windows(), masking=MASKING)
    assert {error for layer in found.layers for error in (layer.error, *layer.heads)} == {0.0}
    assert len(found.layers) == len(shapes_of(model))
    assert found.original.parameters == found.converted.parameters
    assert found.converted.tokens_per_second > 0
    if found.kind != "encoder":
        assert (found.excess, found.kl, found.agreement) == (0.0, 0.0, 1.0)
    if found.kind != "causal":
        assert found.cosine_min == pytest.approx(1.0, abs=1e-12)
    assert hooks(model) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bert-base", "albert", "roberta"])
def test_batches_do_not_matter(name):
    original, converted = pair(name, kv_heads=1)
    alone, together = (
        evaluate(original, converted, windows(), batch=size, masking=MASKING).to_dict()
        for size in (1, 3)
    )
    for found in (alone, together):
        for side in ("original", "converted"):
            del found[side]["tokens_per_second"]
    # float64; sums over up to 50 logits and 34 tokens in another order
    flat = [torch.tensor(_numbers(found), dtype=torch.float64) for found in (alone, together)]
    torch.testing.assert_close(*flat, rtol=1e-9, atol=1e-12)


def _numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-decoder"])
def test_causal_scores(name):
    original, converted = pair(name, kv_heads=1)
    p, q, following = [], [], []
    for ids in windows().ids:
        p.append(singly(original, "logits", ids)[:-1].log_softmax(-1))
        q.append(singly(converted, "logits", ids)[:-1].log_softmax(-1))
        following += ids[1:]
    p, q, following = torch.cat(p), torch.cat(q), torch.tensor(following)
    nats = [functional.nll_loss(log, following).item() for log in (p, q)]
    kl = functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    found = evaluate(original, converted, windows(), batch=2)
    assert (found.kind, found.predicted) == ("causal", sum(LENGTHS) - len(LENGTHS))
    close = {"rel": 1e-6, "abs": 1e-7}  # transformers 4 rounds Llama's logits to float32
    assert found.kl == pytest.approx(kl, **close)
    assert kl > 0.01
    assert found.excess == pytest.approx(nats[1] - nats[0], **close)
    assert [found.original.nats, found.converted.nats] == pytest.approx(nats, **close)
    assert found.converted.perplexity == pytest.approx(2.718281828459045 ** nats[1], **close)
    assert found.agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()


@pytest.mark.parametrize("sizes", [{"kv_heads": 1}, {"heads": 2, "kv_heads": 1}, {"head_dim": 6}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "albert"])
def test_errors_of_layers_and_heads(name, sizes):
    original, converted = pair(name, **sizes)
    found = evaluate(original, converted, windows(), batch=2, masking=MASKING)
    with torch.no_grad(), capture(original) as captured:
        for ids in windows().ids:
            original(input_ids=torch.tensor([ids]))
    models = (original, converted)
    shapes = list(zip(shapes_of(original), shapes_of(converted, **sizes), strict=True))
    adapter = adapter_for(original.config)
    blocks = adapter.blocks(original)
    for layer, both in zip(found.layers, shapes, strict=True):
        weights = [adapter.read(adapter.blocks(model)[layer.layer]) for model in models]
        # the recording of a block that is applied several times holds all applications in turn
        shared = [i for i, block in enumerate(blocks) if block is blocks[layer.layer]]
        pairs = list(captured.pairs(layer.layer))[shared.index(layer.layer) :: len(shared)]
        inputs = [x for x, _ in pairs]
        assert layer.error == pytest.approx(_error(inputs, weights, both), rel=1e-6)
        if both[0].heads != both[1].heads:
            assert layer.heads is None
            continue
        for head, error in enumerate(layer.heads):
            alone = [_head(w, shape, head) for w, shape in zip(weights, both, strict=True)]
            # the angles of a rotary embedding are float32 in the frequencies
            assert error == pytest.approx(_error(inputs, alone, both), rel=1e-6)


def _error(inputs, weights, shapes):
    rows = []
    for w, shape in zip(weights, shapes, strict=True):
        valid = [torch.ones(1, len(x)) for x in inputs]
        rows.append(
            torch.cat(
                [reference(x[None], w, shape, v)[0] for x, v in zip(inputs, valid, strict=True)]
            )
        )
    return ((rows[1] - rows[0]).norm() / (rows[0] - rows[0].mean(0)).norm()).item()


def _head(weights, shape, head):
    """The weights with the output of one head alone."""
    keep = torch.zeros_like(weights["W_O"])
    keep[head * shape.head_dim : (head + 1) * shape.head_dim] = 1
    return {k: v for k, v in weights.items() if k != "b_O"} | {"W_O": weights["W_O"] * keep}


def test_masked_scores():
    original, converted = pair("bert", kv_heads=2)
    right, total, cosines = [0, 0], 0, []
    for number, ids in enumerate(windows().ids):
        places = MASKING.chosen(number, ids)
        covered = [3 if i in places else token for i, token in enumerate(ids)]
        for i, model in enumerate((original, converted)):
            first = singly(model, "logits", covered).argmax(-1)
            right[i] += sum(first[place].item() == ids[place] for place in places)
        total += len(places)
        cosines.append(_cosine(original.base_model, converted.base_model, ids))
    found = evaluate(original, converted, windows(), batch=2, masking=MASKING)
    assert (found.kind, found.predicted, found.original.perplexity) == ("masked", total, None)
    assert found.original.masked_accuracy == right[0] / total
    assert found.converted.masked_accuracy == right[1] / total
    assert found.cosine_min == pytest.approx(min(cosines), rel=1e-9)
    assert found.original.kv_cache_bytes is None


def _cosine(original, converted, ids):
    both = [singly(model, "last_hidden_state", ids).mean(0) for model in (original, converted)]
    return functional.cosine_similarity(*both, dim=0).item()


def test_encoder_scores():
    original, converted = pair("bert-base", head_dim=6)
    cosines = [_cosine(original, converted, ids) for ids in windows().ids]
    found = evaluate(original, converted, windows(), batch=2)
    assert (found.kind, found.predicted, found.kl) == ("encoder", 0, None)
    assert found.cosine_mean == pytest.approx(sum(cosines) / len(cosines), rel=1e-9)
    assert found.cosine_min == pytest.approx(min(cosines), rel=1e-9)
    assert min(cosines) < 0.999


def test_masks_are_drawn_from_seed_and_number_and_spare_special_tokens():
    ids = (1, *range(4, 24), 2)
    places = MASKING.chosen(7, ids)
    assert len(places) == 3  # 15 % of 20
    assert not {0, 21} & set(places)
    assert places == MASKING.chosen(7, ids)
    assert len({tuple(MASKING.chosen(n, ids)) for n in range(20)}) > 10
    assert len({tuple(replace(MASKING, seed=n).chosen(7, ids)) for n in range(20)}) > 10


def test_cost():
    original, converted = pair("llama", kv_heads=1)
    found = evaluate(original, converted, windows())
    # two layers; keys and values of two heads of 8 numbers of 8 bytes
    assert found.original.kv_cache_bytes == 2 * 2 * 2 * 8 * 8
    assert found.converted.kv_cache_bytes == found.original.kv_cache_bytes // 2
    # one head of 8 x 32 numbers less in W_K and in W_V
    assert found.original.parameters - found.converted.parameters == 2 * 2 * 8 * 32


def test_refusals():
    llama, bert = FAMILIES["llama"].make(), FAMILIES["bert"].make()
    with pytest.raises(ValueError, match="kind of the original is causal, of the converted"):
        evaluate(llama, bert, windows())
    with pytest.raises(ValueError, match="no mask token is known"):
        evaluate(bert, bert, windows())
    with pytest.raises(ValueError, match="hold id 50, the models have 50 embeddings"):
        evaluate(llama, llama, Windows.of([[3, 50]]))
    with pytest.raises(ValueError, match="there is no window"):
        evaluate(llama, llama, Windows.of([]))
    with pytest.raises(ValueError, match="the batch size is 0"):
        evaluate(llama, llama, windows(), batch=0)
    other = FAMILIES["llama"].make().train()
    with pytest.raises(ValueError, match="the converted model is in training mode"):
        evaluate(llama, other, windows())
    shallow = replace(FAMILIES["llama"], values=SIZES | {"num_hidden_layers": 1}).make()
    with pytest.raises(ValueError, match="number of layers of the original is 2, of the converted"):
        evaluate(llama, shallow, windows())


def test_no_hook_is_left_and_numbers_that_are_not_finite_are_refused():
    original, converted = pair("llama")
    with torch.no_grad():
        converted.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the converted model's logits give a loss of nan"):
        evaluate(original, converted, windows())
    converted.model.layers[1].mlp = None  # fails in the middle of a call
    with pytest.raises(TypeError):
        evaluate(original, converted, windows())
    assert hooks(original) == hooks(converted) == 0


def test_a_model_for_pretraining_is_a_masked_one():
    model = replace(FAMILIES["bert"], head="ForPreTraining").make()
    found = evaluate(model, model, windows(), masking=MASKING)
    ids = windows().ids[0]
    places = MASKING.chosen(0, ids)
    one = Windows.of([ids])
    covered = [3 if i in places else token for i, token in enumerate(ids)]
    logs = singly(model, "prediction_logits", covered).double().log_softmax(-1)
    nats = -sum(logs[place, ids[place]].item() for place in places) / len(places)
    assert found.kind == "masked"
    # float32 logits
    assert evaluate(model, model, one, masking=MASKING).original.nats == pytest.approx(nats, 1e-5)


def test_scores_in_bfloat16():
    original = FAMILIES["llama"].make()
    halved = FAMILIES["llama"].make(torch.bfloat16)
    found = evaluate(original, halved, windows())
    assert found.converted.kv_cache_bytes * 2 == found.original.kv_cache_bytes
    # bfloat16 rounds to 2^-8: errors of that order, not zero and not of order one
    assert 1e-4 < max(layer.error for layer in found.layers) < 0.05


def test_progress_is_told():
    model = FAMILIES["gpt2"].make()
    seen = []
    evaluate(model, model, windows(), batch=2, observer=lambda *where: seen.append(where))
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.skipif(not (BEDS / "stories260k").is_dir(), reason="needs stories260k in ATTNREG_BEDS")
def test_perplexity_of_the_bed():
    folder = BEDS / "stories260k"
    transformers.utils.logging.disable_progress_bar()
    model = attnreg.load(folder)
    text = read_windows(
        folder / "evaluation.txt", read_tokenizer(folder), length=512, first_only=True
    )
    found = evaluate(model, model, text)
    assert found.predicted == 13177  # both numbers from the bed's README
    assert found.original.perplexity == pytest.approx(3.468, abs=1e-3)
