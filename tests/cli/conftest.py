"""Fixtures that run the command line and save files for it."""

import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

from attnreg import AttentionProblem, MultiHead, predict
from attnreg.cli import main
from tests.cli.cases import layer_weights, planted, random


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, so that file names are short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs the program; returns exit status, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["attnreg", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


@pytest.fixture
def refused(run):
    """Runs the program and checks that it ends with one line; returns the line."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        assert err.startswith("attnreg: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err

    return call


@pytest.fixture
def problem(folder):
    """A saved problem."""
    value = planted()
    value.save("problem.safetensors")
    return value


@pytest.fixture
def layer(folder):
    """A saved multi-head problem, and in weights.safetensors the weights near its solution."""
    A = random(2, 12, 4)
    blank = AttentionProblem(A, torch.zeros_like(A))
    weights = layer_weights()
    value = blank.replace(B=predict(MultiHead(2, 1), weights, blank))
    value.save("problem.safetensors")
    near = {name: w + 0.05 * random(*w.shape, seed=20) for name, w in weights.items()}
    save_file(near, "weights.safetensors")
    return value


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Two models, one in shards, and a text."""
    from tests.transformers.texts import model_folder, write_text  # they need transformers

    root = tmp_path_factory.mktemp("made")
    model_folder("llama", root / "llama", shard="20KB")
    model_folder("bert", root / "bert")
    write_text(root / "text.txt")
    return root


@pytest.fixture
def models(made, folder):
    """Models and a text in the current folder."""
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder
