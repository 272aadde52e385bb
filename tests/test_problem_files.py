"""Digests and files keep all of a problem, and foreign files are read for what they are."""

import math
import re

import pytest
import torch
from safetensors.torch import save_file

from attnreg.arrays import join
from attnreg.problem import AttentionProblem
from attnreg.storage import read_tensors, write_tensors
from tests.problems import (
    PROBLEMS,
    SETTINGS,
    assert_same,
    batch,
    normal,
    positive,
    ragged,
    single,
    visible,
)


@pytest.fixture(params=PROBLEMS, name="problem")
def any_problem(request):
    return PROBLEMS[request.param]()


def test_digest_tells_every_part_apart():
    problems = {
        "plain": single(),
        "queries": AttentionProblem(normal(5, 3, seed=1), normal(5, 2)),
        "targets": AttentionProblem(normal(5, 3), normal(5, 2, seed=1)),
        "keys": AttentionProblem(normal(5, 3), normal(5, 2), normal(5, 3, seed=1)),
        "values": AttentionProblem(normal(5, 3), normal(5, 2), A3=normal(5, 3, seed=1)),
        "dtype": single().to(torch.float32),
        "batch of one": AttentionProblem(normal(5, 3)[None], normal(5, 2)[None]),
        "causal": single(mask="causal"),
        "mask": single(mask=visible(5, 5)),
        "both": single(mask=("causal", visible(5, 5))),
        "weights": single(weights=positive(5)),
        "scale": single(scale=1.0),
        "ridge_x": single(ridge_x=1e-9),
        "ridge_y": single(ridge_y=1e-9),
        "X0": single(center={"X": normal(3, 3)}),
        "Y0": single(center={"Y": normal(3, 3)}),
    }
    assert len({problem.digest() for problem in problems.values()}) == len(problems)


def test_digest_stays_the_same_from_version_to_version():
    a = torch.arange(6.0, dtype=torch.float64).view(3, 2)
    x0 = torch.eye(2, dtype=torch.float64)
    problem = AttentionProblem(a, a, mask="causal", ridge_x=0.5, center={"X": x0})
    assert problem.digest().startswith("b3caeb208a4bafe2")  # saved fits name their problem by it


def test_digest_ignores_how_the_same_was_said():
    ones = torch.ones(5, dtype=torch.float64)
    mask = visible(5, 5)
    assert single(weights=ones, center={}).digest() == single().digest()
    assert batch(mask=mask).digest() == batch(mask=mask, weights=ones.expand(4, 5)).digest()


@pytest.mark.parametrize(
    ("pick", "copied"),
    [
        (lambda a: a.unbind(0), False),
        (lambda a: a[1:].unbind(0), False),
        (lambda a: [a[2], a[1], a[0]], True),
        (lambda a: [a[0], a[2]], True),
        (lambda a: [a[1], a[1]], True),
        (lambda a: [a[0], a[1].clone()], True),
        (lambda a: a[:, :3].unbind(0), True),
        (lambda a: a.mT.unbind(0), True),
    ],
    ids=["all", "last", "backwards", "gap", "twice", "elsewhere", "rows", "turned"],
)
def test_a_batch_is_copied_only_where_it_has_to_be(pick, copied):
    tensor = normal(4, 5, 3)
    sequences = list(pick(tensor))
    joined = join("batch", sequences)
    assert torch.equal(joined, torch.stack(sequences))
    assert (joined.data_ptr() != sequences[0].data_ptr()) == copied


def test_neighbours_of_different_shapes_are_no_batch():
    flat = normal(24)
    with pytest.raises(RuntimeError, match="equal size"):
        join("batch", [flat[:12].view(3, 4), flat[12:].view(4, 3)])


def test_save_and_load_keep_everything(problem, tmp_path):
    path = tmp_path / "problem.safetensors"
    problem.save(path)
    assert_same(AttentionProblem.load(path), problem)
    assert_same(AttentionProblem.load(path, device="cpu"), problem)
    assert read_tensors(path)[1]["digest"] == problem.digest()


def test_saving_again_gives_the_same_bytes(problem, tmp_path):
    problem.save(tmp_path / "one")
    AttentionProblem.load(tmp_path / "one").save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_settings_come_back_exactly(tmp_path):
    single(scale=0.1, ridge_x=1 / 3, ridge_y=5e-324).save(tmp_path / "problem")
    found = AttentionProblem.load(tmp_path / "problem")
    assert (found.scale, found.ridge_x, found.ridge_y) == (0.1, 1 / 3, 5e-324)


def test_problem_outlives_its_file(tmp_path):
    path = tmp_path / "problem.safetensors"
    single().save(path)
    found = AttentionProblem.load(path)
    path.write_bytes(b"")
    assert_same(found, single())


def test_file_stores_equal_inputs_once(tmp_path):
    path = tmp_path / "problem.safetensors"
    ragged().save(path)
    assert set(read_tensors(path)[0]) == {"A1", "B"}
    PROBLEMS["values are keys"]().save(path)
    assert set(read_tensors(path)[0]) == {"A1", "A2", "B"}


def test_bare_safetensors_file_is_a_problem(tmp_path):
    path = tmp_path / "bare.safetensors"
    tensors = {
        "A1": normal(4, 5, 3),
        "B": normal(4, 5, 2),
        "A2": normal(4, 6, 2),
        "A3": normal(4, 6, 1),
        "mask": visible(5, 6),
        "weights": normal(4, 5).abs(),
    }
    save_file(tensors, path)
    assert_same(AttentionProblem.load(path), AttentionProblem(**tensors))
    save_file({"A1": tensors["A1"], "B": tensors["B"]}, path, {"format": "pt"})
    assert_same(AttentionProblem.load(path), batch())


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["A1"], "holds tensors named A1; expected A1 and B"),
        (["A1", "B", "X"], "holds tensors named A1, B, X; expected A1 and B, and besides only A2"),
        ([], "holds no tensors; expected A1 and B"),
    ],
)
def test_bare_file_with_other_tensors_is_refused(tmp_path, names, told):
    path = tmp_path / "bare.safetensors"
    save_file({name: normal(5, 3) for name in names}, path)
    with pytest.raises(ValueError, match=told) as caught:
        AttentionProblem.load(path)
    assert str(path) in str(caught.value)


def refused(path, told):
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        AttentionProblem.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_bare_file_with_bad_tensors_is_refused(tmp_path):
    path = tmp_path / "bare.safetensors"
    save_file({"A1": normal(5, 3).half(), "B": normal(5, 2).half()}, path)
    refused(path, ": A1 has dtype float16; expected float32 or float64: convert it first")
    save_file({"A1": normal(5, 3) * math.nan, "B": normal(5, 2)}, path)
    refused(path, ": A1 holds 15 non-finite value(s), the first nan at [0, 0]")


@pytest.mark.parametrize("metadata", [{"kind": "fit"}, {"kind": None}, {}])
def test_file_of_another_kind_is_refused(tmp_path, metadata):
    path = tmp_path / "fit.safetensors"
    write_tensors(path, {"X": normal(3, 3)}, metadata)
    refused(path, f"holds a {metadata.get('kind')}; expected a problem: give the file that")


def test_missing_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "problem.safetensors"
    refused(path, "does not exist; expected a safetensors file")
    refused(tmp_path, "is not a regular file")
    single(**SETTINGS).save(path)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-1])
    refused(path, "is not a complete safetensors file")
    content[-1] ^= 1
    path.write_bytes(content)
    refused(path, "is damaged")
    path.write_text("A1: 1")
    refused(path, "is not a complete safetensors file")
