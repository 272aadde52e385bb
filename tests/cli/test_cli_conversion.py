"""The command line: `compress` and `plan`."""

import json
from pathlib import Path

import pytest
import torch

from tests.transformers.folders import edit_json
from tests.transformers.texts import contents

QUICK = ("--window", 16, "--max-iterations", 1, "--final-steps", 0, "--held-out", 0.2)
COMPRESS = ("compress", "llama", "--calibration", "text.txt", *QUICK)
PLAN = ("plan", "llama", "--calibration", "text.txt", "--window", 16, "--held-out", 0.2)


def test_compress(run, models):
    code, out, err = run(*COMPRESS, "--kv-heads", 1, "--out", "small", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["loads_with"] == "transformers"
    assert report["too_lossy"] is None
    assert [layer["student"]["kv_heads"] for layer in report["layers"]] == [1, 1, 1]
    assert report["after"]["kv_bytes_per_token"] * 2 == report["before"]["kv_bytes_per_token"]
    saved = json.loads(Path("small/attnreg-report.json").read_text())
    assert {name: report[name] for name in saved} == saved
    assert "seconds" not in saved
    assert saved["command"] in Path("small/README.md").read_text()
    # The command in the card is one that this program takes.
    words = saved["command"].split()
    words[words.index("--out") + 1] = "again"
    assert run(*words[1:], "--quiet") == (0, "", "")
    assert contents(Path("again")).keys() == contents(Path("small")).keys()


def test_table_and_an_encoder(run, models):
    given = ("compress", "bert", "--calibration", "text.txt", *QUICK, "--out", "small")
    code, out, err = run(*given, "--kv-heads", 2)
    assert (code, err) == (0, "")
    for words in ("attnreg.load", "cosine", "4/4/8", "4/2/8", "held out"):
        assert words in out


def test_heads_grouped_by_fits_of_pairs(run, models, monkeypatch):
    given = ("compress", "bert", "--calibration", "text.txt", *QUICK, "--kv-heads", 2)
    code, out, err = run(*given, "--fit-pairs", "--out", "small", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert all(layer["start"].startswith("fitted") for layer in report["layers"])
    assert "--fit-pairs" in report["command"].split()
    monkeypatch.setattr("attnreg.transformers.estimate._rate", lambda device: 1e9)
    dry = [*given, "--dry-run", "--json"]
    plain, longer = (json.loads(run(*dry, *more)[1]) for more in ((), ("--fit-pairs",)))
    assert longer["estimated_seconds"] > plain["estimated_seconds"]


def test_too_lossy_is_written_and_said(run, models):
    code, out, err = run(
        *COMPRESS, "--kv-heads", 1, "--out", "small", "--max-excess", -10, "--json"
    )
    assert code == 3
    assert err.count("\n") == 1
    assert "above --max-excess -10; small was written all the same" in err
    assert json.loads(out)["too_lossy"] in err
    assert Path("small/config.json").exists()
    assert run(*COMPRESS, "--kv-heads", 1, "--out", "small", "--max-excess", 10, "--quiet")[0] == 0
    encoder = ("compress", "bert", "--calibration", "text.txt", *QUICK, "--kv-heads", 2)
    assert run(*encoder, "--out", "other", "--min-cosine", 1.5, "--quiet")[0] == 3


def test_dry_run_writes_nothing(run, models):
    before = contents(models)
    code, out, err = run(*COMPRESS, "--kv-heads", 1, "--layers", "1,2", "--dry-run", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [layer["student"] for layer in found["layers"]] == ["4/2/8", "4/1/8", "4/1/8"]
    assert found["loads_with"] == "attnreg.load"
    assert found["obstacle"]
    assert found["estimated_seconds"] > 0
    assert found["estimated_memory_bytes"] > 0
    assert contents(models) == before


def test_interrupted(run, models, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("attnreg.transformers.stages.fit_layer", interrupted)
    code, out, err = run(*COMPRESS, "--kv-heads", 1, "--out", "small")
    assert (code, out) == (130, "")
    assert err == "attnreg: interrupted; the same command goes on from small.partial\n"
    assert not Path("small").exists()


def test_plan_and_compress_with_it(run, models):
    pytest.importorskip("matplotlib")
    given = (*PLAN, "--kv-budget", 0.7, "--out", "plan.toml", "--figure", "plan.png", "--json")
    code, out, err = run(*given)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert len(found["profile"]) == 6
    assert found["share_of_cache"] == pytest.approx(2 / 3)
    assert found["best_even_setting"] == "kv_heads=1"
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")
    halved = sorted(layer for layer, setting in found["plan"].items() if setting == "kv_heads=1")
    assert len(halved) == 2
    code, out, err = run(*COMPRESS, "--plan", "plan.toml", "--out", "small", "--json")
    assert (code, err) == (0, "")
    changed = [str(layer["layers"][0]) for layer in json.loads(out)["layers"]]
    assert changed == halved


def test_plan_table(run, models):
    code, out, err = run(*PLAN, "--kv-heads", 1, "--head-dim", 4, "--head-dim", 6)
    assert (code, err) == (0, "")
    for words in (
        "kv_heads=1, head_dim=4",
        "kv_heads=1, head_dim=6",
        "unchanged",
        "sum of squared",
    ):
        assert words in out


SIZE = ("--kv-heads", 1, "--out", "small")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*COMPRESS, "--kv-heads", 3, "--out", "small"), "kv_heads = 3"),
        (
            ("compress", "bert", *COMPRESS[2:], "--kv-heads", 3, "--dry-run"),
            "3 key/value heads do not",
        ),
        ((*COMPRESS, "--heads", 3, "--out", "small"), "do not divide 3 heads"),
        ((*COMPRESS, "--out", "small"), "nothing is to be changed"),
        ((*COMPRESS, "--kv-heads", 1), "--out is missing"),
        ((*COMPRESS, *SIZE, "--plan", "none.toml"), "expected one of the two"),
        ((*COMPRESS, "--plan", "none.toml", "--out", "small"), "none.toml cannot be read"),
        ((*COMPRESS, *SIZE, "--layers", "7"), "layer 7 was given"),
        ((*COMPRESS, *SIZE, "--layers", "x"), "--layers is 'x'"),
        ((*COMPRESS, *SIZE, "--dtype", "int8"), "bfloat16"),
        ((*COMPRESS, *SIZE, "--device", "warp"), "device 'warp'"),
        ((*COMPRESS, *SIZE, "--min-cosine", 0.9), "give --max-excess"),
        ((*COMPRESS, "--kv-heads", 1, "--out", "none/small"), "does not exist; make it first"),
        ((*COMPRESS, "--kv-heads", 1, "--out", "bert"), "is there already"),
        ((*COMPRESS, *SIZE, "--window", 10**6), "the model takes"),
        ((*COMPRESS, *SIZE, "--held-out", 0), "between 0 and 1"),
        ((*PLAN, "--kv-budget", 0), "--kv-budget is 0"),
        ((*PLAN, "--kv-budget", 0.1), "the smallest of these settings keeps 0.5"),
        ((*PLAN, "--figure", "none/plan.png"), "make it first"),
        (
            ("compress", "bert", *COMPRESS[2:], *SIZE, "--max-excess", 1),
            "--min-cosine",
        ),
        (("compress", "llama", "--calibration", "none.txt", *SIZE), "none.txt does not exist"),
    ],
)
def test_refused_options(refused, models, arguments, words):
    assert words in refused(*arguments)
    assert not Path("small").exists()
    assert not Path("small.partial").exists()


def test_a_text_shorter_than_a_window(refused, models):
    Path("short.txt").write_text("w1 w2 w3\n")
    line = refused("compress", "llama", "--calibration", "short.txt", *SIZE, "--window", 16)
    assert "fewer than one window of 16" in line


def test_models_that_are_refused(refused, models, monkeypatch):
    edit_json(models / "bert" / "config.json", model_type="mamba")
    line = refused("compress", "bert", "--calibration", "text.txt", *SIZE)
    assert "'mamba' is not supported" in line
    edit_json(models / "bert" / "config.json", auto_map={"AutoModel": "model.Mine"})
    line = refused("compress", "bert", "--calibration", "text.txt", *SIZE)
    assert "trust_remote_code" in line
    shard = sorted(models.glob("llama/model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    assert shard.name in refused(*COMPRESS, *SIZE)
    shard.unlink()
    assert shard.name in refused(*COMPRESS, *SIZE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused("compress", "someone/model", "--calibration", "text.txt", *SIZE)
    assert "someone/model" in line
    assert "local folder" in line


def test_a_full_disk_is_found_before_the_work(refused, models, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("attnreg.transformers.task.shutil.disk_usage", lambda path: usage)
    assert "no space left for --out small" in refused(*COMPRESS, *SIZE)
    assert not Path("small.partial").exists()


def test_without_transformers(refused, models, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    line = refused(*COMPRESS, *SIZE)
    assert "pip install 'attnreg[hf]'" in line


def test_half_precision_options(run, models):
    assert run(*COMPRESS, *SIZE, "--dtype", "bfloat16", "--quiet") == (0, "", "")
    from attnreg.transformers.loading import load

    assert {p.dtype for p in load("small").parameters()} == {torch.bfloat16}
