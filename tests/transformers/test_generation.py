"""Text that the original writes: its distribution, its bounds, and a conversion with it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from attnreg.transformers import generation
from attnreg.transformers.calibration import Windows
from attnreg.transformers.checkpoint import Checkpoint
from attnreg.transformers.convert import convert, partial_folder
from attnreg.transformers.generation import generate_windows
from tests.transformers.folders import by_transformers
from tests.transformers.test_convert import (
    QUICK,
    Killed,
    killed_after,
    root,  # noqa: F401
    task_of,
)
from tests.transformers.texts import contents

PROMPTS = Windows.of([[5, 9, 11, 3, 7, 20], [4, 8, 9], [21, 22, 23, 24, 25]])


@pytest.fixture(params=["llama", "gpt2"])
def checkpoint(request, root):  # noqa: F811
    return Checkpoint.open(root / request.param)


def test_windows_begin_like_the_text_and_hold_the_tokens_asked_for(checkpoint, monkeypatch):
    monkeypatch.setattr(generation, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(generation, "SEQUENCES", 8)
    state = torch.get_rng_state()
    seen = []
    windows = generate_windows(checkpoint, PROMPTS, 150, length=12, seed=3, progress=seen.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert windows.tokens == 150
    assert seen == sorted(seen)
    assert seen[-1] == 150
    assert all(2 <= len(row) <= 12 for row in windows.ids)
    starts = {row[:4] for row in windows.ids}
    assert starts == {(5, 9, 11, 3), (21, 22, 23, 24)}  # the second has no fifth token to continue
    again = generate_windows(checkpoint, PROMPTS, 150, length=12, seed=3)
    other = generate_windows(checkpoint, PROMPTS, 150, length=12, seed=4)
    assert again.digest == windows.digest != other.digest


def test_tokens_are_drawn_from_the_models_own_distribution(root, monkeypatch):  # noqa: F811
    """The third token after one prompt, against the probabilities of transformers' own forward."""
    monkeypatch.setattr(generation, "SEQUENCES", 1000)
    checkpoint = Checkpoint.open(root / "llama")
    windows = generate_windows(checkpoint, Windows.of([[5, 9, 11]]), 12000, length=5, seed=0)
    # length 5: two tokens of prompt and three drawn; the first of these is compared
    drawn = torch.tensor([row[2] for row in windows.ids if len(row) > 2])
    model = by_transformers(root / "llama", torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([[5, 9]])).logits[0, -1].double().softmax(-1)
    ends = model.generation_config.eos_token_id
    expected[ends] = 0.0  # a text that ends at once is no window
    expected /= expected.sum()
    found = torch.bincount(drawn, minlength=len(expected)).double() / len(drawn)
    # Pearson's statistic is near the number of tokens if they are drawn so (deviation sqrt(2 n)).
    statistic = float(len(drawn) * ((found - expected).square() / expected.clamp(min=1e-12)).sum())
    assert abs(statistic - len(expected)) < 5 * (2 * len(expected)) ** 0.5


@pytest.mark.parametrize("end", [0, [7, 0]])
def test_a_model_ends_its_text_also_with_id_0(root, tmp_path, end):  # noqa: F811
    folder = tmp_path / "model"
    shutil.copytree(root / "llama", folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    windows = generate_windows(Checkpoint.open(folder), PROMPTS, 400, length=16, seed=0)
    endless = generate_windows(Checkpoint.open(root / "llama"), PROMPTS, 400, length=16, seed=0)
    ends = {0} if end == 0 else set(end)

    # No window of PROMPTS has more than eight tokens: one token of it is the prompt.
    # The vocabulary is small: without an end, some of the tokens sampled are one of these.
    assert any(ends & set(row[1:]) for row in endless.ids)
    assert not any(ends & set(row[1:]) for row in windows.ids)


def test_a_window_ends_where_the_model_ends_its_text():
    ended = generation._ended
    assert ended([1, 7, 8, 2, 9, 9], 1, {1, 2}) == [1, 7, 8]
    assert ended([1, 7, 8, 9], 1, {1, 2}) == [1, 7, 8, 9]
    assert ended([1, 2, 9], 1, {1, 2}) == [1]


def test_a_model_that_says_nothing_is_refused(root, monkeypatch):  # noqa: F811
    monkeypatch.setattr(generation, "_ended", lambda row, prompt, ends: row[:prompt])
    with pytest.raises(ValueError, match="ends its text after every one of 13 prompts"):
        generate_windows(Checkpoint.open(root / "llama"), PROMPTS, 100, length=8, seed=0)


def test_a_conversion_fits_on_what_was_sampled_and_goes_on_after_a_kill(root, tmp_path):  # noqa: F811
    options = replace(QUICK, generate=200, final_steps=4)
    task = task_of(root, options=options)
    (tmp_path / "whole").mkdir()
    report = convert(task, tmp_path / "whole" / "out").report
    sampled = generate_windows(task.checkpoint, task.fit, 200, length=16, seed=0)
    assert report["calibration"]["generated"] == sampled.facts()
    assert report["calibration"]["held_out"] == task.held_out.facts()
    alone = convert(task_of(root), tmp_path / "alone").report
    assert alone["calibration"]["generated"] is None
    assert alone["layers"][0]["error"] != report["layers"][0]["error"]
    card = (tmp_path / "whole" / "out" / "README.md").read_text()
    assert "on 200 tokens that the original wrote itself" in card
    (tmp_path / "parts").mkdir()
    out = tmp_path / "parts" / "out"
    for stages in range(5):
        with pytest.raises(Killed):
            convert(task, out, observer=killed_after(stages, 1))
        assert (partial_folder(out) / "text.safetensors").exists() == (stages > 0)
    convert(task, out)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_a_single_token_is_refused():
    with pytest.raises(ValueError, match="expected 0, or at least 2 tokens"):
        replace(QUICK, generate=1)
