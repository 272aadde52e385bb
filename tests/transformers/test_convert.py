"""A conversion end to end on tiny random models, checked against the models before and after."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.convert import convert, partial_folder
from attnreg.transformers.loading import load
from attnreg.transformers.plan import Plan, Setting
from attnreg.transformers.task import Options, prepare
from tests.transformers.folders import by_transformers
from tests.transformers.texts import contents, model_folder, write_text

QUICK = Options(window=16, max_iterations=2, held_out=0.2, final_steps=0)
STUDENTS = {  # GPT-2, BERT and ALBERT have no key/value heads of their own
    "llama": Setting(kv_heads=1),
    "gpt2": Setting(kv_heads=2),
    "bert": Setting(heads=2, kv_heads=2),
    "albert": Setting(kv_heads=2),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Models of every family and a text."""
    folder = tmp_path_factory.mktemp("root")
    for family in STUDENTS:
        model_folder(family, folder / family)
    write_text(folder / "text.txt")
    return folder


def task_of(root, family="llama", options=QUICK, plan=None):
    plan = Plan(STUDENTS[family]) if plan is None else plan
    return prepare(root / family, plan, root / "text.txt", options)


@torch.no_grad()
def states(model, windows):
    """For each application of a block: input of block and attention, output of attention; rows."""
    adapter = adapter_for(model.config)
    seen = [[], [], []]
    hooks = []
    for block in {id(block): block for block in adapter.blocks(model)}.values():
        first, last = adapter.taps(block)
        hooks.append(block.register_forward_pre_hook(lambda _, a: seen[0].append(a[0][0])))
        hooks.append(first.register_forward_pre_hook(lambda _, a: seen[1].append(a[0][0])))
        hooks.append(last.register_forward_hook(lambda _, a, out: seen[2].append(out[0])))
    parts = []
    for ids in windows.ids:
        for kind in seen:
            kind.clear()
        model(torch.tensor([ids]))
        parts.append([list(kind) for kind in seen])
    for hook in hooks:
        hook.remove()
    count = len(parts[0][0])
    return [
        [torch.cat([part[kind][i] for part in parts]).double() for kind in range(3)]
        for i in range(count)
    ]


@pytest.mark.parametrize("family", list(STUDENTS))
def test_the_report_is_true_of_the_folder(root, tmp_path, family):
    task = task_of(root, family)
    conversion = convert(task, tmp_path / "out")
    report = conversion.report
    assert not partial_folder(tmp_path / "out").exists()
    student = load(tmp_path / "out")
    original = by_transformers(root / family, torch.float32)
    expressible = family == "llama"
    assert report["loads_with"] == ("transformers" if expressible else "attnreg.load")
    assert (tmp_path / "out" / "attnreg.json").exists() != expressible

    # Errors: the student's attention on its own inputs against the original's on its own, plus
    # what the student's hidden states lack.
    before, after = states(original, task.held_out), states(student, task.held_out)
    for layer in report["layers"]:
        if len(layer["layers"]) > 1:
            continue  # ALBERT's fit is on the original's inputs: see below
        (number,) = layer["layers"]
        drift = before[number][0] - after[number][0]
        target, output = before[number][2] + drift, after[number][2]
        error = (output - target).norm() / (target - target.mean(0)).norm()
        assert layer["held_out_error"] == pytest.approx(float(error), rel=1e-4)
        assert layer["held_out_error"] <= min(layer["start_error"], *layer["path"].values())

    # Parameters, and the scores that stand in the card.
    assert report["after"]["parameters"] == sum(p.numel() for p in student.parameters())
    assert report["before"]["parameters"] == sum(p.numel() for p in original.parameters())
    if task.predicts:
        for model, side in ((original, "before"), (student, "after")):
            found = report[side]["nats_per_token"]
            assert found == pytest.approx(nats(model, task.held_out), abs=1e-5)
        assert conversion.excess == pytest.approx(
            report["after"]["nats_per_token"] - report["before"]["nats_per_token"]
        )
    else:
        assert conversion.excess is None
        first, second = pooled(original, task.held_out), pooled(student, task.held_out)
        expected = float(torch.cosine_similarity(first, second).mean())
        assert conversion.cosine == pytest.approx(expected, abs=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    for layer in report["layers"]:
        ridge = f"{layer['ridge']:g}" + (f" to {layer['center']}" if layer["ridge"] else "")
        assert f"| {layer['start']} | {ridge} | {layer['step']:g} |" in card
    assert task.fit.digest in card
    assert report["model_digest"] in card
    assert ("attnreg.load" in card) != expressible


@torch.no_grad()
def nats(model, windows):
    losses = []
    for ids in windows.ids:
        scores = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        losses.append(-scores[torch.arange(len(ids) - 1), torch.tensor(ids[1:])])
    return float(torch.cat(losses).mean())


@torch.no_grad()
def pooled(model, windows):
    base = model.base_model
    return torch.stack(
        [base(torch.tensor([i])).last_hidden_state[0].double().mean(0) for i in windows.ids]
    )


def test_a_block_applied_many_times_is_one_fit_on_the_originals_inputs(root, tmp_path):
    task = task_of(root, "albert")
    (layer,) = convert(task, tmp_path / "out").report["layers"]
    assert layer["layers"] == [0, 1, 2]
    original = by_transformers(root / "albert", torch.float32)
    student = load(tmp_path / "out")
    before = states(original, task.held_out)
    adapter = adapter_for(student.config)
    block = adapter.blocks(student)[0]
    _, last = adapter.taps(block)
    outputs = []
    last.register_forward_hook(lambda _, a, out: outputs.append(out[0]))
    with torch.no_grad():
        for _, given, _ in before:  # what the block is given is what its attention is given
            for rows in given.float().split([len(ids) for ids in task.held_out.ids]):
                block(rows[None])
    target = torch.cat([one[2] for one in before])
    error = (torch.cat(outputs).double() - target).norm() / (target - target.mean(0)).norm()
    assert layer["held_out_error"] == pytest.approx(float(error), rel=1e-4)


PLAIN = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "attnreg":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = AutoTokenizer.from_pretrained(sys.argv[1])("w5 w9 w11 w3", return_tensors="pt")["input_ids"]
torch.save(model(ids).logits.detach(), sys.argv[2])
"""


def test_plain_transformers_loads_a_llama(root, tmp_path):
    convert(task_of(root), tmp_path / "out")
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "out"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with torch.no_grad():
        expected = load(tmp_path / "out")(torch.tensor([[5, 9, 11, 3]])).logits
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_same_task_gives_the_same_bytes(root, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        convert(task_of(root), tmp_path / name / "out")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    text = b"".join(contents(tmp_path / "a").values())
    assert str(tmp_path).encode() not in text  # no paths of this machine


class Killed(BaseException):
    pass


def killed_after(fits, iterations=None):
    """An observer that ends a conversion after so many fits (and iterations of the next)."""

    def observer(where):
        if where.done >= fits and (
            iterations is None or (where.iteration and where.iteration[0] >= iterations)
        ):
            raise Killed

    return observer


@pytest.mark.parametrize("family", ["llama", "albert"])
def test_a_conversion_goes_on_from_any_fit(root, tmp_path, family):
    (tmp_path / "whole").mkdir()
    convert(task_of(root, family), tmp_path / "whole" / "out")
    (tmp_path / "parts").mkdir()
    out = tmp_path / "parts" / "out"
    total = sum(group.changed for group in task_of(root, family).groups)
    seen = []
    for fits in range(total):
        with pytest.raises(Killed):
            convert(task_of(root, family), out, observer=killed_after(fits, 1))
        assert not out.exists()
        seen.append(len(list(partial_folder(out).glob("*.safetensors"))))
    assert seen == list(range(total))  # each run began where the one before was killed
    convert(task_of(root, family), out)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


@pytest.mark.parametrize("piece", ["layer1", "final-state"])
def test_a_damaged_piece_is_done_again_and_said(root, tmp_path, piece):
    options = replace(QUICK, final_steps=8)
    (tmp_path / "whole").mkdir()
    convert(task_of(root, options=options), tmp_path / "whole" / "out")
    (tmp_path / "parts").mkdir()
    out = tmp_path / "parts" / "out"
    with pytest.raises(Killed):
        convert(task_of(root, options=options), out, observer=killed_after(3, 5))
    path = partial_folder(out) / f"{piece}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    conversion = convert(task_of(root, options=options), out)
    assert conversion.notes == (
        f"{piece}.safetensors of the journal is damaged: this piece is done again",
    )
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_other_settings_on_an_unfinished_conversion(root, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        convert(task_of(root), out, observer=killed_after(1))
    other = task_of(root, options=replace(QUICK, seed=1))
    with pytest.raises(ValueError, match=r"another options: .*--restart"):
        convert(other, out)
    assert convert(other, out, restart=True).report["options"]["seed"] == 1


def test_a_finished_conversion_is_not_done_again(root, tmp_path):
    out = tmp_path / "out"
    first = convert(task_of(root), out)
    before = contents(out)
    calls = []
    second = convert(task_of(root), out, observer=calls.append)
    assert calls == []
    assert second.report == json.loads(json.dumps(first.report))
    assert contents(out) == before
    assert not partial_folder(out).exists()
    with pytest.raises(ValueError, match="is there already and not from this conversion"):
        convert(task_of(root, options=replace(QUICK, seed=1)), out)
    assert contents(out) == before
    assert not partial_folder(out).exists()


def test_chosen_layers_and_a_plan_by_layer(root, tmp_path):
    plan = Plan(Setting(kv_heads=1), only=frozenset({1}))
    task = task_of(root, plan=plan)
    report = convert(task, tmp_path / "out").report
    assert report["loads_with"] == "attnreg.load"  # layers of different sizes
    assert [layer["layers"] for layer in report["layers"]] == [[1]]
    original = by_transformers(root / "llama", torch.float32).state_dict()
    student = load(tmp_path / "out").state_dict()
    assert original.keys() == student.keys()
    changed = {name for name in original if not torch.equal(original[name], student[name])}
    assert {name.rpartition("layers.1.self_attn.")[0] for name in changed} == {"model."}
    assert student["model.layers.1.self_attn.k_proj.weight"].shape == (8, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_shards_stay(tmp_path, dtype):
    source = model_folder("llama", tmp_path / "model", dtype, shard="10KB")
    text = write_text(tmp_path / "text.txt")
    task = prepare(source, Plan(Setting(kv_heads=1)), text, QUICK)
    report = convert(task, tmp_path / "out").report
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    student = load(tmp_path / "out")
    assert {p.dtype for p in student.parameters()} == {dtype}
    # The scores are those of the weights as they were rounded to be saved.
    exact = load(tmp_path / "out", dtype=torch.float32)
    assert report["after"]["nats_per_token"] == pytest.approx(nats(exact, task.held_out), abs=1e-5)


def test_another_dtype(root, tmp_path):
    task = task_of(root, options=replace(QUICK, dtype="bfloat16"))
    report = convert(task, tmp_path / "out").report
    assert {p.dtype for p in load(tmp_path / "out").parameters()} == {torch.bfloat16}
    cache = report["before"]["kv_bytes_per_token"], report["after"]["kv_bytes_per_token"]
    assert cache == (3 * 2 * 2 * 8 * 4, 3 * 2 * 1 * 8 * 2)


def test_an_original_with_a_readme_keeps_it(root, tmp_path):
    source = model_folder("llama", tmp_path / "model")
    (source / "README.md").write_text("about the original")
    task = prepare(source, Plan(Setting(kv_heads=1)), root / "text.txt", QUICK)
    convert(task, tmp_path / "out")
    assert (tmp_path / "out" / "README.original.md").read_text() == "about the original"
    assert "smaller attention" in (tmp_path / "out" / "README.md").read_text()


def test_refusals(root, tmp_path, monkeypatch):
    task = task_of(root)
    with pytest.raises(ValueError, match="does not exist; make it first"):
        convert(task, tmp_path / "none" / "out")
    with pytest.raises(ValueError, match="is the original's folder"):
        convert(task, root / "llama")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="there already and not from this conversion"):
        convert(task, tmp_path / "file")
    for changes, words in [
        ({"dtype": "int8"}, "float32, float16, bfloat16"),
        ({"max_iterations": -1}, "at least 0"),
        ({"max_seconds": 0.0}, "a positive number"),
        ({"device": "warp"}, "device 'warp' cannot be used"),
    ]:
        with pytest.raises(ValueError, match=words):
            replace(QUICK, **changes)
    with pytest.raises(ValueError, match="the model takes"):
        task_of(root, "bert", replace(QUICK, window=10**6))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("attnreg.transformers.task.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"no space left for --out .*make space"):
        convert(task, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


KILLING = Path(__file__).with_name("killing.py")


def kill(root, folder, mode, kills):
    command = [sys.executable, str(KILLING), str(root), str(folder), mode, str(kills)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=570)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) >= kills


def test_sigkill(root, tmp_path):
    kill(root, tmp_path, "random", 3)


@pytest.mark.slow
def test_thirty_sigkills(root, tmp_path):
    kill(root, tmp_path, "random", 30)


@pytest.mark.slow
def test_sigkill_at_every_flush_to_the_disk(root, tmp_path):
    kill(root, tmp_path, "writes", 1)
