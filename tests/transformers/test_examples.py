"""The scripts under examples/ run to their end on tiny models and do what they say."""

import pytest
import torch

import attnreg
from attnreg.transformers.adapters import adapter_for
from examples import causal_model, encoder, one_layer
from tests.transformers.texts import model_folder, write_text


@pytest.fixture
def text(tmp_path):
    return str(write_text(tmp_path / "text.txt", documents=60))


def test_causal_model(tmp_path, text, capsys):
    model = str(model_folder("llama", tmp_path / "model"))
    causal_model.main(model, text, str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "nats per token" in printed
    assert "transformers loads it: LlamaForCausalLM" in printed
    before, after = (attnreg.load(folder) for folder in (model, tmp_path / "out"))
    assert after.config.num_key_value_heads == before.config.num_key_value_heads // 2


def test_encoder(tmp_path, text, capsys, monkeypatch):
    monkeypatch.setattr(encoder, "SENTENCES", ["w1 w2 w3", "w4 w5 w6"])
    model = str(model_folder("bert", tmp_path / "model"))
    encoder.main(model, text, str(tmp_path / "out"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("held-out cosine")
    assert [line.split("  ")[1] for line in lines[-2:]] == ["w1 w2 w3", "w4 w5 w6"]
    student = attnreg.load(tmp_path / "out")
    block = adapter_for(student.config).blocks(student)[0]
    weights = adapter_for(student.config).read(block)
    assert weights["W_K"].shape[1] < weights["W_Q"].shape[1]
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_one_layer(tmp_path, text, capsys):
    one_layer.main(str(model_folder("llama", tmp_path / "model")), text, 1)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("starts: ")
    start, fit = (float(line.split()[-1]) for line in printed[-2:])
    assert start > 0
    assert fit > 0
