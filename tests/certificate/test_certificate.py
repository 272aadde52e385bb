"""Certificates as values and files: round trips, refusals, comparison."""

import dataclasses
import hashlib
import json
import math

import pytest
import torch

from attnreg import Bilinear, Certificate, Kind, fit, predict, verify
from attnreg.problem import AttentionProblem
from tests.twins import normal


@pytest.fixture(scope="module")
def problem():
    A = normal(2, 12, 3)
    blank = AttentionProblem(A, torch.zeros_like(A), ridge_x=0.05, ridge_y=0.05)
    truth = {"X": 0.5 * normal(3, 3, seed=1), "Y": normal(3, 3, seed=2)}
    target = predict(Bilinear(), truth, blank)
    return blank.replace(B=target + 0.1 * normal(2, 12, 3, seed=3))


@pytest.fixture(scope="module")
def result(problem):
    return fit(problem, tol=1e-12)


@pytest.fixture(scope="module")
def certificate(problem, result):
    return verify(problem, result)


def renewed(path):
    """Gives a changed file a digest that fits, as someone who cheats would."""
    content = json.loads(path.read_text())
    content.pop("digest", None)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content | {"digest": digest}))


def test_round_trip(tmp_path, certificate):
    certificate.save(tmp_path / "c.json")
    assert Certificate.load(tmp_path / "c.json") == certificate
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_round_trip_without_numbers(tmp_path, problem):
    none = verify(problem, torch.zeros(3, 3), torch.zeros(3, 3))
    assert none.kind is Kind.NOT_CERTIFIED
    assert (none.gap, none.radius, none.mu, none.lipschitz) == (None,) * 4
    none.save(tmp_path / "c.json")
    assert Certificate.load(tmp_path / "c.json") == none


def test_a_certificate_agrees_with_itself(problem, result, certificate):
    certificate.check(verify(problem, result))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Certificate)])
def test_every_field_is_compared(certificate, name):
    value = getattr(certificate, name)
    if isinstance(value, str):
        changed = value + "."
    elif isinstance(value, float):
        changed = 0.99 * (value or 1.0)
    else:
        changed = {"kind": Kind.GLOBAL, "assumptions": ()}[name]
    with pytest.raises(ValueError, match=r"doctored|another"):
        dataclasses.replace(certificate, **{name: changed}).check(certificate)


def test_last_digits_may_differ(certificate):
    near = dataclasses.replace(certificate, gap=certificate.gap * (1 + 1e-6))
    near.check(certificate)


def test_kinds_are_ordered():
    assert Kind.GLOBAL.implies(Kind.LOCAL)
    assert Kind.LOCAL.implies(Kind.LOCAL)
    assert not Kind.STATIONARY.implies(Kind.LOCAL)
    assert Kind.STATIONARY.implies(Kind.NOT_CERTIFIED)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no certificate"),
        ('{"type": "attnreg certificate", "format_version": 2}', "upgrade attnreg"),
        ('{"type": "attnreg certificate", "format_version": 1}', "is damaged"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Certificate.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        Certificate.load(tmp_path / "c.json")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "certain"},
        {"gap": "small"},
        {"gap": True},
        {"tolerance": None},
        {"reason": 3},
        {"assumptions": "none"},
        {"assumptions": [1]},
        {"extra": 1},
    ],
)
def test_entries_of_the_wrong_type(tmp_path, certificate, change):
    path = tmp_path / "c.json"
    certificate.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="damaged"):
        Certificate.load(path)
    renewed(path)
    with pytest.raises(ValueError, match="no complete certificate"):
        Certificate.load(path)


def test_numbers_are_finite_or_missing(certificate):
    for field in dataclasses.fields(Certificate):
        value = getattr(certificate, field.name)
        assert not isinstance(value, float) or math.isfinite(value)
