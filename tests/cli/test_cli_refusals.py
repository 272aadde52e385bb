"""The command line: what is refused, in one clear line and before the long work."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import attnreg.cli
from attnreg import AttentionProblem
from attnreg.cli import main
from tests.cli.cases import FIT, MULTI, planted, random


def test_files_that_are_refused(refused, problem):
    assert "does not exist" in refused("fit", "none.safetensors", "--out", "fit.safetensors")
    content = Path("problem.safetensors").read_bytes()
    Path("cut").write_bytes(content[: len(content) // 2])
    Path("text").write_text("hello, this is not a safetensors file\nat all\n")
    Path("empty").write_bytes(b"")
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    Path("flipped").write_bytes(flipped)
    for name in ("cut", "text", "empty", "flipped"):
        assert name in refused("fit", name, "--out", "fit.safetensors")
        assert name in refused("info", name)
        assert name in refused("predict", name, "problem.safetensors", "--out", "out")
        assert name in refused(*FIT, "--init", name)
    assert not Path("fit.safetensors").exists()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"A1": torch.full((3, 2), float("nan")), "B": torch.ones(3, 2)}, "non-finite"),
        ({"A1": torch.ones(3, 2), "B": torch.full((3, 2), float("inf"))}, "non-finite"),
        ({"A1": torch.ones(3, 2, dtype=torch.int64), "B": torch.ones(3, 2)}, "int64"),
        ({"A1": torch.ones(3, 2).half(), "B": torch.ones(3, 2).half()}, "float16"),
        ({"A1": torch.ones(3, 2), "B": torch.ones(4, 2)}, "row"),
        ({"A1": torch.ones(0, 2), "B": torch.ones(0, 2)}, "empty"),
        ({"A1": torch.ones(3, 2)}, "expected A1 and B"),
        ({"A1": torch.ones(3, 2), "B": torch.ones(3, 2), "C": torch.ones(1)}, "C"),
        ({"A1": torch.ones(3, 2), "B": torch.ones(3, 2), "weights": -torch.ones(3)}, "weights"),
        (
            {"A1": torch.ones(3, 2), "B": torch.ones(3, 2), "mask": torch.zeros(3, 3).bool()},
            "mask",
        ),
    ],
)
def test_tensors_that_are_refused(refused, tensors, words):
    save_file(tensors, "problem.safetensors")
    assert words in refused(*FIT)
    assert not Path("fit.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--heads", 4, "--kv-heads", 3), "kv_heads=3 does not divide heads=4"),
        (("--heads", 3), "head_dim"),
        (("--heads", 0), "heads=0"),
        (("--kv-heads", 2, "--no-bias"), "--kv-heads and --no-bias given without --heads"),
        (("--heads", 2, "--ridge-x", 1), "--init or --center"),
        (("--ridge-x", -1), "ridge_x"),
        (("--ridge-y", "nan"), "ridge_y"),
        (("--scale", 0), "scale"),
        (("--tol", 0), "tol"),
        (("--max-seconds", -1), "max_seconds"),
        (("--max-iterations", -1), "max_iterations"),
        (("--init", "none"), "none does not exist"),
        (("--init", "problem.safetensors"), "expected a fit or named parameters"),
        (("--init", "weights.safetensors"), "missing ['X', 'Y']"),
        (("--heads", 2, "--init", "weights.safetensors"), "W_K"),
        (("--ridge-x", 1, "--center", "weights.safetensors"), "missing"),
    ],
)
def test_options_that_are_refused(refused, layer, options, words):
    assert words in refused(*FIT, *options)
    assert not Path("fit.safetensors").exists()


def test_init_of_another_model_or_size(run, refused, layer):
    run(*MULTI, "--max-iterations", 0)
    assert "--init is a fit of MultiHead" in refused(
        *FIT, "--heads", 2, "--init", "fit.safetensors"
    )
    planted().save("small.safetensors")
    words = refused("fit", "small.safetensors", "--out", "out", "--init", "fit.safetensors")
    assert "heads=2 does not divide" in words
    run(*FIT, "--max-iterations", 0)
    words = refused("fit", "small.safetensors", "--out", "out", "--init", "fit.safetensors")
    assert "parameter X has shape (4, 4), (3, 3) is expected" in words


@pytest.mark.parametrize(
    "options", [("--starts", 4), ("--certify",), ("--solver", "newton-cg"), ("--solver", "auto")]
)
def test_validation_with_what_minimises_the_loss(refused, layer, options):
    line = refused(*MULTI, "--validation", "weights.safetensors", *options)
    assert " ".join(map(str, options)) in line
    assert "leave out one or the other" in line


def test_validation_sequences_that_do_not_fit(refused, layer):
    assert "absent" in refused(*MULTI, "--validation", "absent.safetensors")
    wider = AttentionProblem(random(2, 6, 5), random(2, 6, 5))
    wider.save("others.safetensors")
    line = refused(*MULTI, "--init", "weights.safetensors", "--validation", "others.safetensors")
    assert "the validation sequences have d_query=5, those to fit on have d_query=4" in line
    assert "is an input too" in refused(
        "fit",
        "problem.safetensors",
        "--out",
        "others.safetensors",
        "--validation",
        "others.safetensors",
    )


def test_out_is_checked_before_the_work(refused, problem, monkeypatch):
    def too_late(*arguments, **options):
        raise AssertionError("the fit has begun")

    monkeypatch.setattr(attnreg.cli, "fit", too_late)
    fit = ("fit", "problem.safetensors", "--out")
    assert "No such file or directory" in refused(*fit, "absent/fit.safetensors")
    Path("folder").mkdir()
    assert "not a regular file" in refused(*fit, "folder")
    assert "is an input too" in refused(*fit, "problem.safetensors")
    assert "is an input too" in refused(*fit, "folder/../problem.safetensors")
    assert "is an input too" in refused("predict", "a", "b", "--out", "b")
    if os.name != "nt":
        assert "not a regular file" in refused(*fit, os.devnull)
        Path("file").touch()
        assert "Not a directory" in refused(*fit, "file/fit.safetensors")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_out_in_a_read_only_folder(refused, problem):
    Path("closed").mkdir(mode=0o500)
    assert "Permission denied" in refused("fit", "problem.safetensors", "--out", "closed/fit")


def test_full_disk(refused, problem, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("attnreg.storage.save_file", full)
    line = refused(*FIT)
    assert line == "attnreg: cannot write fit.safetensors: No space left on device\n"
    assert [path.name for path in Path().iterdir()] == ["problem.safetensors"]


def test_refusal_is_one_line_whatever_its_text(refused, problem, monkeypatch):
    def fails(*arguments, **options):
        raise ValueError("first\nsecond")

    monkeypatch.setattr(attnreg.cli, "fit", fails)
    assert refused(*FIT) == "attnreg: first second\n"


def test_a_bug_keeps_its_traceback(folder, problem, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(attnreg.cli, "fit", fails)
    monkeypatch.setattr(sys, "argv", ["attnreg", *FIT])
    with pytest.raises(RuntimeError, match="a bug"):
        main()


@pytest.mark.parametrize("arguments", [("fit",), ("fit", "a"), ("none",), ("fit", "--tol", "x")])
def test_usage_errors(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: attnreg" in err


def test_a_solver_that_is_not_for_the_problem(refused, problem):
    assert "solver='newton' was given" in refused(*FIT, "--solver", "newton")
    assert "needs ridge_x and ridge_y above 0" in refused(*FIT, "--solver", "newton-cg")


def test_starts_that_a_fit_cannot_have(refused, problem):
    assert "a whole number from 1 to 65536" in refused(*FIT, "--starts", 0)
    assert "MultiHead takes one start" in refused(*MULTI, "--head-dim", 2, "--starts", 2)
