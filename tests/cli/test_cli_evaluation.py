"""The command line: `evaluate`."""

import json
import shutil

import pytest

from tests.transformers.folders import edit_json

TEXT = ("--text", "text.txt", "--window", 16)


def test_evaluate(run, models):
    quick = ("--max-iterations", 0, "--final-steps", 0, "--window", 16, "--held-out", 0.2)
    compress = ("compress", "llama", "--calibration", "text.txt", *quick, "--kv-heads", 1)
    assert run(*compress, "--out", "small", "--quiet")[0] == 0
    code, out, err = run("evaluate", "llama", "small", *TEXT, "--max-tokens", 200, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["tokens"] <= 200
    assert report["text"] == "text.txt"
    assert set(report["versions"]) == {"attnreg", "torch", "transformers"}
    assert report["original"]["digest"] != report["converted"]["digest"]
    before, after = report["original"], report["converted"]
    assert after["kv_cache_bytes"] * 2 == before["kv_cache_bytes"]
    assert report["excess"] == pytest.approx(after["nats"] - before["nats"], abs=1e-12)
    assert [len(layer["heads"]) for layer in report["layers"]] == [4, 4, 4]

    code, out, err = run("evaluate", "llama", "small", *TEXT, "--first-only")
    assert (code, err) == (0, "")
    assert "windows    20" in out
    assert "perplexity" in out
    assert run("evaluate", "llama", "small", *TEXT, "--quiet") == (0, "", "")


def test_masked(run, models):
    edit_json(models / "bert" / "tokenizer_config.json", mask_token="w59")
    command = ("evaluate", "bert", "bert", *TEXT, "--dtype", "float32", "--seed")
    reports = [json.loads(run(*command, seed, "--json")[1]) for seed in (0, 1)]
    assert [report["kind"] for report in reports] == ["masked", "masked"]
    assert reports[0]["excess"] == 0.0
    assert reports[0]["original"]["nats"] != reports[1]["original"]["nats"]
    assert "cosine mean" in run(*command, 0)[1]


def test_refusals(refused, models):
    def refuse(*arguments):
        return refused("evaluate", *arguments)

    assert "fewer than one window of 2048" in refuse(
        "llama", "llama", "--text", "text.txt", "--window", 2048
    )
    assert "does not exist" in refuse("llama", "llama", "--text", "none.txt")
    assert "no mask token is known" in refuse("bert", "bert", *TEXT)
    assert "the kind of the original is causal" in refuse("llama", "bert", *TEXT)
    shutil.copytree("llama", "other")
    vocabulary = json.loads((models / "other" / "tokenizer.json").read_text())["model"]
    vocabulary["vocab"] |= {"w1": 2, "w2": 1}
    edit_json(models / "other" / "tokenizer.json", model=vocabulary)
    assert "differ in their vocabularies" in refuse("llama", "other", *TEXT)
    assert "the model takes 2048 tokens" in refuse(
        "llama", "llama", "--text", "text.txt", "--window", 4096
    )
