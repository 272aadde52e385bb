"""Sampled rows: scores against true leverages, and the matrix against the exact one."""

import dataclasses

import pytest
import torch

from attnreg.curvature.dense import assemble_gauss_newton
from attnreg.curvature.sketch import (
    RowSample,
    oversampling,
    sketch_gauss_newton,
    spectral_bound,
)
from attnreg.models import Bilinear, attention
from attnreg.objective import Objective, Point
from attnreg.problem import AttentionProblem
from tests.cases import CASES, twin
from tests.test_objective import point_of
from tests.twins import Twin, normal, padded, relative

RIDGED = [name for name in CASES if "ridges" in name]


def tall(n=400, d=3, ridge_x=5e-4, ridge_y=0.5):
    """A point of one long sequence whose ridges leave much curvature and allow few rows."""
    a, x = normal(n, d, seed=1), 0.3 * normal(d, d, seed=2)
    targets = torch.softmax(a @ x @ a.T, 1) @ a @ normal(d, d, seed=3)
    problem = AttentionProblem(a, targets, ridge_x=ridge_x, ridge_y=ridge_y)
    objective = Objective(problem, Bilinear())
    return Point(objective, objective.features(x.flatten()))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def all_changes(point):
    """Positions and ``C`` of all rows."""
    parts = list(point.features.comoments(None))
    index = torch.cat([p.index for p in parts])
    return index, point.coupling.mT @ torch.cat([p.second.flatten(0, 2) for p in parts])


def leverages(t, point):
    """``w_j ||J_j N^-1 J_j^T||`` from the twin's joint Jacobian, in the order of the columns."""
    theta, readout = point.theta, point.readout

    def residual(theta, readout):
        design, target, extra = t.design(theta)
        return torch.cat([(design @ readout - target).flatten(), extra])

    jt, jo = torch.func.jacrev(residual, argnums=(0, 1))(theta, readout)
    jacobian = torch.cat([jt, jo.flatten(1)], 1)
    inverse = torch.linalg.inv(jacobian.T @ jacobian)
    rows = len(t.rows[3])
    blocks = jacobian[: rows * readout.shape[1]].unflatten(0, (rows, -1))
    norms = torch.linalg.matrix_norm(blocks @ inverse @ blocks.mT, 2)
    lengths = [len(s[0]) for s in t.sequences]
    return padded(t.case.problem(t.center), list(norms[:, None].split(lengths)))[:, 0]


@pytest.mark.parametrize("name", RIDGED)
@pytest.mark.parametrize("ridge", [0.03, 3.0])
def test_scores_bound_the_leverages_and_are_bounded(name, ridge):
    t = twin(name, "bilinear")
    options = t.case.options | {"ridge_x": ridge, "ridge_y": 0.4}
    t = Twin(dataclasses.replace(t.case, options=options), t.model, t.center)
    point = point_of(t)
    sample = RowSample(point, 1.0, seeded(0))
    index, change = all_changes(point)
    bounds, exact = sample._scores.bounds(), torch.zeros(len(index), dtype=torch.float64)
    exact[index] = sample._scores.exact(index, change)
    true = leverages(t, point)
    # Equal up to rounding where the row has weight 0 or the bound is sharp.
    assert (exact >= true * (1 - 1e-9) - 1e-12).all()
    assert (bounds >= exact * (1 - 1e-9) - 1e-12).all()
    assert float(exact.sum()) < 50 * float(true.sum())


def test_spectral_bound_is_close_from_above():
    c = normal(20, 6, 4) * torch.logspace(0, -3, 20, dtype=torch.float64)[:, None, None]
    c[3] = 0.0
    exact = torch.linalg.matrix_norm(c, 2).square()
    for matrices in (c, c.mT):
        found = spectral_bound(matrices)
        assert (found >= exact * (1 - 1e-12)).all()
        assert (found <= exact * 4**0.125 * (1 + 1e-12)).all()


@pytest.mark.parametrize("name", RIDGED)
def test_with_every_row_it_is_the_exact_matrix(name):
    point = point_of(twin(name, "bilinear"))
    sketch = sketch_gauss_newton(point, 1e-3, 0.01, seeded(0))
    assert sketch.exact
    assert sketch.sampled == sketch.available == int((point.objective.weights > 0).sum())
    # Scores of rows that hold no data, and rounding of sums in another order.
    assert relative(sketch.matrix, assemble_gauss_newton(point)) < 1e-12


@pytest.mark.parametrize("name", RIDGED)
def test_chosen_rows_are_those_of_the_whole(name, monkeypatch):
    point = point_of(twin(name, "bilinear"))
    cotangent = normal(*point.residual.shape, seed=5) @ point.coupling.mT
    whole = list(point.features.comoments(cotangent))
    index = torch.cat([p.index for p in whole])
    chosen = torch.arange(1, len(point.residual), 3)
    monkeypatch.setattr(attention, "BLOCK_BYTES", 200)
    parts = list(point.features.comoments(cotangent, chosen))
    assert torch.cat([p.index for p in parts]).equal(chosen)
    place = torch.empty_like(index)
    place[index] = torch.arange(len(index))
    for attribute in ("inputs", "second", "third"):
        expected = torch.cat([getattr(p, attribute) for p in whole])[place[chosen]]
        found = torch.cat([getattr(p, attribute) for p in parts])
        assert (found - expected).abs().max() < 1e-12 * expected.abs().max(), attribute


def test_candidates_are_thinned_to_what_all_scores_would_give():
    point = tall()
    rate = 20.0
    sample = RowSample(point, rate, seeded(4))
    assert sample.candidates is not None
    assert len(sample.candidates) < sample.available
    assemble_gauss_newton(point, sample)
    index, change = all_changes(point)
    probability = (rate * sample._scores.exact(index, change)).clamp_max(1.0)
    draws = torch.rand(len(index), generator=seeded(4), dtype=torch.float64)
    assert sample.sampled == int((draws[index] < probability).sum())
    assert 0 < sample.sampled < len(sample.candidates)


def test_factors_have_expectation_one():
    point = tall()
    index, change = all_changes(point)
    total, runs = torch.zeros(len(index), dtype=torch.float64), 2000
    sample = RowSample(point, 60.0, seeded(0))
    probability = (60.0 * sample._scores.exact(index, change)).clamp_max(1.0)
    for seed in range(runs):
        sample._draws = torch.rand(len(index), generator=seeded(seed), dtype=torch.float64)
        kept, factors = sample.keep(index, change)
        total[kept] += factors
    error = ((1 - probability) / probability / runs).sqrt()
    # 400 rows: the largest of as many normal deviates is below 4.5 with probability 0.997.
    assert ((total / runs - 1).abs() <= 4.5 * error + 1e-12).all()


def test_the_same_seed_gives_the_same_matrix():
    point = tall()
    first, again, other = (sketch_gauss_newton(point, 0.6, 0.01, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first.matrix, again.matrix)
    assert not torch.equal(first.matrix, other.matrix)


def test_distortion_is_within_the_statement():
    point = tall()
    exact = assemble_gauss_newton(point)
    root = torch.linalg.cholesky(exact)
    distortions = []
    for seed in range(40):
        sketch = sketch_gauss_newton(point, 0.6, 0.05, seeded(seed))
        assert not sketch.exact
        assert sketch.sampled < 300
        inner = torch.linalg.solve_triangular(root, sketch.matrix, upper=False)
        inner = torch.linalg.solve_triangular(root, inner.mT, upper=False)
        values = torch.linalg.eigvalsh((inner + inner.mT) / 2)
        distortions.append(float((values - 1).abs().max()))
    # At most 5 % may fail; the inequality is loose, so none does.
    assert max(distortions) < 0.6
    assert min(distortions) > 0.01


def test_fewer_rows_for_a_stronger_ridge():
    sizes = []
    for ridge in (5e-5, 5e-4, 5e-3):
        sketch = sketch_gauss_newton(tall(ridge_x=ridge), 0.6, 0.01, seeded(0))
        sizes.append(sketch.sampled)
    assert sizes[0] > sizes[1] > sizes[2]


def test_the_size_follows_the_formula():
    point = tall()
    index, change = all_changes(point)
    rate = oversampling(18, 0.6, 0.01)
    assert rate == pytest.approx(8 / 3 / 0.36 * 8.188689124444204, rel=1e-12)  # ln(3600)
    scores = RowSample(point, rate, seeded(0))
    expected = float((rate * scores._scores.exact(index, change)).clamp_max(1.0).sum())
    found = [sketch_gauss_newton(point, 0.6, 0.01, seeded(s)).sampled for s in range(20)]
    # Mean of 20 sums of independent indicators: standard deviation below sqrt(expected / 20).
    assert abs(sum(found) / 20 - expected) < 4 * (expected / 20) ** 0.5


@pytest.mark.parametrize(
    ("distortion", "failure"), [(0.0, 0.1), (1.5, 0.1), (0.5, 0.0), (0.5, 1.0)]
)
def test_numbers_out_of_range_are_refused(distortion, failure):
    with pytest.raises(ValueError, match="was given"):
        sketch_gauss_newton(tall(n=20), distortion, failure, seeded(0))
