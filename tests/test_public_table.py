"""The public table: peers are found, files resumed, profiles right, Markdown as the JSON says."""

import contextlib
import json
import math

import pytest
import torch

from benchmarks import common, large_layers, planted_suite, profiles, summary, table
from benchmarks.common import Clock
from benchmarks.layer_problem import Data
from benchmarks.peers import OURS, Peer, PlantedArrays, Trace, base, found, installed, muon, run
from benchmarks.peers.adam import Adam
from benchmarks.peers.lbfgs import LBFGS
from benchmarks.planted_problem import planted

WANTED = {
    "Adam",
    "AdamW",
    "Muon",
    "SOAP",
    "torch L-BFGS",
    "pytorch-minimize trust-ncg",
    "pytorch-minimize newton-cg",
    "pytorch-minimize l-bfgs",
    "torch-levenberg-marquardt",
    "scipy trf",
    "scipy trust-krylov",
    "optimistix LM",
    "optimistix Dogleg",
}
LAYERED = [peer for peer in found() if peer.layers]
TINY = {"sequences": 2, "rows": 12, "width": 3, "noise": 0.1}


# ---------------------------------------------------------------------- peers


def test_all_peers_are_found_without_their_packages():
    names = [peer.name for peer in found()]
    assert set(names) == WANTED
    assert len(names) == len(set(names))
    settings = [method.name for peer in found() for method in peer.planted]
    assert len(settings) == len(set(settings))
    for peer in found():
        assert bool(peer.layers) != bool(peer.why_no_layers)
        if peer.scheduled:
            assert len({method.rate for method in peer.planted}) >= 4
            assert len({method.rate for method in peer.layers}) >= 4


def test_a_peer_without_its_package_is_named():
    absent = Peer("absent", (LBFGS(10),), package="attnreg_no_such_module")
    there, missing = installed([absent, *found()[:1]])
    assert there == found()[:1]
    assert list(missing) == ["absent"]
    assert "attnreg_no_such_module is missing: pip install" in missing["absent"]


class Ticks(Clock):
    """A clock that goes on by a thousandth each time it is read: runs are the same everywhere."""

    def __init__(self):
        self._ticks = 0

    def seconds(self):
        self._ticks += 1
        return self._ticks / 1000

    def paused(self):
        return contextlib.nullcontext()


@pytest.fixture
def ticks(monkeypatch):
    """Runs take as long as their clock is read."""
    monkeypatch.setattr(base, "Clock", Ticks)


@pytest.mark.usefixtures("ticks")
@pytest.mark.filterwarnings("default")  # packages whose imports may warn
@pytest.mark.parametrize("peer", found(), ids=lambda peer: peer.name)
def test_every_peer_lowers_the_loss(peer):
    if peer.missing:
        pytest.skip(peer.missing)
    instance = planted(0.0, 0, **TINY)
    trace = run(peer.planted[-1], instance.arrays, instance.start, 1.0)
    assert trace.loss < 0.9 * instance.initial_loss, (trace.status, trace.note)
    found_again = float(instance.arrays.loss(trace.weights))
    assert found_again == pytest.approx(trace.loss, rel=1e-9)  # float64, other orders of sums


@pytest.mark.usefixtures("ticks")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("peer", LAYERED, ids=lambda peer: peer.name)
def test_mini_batches_lower_the_loss_of_a_layer(peer):
    if peer.missing:
        pytest.skip(peer.missing)
    data, start = _layer()
    trace = run(peer.layers[-5 % len(peer.layers)], data, start, 2.0, fractions=(0.2, 0.5))
    seconds = [time for time, _ in trace.snapshots]
    assert seconds[:-1] == pytest.approx([0.4, 1.0][: len(seconds) - 1], abs=0.01)
    assert seconds[-1] == trace.total_seconds
    assert float(data.loss(trace.snapshots[-1][1])) < 0.9 * float(data.loss(start))
    assert all(torch.equal(start[name], value) for name, value in _layer()[1].items())


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_orthogonalises_as_torch_does_but_in_float32(shape, monkeypatch):
    """A step of bfloat16 is 0.4 %, and five iterations of three products add up some of them."""
    original = torch.optim._muon._zeropower_via_newtonschulz
    matrix, given = torch.randn(shape, generator=torch.Generator().manual_seed(0)), []
    arguments = (3.4445, -4.775, 2.0315), 5, 1e-7
    expected = original(matrix, *arguments).float()
    made = muon.orthogonalised(matrix, *arguments)
    assert made.dtype == torch.float32
    assert float((made - expected).norm()) <= 0.03 * float(expected.norm())
    for faster in (True, False):
        monkeypatch.setattr(muon, "float32_is_faster", lambda faster=faster: faster)
        with muon._orthogonalisation(torch.device("cpu")):
            given.append(torch.optim._muon._zeropower_via_newtonschulz)
    assert given == [muon.orthogonalised, original]
    assert torch.optim._muon._zeropower_via_newtonschulz is original


@pytest.mark.parametrize("seconds", [(2.0, 1.0), (1.0, 2.0)])
def test_muon_orthogonalises_in_the_precision_whose_trial_is_faster(seconds, monkeypatch):
    ways = muon.orthogonalised, muon._muon._zeropower_via_newtonschulz
    taken = dict(zip(ways, seconds, strict=True))
    monkeypatch.setattr(muon, "_seconds", lambda way, matrix: taken[way])
    assert muon.float32_is_faster.__wrapped__() == (seconds[0] < seconds[1])


def test_a_dense_jacobian_that_is_too_large_is_not_built():
    arrays = torch.empty(32, 256, 32, dtype=torch.float64)
    with pytest.raises(MemoryError, match=r"not run: its dense Jacobian takes 4.0 GiB"):
        PlantedArrays(arrays, arrays).check_jacobian()
    arrays = torch.empty(8, 128, 32, dtype=torch.float64)
    PlantedArrays(arrays, arrays).check_jacobian()
    with pytest.raises(MemoryError, match=r"not run: a factor of its Jacobian takes 1e\+11"):
        PlantedArrays(arrays, arrays).check_jacobian(factored=True)


def test_evaluations_after_the_time_count_for_nobody():
    trace = Trace([0.1, 0.9, 1.1], [3.0, 2.0, 1.0], loss=1.0).until(1.0)
    assert (trace.seconds, trace.losses, trace.loss) == ([0.1, 0.9], [3.0, 2.0], 2.0)
    assert trace.seconds_to(1.5) is None
    assert trace.until(0.0).loss == math.inf


def _layer():
    from attnreg import MultiHead

    generator = torch.Generator().manual_seed(0)
    width, model = 8, MultiHead(4, 2, 2)
    sizes = {"Q": (width, 8), "K": (width, 4), "V": (width, 4), "O": (8, width)}
    A = torch.randn(6, 5, width, generator=generator)
    weights = {}
    for name, size in sizes.items():
        weights[f"W_{name}"] = torch.randn(size, generator=generator) * 0.1
        weights[f"b_{name}"] = torch.zeros(size[1])
    return Data(A, torch.tanh(A), model), weights


# ---------------------------------------------------------------------- suites


def test_tiers_have_all_conditionings_and_noise_levels():
    for tier in ("bench", "large"):
        cases = planted_suite.cases(tier)
        assert len({case.name for case in cases}) == len(cases) == 15
        assert {case.decades for case in cases} == set(planted_suite.DECADES)
        assert {case.noise for case in cases} == set(planted_suite.NOISES)
    both = (*planted_suite.BENCH, *planted_suite.LARGE)
    assert len(set(both)) == len(both) == 10
    widths, rows, sequences = (set(column) for column in zip(*both, strict=True))
    assert (min(widths), max(widths)) == (4, 64)
    assert (min(rows), max(rows)) == (64, 2048)
    assert (min(sequences), max(sequences)) == (1, 32)
    assert set(planted_suite.QUICK) & set(planted_suite.BENCH)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results and a quiet console."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for module in (common, planted_suite):
        monkeypatch.setattr(module.console, "print", lambda *text, **options: None)
    return tmp_path


def test_the_suite_goes_on_where_it_was(results, monkeypatch):
    monkeypatch.setattr(planted_suite, "BENCH", ((3, 12, 2), (4, 10, 1)))
    monkeypatch.setattr(planted_suite, "warm_up", lambda peers, instance: None)
    asked, killed = [], []

    def run_case(case, peers, seconds, repeats):
        asked.append(case.name)
        if len(asked) == 3 and not killed:
            killed.append(case.name)
            raise KeyboardInterrupt
        return {"rows": {}, "best_loss": 1.0, "initial_loss": 1.0}

    monkeypatch.setattr(planted_suite, "run_case", run_case)
    with pytest.raises(KeyboardInterrupt):
        planted_suite.main(["--threads", "1"])
    names = [case.name for case in planted_suite.cases("bench")]
    planted_suite.main(["--threads", "1"])
    assert asked == [*names[:3], *names[2:]]
    assert list(json.loads((results / "planted_suite.json").read_text())["cases"]) == names
    asked.clear()
    planted_suite.main(["--threads", "1", "--seconds", "9"])  # another setting: all anew
    assert len(asked) == len(names)
    asked.clear()
    planted_suite.main(["--threads", "1", "--seconds", "9", "--minutes", "0"])
    assert asked == []


def test_runs_of_other_widths_side_by_side_add_to_one_file(results, monkeypatch):
    monkeypatch.setattr(planted_suite, "BENCH", ((3, 12, 2), (4, 10, 1)))
    monkeypatch.setattr(planted_suite, "warm_up", lambda peers, instance: None)
    entry = {"rows": {}, "best_loss": 1.0, "initial_loss": 1.0}
    asked = []

    def run_case(case, peers, seconds, repeats):
        asked.append(case.width)
        if len(asked) == 1:  # another run makes all of its own cases meanwhile
            planted_suite.main(["--threads", "1", "--widths", "4"])
        return entry

    monkeypatch.setattr(planted_suite, "run_case", run_case)
    planted_suite.main(["--threads", "1", "--widths", "3"])
    assert asked == [3, 4, 4, 4, 3, 3]
    planted_suite.main(["--threads", "1", "--only", "nobody", "--widths", "3"])  # saves nothing
    assert asked[6:] == [3, 3, 3]
    names = [case.name for case in planted_suite.cases("bench")]
    assert list(json.loads((results / "planted_suite.json").read_text())["cases"]) == names


def test_widths_that_a_tier_has_not_are_refused(results, capsys):
    with pytest.raises(SystemExit) as error:
        planted_suite.main(["--tier", "large", "--widths", "8", "7"])
    assert error.value.code == 2
    assert "tier large has [8, 16, 32, 64], not [7]" in capsys.readouterr().err
    assert not list(results.iterdir())


def test_a_case_has_the_best_setting_and_medians():
    case = planted_suite.Case(3, 12, 2, 0.0, 0.1)
    peers = [Peer("torch L-BFGS", (LBFGS(10), LBFGS(30))), Peer("Adam", (Adam(0.1),))]
    content = planted_suite.run_case(case, peers, 0.4, 3)
    assert set(content["rows"]) == {OURS.name, "torch L-BFGS", "Adam"}
    lbfgs = content["rows"]["torch L-BFGS"]
    assert set(lbfgs["trials"]) == {"torch L-BFGS (10)", "torch L-BFGS (30)"}
    assert lbfgs["setting"] in lbfgs["trials"]
    best = content["rows"][content["best_method"]]
    assert content["best_loss"] == min(row["loss"] for row in content["rows"].values())
    assert len(best["repeats"]) == 3
    assert best["seconds"] == planted_suite.arrival(best["repeats"])
    assert content["cpu_share"] > 0


def test_runs_that_do_not_arrive_do_not_count():
    assert planted_suite.arrival([0.3, None, 0.1, 0.2]) == 0.2
    assert planted_suite.arrival([None, None]) is None


# ---------------------------------------------------------------------- profiles, Markdown


def test_profiles_are_those_of_an_explicit_loop():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(7, 4, generator=generator).tolist()
    times = {
        f"case {i}": {m: None if t < 0.3 else t for m, t in zip("abcd", row, strict=True)}
        for i, row in enumerate(drawn)
    }
    times["nobody"] = dict.fromkeys("abcd")
    found_ratios = profiles.ratios(times)
    for method in "abcd":
        for ratio in (1.0, 1.5, 2.0, 10.0):
            within, count = 0, 0
            for row in times.values():
                solved = [t for t in row.values() if t is not None]
                if solved:
                    count += 1
                    mine = row[method]
                    if mine is not None and mine <= ratio * min(solved):
                        within += 1
            # a quotient against a product: none of these ratios lies on the edge but that of 1
            assert profiles.profile(found_ratios[method], ratio) == within / count
    assert profiles.profile([], 1.0) == 0.0


def _suite():
    def row(seconds, loss, setting):
        return {
            "seconds": seconds,
            "setting": setting,
            "loss": loss,
            "status": "TIME" if seconds is None else "CONVERGED",
            "curve": [[0.1, 1.0], [0.2, loss]],
        }

    def case(ours, peer, losses):
        rows = {OURS.name: row(ours, losses[0], "attnreg"), "P": row(peer, losses[1], "P (2)")}
        best = min(rows, key=lambda name: rows[name]["loss"])
        return {"rows": rows, "best_loss": min(losses), "best_method": best, "initial_loss": 1.0}

    machine = {"processor": "C", "threads": 1, "python": "3", "packages": {"torch": "2"}}
    return {
        "machine": machine,
        "setting": {"seconds": 2.5, "repeats": 3, "clock": "wall"},
        "planned": 4,
        "missing": {"Q": "module q is missing"},
        "cases": {
            "won": case(0.1, 0.5, (0.01, 0.01)),
            "slower": case(0.3, 0.1, (0.01, 0.01)),
            "worse": case(None, 0.1, (0.03, 0.01)),
        },
    }


def test_the_markdown_says_what_was_lost():
    text = table.planted_tables(_suite(), "bench")
    assert "3 of 4 cases, 2.5 wall seconds a run" in text
    assert "| **attnreg** | 33% | 33% | 67% | 2 of 3 | 1 |" in text
    assert "| P | 67% | 67% | 100% | 3 of 3 | 0 |" in text
    assert "| won | 0.1 | 0.5 P (2) | - | - |" in text
    assert "Not run: Q (module q is missing)" in text
    lost = text.rpartition("**Lost by attnreg**: ")[2]
    assert lost == "slower: 3 times the seconds of P; worse: not there (gap 2e-02), P is"


def _layers():
    errors = {"calibration": 0.1, "validation": 0.2, "held_out": 0.3}
    curve = [[1.0, {**errors, "validation": 0.5}], [12.0, errors]]
    row = {"seconds": 12.0, "errors": errors, "readout": "solved", "curve": curve}
    rows = {
        OURS.name: {**row, "setting": "attnreg"},
        "Adam": {**row, "setting": "Adam (1)", "trials": {"Adam (1)": 0.25}},
        "SOAP": {**row, "setting": "SOAP (1)", "errors": {**errors, "validation": 0.1}},
    }
    layer = {"start": errors, "rows": rows}
    return {
        "machine": _suite()["machine"],
        "setting": {"seconds": 12.0, "sequences": 2, "tokens": 128},
        "missing": {},
        "not_run": {"T": "needs more"},
        "layers": {"layer 3": layer | {"verdicts": large_layers.verdicts(layer)}},
    }


def test_all_three_errors_stand_in_the_table_of_a_layer():
    text = table.layer_tables(_layers(), "bench")
    assert "| Adam | Adam (1) | 12 | 0.1 | 0.2 | 0.3 | solved | Adam (1) 0.25 |" in text
    assert "T (needs more)" in text
    assert "(Adam (1)), validation 0.2000: reached in 12 s, 1 times sooner;" in text
    assert "(SOAP (1)), validation 0.1000: **never reached by attnreg**;" in text
    assert "attnreg's 0.2000 is 100.0% **higher**" in text


def test_little_data_in_the_table_and_in_the_summary():
    def row(same, third):
        return {"same_texts": same, "third_text": third}

    rows = {"start": row(0.9, 1.2), "Adam": row(0.5, 0.8), "Muon": row(0.6, 0.7)}
    rows |= {"Adam, ridged": row(0.45, 0.7), "Muon, ridged": row(0.6, 0.7)}
    rows |= {"attnreg, curvature": row(0.3, 0.9), "attnreg, validated": row(0.4, 0.63)}
    cell = {"residuals_a_weight": 4.0, "seconds": 6.0, "rows": rows}
    worse = {**rows, "attnreg, validated": row(0.55, 0.6)}
    content = {
        "machine": _suite()["machine"],
        "setting": {"tried": {"Adam": ["a", "b"], "Muon": ["c"]}},
        "layers": {"layer 3": {"32": cell, "96": {**cell, "rows": worse}}},
    }
    text = table.little_table(content, "averaged")
    assert text.startswith("### Little data from averaged heads, `python -m benchmarks.little_data")
    assert "Settings tried: Adam 2; Muon 1." in text
    line = (
        "| layer 3 | 32 | 4 | 6 | 0.9, 1.2 | 0.5, 0.8 | 0.6, 0.7 | 0.45, 0.7 | 0.6, 0.7 "
        "| **0.3**, 0.9 | 0.4, **0.63** |"
    )
    assert line in text
    assert summary._little(content) == [
        "little data: below all peers on 1 of 2",
        "little data, layer 3, 32 sequences: below the best peer by 20.0% on the same texts, "
        "10.0% on the third; with a ridge on its end by 11.1%, 10.0%",
        "little data, layer 3, 96 sequences: below the best peer by -10.0% on the same texts, "
        "14.3% on the third; with a ridge on its end by -22.2%, 14.3%",
    ]
    assert summary._little(content, "averaged heads")[0].startswith("averaged heads: below all")


def test_what_was_tried_is_told_where_there_was_a_choice():
    assert table._trials({"trials": {"a": 0.5, "b": 0.25}, "finals": {"a": 0.4}}) == "a 0.5; b 0.25"
    assert table._trials({"finals": {"fit": 0.5, "validated": 0.25}}) == "fit 0.5; validated 0.25"
    assert table._trials({"trials": {}, "finals": {"a": 0.4}}) == table._trials({}) == ""


def test_only_the_part_between_the_markers_is_written():
    page = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    written = table.replaced(page, "new")
    assert written == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter\n"
    assert table.replaced(written, "new") == written
    for broken in ("nothing", table.BEGIN, f"{table.END}{table.BEGIN}"):
        with pytest.raises(ValueError, match="needs the lines"):
            table.replaced(broken, "new")


def test_the_page_is_what_the_results_say():
    page = table.PAGE.read_text(encoding="utf-8")
    assert page == table.replaced(page, table.tables(("bench", "large")))


def test_pictures_are_drawn(tmp_path):
    profiles.draw_planted(_suite(), tmp_path / "suite.png")
    profiles.draw_layers(_layers(), tmp_path / "layers.png")
    for name in ("suite.png", "layers.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
