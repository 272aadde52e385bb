"""What the benchmarks stand on: the planted problem, resumed files and the picture."""

import json
import re
from pathlib import Path

import pytest
import torch

from attnreg import AttentionProblem, MultiHead
from attnreg.models import Rotary
from attnreg.result import predict
from benchmarks import common, conversion_bed, conversion_minilm, multimodal, planted, summary
from benchmarks.planted_problem import NOISE
from benchmarks.planted_problem import planted as instance_of

SMALL = {"sequences": 2, "rows": 20, "width": 4}


@pytest.mark.parametrize("decades", [0.0, 2.0])
def test_planted_problem_is_what_it_says(decades):
    instance = instance_of(decades, 0, logit_std=3.0, sequences=8, rows=100, width=6)
    A, B = instance.arrays.A, instance.arrays.B
    columns = A.flatten(0, 1).std(0)
    # 800 rows: a standard deviation is known to about 1 / sqrt(1600).
    assert float(columns.max() / columns.min()) == pytest.approx(10**decades, rel=0.15)
    assert instance.planted_loss == pytest.approx(instance.noise_floor, rel=0.1)
    assert instance.noise_floor == pytest.approx(NOISE**2 * float(B.square().sum()), rel=0.1)
    assert instance.initial_loss == pytest.approx(float(B.square().sum()), rel=1e-12)


def test_finished_cases_are_kept_on_request_only(tmp_path):
    content = {"machine": {"cores": 2}, "setting": {"seconds": 1}, "speed": {}, "minima": {}}
    path = tmp_path / "planted.json"
    done = content | {"speed": {"a": 1}, "minima": {"a": {"seed 0": 2}}}
    path.write_text(json.dumps(done))
    content["minima"] = {"a": {"seed 1": 3}}
    planted._save(content, path, resume=True)
    written = json.loads(path.read_text())
    assert written["speed"] == {"a": 1}
    assert written["minima"] == {"a": {"seed 0": 2, "seed 1": 3}}
    other = content | {"setting": {"seconds": 2}, "speed": {}}
    planted._resume(other, path)
    assert other["speed"] == {}
    fresh = content | {"speed": {}, "minima": {}}
    planted._save(fresh, path, resume=False)
    written = json.loads(path.read_text())
    assert written["speed"] == written["minima"] == {}


def test_a_case_compares_all_methods():
    from benchmarks.peers.lbfgs import LBFGS

    case = planted.minima_case(instance_of(0.0, 0, **SMALL), [LBFGS(10)], 2.0)
    assert set(case["methods"]) == {"attnreg", "torch L-BFGS (10)"}
    assert case["ours_against_best_peer"] in ("better", "equal", "worse")
    losses = {name: row["loss"] for name, row in case["methods"].items()}
    best = min(losses, key=losses.get)
    assert case["methods"][best]["seconds_to_best"] is not None
    assert all(0 < loss < case["initial_loss"] for loss in losses.values())


def test_the_figures_of_the_readme_come_from_the_results(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(summary.console, "print", lines.append)
    monkeypatch.setattr(summary, "PICTURE", tmp_path / "picture.png")
    summary.main()
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    text, readme = "\n".join(lines), (Path(__file__).parent.parent / "README.md").read_text()
    printed = {
        "planted, 0 decades.*?median ([0-9.]+) s": 2,
        "planted, 1.5 decades.*?median ([0-9.]+) s": 2,
        "planted, 3 decades.*?median ([0-9.]+) s": 2,
        "best L-BFGS reached ([0-9.]+) times": 0,
        "best Adam reached ([0-9.]+) times": 1,
        "n = 128: ([0-9.]+) x forward": 1,
        "n = 2048: ([0-9.]+) x forward": 1,
        "n = 128: .*?, ([0-9.]+) x its": 2,
        "n = 2048: .*?, ([0-9.]+) x its": 2,
        "peak ([0-9.]+) GiB": 2,
        "n = 1024, d = 32: LOCAL in ([0-9.]+) s": 1,
        "bilinear, d = 384: LOCAL in ([0-9.]+) s": 0,
        "newton-sketch: ([0-9.]+) to": 2,
        "to ([0-9.]+) iterations a decade": 2,
        "over the true gap ([0-9.]+)": 2,
        "ridge 1 of the top: 7 to ([0-9]+) products": 0,
        "ridge 0.0001 of the top: 19 to ([0-9]+) products": 0,
        "([0-9]+) of 252 doctored": 0,
        **{
            f"large, layer {layer}, {target}.*: {figure}": 1
            for layer in (0, 3, 5)
            for target in ("the best", "SOAP")
            for figure in ("sooner ([0-9.]+) times", ".*lower ([0-9.]+)%")
        },
        **{f"large, layer {layer}: ([0-9.]+)% below Adam": 1 for layer in (0, 3, 5)},
        "grouping, layer 0: .*; pairs ([0-9.]+)% below": 1,
        "grouping, layer 3: .*; pairs ([0-9.]+)% below": 1,
        "grouping, layer 5: .*; pairs -([0-9.]+)% below": 1,
        "bench, layer 3, the best.*: sooner ([0-9.]+) times": 1,
        "bench, layer 3, the best.*lower ([0-9.]+)%": 1,
        "kv4, cosine: .*adam 40 s, 100k tokens more: ([0-9.]+)": 4,
        "kv4, cosine: .*ours 40 s, 100k tokens more: ([0-9.]+)": 4,
        "kv4, cosine: .*ours 240 s, 300k tokens more: ([0-9.]+)": 4,
        "kv4, cosine: .*ours 240 s, 300k tokens more: [0-9.]+ ([0-9.]+)": 4,
        "kv4, third cosine: .*ours 240 s, 300k tokens more: ([0-9.]+)": 3,
    }
    for pattern, digits in printed.items():
        found = re.search(pattern, text)
        assert found, pattern
        assert re.search(rf"\b{re.escape(f'{float(found[1]):.{digits}f}')}\b", readme), pattern
    prose = " ".join(readme.split())
    counts = "suite {}: of ([0-9]+) cases first on ([0-9]+), cut off on ([0-9]+), peers on ([0-9]+)"
    bench, large = (re.search(counts.format(tier), text) for tier in ("bench", "large"))
    assert f"on {bench[2]} of {bench[1]} cases" in prose
    assert f"on all of {large[1]} larger ones" in prose
    assert large[1] == large[2]
    lost = re.findall(r"suite bench.*: (\S+) is there, attnreg is not", text)
    assert len(lost) == int(bench[1]) - int(bench[2])
    assert all(f"on the other {peer} " in prose for peer in lost)
    assert f"On {bench[3]} and {large[3]} of them the clock" in prose
    assert f"Peers arrive on {bench[4]} of the former" in prose
    assert f"on {large[4]} of the latter" in prose
    suite = prose[prose.index("Peers arrive on") : prose.index("**Real layer**")]
    later = re.findall(r"suite .* at ([0-9.]+) times the seconds", text)
    above = re.findall(r"suite .*: lowest ([0-9.]+), planted ([0-9.]+), (\w+)", text)
    assert len(later) + len(lost) == int(bench[4]) + int(large[4])
    assert {status for *_, status in above} == {"time", "converged"}
    for figure in (*later, *(loss for *losses, _ in above for loss in losses)):
        assert re.search(rf"\b{re.escape(figure)}\b", suite), figure
    for start, told, counts in (
        ("little data", "SOAP on {} of {},", (8, 32, 96)),
        ("averaged heads", "below them on {} of {},", (32, 96)),
    ):
        first, cells = re.search(f"{start}: below all peers on ([0-9]+) of ([0-9]+)", text).groups()
        assert told.format(first, cells) in prose
        for count in counts:
            figures = r"by (-?[0-9.]+)% on the same texts, (-?[0-9.]+)% on the third; "
            lines = re.findall(f"{start}, layer ., {count} seq.* {figures}", text)
            gains = [float(gain) for line in lines for gain in line]
            assert len(gains) == 6
            assert f"{min(gains):.1f} to {max(gains):.1f} % with" in prose
    for count, told in (
        (32, "Adam is below `fit_validated` there by {} and {} %"),
        (96, "with 12 it is by {} and {} % if it has attnreg's ridge"),
    ):
        line = re.search(f"averaged heads, layer 5, {count} sequences: .*", text)[0]
        figures = [float(x) for x in re.findall(r"(-?[0-9.]+)%", line)]  # alone, then with a ridge
        chosen = figures[:2] if count == 32 else figures[2:]
        assert told.format(*(f"{-x:.1f}" for x in chosen)) in prose
    assert re.search("0 decades.*on 10 of 10 seeds, worse than a peer on 0", text)
    issued = re.search("2000 problems, ([0-9]+) issued, 0 violations", text)
    assert issued
    assert f"{int(issued[1]):,} certificates were issued" in " ".join(readme.split())


@pytest.mark.parametrize("rotary", [None, Rotary((1.0, 0.25))])
@pytest.mark.parametrize("bias", [False, True])
def test_features_of_the_peer_are_those_of_the_package(rotary, bias):
    model = MultiHead(4, 2, 4, bias=bias, rotary=rotary)
    sequences = [torch.randn(n, 8) for n in (5, 5, 4)]  # one batch, padded
    problem = AttentionProblem(sequences, sequences, mask="causal" if rotary else None)
    sizes = {"Q": (8, 16), "K": (8, 8), "V": (8, 8), "O": (16, 8)}
    weights = {f"W_{name}": torch.randn(size) for name, size in sizes.items()}
    if bias:
        weights |= {f"b_{name}": torch.randn(size[1]) for name, size in sizes.items()}
    (batch,) = problem.batches
    output = conversion_bed.features(model, weights, batch) @ weights["W_O"]
    output = output + weights.get("b_O", 0.0)
    for wanted, found in zip(
        predict(model, weights, problem), problem.unpad([output]), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # float32, entries near 10


def test_runs_tell_repeated_text():
    first, shifted = list(range(100)), [-1, *range(40, 72), -2]
    assert not conversion_minilm.runs(first).isdisjoint(conversion_minilm.runs(shifted))
    assert conversion_minilm.runs(first).isdisjoint(conversion_minilm.runs(shifted[:-2]))


def _bed(done, name="tiny"):
    return conversion_bed.Bed(
        name=name,
        title=name,
        layers=2,
        students={"a": {"kv_heads": 1}},
        seconds=(3.0,),
        rates=(1e-3,),
        windows=1,
        generate=5,
        prepare=lambda sizes, fields: done.append(fields),
        score=lambda folder: {},
        facts={"known": 1},
    )


def test_conversion_rows_are_kept_and_left_out(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(conversion_bed.console, "print", lambda *text: lines.append(str(text[0])))
    for module in (common, conversion_bed):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    asked = []

    def measure(bed, student, method, seconds, generate, seed, rates):
        asked.append((student, method, seconds, generate, seed))
        if method == "svd":
            raise conversion_bed.NotApplicable("no such start")
        return dict(zip(conversion_bed.KEY, asked[-1], strict=True)) | {"seconds": 1.0}

    path = tmp_path / "tiny.json"
    monkeypatch.setattr(conversion_bed, "measure", measure)
    conversion_bed.run(_bed([]), None, ["--methods", "mean", "svd"])
    assert asked == [("a", "mean", 0.0, 5, 0), ("a", "svd", 0.0, 5, 0)]
    assert "a, svd left out: no such start" in lines
    asked.clear()
    conversion_bed.run(_bed([]), None, ["--methods", "mean", "ours", "--resume"])
    assert asked == [("a", "ours", 3.0, 5, 0)]
    asked.clear()
    seeds = ["--seeds", "0", "1"]
    conversion_bed.run(_bed([]), None, ["--methods", "ours", "--resume", *seeds])
    assert asked == [("a", "ours", 3.0, 5, 1)]
    asked.clear()
    conversion_bed.run(_bed([]), None, ["--methods", "ours", "--resume", "--generate", "0"])
    assert asked == [("a", "ours", 3.0, 0, 0)]
    written = json.loads(path.read_text())
    assert written["known"] == 1
    assert [row["method"] for row in written["rows"]] == ["mean", "ours", "ours", "ours"]


def test_conversion_rows_of_runs_side_by_side_are_all_kept(tmp_path):
    path = tmp_path / "tiny.json"
    own = dict(zip(conversion_bed.KEY, ("a", "ours", 3.0, 5, 1), strict=True))
    older = {name: own[name] for name in conversion_bed.KEY[:-1]}  # of seed 0
    assert conversion_bed.merged(path, [own]) == [own]
    path.write_text(json.dumps({"rows": [older]}))
    assert conversion_bed.merged(path, [own]) == [older, own]
    assert conversion_bed.merged(path, [own, {**older, "seed": 0}]) == [older, own]


@pytest.mark.parametrize(
    ("method", "bound", "final"),
    [("adam", None, False), ("ours", 6.0, False), ("adam+", 6.0, True), ("final", 6.0, True)],
)
def test_the_clock_bounds_ours_for_all_layers(method, bound, final):
    fields = conversion_bed.settings(_bed([]), method, 3.0, 5, 7)
    assert fields["max_seconds"] == bound
    assert (fields["final_steps"] > 0) == final
    assert (fields["generate"], fields["seed"]) == (5, 7)


def test_multimodal_cases_with_and_without_the_peer():
    first = multimodal.case(4, 0, 16, 1)
    second = multimodal.case(4, 1, 16, 1, seconds=60.0)
    assert second["peer"] is None
    assert first["peer"]["evaluations"] > 1
    assert first["ours"]["minima"]["starts"] == 16
    found = multimodal.summary([first, second])
    assert (found["ours"]["instances"], found["peer"]["instances"]) == (2, 1)
    line = summary._multimodal({"widths": {"4": {"summary": found}}})[0]
    assert f"found on {found['ours']['found']} of 2" in line


def test_a_multimodal_batch_of_losses_is_their_sum():
    A, B = multimodal.instance(4, 0)
    X, Y = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    single = [multimodal.loss_of(A, B, x, y) for x, y in zip(X, Y, strict=True)]
    assert float(multimodal.loss_of(A, B, X, Y)) == pytest.approx(float(sum(single)), rel=1e-12)
