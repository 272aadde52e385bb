"""The paper's objects, written out with the Kronecker product, are what the package computes."""

import pytest
import torch

from attnreg.models import Bilinear
from attnreg.objective import Objective, Point
from attnreg.problem import AttentionProblem
from tests.twins import normal, relative

N, D = 6, 3
A1, A2, A3, B = (normal(N, D, seed=s) for s in range(1, 5))
X, Y = normal(D, D, seed=5), normal(D, D, seed=6)
A = torch.kron(A1, A2)  # (n^2, d^2)
BLOCKS = A.unflatten(0, (N, N))  # A_{j0}, (n, d^2)
RHO_X, RHO_Y = 0.3, 0.2


def paper_loss(x, y):
    """The sum over j0 and i0 of the abstract."""
    total = 0.0
    for j0 in range(N):
        u = torch.exp(BLOCKS[j0] @ x)
        alpha = u.sum()
        f = u / alpha
        for i0 in range(D):
            total = total + (f @ (A3 @ y[:, i0]) - B[j0, i0]) ** 2
    return total


def paper_ridge(x, y):
    return RHO_X * (A @ x).square().sum() + RHO_Y * (A3 @ y).square().sum()


@pytest.fixture(scope="module")
def point():
    problem = AttentionProblem(A1, B, A2, A3, ridge_x=RHO_X, ridge_y=RHO_Y)
    objective = Objective(problem, Bilinear())
    return Point(objective, objective.features(X.flatten()))


def test_tensor_trick():
    assert relative(A @ X.flatten(), (A1 @ X @ A2.T).flatten()) < 1e-14
    for j0 in range(N):
        assert relative(BLOCKS[j0] @ X.flatten(), A2 @ X.T @ A1[j0]) < 1e-13


def test_softmax_rows_residuals_and_loss(point):
    x, y = X.flatten(), point.readout
    for j0 in range(N):
        u = torch.exp(BLOCKS[j0] @ x)
        f = u / u.sum()
        assert relative(f @ A3, point.features.columns[j0]) < 1e-13
        entries = torch.stack([f @ (A3 @ y[:, i0]) - B[j0, i0] for i0 in range(D)])
        assert relative(entries, point.residual[j0]) < 1e-12
    assert float(paper_loss(x, y)) == pytest.approx(point.loss, rel=1e-12)
    expected = float(paper_loss(x, y) + paper_ridge(x, y))
    assert expected == pytest.approx(point.regularised, rel=1e-12)


def test_joint_hessian_has_the_reduced_one_as_schur_complement(point):
    """The blocks of the paper's Hessian in (x, y), eliminated, are the reduced Hessian."""

    def value(joint):
        x, y = joint[: D * D], joint[D * D :].view(D, D)
        return paper_loss(x, y) + paper_ridge(x, y)

    joint = torch.cat([X.flatten(), point.readout.flatten()])
    whole = torch.autograd.functional.hessian(value, joint)
    k = D * D
    xx, xy, yy = whole[:k, :k], whole[:k, k:], whole[k:, k:]
    reduced = xx - xy @ torch.linalg.solve(yy, xy.T)
    found = torch.stack([point.hessian(e) for e in torch.eye(k, dtype=torch.float64)])
    assert relative(found, reduced) < 1e-9
    # The y-block is 2 (F^T F + rho_y G3) (x) I: Y enters linearly.
    normal_matrix = point.features.columns.T @ point.features.columns + RHO_Y * A3.T @ A3
    assert relative(yy, 2 * torch.kron(normal_matrix, torch.eye(D).double())) < 1e-9
    # At the best Y the gradient by y is 0 and that by x is the reduced gradient.
    gradient = torch.autograd.functional.jacobian(value, joint)
    assert float(gradient[k:].norm()) < 1e-10 * float(gradient.norm())
    assert relative(gradient[:k], point.gradient) < 1e-10


def test_schur_complement_keeps_the_loewner_order():
    """Part of the sketch's proof: (1 - eps) N <= N~ <= (1 + eps) N passes to the complements."""
    for seed in range(20):
        n = normal(8, 8, seed=seed)
        matrix = n @ n.T + 0.1 * torch.eye(8, dtype=torch.float64)
        root = torch.linalg.cholesky(matrix)
        change = normal(8, 8, seed=100 + seed)
        change = change + change.T
        change *= 0.5 / torch.linalg.eigvalsh(change).abs().max()
        other = root @ (torch.eye(8, dtype=torch.float64) + change) @ root.T
        one, two = (
            m[:5, :5] - m[:5, 5:] @ torch.linalg.solve(m[5:, 5:], m[5:, :5])
            for m in (matrix, other)
        )
        inner = torch.linalg.cholesky(one)
        whitened = torch.linalg.solve_triangular(inner, two, upper=False)
        whitened = torch.linalg.solve_triangular(inner, whitened.T, upper=False)
        values = torch.linalg.eigvalsh((whitened + whitened.T) / 2)
        assert float((values - 1).abs().max()) <= 0.5 * (1 + 1e-10)
