"""The command ``attnreg verify``: exit statuses and what it prints."""

import dataclasses
import json
from pathlib import Path

import pytest

from attnreg import AttentionProblem, Certificate, Kind
from tests.cli.cases import FIT, planted, random

VERIFY = ("verify", "problem.safetensors", "fit.safetensors")


@pytest.fixture
def fitted(run):
    """A saved problem with ridges and noise, and its fit."""
    problem = planted(ridge_x=0.02, ridge_y=0.02)
    noise = 0.1 * random(2, 12, 3, seed=9)
    problem.replace(B=problem.batches[0].B + noise).save("problem.safetensors")
    assert run(*FIT, "--tol", 1e-12)[0] == 0


def test_certified(fitted, run):
    code, out, _ = run(*VERIFY, "--json", "--out", "c.json")
    found = json.loads(out)
    assert code == 0
    assert found["kind"] == "local"
    assert found["gap"] == Certificate.load("c.json").gap
    code, out, _ = run(*VERIFY, "--certificate", "c.json", "--json")
    assert code == 0
    assert json.loads(out)["checked"] == "c.json"


def test_fit_that_certifies_itself(fitted, run):
    code, out, _ = run(*FIT, "--certify", "--tol", 1e-9, "--json")
    summary = json.loads(out)
    assert code == 0
    assert summary["status"] == "certified"
    assert summary["certificate"]["kind"] == "local"
    code, out, _ = run(*FIT, "--certify", "--tol", 1e-300, "--json")
    assert code == 3
    assert "the gap is not certified" in json.loads(out)["notes"][-1]


def test_table(fitted, run):
    code, out, _ = run(*VERIFY)
    assert code == 0
    assert "positive definite" in " ".join(out.split())


def test_rigorous(fitted, run):
    code, out, _ = run(*VERIFY, "--rigorous", "--json")
    assert code == 0
    assert json.loads(out)["method"] == "rigorous"


def test_required(fitted, run):
    assert run(*VERIFY, "--require", "stationary")[0] == 0
    assert run(*VERIFY, "--require", "global")[0] == 3


def test_not_certified(fitted, run):
    run(*FIT, "--max-iterations", 1)
    code, out, _ = run(*VERIFY, "--json", "--out", "c.json")
    assert code == 3
    assert json.loads(out)["kind"] == "not_certified"
    assert Certificate.load("c.json").kind is Kind.NOT_CERTIFIED


def test_settings_are_those_of_the_fit(fitted, run):
    run(*FIT, "--ridge-x", 0.05, "--tol", 1e-12)
    code, out, _ = run(*VERIFY, "--json")
    assert code == 3
    assert "another problem" in json.loads(out)["note"]
    code, out, _ = run(*VERIFY, "--ridge-x", 0.05, "--json")
    assert code == 0
    assert "note" not in json.loads(out)


def test_doctored_certificate(fitted, run, refused):
    run(*VERIFY, "--out", "c.json")
    true = Certificate.load("c.json")
    dataclasses.replace(true, gap=true.gap / 2).save("c.json")
    assert "its gap is" in refused(*VERIFY, "--certificate", "c.json")
    path = Path("c.json")
    path.write_text(path.read_text().replace('"local"', '"global"'))
    assert "is damaged" in refused(*VERIFY, "--certificate", "c.json")


def test_certificate_of_another_problem(fitted, run, refused):
    run(*VERIFY, "--out", "c.json")
    AttentionProblem.load("problem.safetensors").replace(ridge_y=0.03).save("problem.safetensors")
    assert "belongs to another problem" in refused(*VERIFY, "--certificate", "c.json")


def test_certificate_of_another_fit(fitted, run, refused):
    run(*VERIFY, "--out", "c.json")
    run(*FIT, "--seed", 1, "--tol", 1e-3)
    assert "belongs to another fit" in refused(*VERIFY, "--certificate", "c.json")


def test_certificate_that_is_none(fitted, refused):
    assert "cannot be read" in refused(*VERIFY, "--certificate", "c.json")
