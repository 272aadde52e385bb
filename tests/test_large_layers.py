"""The benchmark of the large layers: finalists, rows, files that several runs share, devices."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

from attnreg import MultiHead
from benchmarks import common, large_layers, roofline
from benchmarks.layer_problem import Data, Layer
from benchmarks.peers import OURS, Peer, Trace, Validated, found, run

PEERS = [peer for peer in found() if peer.layers]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results and a quiet console."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for module in (common, large_layers):
        monkeypatch.setattr(module.console, "print", lambda *text, **options: None)
    return tmp_path


def test_a_row_of_a_layer_is_kept(results, monkeypatch):
    done = []
    row = {"setting": "s", "errors": {}, "finals": {"s": 1.0}}
    monkeypatch.setattr(large_layers, "run", lambda *given: None)
    monkeypatch.setattr(large_layers, "our_row", lambda bed, tier: done.append("attnreg") or row)
    monkeypatch.setattr(large_layers, "peer_row", lambda p, *given: done.append(p.name) or row)
    rows, saved = {"Adam": row}, []
    bed = type("Bed", (), {"fitted": None, "start": None})
    tier = large_layers.TIERS["quick"]
    large_layers.run_layer("layer 3", bed, PEERS, tier, rows, lambda: saved.append(len(rows)))
    assert set(rows) == {OURS.name, *(peer.name for peer in PEERS)}
    assert "Adam" not in done
    assert saved == list(range(2, len(rows) + 1))


def test_layers_side_by_side_add_to_one_file(results, monkeypatch):
    """Another run's layer stays; `--fresh` and other settings begin anew."""
    path = results / "large_layers-large.json"
    row = {"setting": "s", "seconds": 1.0, "errors": dict.fromkeys(large_layers.SCORED, 0.5)}
    row |= {"readout": "as it is", "curve": [], "finals": dict.fromkeys("abcd", 0.5)}
    bed = type("Bed", (), {"start": None, "errors": lambda self, _: row["errors"]})
    asked = []

    def run_layer(name, bed, peers, tier, rows, keep):
        asked.append(name)
        beside = path.exists()
        if beside:  # another run is done with its layer, and with a row of this one
            content = json.loads(path.read_text())
            content["layers"]["layer 9"] = {"rows": {}}
            content["layers"][name] = {"rows": {"other": row}, "longer": longer}
            path.write_text(json.dumps(content))
        rows |= {OURS.name: row} | {peer.name: row for peer in peers}
        keep()
        assert ("other" in rows) == beside

    monkeypatch.setattr(large_layers, "run_layer", run_layer)
    monkeypatch.setattr(large_layers, "load_bed", lambda *given: bed())
    longer = {"seconds": 3.0, "errors": row["errors"]}
    made = []
    monkeypatch.setattr(
        large_layers, "our_longer_fit", lambda bed, seconds: made.append(seconds) or longer
    )
    monkeypatch.setattr(large_layers, "print_layer", lambda *given: None)
    given = ["--tier", "large", "--threads", "1", "--layers"]

    def layers_after(*arguments):
        large_layers.main([*given, *arguments])
        return json.loads(path.read_text())["layers"]

    assert list(layers_after("5")) == ["layer 5"]
    first = layers_after("3")
    assert list(first) == ["layer 3", "layer 5", "layer 9"]
    assert first["layer 3"]["longer"] == longer
    assert "other" in first["layer 3"]["rows"]
    assert made == [360.0]  # of layer 5; the other run has made that of layer 3
    assert layers_after("3", "5") == first
    assert asked == ["layer 5", "layer 3"]
    asked.clear()
    path.unlink()
    assert list(layers_after("5", "--seconds", "9")) == ["layer 5"]
    assert list(layers_after("0", "--fresh")) == ["layer 0"]


def test_the_best_finalist_is_the_row(monkeypatch):
    """Trials choose the finalists, validation at the end the best of them."""
    ends = {"a": [0.3, 0.5], "b": [0.2, 0.4], "c": [0.9, 0.1]}
    asked = []

    class Named:
        def __init__(self, name):
            self.name = name

    class Bed:
        fitted = start = None

        def validation(self, weights):
            return weights

        def best_errors(self, weights):
            return dict.fromkeys(large_layers.SCORED, weights) | {"readout": "solved"}

    def run(method, data, start, seconds, fractions=()):
        asked.append((method.name, bool(fractions)))
        trace = Trace(seconds=[seconds], losses=[1.0])
        trace.total_seconds = seconds
        trace.weights = ends[method.name][0]
        trace.snapshots = [(seconds / 2, 0.6), (seconds, ends[method.name][1])]
        return trace

    monkeypatch.setattr(large_layers, "run", run)
    tier = large_layers.Tier((3,), 1, 1, 40.0, 0.25, 2, 3)
    row = large_layers.peer_row(Peer("p", (), tuple(map(Named, "abc"))), Bed(), tier)
    assert asked == [*((name, False) for name in "abc"), ("b", True), ("a", True)]
    assert row["trials"] == {"a": 0.3, "b": 0.2, "c": 0.9}
    assert row["finals"] == {"b": 0.4, "a": 0.5}
    assert (row["setting"], row["errors"]["validation"], row["readout"]) == ("b", 0.4, "solved")
    assert [seconds for seconds, _ in row["curve"]] == [20.0, 40.0]
    asked.clear()  # with one more finalist, which is better, the rest is kept
    wider = large_layers.Tier((3,), 1, 1, 40.0, 0.25, 3, 3)
    peer = Peer("p", (), tuple(map(Named, "abc")))
    assert large_layers.lacking({"p": row, OURS.name: {}}, [peer], tier) == set()
    assert large_layers.lacking({"p": row}, [peer], wider) == {"p", OURS.name}
    completed = large_layers.peer_row(peer, Bed(), wider, row)
    assert asked == [("c", True)]
    assert (completed["setting"], completed["trials"]) == ("c", row["trials"])
    assert completed["finals"] == row["finals"] | {"c": 0.1}
    ends["c"][1] = 0.8  # and where it is not better, the row is
    worse = large_layers.peer_row(peer, Bed(), wider, row)
    assert worse == row | {"finals": row["finals"] | {"c": 0.8}}


WAYS = [(True, (0.5, 0.4)), (True, (0.3, 0.4)), (False, (0.5,))]


@pytest.mark.parametrize(("scarce", "ends"), WAYS)
def test_our_row_is_the_better_way(monkeypatch, scarce, ends):
    """Validated fits are a second way where data are few."""
    bed = SimpleNamespace(fitted=SimpleNamespace(attention=dict), start={}, judging="others")
    monkeypatch.setattr(large_layers, "scarce", lambda problem, start: scarce)
    asked = []

    def fits(method, given, tier):
        assert given is bed
        asked.append(method)
        return {"setting": method.name, "errors": {"validation": ends[len(asked) - 1]}}

    monkeypatch.setattr(large_layers, "_our_fits", fits)
    row = large_layers.our_row(bed, large_layers.TIERS["quick"])
    assert asked == [OURS, Validated("others")][: len(ends)]
    names = [method.name for method in asked]
    assert row["finals"] == dict(zip(names, ends, strict=True))
    assert row["setting"] == names[ends.index(min(ends))]


def test_a_validated_fit_is_run_like_a_peer():
    inputs = [torch.randn(12, 6, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    model = MultiHead(4, 2, 2)
    fitted, others = (Data(A, torch.tanh(A), model) for A in inputs)
    start = model.start(fitted.attention(), 0)
    trace = run(Validated(others), fitted, start, 0.5)
    assert trace.note == "VALIDATED"
    assert trace.derivatives > 0
    assert trace.total_seconds > 0
    assert float(others.loss(trace.weights)) < float(others.loss(start))


def test_verdicts_compare_with_the_best_of_each_target():
    def row(name, seconds, *errors):
        curve = [[s, {"validation": e}] for s, e in zip(seconds, errors, strict=True)]
        return {
            "setting": name,
            "seconds": seconds[-1],
            "errors": {"validation": errors[-1]},
            "curve": curve,
        }

    rows = {
        OURS.name: row("attnreg", (12.0, 24.0, 120.0), 0.5, 0.4, 0.3),
        "Adam": row("a", (120.0,), 0.45),
        "Muon": row("m", (120.0,), 0.41),
        "SOAP": row("s", (120.0,), 0.2),
    }
    first, soap = large_layers.verdicts({"rows": rows}).values()
    assert (first["setting"], first["seconds"], first["sooner"]) == ("m", 24.0, 5.0)
    assert first["lower_at_the_end"] == pytest.approx(1 - 0.3 / 0.41)
    assert (soap["seconds"], soap["sooner"]) == (None, None)
    assert soap["lower_at_the_end"] == pytest.approx(-0.5)


# ---------------------------------------------------------------------- other devices


def test_another_device_or_precision_has_a_file_of_its_own():
    options = argparse.Namespace(device="cpu", precision="float32", tier="bench")
    path, facts = large_layers._place(options)
    assert (path.name, facts) == ("large_layers.json", {})
    options.precision = "bf16"
    path, facts = large_layers._place(options)
    assert path.name == "large_layers-bench-cpu-bf16.json"
    assert facts == {"device": "cpu", "precision": "bf16"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["--precision", "tf32"], "precision tf32 needs a CUDA device"),
    ],
)
def test_a_device_or_precision_that_is_not_there_is_refused(given, said, capsys):
    with pytest.raises(SystemExit) as error:
        large_layers.main([*given, "--quick"])
    assert error.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_layer_goes_to_another_device_whole():
    A = torch.randn(6, 5, 8)
    data, start = Data(A, torch.tanh(A), MultiHead(4, 2, 2)), {"W_Q": torch.zeros(8, 8)}
    layer = Layer(data, data, start, start).to("meta")
    tensors = [layer.train.A, layer.train.B, layer.held_out.A, layer.held_out.B]
    tensors += [*layer.pooled.values(), *layer.weights.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert layer.train.model == data.model


def test_the_roofline_refuses_a_device_in_the_same_words(capsys):
    with pytest.raises(SystemExit) as error:
        roofline.main(["--device", "nowhere", "--quick"])
    assert error.value.code == 2
    assert "device 'nowhere' cannot be used" in capsys.readouterr().err.splitlines()[-1]
