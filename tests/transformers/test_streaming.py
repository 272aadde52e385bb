"""A model run block by block computes what it computes as a whole."""

import pytest
import torch

from attnreg.transformers import streaming
from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.checkpoint import Checkpoint
from attnreg.transformers.streaming import Blockwise
from tests.transformers.folders import BUILDERS, by_transformers, save

IDS = [[5, 9, 11, 3, 7, 20, 33], [4, 8], [21, 22, 23, 24, 25], [30, 31, 32, 33, 34, 35, 36]]
ROUNDING = {"rtol": 1e-5, "atol": 2e-5}  # float32, other batches


@pytest.fixture(scope="module", params=list(BUILDERS))
def family(request, tmp_path_factory):
    folder = save(request.param, tmp_path_factory.mktemp("model"))
    return folder, by_transformers(folder, torch.float32)


@torch.no_grad()
def whole(model, ids):
    """The model on one window: its output, and input and output of every attention."""
    adapter = adapter_for(model.config)
    given, found, hooks = [], [], []
    for block in {id(block): block for block in adapter.blocks(model)}.values():
        first, last = adapter.taps(block)
        hooks.append(first.register_forward_pre_hook(lambda _, args: given.append(args[0][0])))
        hooks.append(last.register_forward_hook(lambda _, args, out: found.append(out[0])))
    output = model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return output, given, found


@pytest.mark.parametrize("limit", [8192, 10])
def test_every_attention_and_the_end_are_those_of_the_whole_model(family, limit, monkeypatch):
    folder, model = family
    monkeypatch.setattr(streaming, "BATCH_TOKENS", limit)  # 10: batches of one or two windows
    runner = Blockwise(Checkpoint.open(folder), IDS)
    expected = [whole(model, ids) for ids in IDS]
    rows = runner.start()
    for number, name in enumerate(runner.applications):
        block = runner.block(name)
        alone = runner.attention_input(number, block, rows)
        rows, given, found = runner.apply(number, block, rows, attention=True)
        assert torch.equal(alone, given)
        for part, ours in ((1, given), (2, found)):
            theirs = torch.cat([one[part][number] for one in expected])
            torch.testing.assert_close(ours, theirs, **ROUNDING)
    windows = [2, 0]
    if hasattr(expected[0][0], "last_hidden_state"):
        theirs = [expected[i][0].last_hidden_state[0].double().mean(0) for i in windows]
        torch.testing.assert_close(runner.pooled(rows, windows), torch.stack(theirs), **ROUNDING)
    else:
        logits = [expected[i][0].logits[0, :-1].double() for i in windows]
        losses = [
            -one.log_softmax(-1)[torch.arange(len(one)), torch.tensor(IDS[i][1:])]
            for one, i in zip(logits, windows, strict=True)
        ]
        torch.testing.assert_close(runner.losses(rows, windows), torch.cat(losses), **ROUNDING)


def test_one_block_is_in_memory_at_a_time(tmp_path):
    checkpoint = Checkpoint.open(save("llama", tmp_path))
    runner = Blockwise(checkpoint, IDS)
    held = {name for name, _ in runner._model.named_parameters()}
    assert held
    assert not any(name.startswith(runner.applications) for name in held)
    assert all(p.is_meta for t in runner._templates.values() for p in t.parameters())
    block = runner.block(runner.applications[1])
    assert not any(p.is_meta for p in block.parameters())
    assert all(p.is_meta for t in runner._templates.values() for p in t.parameters())


def test_hidden_states_on_disk_are_the_same_and_leave_nothing(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(save("gpt2", tmp_path / "model"))
    spill = tmp_path / "spill"
    spill.mkdir()
    ends = []
    for folder in (None, spill):
        monkeypatch.setattr(streaming, "MAPPED_BYTES", 1)
        runner = Blockwise(checkpoint, IDS, spill=folder)
        rows = runner.start()
        for number, name in enumerate(runner.applications):
            rows, *_ = runner.apply(number, runner.block(name), rows)
        ends.append(rows)
    assert torch.equal(*ends)
    assert not list(spill.iterdir())


def test_hooks_do_not_survive_an_exception(tmp_path):
    runner = Blockwise(Checkpoint.open(save("llama", tmp_path)), IDS)
    rows = runner.start()
    block = runner.block(runner.applications[0])
    first, last = runner.adapter.taps(block)
    with pytest.raises(RuntimeError):
        runner.apply(0, block, rows[:, :3], attention=True)
    assert not first._forward_pre_hooks
    assert not last._forward_hooks
