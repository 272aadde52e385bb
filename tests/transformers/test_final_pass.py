"""The final pass, checked against whole models of transformers and the folders it ends in."""

import math
from dataclasses import replace

import pytest
import torch

from attnreg.transformers import final_pass
from attnreg.transformers import task as tasks
from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.convert import convert, partial_folder
from attnreg.transformers.final_pass import Refinement
from attnreg.transformers.loading import load
from attnreg.transformers.streaming import Blockwise
from tests.transformers.folders import by_transformers
from tests.transformers.test_convert import (
    QUICK,
    STUDENTS,
    Killed,
    killed_after,
    root,  # noqa: F401
    task_of,
)
from tests.transformers.texts import contents

STEPS = replace(QUICK, final_steps=16)


@torch.no_grad()
def twin(original, student, windows, *, predicts):
    """The loss a token, window by window, in float64."""
    losses = []
    for ids in windows.ids:
        if predicts:
            p, q = (m(torch.tensor([ids])).logits[0].double() for m in (original, student))
            p, q = p.softmax(-1), q.softmax(-1)
            losses.append((p * (p / q).log()).sum(-1))
        else:
            h, s = (
                m.base_model(torch.tensor([ids])).last_hidden_state[0].double()
                for m in (original, student)
            )
            losses.append((s - h).norm(dim=-1) ** 2 / h.norm(dim=-1) ** 2)
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("family", list(STUDENTS))
def test_the_loss_falls_and_is_true_of_the_folder(root, tmp_path, family):  # noqa: F811
    steps = 48 if family == "albert" else 16  # one block in all places gains later
    task = task_of(root, family, replace(STEPS, final_steps=steps))
    fits = convert(task_of(root, family), tmp_path / "fits").report
    report = convert(task, tmp_path / "out").report
    original = by_transformers(root / family, torch.float32)
    before, after = load(tmp_path / "fits"), load(tmp_path / "out")
    record = report["final_pass"]
    for model, name in ((before, "start_loss"), (after, "held_out_loss")):
        expected = twin(original, model, task.held_out, predicts=task.predicts)
        # float32 against float64; a KL is a small difference of logarithms
        assert record[name] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert record["steps"] == steps
    assert record["best_step"] > 0
    assert record["held_out_loss"] < record["start_loss"]
    assert report["layers"] == fits["layers"]
    assert fits["final_pass"] is None
    assert "all layers together" not in (tmp_path / "fits" / "README.md").read_text()
    assert f"all layers together took {steps} steps" in (tmp_path / "out" / "README.md").read_text()

    # The projections have moved, and nothing else.
    first, second = before.state_dict(), after.state_dict()
    assert first.keys() == second.keys()
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    adapter = adapter_for(after.config)
    names = {id(value): name for name, value in after.named_parameters()}
    allowed = {
        names[id(weight)]
        for block in adapter.blocks(after)
        for weight in final_pass.attention_weights(adapter, block)
    }
    assert moved == allowed


def test_the_gradient_is_that_of_the_whole_model(root, tmp_path):  # noqa: F811
    task = task_of(root)
    convert(task, tmp_path / "fits")
    original, student = by_transformers(root / "llama", torch.float32), load(tmp_path / "fits")
    runner = Blockwise(task.checkpoint, [*task.fit.ids, *task.held_out.ids])
    rows = runner.start()
    blocks = {group.block: runner.block(group.block) for group in task.groups}
    for number, name in enumerate(runner.applications):
        rows, *_ = runner.apply(number, blocks[name], rows)
    adapter = task.adapter
    for group, block in zip(task.groups, adapter.blocks(student), strict=True):
        adapter.write(blocks[group.block], adapter.read(block), group.student)
    count = len(task.fit)
    held_out = range(count, count + len(task.held_out))
    refinement = Refinement(
        runner,
        blocks,
        list(blocks),
        rows,
        range(count),
        held_out,
        predicts=True,
        saved=torch.float32,
    )
    batch = [0, 3, 1]
    refinement._losses(batch).mean().backward()
    losses = []
    for window in batch:
        ids = torch.tensor([task.fit.ids[window]])
        p = original(ids).logits[0].detach().log_softmax(-1)
        q = student(ids).logits[0].log_softmax(-1)
        losses.append((p.exp() * (p - q)).sum(-1))
    torch.cat(losses).mean().backward()
    for name, block in zip(blocks, adapter.blocks(student), strict=True):
        pairs = zip(
            final_pass.attention_weights(adapter, blocks[name]),
            final_pass.attention_weights(adapter, block),
            strict=True,
        )
        for ours, theirs in pairs:
            # float32, in another order of sums: windows one by one and padded together
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=2e-6)
        others = set(blocks[name].parameters()) - set(
            final_pass.attention_weights(adapter, blocks[name])
        )
        assert all(weight.grad is None for weight in others)


def test_steps_that_lose_are_not_kept(root, tmp_path, monkeypatch):  # noqa: F811
    convert(task_of(root), tmp_path / "fits")
    monkeypatch.setattr(final_pass, "RATE", -0.1)  # up the gradient
    record = convert(task_of(root, options=STEPS), tmp_path / "out").report["final_pass"]
    assert record["best_step"] == 0
    assert record["held_out_loss"] == record["start_loss"]
    first, second = (load(tmp_path / name).state_dict() for name in ("fits", "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["llama", "albert"])
def test_a_final_pass_goes_on_from_any_check(root, tmp_path, family):  # noqa: F811
    task = task_of(root, family, STEPS)
    (tmp_path / "whole").mkdir()
    convert(task, tmp_path / "whole" / "out")
    (tmp_path / "parts").mkdir()
    out = tmp_path / "parts" / "out"
    fits = sum(group.changed for group in task.groups)
    begun = []

    def observer(where):
        if where.stage == "final pass" and where.iteration:
            begun.append(where.iteration[0])
        killed_after(fits, steps)(where)

    for steps in (1, 3, 9, 16):
        with pytest.raises(Killed):
            convert(task, out, observer=observer)
        assert (partial_folder(out) / "final-state.safetensors").exists() == (steps > 2)
    # A check every second step: a run begins after the last one before the kill.
    assert begun == [1, *range(1, 4), *range(3, 10), *range(9, 17)]
    convert(task, out)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_a_bound_by_time_ends_it(root, tmp_path):  # noqa: F811
    options = replace(QUICK, final_steps=10**6, max_seconds=1.0)
    record = convert(task_of(root, options=options), tmp_path / "out").report["final_pass"]
    assert 0 < record["steps"] < 10**6
    assert math.isfinite(record["held_out_loss"])


def test_a_model_larger_than_memory_is_refused_before_any_work(root, monkeypatch):  # noqa: F811
    pages = {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 10}
    monkeypatch.setattr(tasks.os, "sysconf", pages.__getitem__)
    task_of(root)
    with pytest.raises(ValueError, match=r"this machine has 0\.0 GB; give --final-steps 0"):
        task_of(root, options=STEPS)


@pytest.mark.parametrize(("family", "steps"), [("llama", 400), ("gpt2", 400), ("bert", 0)])
def test_steps_by_default(root, family, steps):  # noqa: F811
    assert task_of(root, family, replace(QUICK, final_steps=None)).final_steps == steps
    assert task_of(root, family, STEPS).final_steps == 16
