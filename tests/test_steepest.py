"""Steps of mini-batches: coordinates that change nothing but the steps, and polar factors."""

import pytest
import torch

import attnreg
from attnreg.kronecker import split_blocks
from attnreg.models import Rotary
from attnreg.objective import Objective
from attnreg.solvers.choice import ENOUGH
from attnreg.solvers.minibatches import features_of
from attnreg.solvers.steepest import SCALED, ScaledInputs, polar_factors, scaled_power

GENERATOR = torch.Generator


def normal(seed, *shape):
    return torch.randn(shape, generator=GENERATOR().manual_seed(seed), dtype=torch.float64)


def models():
    multi = attnreg.MultiHead(heads=4, kv_heads=2, head_dim=3, bias=True)
    turned = attnreg.MultiHead(
        heads=2, kv_heads=1, head_dim=4, bias=True, rotary=Rotary((1.3, 0.4)), norm_eps=1e-6
    )
    return {"bilinear": attnreg.Bilinear(), "heads": multi, "norms": turned}


def objective(name, *, cross=False):
    a = [normal(i, n, 6) * torch.logspace(0, -2, 6).double() for i, n in enumerate((7, 9, 9))]
    b = [normal(9 + i, len(x), 5) for i, x in enumerate(a)]
    keys = [normal(20 + i, len(x) + 2, 4) for i, x in enumerate(a)] if cross else None
    problem = attnreg.AttentionProblem(a, b, A2=keys, A3=keys)
    return Objective(problem, models()[name])


CASES = [("bilinear", False), ("bilinear", True), ("heads", False), ("heads", True)]
CASES.append(("norms", False))


@pytest.mark.parametrize(("name", "cross"), CASES)
def test_features_and_gradients_are_those_of_the_given_coordinates(name, cross):
    target = objective(name, cross=cross)
    problem, model = target.problem, target.model
    theta, _ = model.split(problem, model.start(problem, 0))
    inputs = ScaledInputs(target)
    inner = inputs.enter(theta)
    torch.testing.assert_close(inputs.leave(inner), theta, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(inner, theta)
    for batch in problem.batches:
        scaled = inputs.batch(batch)
        assert (scaled.A2 is scaled.A1) == (batch.A2 is batch.A1 and name != "bilinear")
        there, here = features_of(target, scaled, inner), features_of(target, batch, theta)
        torch.testing.assert_close(there.columns, here.columns, rtol=1e-11, atol=1e-12)
        cotangent = normal(3, len(here.columns), target.layout.features)
        wanted, found = here.vjp(cotangent), there.vjp(cotangent)
        torch.testing.assert_close(inputs.gradient(found), wanted, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(inputs.pulled(wanted), found, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("power", [0.2, 0.05, 0.0])
def test_the_second_moment_of_scaled_inputs_is_a_power(power):
    # Along the eigenvectors it is lambda * s^2, that is mean (lambda / mean)^(1 - 2 power).
    target = objective("bilinear")
    inputs = ScaledInputs(target, power)
    rows = torch.cat([b.A1.flatten(0, 1)[b.weights.flatten() > 0] for b in target.problem.batches])
    scaled = torch.cat(
        [inputs.batch(b).A1.flatten(0, 1)[b.weights.flatten() > 0] for b in target.problem.batches]
    )
    moment = rows.mT @ rows / len(rows)
    values = torch.linalg.eigvalsh(moment)
    expected = values.mean() * (values / values.mean()) ** (1 - 2 * power)
    found = scaled.mT @ scaled / len(rows)
    torch.testing.assert_close(found, torch.diag(expected), rtol=1e-9, atol=1e-10)


def test_the_power_grows_with_the_data_up_to_enough():
    found = [scaled_power(share * ENOUGH) for share in (0.0, 0.1, 0.5, 1.0, 10.0)]
    assert found == pytest.approx([share * SCALED for share in (0.0, 0.1, 0.5, 1.0, 1.0)])


@pytest.mark.parametrize("name", ["bilinear", "heads", "norms"])
def test_scales_are_the_lengths_of_a_step(name):
    # T is orthogonal times diagonal: norms of steps need no product.
    target = objective(name)
    inputs, blocks = ScaledInputs(target), target.layout.blocks
    step = normal(4, target.layout.size)
    outside = split_blocks(inputs.leave(step), blocks)
    for block, inside, out in zip(blocks, split_blocks(step, blocks), outside, strict=True):
        expected = float((inputs.scales(block) * inside).norm())
        assert float(out.norm()) == pytest.approx(expected, rel=1e-12)


def test_inputs_of_zero_and_null_directions_stay_finite():
    rows = normal(0, 8, 3)
    problem = attnreg.AttentionProblem(torch.cat([rows, 0 * rows], 1), normal(1, 8, 2))
    for factor in (1.0, 0.0):
        given = attnreg.AttentionProblem(factor * problem.batches[0].A1, problem.batches[0].B)
        inputs = ScaledInputs(Objective(given, attnreg.Bilinear()))
        theta = normal(2, 36)
        torch.testing.assert_close(inputs.leave(inputs.enter(theta)), theta)


@pytest.mark.parametrize(("heads", "rows", "width"), [(1, 7, 3), (3, 7, 4), (2, 3, 3)])
def test_polar_factors_are_those_of_the_svd(heads, rows, width):
    matrix = normal(5, rows, heads * width)
    found = polar_factors(matrix, heads)
    for part, factor in zip(matrix.split(width, 1), found.split(width, 1), strict=True):
        u, _, v = torch.linalg.svd(part, full_matrices=False)
        torch.testing.assert_close(factor, u @ v, rtol=1e-9, atol=1e-10)


def test_polar_factors_do_not_see_size_or_turns():
    matrix = normal(6, 9, 8)
    turn = torch.linalg.qr(normal(7, 9, 9))[0]
    plain = polar_factors(matrix, 2)
    torch.testing.assert_close(polar_factors(1e-6 * matrix, 2), plain, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(polar_factors(turn @ matrix, 2), turn @ plain, rtol=1e-8, atol=1e-9)


def test_polar_factors_of_nothing_are_nothing():
    zero = torch.zeros(5, 6, dtype=torch.float64)
    assert torch.equal(polar_factors(zero, 2), zero)
    thin = torch.cat([normal(8, 5, 1), zero[:, :2]], 1)  # rank 1
    found = polar_factors(thin, 1)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[:, :1], thin[:, :1] / thin[:, :1].norm())
