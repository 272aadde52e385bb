"""The command line: bench roofline on small sizes."""

import json
import sys

import pytest
import torch

from attnreg.roofline.measure import SQUARE, STREAM_BYTES

BENCH = ("bench", "roofline")
SMALL = (*BENCH, "--dim", 8, "--heads", 2, "--sequences", 2, "--length", 12)
SMALL = (*SMALL, "--newton-dim", 3, "--newton-length", 40, "--repeats", 1)
KERNELS = ["features", "JVP", "VJP", "Gauss-Newton", "Hessian", "mini-batch", "Newton step"]


@pytest.fixture(autouse=True)
def small_roofs(monkeypatch):
    monkeypatch.setitem(SQUARE, "cpu", 64)
    monkeypatch.setitem(STREAM_BYTES, "cpu", 1 << 16)


def test_json_has_all_that_was_measured(run):
    threads = torch.get_num_threads()
    code, out, err = run(*SMALL, "--kv-heads", 1, "--threads", 1, "--seed", 5, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [kernel["name"] for kernel in found["kernels"]] == KERNELS
    assert found["sizes"]["kv_heads"] == 1
    assert (found["threads"], found["seed"], found["repeats"]) == (1, 5, 1)
    assert (found["dtype"], found["precision"], found["device"]) == ("float32", "float32", "cpu")
    for kernel in found["kernels"]:
        assert 0 < kernel["error"] < 1e-3
        assert kernel["rate"] > 0 < kernel["gemm_rate"]
    assert torch.get_num_threads() == threads


def test_table_fits_a_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(*SMALL, "--precision", "bf16")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "products in bf16" in out
    start = next(i for i, line in enumerate(lines) if line.startswith("kernel "))
    columns = "kernel GFLOP other MB FLOP/B ms GFLOP/s alone share error"
    assert lines[start].split() == columns.split()
    assert [line.split("  ")[0].strip() for line in lines[start + 1 :]] == KERNELS
    assert run(*SMALL, "--quiet") == (0, "", "")


def test_picture(run, folder):
    pytest.importorskip("matplotlib")
    assert run(*SMALL, "--plot", "roofline.png", "--quiet") == (0, "", "")
    assert (folder / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_refused(refused, monkeypatch):
    assert "tf32 needs a CUDA device" in refused(*SMALL, "--precision", "tf32")
    assert "expected one of float32, tf32, bf16" in refused(*SMALL, "--precision", "fp8")
    assert "bf16 is for float32 data" in refused(
        *SMALL, "--precision", "bf16", "--dtype", "float64"
    )
    assert "expected float32 or float64" in refused(*SMALL, "--dtype", "float16")
    assert "device 'nowhere' cannot be used" in refused(*SMALL, "--device", "nowhere")
    assert "heads=3 does not divide dim=8" in refused(*SMALL, "--heads", 3)
    assert "kv_heads=2 does not divide heads=1" in refused(*SMALL, "--heads", 1, "--kv-heads", 2)
    assert "newton_length is 3" in refused(*SMALL, "--newton-length", 3)
    assert "its folder does not exist" in refused(*SMALL, "--plot", "none/roofline.png")
    assert "its ending is none of" in refused(*SMALL, "--plot", "roofline.txt")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    line = refused(*SMALL, "--plot", "roofline.png")
    assert "--plot needs matplotlib: pip install 'attnreg[plots]'" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has one")
def test_a_device_that_is_not_there_is_refused(refused):
    assert "device 'cuda' cannot be used" in refused(*SMALL, "--device", "cuda")


def test_an_interrupted_measurement_says_so(run, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("attnreg.roofline.measure", stop)
    code, out, err = run(*SMALL)
    assert (code, out) == (130, "")
    assert err == "attnreg: interrupted; nothing was measured\n"
