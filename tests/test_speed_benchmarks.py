"""The benchmarks of speed: fitted exponents, and the roofline in every precision."""

import itertools
import json

import pytest
import torch

from attnreg.roofline import Sizes
from attnreg.roofline.measure import SQUARE, STREAM_BYTES, Measurement, Roofline
from benchmarks import common, growth, roofline, summary


def test_exponents_of_powers_are_found():
    entries = [
        {"rows": n, "width": d, "heads": h, "sequences": s, "seconds": 3e-9 * n**2 * d * s}
        for n, d, h, s in itertools.product((64, 128, 512), (32, 64), (2, 8), (1, 4))
    ]
    found = growth.exponents(entries, [e["seconds"] for e in entries], growth.AXES)
    assert list(found) == ["n", "d", "heads", "sequences"]
    for power, expected in zip(found.values(), (2, 1, 0, 1), strict=True):
        assert power == pytest.approx((expected, 0), abs=1e-8)


def test_an_iteration_spends_what_its_products_cost():
    cell = growth.Cell(2, 12, 8, 2)
    entry = growth.measure(cell, 1)
    # A step of a product and more besides: each product of the matrix costs about ten passes.
    assert sum(entry["operations"].values()) > growth.PRODUCTS * 4 * cell.formula
    assert entry["seconds"] > 0 < entry["gemm_seconds"]
    sizes = itertools.product((12, 24), (8, 16), (2, 4), (1, 2))
    grid = [entry | dict(zip(growth.AXES.values(), cell, strict=True)) for cell in sizes]
    found = growth.summarise(grid, 0.0)
    assert set(found["fits"]) == {"seconds", "counted", "formula, s w n (n + d + w)"}


def test_roofline_in_every_precision_with_its_bars(tmp_path, monkeypatch):
    monkeypatch.setitem(SQUARE, "cpu", 64)
    monkeypatch.setitem(STREAM_BYTES, "cpu", 1 << 16)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    small = Sizes(8, 2, None, 2, 12, newton_dim=3, newton_length=40)
    monkeypatch.setattr(roofline, "Sizes", lambda **given: small)
    roofline.main(["--quick", "--repeats", "1"])
    content = json.loads((tmp_path / "roofline-quick.json").read_text())
    assert set(content["runs"]) == {"float32", "bf16"}
    names = [kernel["name"] for kernel in content["runs"]["float32"]["kernels"]]
    assert set(roofline.BARS) <= set(names)
    lines = summary.LINES["roofline"](content)
    assert len(lines) == 2 * len(names)
    assert roofline.precisions("cuda:0") == ["float32", "tf32", "bf16"]


def test_a_missed_bar_is_marked(capsys, monkeypatch):
    lines = []
    monkeypatch.setattr(roofline, "print_table", lambda title, columns, rows: lines.extend(rows))
    numbers = (10, 1, {}, 1, 1.0, 0.5)
    kernels = (
        Measurement("JVP", *numbers, 0.5, 1e-7, ""),
        Measurement("VJP", *numbers, 0.7, 1e-7, ""),
    )
    roofline.print_roofline(
        Roofline(Sizes(), "float32", "float32", "cpu", 1, 1, 0, 1.0, 1.0, kernels)
    )
    assert [row[-2] for row in lines] == ["50% (>= 60%) !", "70% (>= 60%)"]


def test_a_device_is_waited_for(monkeypatch):
    from attnreg.roofline.measure import _seconds

    steps = []
    monkeypatch.setattr(torch.accelerator, "synchronize", steps.append)
    meta = torch.device("meta")
    assert _seconds(lambda: steps.append("run"), meta) > 0
    assert steps == [meta, "run", meta]
    steps.clear()
    _seconds(lambda: steps.append("run"), torch.device("cpu"))
    assert steps == ["run"]
