"""The readout against dense least squares."""

import pytest
import torch

from attnreg.readout import NormalEquations, gram64, scaled_inverse
from tests.twins import normal, relative

ROWS, K, OUT = 30, 6, 3
F, B = normal(ROWS, K), normal(ROWS, OUT, seed=1)
W = normal(ROWS, 1, seed=2).abs()


def test_plain_least_squares():
    normal_equations = NormalEquations(F, F, None, 0.0, K)
    readout, residual = normal_equations.solve(B, None)
    expected = torch.linalg.lstsq(F, B).solution
    assert normal_equations.rank == K
    assert relative(readout, expected) < 1e-13
    assert relative(residual, F @ expected - B) < 1e-13
    v = normal(K, 2, seed=5)
    assert relative(normal_equations.apply_inverse(v), torch.linalg.solve(F.T @ F, v)) < 1e-12


@pytest.mark.parametrize("damped", [K, K - 1])
def test_weights_ridge_centre_and_damping(damped):
    root = normal(K, K, seed=3)
    ridge, center = root.T @ root, normal(K, OUT, seed=4)
    readout, residual = NormalEquations(W * F, F, ridge, 0.7, damped).solve(B, center)
    damping = 0.7**0.5 * torch.eye(K, dtype=torch.float64)[:damped]
    design = torch.cat([W.sqrt() * F, root, damping])
    target = torch.cat([W.sqrt() * B, root @ center, torch.zeros(damped, OUT)])
    expected = torch.linalg.lstsq(design, target).solution
    assert relative(readout, expected) < 1e-12
    assert relative(residual, F @ expected - B) < 1e-12


@pytest.mark.parametrize("decades", [3, 6])
def test_refinement_reaches_a_backward_stable_solution(decades):
    q, _ = torch.linalg.qr(F)
    v, _ = torch.linalg.qr(normal(K, K, seed=7))
    f = q @ torch.diag(torch.logspace(0, -decades, K, dtype=torch.float64)) @ v
    readout, residual = NormalEquations(f, f, None, 0.0, K).solve(B, None)
    expected = torch.linalg.lstsq(f, B).solution
    assert float((f @ (readout - expected)).norm()) < 1e-9 * float(B.norm())
    assert relative(residual, f @ expected - B) < 1e-9


def deficient():
    """Two equal columns up to their size, one that is zero, one a sum of two others."""
    f = F.clone()
    f[:, 1] = 4 * f[:, 0]
    f[:, 2] = 0.0
    f[:, 5] = f[:, 3] + f[:, 4]
    return f


def test_rank_deficient_is_minimum_norm_in_scaled_coordinates():
    f = deficient()
    normal_equations = NormalEquations(f, f, None, 0.0, K)
    readout, residual = normal_equations.solve(B, None)
    assert normal_equations.rank == 3
    sizes = f.norm(dim=0)
    scaled = torch.where(sizes > 0, f / sizes.clamp_min(1e-300), f)
    expected = torch.linalg.pinv(scaled, rtol=1e-10) @ B
    assert relative(sizes[:, None] * readout, expected * (sizes > 0)[:, None]) < 1e-10
    assert not readout[2].any()
    projected = f @ torch.linalg.pinv(f, rtol=1e-10) @ B
    assert relative(residual, projected - B) < 1e-12


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_units_of_the_columns_do_not_matter(size):
    units = torch.logspace(0, 1, K, dtype=torch.float64) ** (8 if size > 1 else -8)
    normal_equations = NormalEquations(F * units, F * units, None, 0.0, K)
    readout, _ = normal_equations.solve(B, None)
    assert normal_equations.rank == K
    assert relative(units[:, None] * readout, torch.linalg.lstsq(F, B).solution) < 1e-9


def test_fewer_rows_than_columns():
    f, b = F[:4], B[:4]
    normal_equations = NormalEquations(f, f, None, 0.0, K)
    _, residual = normal_equations.solve(b, None)
    assert normal_equations.rank == 4
    assert float(residual.norm()) < 1e-12


def test_all_zero():
    f = torch.zeros(ROWS, K, dtype=torch.float64)
    normal_equations = NormalEquations(f, f, None, 0.0, K)
    readout, residual = normal_equations.solve(B, None)
    assert normal_equations.rank == 0
    assert not readout.any()
    assert torch.equal(residual, -B)


def test_damping_makes_it_regular():
    f = deficient()
    assert NormalEquations(f, f, None, 0.1, K).rank == K


def test_float32_is_accumulated_in_float64():
    f, b = F.float(), B.float()
    readout, residual = NormalEquations(f, f, None, 0.0, K).solve(b, None)
    assert readout.dtype == residual.dtype == torch.float32
    expected = torch.linalg.lstsq(f.double(), b.double()).solution
    assert relative(readout.double(), expected) < 1e-6
    assert relative(gram64(f, b), f.double().T @ b.double()) < 1e-15


def test_gram64_in_chunks(monkeypatch):
    monkeypatch.setattr("attnreg.readout._CHUNK", 7)
    assert relative(gram64(F.float(), B.float()), F.float().double().T @ B.float().double()) < 1e-14


def test_scaled_inverse_is_symmetric():
    f = deficient()
    inverse, rank = scaled_inverse(f.T @ f)
    assert rank == 3
    assert relative(inverse, inverse.T) < 1e-12
    m = f.T @ f
    assert relative(m @ inverse @ m, m) < 1e-10


def test_rank_of_float32_columns_is_that_of_the_exact_ones():
    exact = torch.cat([normal(200, 4), normal(200, 4) @ normal(4, 2, seed=3)], 1)
    b = normal(200, OUT, seed=1)
    f = exact.float()
    normal_equations = NormalEquations(f, f, None, 0.0, K)
    readout, residual = normal_equations.solve(b.float(), None)
    assert normal_equations.rank == 4
    assert float(readout.norm()) < 10
    best = exact @ torch.linalg.pinv(exact, rtol=1e-10) @ b - b
    assert relative(residual.double(), best) < 1e-5
