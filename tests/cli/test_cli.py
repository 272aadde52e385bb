"""The command line: `fit` with its exit statuses, the demo, version and help."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import attnreg.cli
from attnreg import AttentionProblem, FitResult, MultiHead, Status, __version__, fit_validated
from tests.cli.cases import FIT, MULTI, layer_weights, planted, random


def test_fit_converges(run, problem):
    code, out, err = run(*FIT, "--json")
    assert (code, err) == (0, "")
    summary = json.loads(out)
    result = FitResult.load("fit.safetensors")
    assert result.problem_digest == problem.digest()
    assert result.converged
    assert summary["converged"] is True
    assert summary["status"] == "converged"
    assert summary["status_text"] == result.status.text
    for name in ("loss", "regularised_loss", "relative_error", "gradient_norm", "seed"):
        assert summary[name] == getattr(result, name)
    assert summary["iterations"] == result.history[-1].iteration
    assert summary["passes"] == result.history[-1].passes
    assert summary["seconds"] == result.history[-1].seconds
    assert summary["out"] == "fit.safetensors"
    assert summary["notes"] == list(result.notes)


def test_fit_prints_a_table(run, problem):
    code, out, err = run(*FIT)
    assert (code, err) == (0, "")
    assert "relative error" in out
    assert "converged" in out


def test_quiet_prints_nothing(run, problem):
    assert run(*FIT, "--quiet") == (0, "", "")
    assert json.loads(run(*FIT, "--quiet", "--json")[1])["converged"]


def test_names_are_not_markup(run, problem):
    Path("[red]").mkdir()
    assert "[red]/fit" in run("fit", "problem.safetensors", "--out", "[red]/fit")[1]


def test_display_on_a_terminal_only(run, problem, monkeypatch):
    shown = []

    def watched(*arguments, progress, **options):
        shown.append(progress)
        return attnreg.fit(*arguments, **options)

    monkeypatch.setattr(attnreg.cli, "fit", watched)
    run(*FIT)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run(*FIT)
    run(*FIT, "--quiet")
    assert shown == [False, True, False]


def test_bare_tensors(run, folder):
    value = planted()
    tensors = {"A1": value.batches[0].A1, "B": value.batches[0].B}
    save_file({**tensors, "weights": torch.ones(2, 12).double()}, "problem.safetensors")
    assert run(*FIT)[0] == 0
    assert FitResult.load("fit.safetensors").problem_digest == value.digest()


def test_options_override_the_file(run, problem):
    code, *_ = run(*FIT, "--scale", 0.5, "--ridge-x", 1e-3, "--ridge-y", 1e-4, "--causal")
    assert code == 0
    expected = problem.replace(scale=0.5, ridge_x=1e-3, ridge_y=1e-4, mask="causal")
    assert FitResult.load("fit.safetensors").problem_digest == expected.digest()


@pytest.mark.parametrize("solver", ["newton-sketch", "newton-cg"])
def test_solvers_by_name(run, problem, solver):
    ridges = ("--ridge-x", 0.5, "--ridge-y", 0.5)
    code, out, err = run(*FIT, "--solver", solver, *ridges, "--json")
    assert (code, err) == (0, "")
    summary, result = json.loads(out), FitResult.load("fit.safetensors")
    assert summary["solver"] == result.solver == solver
    assert summary["operations"] == result.history[-1].operations
    assert summary["operations"]["attention"] > 0
    assert summary["inner_iterations"] > 0
    table = json.loads(run("info", "fit.safetensors", "--json")[1])["history"]
    assert table[-1]["rows"] == result.history[-1].rows


def test_many_starts_say_what_they_found(run, problem):
    code, out, _ = run(*FIT, "--starts", 4, "--json")
    assert code == 0
    minima = FitResult.load("fit.safetensors").minima
    assert json.loads(out)["minima"] == vars(minima) | {"text": minima.text}
    assert json.loads(run("info", "fit.safetensors", "--json")[1])["minima"]["starts"] == 4
    assert "distinct" in run("info", "fit.safetensors")[1]
    run(*FIT)
    assert "minima" not in json.loads(run("info", "fit.safetensors", "--json")[1])


def test_settings_of_the_file_stay(run, folder):
    value = planted(scale=0.5, ridge_x=1e-3, ridge_y=1e-3, mask="causal")
    value.save("problem.safetensors")
    assert run(*FIT, "--causal", "--ridge-y", 0)[0] == 0
    assert FitResult.load("fit.safetensors").problem_digest == value.replace(ridge_y=0.0).digest()


def test_causal_joins_the_mask(run, folder):
    mask = random(12, 12) > -1
    mask.fill_diagonal_(True)
    value = planted(mask=mask)
    value.save("problem.safetensors")
    run(*FIT, "--causal", "--max-iterations", 1)
    expected = value.replace(mask=("causal", mask)).digest()
    assert FitResult.load("fit.safetensors").problem_digest == expected


def test_bounds_and_seed_reach_the_fit(run, problem):
    run(*FIT, "--tol", 1e-3, "--seed", 7)
    result = FitResult.load("fit.safetensors")
    assert (result.tol, result.seed) == (1e-3, 7)


def test_stopped_before_the_tolerance(run, problem):
    code, out, err = run(*FIT, "--max-iterations", 1, "--json")
    assert (code, err) == (3, "")
    assert json.loads(out)["status"] == "max_iterations"
    assert FitResult.load("fit.safetensors").status is Status.MAX_ITERATIONS
    assert run(*FIT, "--max-seconds", 1e-9)[0] == 3
    assert FitResult.load("fit.safetensors").status is Status.MAX_SECONDS


def test_continue_a_fit(run, problem):
    run(*FIT, "--max-iterations", 2)
    before = FitResult.load("fit.safetensors")
    assert run(*FIT, "--init", "fit.safetensors")[0] == 0
    # Not equal: the first readout may have been that of the regularisation path.
    assert FitResult.load("fit.safetensors").history[0].loss <= before.loss * (1 + 1e-9)


def test_multi_head_from_named_weights(run, layer):
    code, *_ = run(*MULTI, "--head-dim", 2, "--v-head-dim", 2, "--init", "weights.safetensors")
    assert code == 0
    result = FitResult.load("fit.safetensors")
    assert result.model == MultiHead(2, 1, 2, 2)
    # Without --heads the model of the saved fit is taken.
    assert run(*FIT, "--init", "fit.safetensors")[0] == 0
    assert FitResult.load("fit.safetensors").model == result.model


def test_multi_head_without_biases(run, layer):
    run(*MULTI, "--no-bias", "--max-iterations", 1)
    assert set(FitResult.load("fit.safetensors").parameters) == {"W_Q", "W_K", "W_V", "W_O"}


def test_multi_head_ridge_pulls_towards_init(run, layer):
    ridges = ("--ridge-x", 1e-3, "--ridge-y", 1e-3, "--max-iterations", 2, "--json")
    code, out, _ = run(*MULTI, "--init", "weights.safetensors", *ridges)
    assert code == 3
    assert "the ridges pull towards the weights of --init" in json.loads(out)["notes"]
    expected = layer.replace(
        ridge_x=1e-3, ridge_y=1e-3, center=load_file("weights.safetensors")
    ).digest()
    assert FitResult.load("fit.safetensors").problem_digest == expected
    # Continued with the same centre.
    _, out, _ = run(*FIT, "--init", "fit.safetensors", "--center", "weights.safetensors", *ridges)
    assert json.loads(out)["notes"] == []
    assert FitResult.load("fit.safetensors").problem_digest == expected


def test_multi_head_center_of_the_problem_stays(run, layer):
    value = layer.replace(ridge_x=1e-3, center=layer_weights(seed=50))
    value.save("problem.safetensors")
    run(*MULTI, "--init", "weights.safetensors", "--max-iterations", 1)
    assert FitResult.load("fit.safetensors").problem_digest == value.digest()


def test_interrupt_saves_the_best_iterate(run, problem, monkeypatch):
    def interrupt(record):
        if record.iteration == 2:
            raise KeyboardInterrupt

    def interrupted(*arguments, **options):
        return attnreg.fit(*arguments, **options, callback=interrupt)

    monkeypatch.setattr(attnreg.cli, "fit", interrupted)
    code, out, err = run(*FIT, "--json")
    assert (code, err) == (3, "")
    assert json.loads(out)["status"] == "interrupted"
    assert FitResult.load("fit.safetensors").status is Status.INTERRUPTED


def test_interrupt_before_there_is_an_iterate(run, problem, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(attnreg.cli, "fit", interrupted)
    code, out, err = run(*FIT)
    assert (code, out) == (130, "")
    assert err == "attnreg: interrupted before the first iteration; nothing was saved\n"
    assert not Path("fit.safetensors").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_in_a_process(folder):
    """A fit that cannot end by itself: the signal comes once the loop has begun."""
    script = """
import os, signal, sys, attnreg, attnreg.cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
def fit(*arguments, **options):
    def callback(record):
        if record.iteration == 1:
            os.kill(os.getpid(), signal.SIGINT)
    return attnreg.fit(*arguments, **options, callback=callback)
attnreg.cli.fit = fit
sys.argv = ["attnreg", "fit", "problem.safetensors", "--out", "fit.safetensors", "--tol", "1e-300"]
attnreg.cli.main()
"""
    planted().save("problem.safetensors")
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (3, "")
    assert FitResult.load("fit.safetensors").status is Status.INTERRUPTED


def test_demo_is_called(run, monkeypatch):
    calls = []
    monkeypatch.setattr("attnreg.demo.run", lambda *arguments: calls.append(arguments))
    assert run("demo")[0] == 0
    assert run("demo", "--out", "there", "--seconds", 2, "--json")[0] == 0
    assert calls == [(Path("demo-output"), None, False), (Path("there"), 2.0, True)]


def test_validation_chooses(run, layer):
    others = AttentionProblem(*(random(3, 6, 4, seed=seed) for seed in (70, 71)), scale=layer.scale)
    others.save("others.safetensors")
    options = ("--init", "weights.safetensors", "--validation", "others.safetensors")
    code, out, _ = run(*MULTI, *options, "--max-iterations", 8, "--json")
    assert code == 0
    summary = json.loads(out)
    assert summary["status"] == "validated"
    assert summary["converged"] is False
    result = FitResult.load("fit.safetensors")
    expected = fit_validated(
        layer,
        others,
        result.model,
        init=load_file("weights.safetensors"),
        max_iterations=8,
    )
    assert result.loss == expected.loss
    assert summary["notes"] == list(expected.notes)


def test_demo_without_matplotlib(refused, monkeypatch):
    def fails(*arguments):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr("attnreg.demo.run", fails)
    assert "pip install 'attnreg[hf,plots]'" in refused("demo")


def test_demo_refusals(refused, folder):
    for seconds in (0, -1, "nan", "inf"):
        assert "--seconds" in refused("demo", "--seconds", seconds)
    Path("file").touch()
    assert "file" in refused("demo", "--out", "file", "--seconds", 1)


def test_version(run):
    assert run("--version") == (0, f"attnreg {__version__}\n", "")


@pytest.mark.parametrize("command", ["fit", "predict", "info", "demo"])
def test_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "--json" in out
    assert command in run("--help")[1]
