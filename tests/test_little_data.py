"""The benchmark of little data: its rows, and a file that several runs share."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from benchmarks import common, little_data
from benchmarks.layer_problem import ORIGINAL, STUDENT, Bed, Data, Layer, with_outputs
from benchmarks.peers import Peer, Trace


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def bed():
    """Two short sequences to fit on, others that judge, all of a random layer of full width."""
    inputs = normal(6, 16, 384, seed=0)
    blank = Data(inputs, inputs).attention()
    weights = {
        name: normal(*value.shape, seed=i) / max(value.shape[0], 32) ** 0.5
        for i, (name, value) in enumerate(ORIGINAL.start(blank, 0).items())
    }
    data = with_outputs(inputs, weights)
    texts = {name: data.part(i, 2) for name, i in zip(little_data.TEXTS, (0, 2, 4, 4), strict=True)}
    return Bed({**STUDENT.start(blank, 0), "W_O": weights["W_O"].clone()}, texts)


def test_the_readout_that_validates_better_counts(bed):
    unsolved = {**bed.start, "W_O": 100 * bed.start["W_O"]}
    solved = bed.best_errors(unsolved)
    assert solved["readout"] == "solved"
    assert solved["validation"] == bed.validation(unsolved) < bed.errors(unsolved)["validation"]
    assert solved["fitted"] < bed.errors(unsolved)["fitted"]
    lost = bed.best_errors({**bed.start, "W_O": torch.full_like(bed.start["W_O"], math.nan)})
    assert {lost[text] for text in little_data.TEXTS} == {math.inf}


@dataclass(frozen=True)
class Setting:
    """A peer's setting; only its name and rate are looked at."""

    rate: float
    name: str = ""


def test_low_rates_are_tried_at_a_quarter_too():
    peer = Peer("p", (), tuple(map(Setting, (0.8, 0.4, 1.6, 0.4))))
    assert [method.rate for method in little_data.settings(peer)] == [
        *(0.8, 0.4, 1.6, 0.4),
        *(0.2, 0.1, 0.1),
    ]


def test_a_peers_best_setting_is_that_of_the_lowest_validation_error(bed, monkeypatch):
    ends = {"lost": math.nan, "near": 0.0, "far": 3.0}  # by which W_Q of the start has moved

    def run(method, fitted, start, seconds):
        assert (fitted, seconds) == (bed.fitted, 0.5)
        return Trace(weights={**start, "W_Q": start["W_Q"] + ends[method.name]})

    monkeypatch.setattr(little_data, "run", run)
    monkeypatch.setattr(little_data, "settings", lambda peer: peer.layers)
    methods = tuple(Setting(1.0, name) for name in ends)
    peer = Peer("p", (), methods)
    rows = little_data.peer_rows(peer, bed, 0.5, {})
    assert list(rows) == ["p", "p, ridged"]
    assert [found["runs"] for found in rows.values()] == [little_data.REPEATS] * 2
    # What an earlier run made is not run again, and fewer runs of it are completed.
    kept = {name: {**found, "seconds": 7.0} for name, found in rows.items()}
    assert little_data.peer_rows(peer, bed, 0.5, kept) == kept
    single = {name: {**found, "fitted": 0.0, "runs": 1} for name, found in rows.items()}
    assert little_data.peer_rows(peer, bed, 0.5, single) == rows
    row, ridged = rows.values()
    # Among the ridged readouts are the one that was given and the one by least squares.
    assert ridged["validation"] <= row["validation"] * (1 + 1e-5)
    for name, moved in ends.items():
        if math.isfinite(moved):
            moved_start = {**bed.start, "W_Q": bed.start["W_Q"] + moved}
            errors = little_data.ridged_errors(bed, moved_start)
            assert ridged["validation"] <= errors["validation"], name
    assert row["tried"] == {
        name: bed.validation({**bed.start, "W_Q": bed.start["W_Q"] + moved})
        for name, moved in ends.items()
    }
    assert row["tried"]["lost"] == math.inf
    assert row["validation"] == row["tried"][row["setting"]] == min(row["tried"].values())


def test_ours_are_scored_on_all_texts(bed):
    rows = little_data.our_rows(bed, 0.3)
    assert list(rows) == ["attnreg, curvature", "attnreg, mini-batches", little_data.OURS]
    start = bed.errors(bed.start)
    # Errors in float32 by fused attention; the choice was by sums in float64.
    assert rows[little_data.OURS]["validation"] <= start["validation"] * (1 + 1e-5)
    assert rows["attnreg, curvature"]["fitted"] < start["fitted"]
    for row in rows.values():
        assert row["seconds"] > 0
        assert set(little_data.TEXTS) < set(row)


def test_layers_side_by_side_add_to_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common.console, "print", lambda *text, **options: None)
    monkeypatch.setattr(little_data, "_print", lambda name, cells: None)
    made = []

    def layer(number, setting, peers, before, *, averaged):
        assert averaged == (setting.sequences == (32, 96))
        made.append(number)
        return {"made": len(made), "before": before and before["made"]}

    monkeypatch.setattr(little_data, "_layer", layer)
    for chosen in (["5"], ["3", "5"]):
        little_data.main(["--layers", *chosen])

    def layers():
        return json.loads((tmp_path / "little_data.json").read_text())["layers"]

    assert list(layers()) == ["layer 3", "layer 5"]
    assert made == [5, 3]
    little_data.main(["--layers", "3", "--ours"])
    assert layers()["layer 3"] == {"made": 3, "before": 2}
    little_data.main(["--layers", "3", "--fresh"])
    assert made == [5, 3, 3, 3]
    assert layers() == {"layer 3": {"made": 4, "before": None}}
    little_data.main(["--layers", "0", "--averaged"])
    content = json.loads((tmp_path / "little_data-averaged.json").read_text())
    assert content["layers"] == {"layer 0": {"made": 5, "before": None}}


def test_a_layer_begins_at_the_best_start_or_at_averaged_heads(monkeypatch, bed):
    pooled, best, begun = bed.start, {**bed.start, "W_Q": bed.start["W_K"].repeat(1, 3)}, []
    data = Data(bed.fitted.A.repeat(2, 1, 1), bed.fitted.B.repeat(2, 1, 1))
    layer = Layer(data, data, pooled, {name: bed.start[name] for name in little_data.WEIGHTS})
    found = SimpleNamespace(name="best", unsolved=best)
    monkeypatch.setattr(little_data, "load_layer", lambda *given: layer)
    monkeypatch.setattr(little_data, "third_text", lambda *given: data)
    monkeypatch.setattr(little_data, "best_start", lambda *given: found)
    monkeypatch.setattr(little_data, "our_rows", lambda bed, seconds: begun.append(bed.start) or {})
    setting = little_data.Setting((3,), (2,), (0.5,), 2)
    for averaged, start, name in ((False, best, "best"), (True, pooled, "mean-pooled heads")):
        cells = little_data._layer(3, setting, [], None, averaged=averaged)
        assert begun.pop() is start
        assert cells["2"]["rows"]["start"]["setting"] == name
        weights = sum(value.numel() for value in start.values())
        assert cells["2"]["residuals_a_weight"] == data.part(0, 2).B.numel() / weights
