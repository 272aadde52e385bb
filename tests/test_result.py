"""What a fit takes and refuses, hands back, saves, loads and predicts."""

import dataclasses
import math

import pytest
import torch

from attnreg.fitting import fit
from attnreg.models import Bilinear, MultiHead, pool_kv_heads
from attnreg.problem import AttentionProblem
from attnreg.result import FitResult
from tests.cases import CASES, MODELS, cross, planted, ragged
from tests.twins import Twin, normal, relative

HEADS = MultiHead(2, head_dim=2)
NOISY = planted(Bilinear(), 0.1)[0].problem()


@pytest.fixture(scope="module")
def fits():
    case, parameters = planted(HEADS, 0.1)
    return {
        "bilinear": fit(NOISY, max_iterations=12),
        "scaled": fit(ragged(options={"scale": 0.3}).problem(), max_iterations=5),
        "heads": fit(case.problem(), HEADS, init=parameters, max_iterations=3),
        "float32": fit(NOISY.to(torch.float32), max_iterations=2),
        "gqa": fit(cross().problem(), MultiHead(4, 2, 3, 2), max_iterations=2),
    }


@pytest.mark.parametrize("name", ["bilinear", "scaled", "heads", "float32", "gqa"])
def test_save_and_load(fits, name, tmp_path):
    result = fits[name]
    path = tmp_path / "fit.safetensors"
    result.save(path)
    again = FitResult.load(path)
    for field in dataclasses.fields(FitResult):
        if field.name != "parameters":
            assert getattr(again, field.name) == getattr(result, field.name), field.name
    assert again.parameters.keys() == result.parameters.keys()
    for key, value in result.parameters.items():
        assert torch.equal(again.parameters[key], value)
        assert again.parameters[key].dtype == value.dtype
    inputs = [normal(k, 4, seed=k).to(value.dtype) for k in (5, 9)]
    if name == "gqa":
        other = [normal(k, d, seed=k) for d in (3, 5) for k in (5, 9)]
        arguments = (inputs, other[:2], other[2:])
    else:
        arguments = (inputs,)
    for a, b in zip(again.predict(*arguments), result.predict(*arguments), strict=True):
        assert torch.equal(a, b)


def test_loading_refuses_what_is_no_fit(fits, tmp_path):
    NOISY.save(tmp_path / "problem.safetensors")
    with pytest.raises(ValueError, match="'problem', a fit is expected"):
        FitResult.load(tmp_path / "problem.safetensors")
    fits["heads"].save(tmp_path / "fit.safetensors")
    with pytest.raises(ValueError, match="fit"):
        AttentionProblem.load(tmp_path / "fit.safetensors")
    with pytest.raises(ValueError, match="missing"):
        FitResult.load(tmp_path / "missing.safetensors")
    content = (tmp_path / "fit.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-20])
    with pytest.raises(ValueError, match="cut"):
        FitResult.load(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_predict_on_a_problem_is_the_twins_output(case, model):
    t = Twin(CASES[case](), MODELS[model])
    parameters = t.random(5)
    result = dataclasses.replace(
        fit(NOISY, max_iterations=0), model=t.model, parameters=parameters, scale=0.123
    )
    problem = t.case.problem(parameters)
    found = result.predict(problem)
    found = found.flatten(0, 1) if t.case.stack else torch.cat(found)
    assert relative(found, t.output(parameters)) < 1e-12
    mask = problem.mask
    arguments = {"A2": t.case.A2, "A3": t.case.A3, "mask": mask}
    again = dataclasses.replace(result, scale=problem.scale).predict(t.case.A1, **arguments)
    assert relative(torch.cat(again), t.output(parameters)) < 1e-12


def test_predict_keeps_the_structure_of_the_inputs(fits):
    result = fits["bilinear"]
    rows = normal(6, 4)
    matrix = result.predict(rows)
    assert matrix.shape == (6, 3)
    assert torch.equal(result.predict(rows.numpy()), matrix)
    batch = result.predict(torch.stack([rows, rows]))
    assert batch.shape == (2, 6, 3)
    several = result.predict([rows, rows[:2]])
    assert [tuple(x.shape) for x in several] == [(6, 3), (2, 3)]
    for x in (batch[1], several[0]):
        assert torch.allclose(x, matrix, rtol=0, atol=1e-13)
    causal = result.predict(rows, mask="causal")
    assert torch.allclose(causal[-1], matrix[-1], rtol=0, atol=1e-13)
    assert torch.allclose(causal[0], rows[0] @ result.Y, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="shape"):
        result.predict(normal(6, 5))
    with pytest.raises(ValueError, match="nan"):
        result.predict(rows * math.nan)


def test_a_causal_fit_predicts_causally(tmp_path):
    case, parameters = planted(Bilinear(), 0.1)
    problem = case.problem().replace(mask="causal")
    result = fit(problem, init=parameters, max_iterations=1)
    rows, mask = normal(6, 4), torch.ones(6, 6).triu(-3).bool()
    result.save(tmp_path / "fit.safetensors")
    for r in (result, FitResult.load(tmp_path / "fit.safetensors")):
        assert r.causal
        for given in (None, "causal"):
            assert torch.equal(r.predict(rows, mask=given)[:3], r.predict(rows[:3]))
        both = r.predict(rows, mask=mask)
        assert torch.equal(both, r.predict(rows, mask=("causal", mask)))
        assert not torch.allclose(both, r.predict(rows))
        with pytest.raises(ValueError, match="expected 'causal'"):
            r.predict(rows, mask="casual")


def test_X_and_Y_belong_to_bilinear_fits(fits):
    assert fits["bilinear"].X.shape == (4, 4)
    assert fits["bilinear"].Y.shape == (4, 3)
    for name in "XY":
        with pytest.raises(AttributeError, match="MultiHead fit has no"):
            getattr(fits["heads"], name)
    assert fits["bilinear"].problem_digest == NOISY.digest()


# ---------------------------------------------------------------------- init


@pytest.mark.parametrize("iterations", [0, 2, 15])
def test_a_result_continues(iterations):
    first = fit(NOISY, max_iterations=iterations)
    second = fit(NOISY, init=first)
    assert second.converged
    assert second.history[0].loss == pytest.approx(first.loss, rel=1e-9)
    assert second.history[0].path == 0.0
    assert second.loss == pytest.approx(fit(NOISY).loss, rel=1e-7)
    done = fit(NOISY, init=second)
    assert len(done.history) == 1
    assert torch.equal(done.X, second.X)


def test_a_result_of_another_model_is_refused(fits):
    with pytest.raises(ValueError, match=r"pass model=init\.model"):
        fit(NOISY, HEADS, init=fits["bilinear"])
    assert fit(NOISY.replace(B=NOISY.batches[0].B), init=fits["bilinear"]).converged


def test_gauge_biases_stay_as_given():
    case, parameters = planted(HEADS, 0.1)
    result = fit(case.problem(), HEADS, init=parameters, max_iterations=3)
    for name in ("b_K", "b_V"):
        assert torch.equal(result.parameters[name], parameters[name])
    assert parameters.keys() == result.parameters.keys()


GOOD = {"X": normal(4, 4), "Y": normal(4, 3)}
BAD = {
    "missing": {"X": GOOD["X"]},
    "unknown": GOOD | {"Z": normal(1)},
    "shape": GOOD | {"X": normal(4, 5)},
    "transposed": GOOD | {"Y": normal(3, 4)},
    "nan": GOOD | {"X": GOOD["X"] * math.nan},
    "inf": GOOD | {"Y": GOOD["Y"] * math.inf},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_starts_are_refused(name):
    with pytest.raises(ValueError, match=r"[XYZ]"):
        fit(NOISY, init=BAD[name])
    with pytest.raises(ValueError, match=r"[XYZ]"):
        fit(NOISY.replace(ridge_x=1.0, center=None), init=BAD[name])


def test_a_start_in_another_precision_or_from_numpy_is_cast():
    start = {name: value.float().numpy() for name, value in GOOD.items()}
    result = fit(NOISY, init=start, max_iterations=1)
    assert result.X.dtype == torch.float64


def test_a_start_is_not_written_to():
    start = {name: value.clone() for name, value in GOOD.items()}
    fit(NOISY, init=start, max_iterations=2)
    assert all(torch.equal(start[name], GOOD[name]) for name in GOOD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"tol": tol}, "tol=") for tol in (0.0, -1.0, math.nan, math.inf)),
        ({"max_iterations": -1}, "max_iterations="),
        *(({"max_seconds": s}, "max_seconds=") for s in (0.0, -1.0, math.nan)),
    ],
)
def test_bad_bounds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit(NOISY, **options)


# ---------------------------------------------------------------------- MultiHead


@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 0},
        {"heads": 2.0},
        {"heads": True},
        {"heads": 4, "kv_heads": 3},
        {"heads": 2, "head_dim": 0},
        {"heads": 2, "v_head_dim": -1},
    ],
)
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="head"):
        MultiHead(**sizes)


def test_head_dim_must_be_given_where_heads_do_not_divide_the_width():
    with pytest.raises(ValueError, match="pass head_dim"):
        fit(NOISY, MultiHead(3))


def test_a_multihead_ridge_without_a_centre_is_refused():
    for ridge in ("ridge_x", "ridge_y"):
        with pytest.raises(ValueError, match="center=weights"):
            fit(NOISY.replace(**{ridge: 1.0}), HEADS)
    with pytest.raises(ValueError, match="W_Q"):
        fit(NOISY.replace(ridge_x=1.0, center={"W_Q": normal(4, 4)}), HEADS)


def test_pooling_averages_groups_of_heads():
    full = MultiHead(4, head_dim=3, v_head_dim=2)
    weights = Twin(planted(full)[0], full).random(3)
    pooled = pool_kv_heads(weights, 4, 2)
    assert pooled.keys() == weights.keys()
    for name, width in (("W_K", 3), ("b_K", 3), ("W_V", 2), ("b_V", 2)):
        for group in range(2):
            parts = [
                weights[name][..., h * width :][..., :width] for h in (2 * group, 2 * group + 1)
            ]
            found = pooled[name][..., group * width :][..., :width]
            assert torch.allclose(found, sum(parts) / 2, rtol=1e-15, atol=0)
    assert torch.equal(pooled["W_Q"], weights["W_Q"])
    same = pool_kv_heads(weights, 4, 4)
    assert all(torch.equal(same[name], weights[name]) for name in weights)


def test_pooling_refuses_what_does_not_divide():
    weights = {"W_K": normal(4, 12), "W_V": normal(4, 12)}
    for kv_heads in (0, 3, 8, -1):
        with pytest.raises(ValueError, match="divisor"):
            pool_kv_heads(weights, 4, kv_heads)
    with pytest.raises(ValueError, match="no multiple of heads=5"):
        pool_kv_heads(weights, 5, 1)


def test_a_pooled_start_improves():
    full, few = MultiHead(4, head_dim=2), MultiHead(4, 2, 2)
    case, weights = planted(full, n=30)
    result = fit(case.problem(), few, init=pool_kv_heads(weights, 4, 2), max_iterations=25)
    assert result.loss < 0.7 * result.history[0].loss
    output = Twin(case, few).output(result.parameters)
    expected = float((output - torch.cat(case.B)).square().sum())
    assert result.loss == pytest.approx(expected, rel=1e-9)
