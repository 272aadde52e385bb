"""Lower bounds of Hessians and the Newton decrement, on matrices whose answer is known."""

import mpmath
import pytest
import torch

from attnreg.certificate.curvature import Curvature
from attnreg.certificate.gradient import Gradient
from attnreg.certificate.spectrum import lower_bounds, smallest_curvature
from tests.twins import normal

SPLIT, SIZE = 6, 10


def curvature(condition, error=0.0, seed=0):
    """A Hessian with eigenvalues from 1 to ``1 / condition`` and blocks of very different sizes."""
    basis = torch.linalg.qr(normal(SIZE, SIZE, seed=seed)).Q
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), SIZE)
    scale = torch.ones(SIZE, dtype=torch.float64)
    scale[SPLIT:] = 2.0**20
    matrix = scale[:, None] * ((basis * values) @ basis.mT) * scale
    return Curvature((matrix + matrix.mT) / 2, SPLIT, error, error * 2.0**20, error * 2.0**40)


def gradient(vector, error=0.0):
    return Gradient(vector[:SPLIT].view(2, 3), vector[SPLIT:].view(2, 2), error, error, 1.0, 1.0)


def shorted(matrix, part):
    """Smallest eigenvalue of the Schur complement on a part: the best bound there is."""
    with mpmath.workdps(50):
        inverse = mpmath.matrix(matrix.tolist()) ** -1
        block = mpmath.matrix([[inverse[i, j] for j in part] for i in part])
        return 1 / max(mpmath.eigsy(block, eigvals_only=True))


@pytest.mark.parametrize("condition", [1e1, 1e5, 1e9])
def test_bounds_are_below_the_best_ones(condition):
    c = curvature(condition)
    found = lower_bounds(c, gradient(normal(SIZE, seed=3)))
    for bound, part in ((found.x, range(SPLIT)), (found.y, range(SPLIT, SIZE))):
        best = shorted(c.matrix, part)
        assert 0.85 * best < bound <= best


@pytest.mark.parametrize("condition", [1e1, 1e5, 1e9])
def test_decrement_is_above_the_true_one(condition):
    c = curvature(condition)
    for seed in range(5):
        g = normal(SIZE, seed=seed)
        found = lower_bounds(c, gradient(g)).decrement
        with mpmath.workdps(50):
            column = mpmath.matrix(g.tolist())
            solution = mpmath.lu_solve(mpmath.matrix(c.matrix.tolist()), column)
            true = mpmath.sqrt(mpmath.fdot(column, solution))
        # Above by rounding only, which the condition magnifies.
        assert true <= found <= true * (1 + 3e-15 * condition + 3e-12)


def test_errors_are_added():
    c, g = curvature(1e3), normal(SIZE, seed=1)
    sure = lower_bounds(c, gradient(g))
    unsure = lower_bounds(curvature(1e3, error=1e-4), gradient(g, error=1e-3))
    assert unsure.x < sure.x
    assert unsure.y < sure.y
    assert unsure.decrement > sure.decrement
    assert lower_bounds(curvature(1e3, error=2e-3), gradient(g)) is None  # 1e-3 is the smallest


@pytest.mark.parametrize("smallest", [-1e-3, -1e-15, 0.0, 1e-16])
def test_what_is_not_positive_definite_beyond_rounding_is_refused(smallest):
    basis = torch.linalg.qr(normal(SIZE, SIZE)).Q
    values = torch.ones(SIZE, dtype=torch.float64)
    values[0] = smallest
    matrix = (basis * values) @ basis.mT
    c = Curvature((matrix + matrix.mT) / 2, SPLIT, 0.0, 0.0, 0.0)
    assert lower_bounds(c, gradient(normal(SIZE, seed=1))) is None
    assert smallest_curvature(c.matrix) == pytest.approx(smallest, abs=1e-2)


def test_negative_diagonal():
    c = Curvature(-torch.eye(SIZE, dtype=torch.float64), SPLIT, 0.0, 0.0, 0.0)
    assert lower_bounds(c, gradient(normal(SIZE))) is None
    assert smallest_curvature(c.matrix) == pytest.approx(-1.0)
