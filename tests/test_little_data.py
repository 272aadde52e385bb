"""The benchmark of little data: its rows, and a file that several runs share."""

import json

import pytest
import torch

from attnreg import MultiHead
from benchmarks import common, little_data
from benchmarks.layer_problem import STUDENT, Data, relative_error, with_outputs
from benchmarks.peers import Peer
from benchmarks.peers.adam import Adam


@pytest.fixture(scope="module")
def cell():
    """Two short sequences to fit on, others that judge, all of a random layer of full width."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    inputs = normal(6, 16, 384)
    blank = Data(inputs, inputs).attention()
    weights = {
        name: normal(*value.shape) / max(value.shape[0], 32) ** 0.5
        for name, value in MultiHead(12, head_dim=32).start(blank, 0).items()
    }
    data = with_outputs(inputs, weights)
    texts = {
        name: Data(data.A[i : i + 2], data.B[i : i + 2])
        for name, i in (("fitted", 0), ("validation", 2), ("same_texts", 4), ("third_text", 4))
    }
    start = {**STUDENT.start(blank, 0), "W_O": weights["W_O"].clone()}
    return little_data._Cell(texts, start, 0.2)


def test_a_peers_best_setting_is_that_of_the_lowest_validation_error(cell):
    row = cell.best(Peer("Adam", (), (Adam(1e-3, 1), Adam(1e-2, 1))))
    assert set(row["tried"]) == {Adam(1e-3, 1).name, Adam(1e-2, 1).name}
    assert row["setting"] in row["tried"]
    assert row["validation"] <= min(row["tried"].values())
    assert row["readout"] in ("as it is", "solved")


def test_ours_are_scored_on_all_texts(cell):
    rows = {name: cell.ours(make) for name, make in cell.ways().items()}
    assert list(rows) == ["attnreg, curvature", "attnreg, mini-batches", little_data.OURS]
    start = relative_error(cell._start, cell._texts["validation"])
    assert rows[little_data.OURS]["validation"] <= start * (1 + 1e-5)
    assert rows["attnreg, curvature"]["fitted"] < cell.scored(cell._start)["fitted"]
    for row in rows.values():
        assert row["seconds"] > 0
        assert set(little_data.TEXTS) < set(row)


def test_layers_side_by_side_add_to_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common.console, "print", lambda *text, **options: None)
    made = []
    monkeypatch.setattr(little_data, "_layer", lambda number, *given: made.append(number) or {})
    for layers in (["5"], ["3", "5"]):
        little_data.main(["--layers", *layers])
    content = json.loads((tmp_path / "little_data.json").read_text())
    assert list(content["layers"]) == ["layer 3", "layer 5"]
    assert made == [5, 3]
    little_data.main(["--layers", "3", "--fresh"])
    assert made == [5, 3, 3]
