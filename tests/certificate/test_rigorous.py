"""Ball arithmetic: enclosures against 60 digits and against float64."""

import math

import mpmath
import pytest
import torch

from attnreg.certificate.balls import Balls, above, as_balls, spectral_bound, working_precision
from attnreg.certificate.bounds import GeometryObserver
from attnreg.certificate.coordinates import Coordinates, Setting
from attnreg.certificate.curvature import CurvatureObserver
from attnreg.certificate.gradient import evaluate
from attnreg.certificate.rigorous import rigorous_findings
from tests.cases import CASES, twin
from tests.certificate import exact
from tests.certificate.test_gradient import CENTER, TINY
from tests.twins import normal, relative


def test_precision_is_put_back():
    with working_precision() as flint:
        inside = flint.ctx.prec
    assert flint.ctx.prec != inside


def test_above_is_above():
    with working_precision() as flint:
        third = flint.arb(1) / 3
        assert flint.arb(above(third)) > third
        assert above(third) < 1 / 3 + 1e-15
        assert above(flint.arb("nan")) == math.inf


def test_spectral_bound():
    matrix = normal(9, 5)
    with working_precision() as flint:
        found = above(spectral_bound(flint, as_balls(flint, matrix.mT @ matrix)))
    true = float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    assert true <= found < 1.06 * true  # 5^(1/64) at most


@pytest.mark.parametrize("name", TINY)
def test_enclosures_hold_the_exact_values(name):
    case, parameters = TINY[name](), {"X": normal(2, 2, seed=8), "Y": normal(2, 2, seed=9)}
    center = CENTER if "ridge_x" in case.options else None
    with mpmath.workdps(exact.DIGITS), working_precision() as flint:
        setting, coordinates, x, y = exact.whitened(case, center, parameters)
        found = Balls(flint, setting, coordinates).evaluate()
        wanted = [entry for rows in (x, y) for row in rows for entry in row]
        largest = max(abs(entry) for entry in wanted)
        for ball, entry in zip(found.gradient.entries(), wanted, strict=True):
            # The difference quotient is right to 1e-36, which whitening magnifies by up to 1e12.
            assert abs(mpmath.mpf(str(ball.mid().str(70, radius=False))) - entry) < 1e-22 * largest
            assert float(ball.rad()) < 1e-50 * float(largest)


@pytest.mark.parametrize("name", CASES)
def test_midpoints_are_the_float64_values(name):
    made = twin(name, "bilinear")
    problem, parameters = made.case.problem(center=made.center), made.random(3)
    setting = Setting.of(problem, parameters)
    coordinates = Coordinates.of(setting, problem.dtype)
    curvature_of = CurvatureObserver(setting, coordinates)
    geometry_of = GeometryObserver(setting, coordinates)
    gradient = evaluate(setting, coordinates, lambda r: (curvature_of(r), geometry_of(r)))
    curvature = curvature_of.result()
    with working_precision() as flint:
        found = Balls(flint, setting, coordinates).evaluate()
        flat = torch.tensor([float(e) for e in found.hessian.entries()], dtype=torch.float64)
        value = float(found.value)
    matrix = flat.view(curvature.matrix.shape)
    n, error = curvature.split, curvature.matrix - matrix
    assert relative(curvature.matrix, matrix) < 1e-14
    # The stated rounding of the float64 Hessian, block by block.
    assert float(torch.linalg.matrix_norm(error[:n, :n], 2)) <= curvature.xx
    assert float(torch.linalg.matrix_norm(error[n:, :n], 2)) <= curvature.xy
    assert float(torch.linalg.matrix_norm(error[n:, n:], 2)) <= curvature.yy
    assert gradient.value == pytest.approx(value, rel=1e-15)
    findings = rigorous_findings(problem, setting, coordinates)
    ours = geometry_of.result()
    for a, b in zip(findings.geometry.sequences, ours.sequences, strict=True):
        for size in ("K", "delta", "omega", "beta", "alpha", "rho", "rho_alpha"):
            # float64 sizes are enlarged by 1e-9: never below the enclosed ones.
            assert getattr(a, size) <= getattr(b, size) <= getattr(a, size) * (1 + 1e-8)
    assert ours.features <= findings.geometry.features * (1 + 1e-8)
