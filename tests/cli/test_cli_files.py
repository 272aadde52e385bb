"""The command line: `predict` and `info`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnreg import AttentionProblem, FitResult
from tests.cli.cases import FIT, random


@pytest.fixture
def fitted(run, problem):
    """The result of a short fit."""
    run(*FIT, "--scale", 0.5, "--max-iterations", 3)
    return FitResult.load("fit.safetensors")


PREDICT = ("predict", "fit.safetensors", "inputs.safetensors", "--out", "out.safetensors")


def test_predict_bare_tensors(run, fitted):
    inputs = {"A1": random(5, 3), "A2": random(7, 3, seed=1), "A3": random(7, 3, seed=2)}
    inputs["mask"] = torch.ones(5, 7).tril(2).bool()
    save_file(inputs, "inputs.safetensors")
    code, out, err = run(*PREDICT, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "out": "out.safetensors",
        "tensors": {"prediction": "float64 5 x 3"},
        "notes": [],
    }
    tensors = load_file("out.safetensors")
    assert list(tensors) == ["prediction"]
    torch.testing.assert_close(tensors["prediction"], fitted.predict(**inputs), rtol=0, atol=0)


def test_predict_causal(run, fitted):
    A1, mask = random(2, 5, 3), torch.ones(5, 5).triu(-1).bool()
    for tensors, expected in [
        ({"A1": A1}, fitted.predict(A1, mask="causal")),
        ({"A1": A1, "mask": mask}, fitted.predict(A1, mask=("causal", mask))),
        ({"A1": A1, "B": A1.clone()}, fitted.predict(A1, mask="causal")),
    ]:
        save_file(tensors, "inputs.safetensors")
        assert run(*PREDICT, "--causal")[0] == 0
        prediction = load_file("out.safetensors")["prediction"]
        torch.testing.assert_close(prediction, expected, rtol=0, atol=0)


def test_predict_a_saved_list(run, fitted):
    A = [random(5, 3), random(2, 3, seed=1), random(9, 3, seed=2)]
    AttentionProblem(A, A, scale=0.5).save("inputs.safetensors")
    code, out, _ = run(*PREDICT)
    assert code == 0
    assert "prediction.2" in out
    tensors = load_file("out.safetensors")
    assert sorted(tensors) == ["prediction.0", "prediction.1", "prediction.2"]
    for i, expected in enumerate(fitted.predict(A)):
        torch.testing.assert_close(tensors[f"prediction.{i}"], expected, rtol=0, atol=0)


def test_predict_takes_the_scale_of_the_fit_and_says_so(run, fitted):
    A = random(5, 3)
    AttentionProblem(A, A, scale=2.0).save("inputs.safetensors")
    _, out, _ = run(*PREDICT, "--json")
    assert json.loads(out)["notes"] == ["the fit's scale 0.5 was used, not the inputs' 2.0"]
    prediction = load_file("out.safetensors")["prediction"]
    torch.testing.assert_close(prediction, fitted.predict(A), rtol=0, atol=0)


def test_predict_refusals(refused, fitted):
    assert "a fit is expected" in refused(
        "predict", "problem.safetensors", "fit.safetensors", "--out", "out"
    )
    assert "expected a problem" in refused(
        "predict", "fit.safetensors", "fit.safetensors", "--out", "out"
    )
    assert "inputs.safetensors does not exist" in refused(*PREDICT)
    for tensors, words in [
        ({"A1": random(5, 4)}, "shape"),
        ({"A1": torch.ones(5, 3, dtype=torch.int32)}, "int32"),
        ({"A1": torch.full((5, 3), float("nan"))}, "non-finite"),
        ({"A2": random(5, 3)}, "holds A2; expected A1"),
        ({"A1": random(5, 3), "C": random(5, 3)}, "holds A1, C; expected A1"),
    ]:
        save_file(tensors, "inputs.safetensors")
        assert words in refused(*PREDICT)
    assert not Path("out.safetensors").exists()


def info(run, name):
    code, out, err = run("info", name)
    assert (code, err) == (0, "")
    assert "kind" in out
    return json.loads(run("info", name, "--json")[1])


def test_info_of_a_problem(run, folder):
    A = [random(5, 3), random(2, 3, seed=1)]
    value = AttentionProblem(
        A, A, mask="causal", scale=0.5, ridge_x=1e-3, center={"X": random(3, 3)}
    )
    value.save("problem.safetensors")
    summary = info(run, "problem.safetensors")
    expected = {
        "kind": "problem",
        "structure": "list",
        "n_sequences": 2,
        "n_rows": 7,
        "queries": [2, 5],
        "keys": [2, 5],
        "d_query": 3,
        "d_out": 3,
        "dtype": "float64",
        "mask": ["causal"],
        "total_weight": 7.0,
        "self_attention": True,
        "scale": 0.5,
        "ridge_x": 1e-3,
        "ridge_y": 0.0,
        "center": ["X"],
        "digest": value.digest(),
    }
    assert {name: summary[name] for name in expected} == expected


def test_info_of_a_fit(run, fitted):
    summary = info(run, "fit.safetensors")
    assert summary["kind"] == "fit"
    assert summary["status"] == "max_iterations"
    assert summary["model"] == "Bilinear()"
    assert summary["relative_error"] == fitted.relative_error
    assert (summary["scale"], summary["tol"], summary["seed"]) == (0.5, 1e-8, 0)
    assert summary["problem_digest"] == fitted.problem_digest
    assert summary["tensors"] == {"X": "float64 3 x 3", "Y": "float64 3 x 3"}
    assert [row["loss"] for row in summary["history"]] == [r.loss for r in fitted.history[-5:]]
    assert len(summary["digest"]) == 64


def test_info_of_other_files(run, fitted):
    tensors = {"number": torch.tensor(1.0), "half": torch.full((2, 3), float("nan")).half()}
    save_file(tensors, "plain.safetensors")
    summary = info(run, "plain.safetensors")
    assert summary["kind"] == "tensors"
    assert summary["digest"] is None
    assert summary["tensors"] == {"number": "float32 number", "half": "float16 2 x 3"}
    save_file({"A1": random(5, 3)}, "inputs.safetensors")
    run(*PREDICT)
    assert info(run, "out.safetensors")["kind"] == "prediction"
