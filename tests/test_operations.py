"""Counted operations against the matrix products that torch executes, and a hand count."""

import pytest
import torch

from attnreg.curvature.dense import assemble_gauss_newton, assemble_hessian
from attnreg.curvature.preconditioner import gauss_newton_estimate, natural_metric
from attnreg.curvature.sketch import sketch_gauss_newton
from attnreg.linear_solve.cholesky import DenseSolver
from attnreg.models import Bilinear, MultiHead, attention
from attnreg.objective import Objective, Point
from attnreg.operations import Operations
from attnreg.problem import AttentionProblem
from attnreg.roofline.trace import trace
from tests.twins import normal

N, M, D, E, V, OUT = 30, 20, 5, 4, 3, 2
MODELS = {
    "bilinear": Bilinear(),
    "heads": MultiHead(4, 2, 2, 3, bias=False),
    "heads and biases": MultiHead(4, 2, 2, 3),
}


def point_of(model, dtype=torch.float64, **options):
    given = normal(N, D, seed=1), normal(N, OUT, seed=2), normal(M, E, seed=3), normal(M, V, seed=4)
    problem = AttentionProblem(*(g.to(dtype) for g in given), **options)
    parameters = model.start(problem, 0)
    objective = Objective(problem, model)
    assert objective.left  # the moments of the inputs are made once, and not counted
    return Point(objective, objective.features(model.split(problem, parameters)[0]))


def signs():
    return torch.Generator().manual_seed(0)


DERIVATIVES = {
    "gradient": lambda p: p.gradient,
    "Gauss-Newton product": lambda p: p.gauss_newton(torch.ones_like(p.theta)),
    "Hessian product": lambda p: p.hessian(torch.ones_like(p.theta)),
    "preconditioner": lambda p: gauss_newton_estimate(p, signs()).inverse(1.0)(p.theta),
    "point": lambda p: Point(p.objective, p.objective.features(p.theta)),
}
MATRICES = {
    "Gauss-Newton matrix": assemble_gauss_newton,
    "Hessian matrix": assemble_hessian,
    "sketch": lambda p: sketch_gauss_newton(p, 1.0, 0.5, signs()),
    "metric": lambda p: natural_metric(p).inverse(0.0)(p.theta),
}


def count(body, point):
    """Operations counted by the package, and those of the products that torch executes."""
    before = point.objective.operations.as_dict()
    executed = trace(lambda: body(point))
    after = point.objective.operations.as_dict()
    spent = {kind: after[kind] - before[kind] for kind in after}
    return spent, sum(product.flops for product in executed.products)


@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cached", [True, False])
def test_products_are_those_that_torch_counts(name, model, dtype, cached, monkeypatch):
    if not cached:
        monkeypatch.setattr("attnreg.models.features.CACHE_BYTES", 0)
    monkeypatch.setattr(attention, "BLOCK_BYTES", 800)
    point = point_of(MODELS[model], dtype)
    spent, expected = count(DERIVATIVES[name], point)
    assert sum(spent.values()) == expected > 0


@pytest.mark.parametrize("name", MATRICES)
def test_assembly_is_what_torch_counts(name):
    point = point_of(Bilinear(), ridge_x=5.0, ridge_y=1.0)
    spent, expected = count(MATRICES[name], point)
    # The readout's normal matrix of sampled rows may be singular: its pseudo-inverse, V^3.
    assert sum(spent.values()) == pytest.approx(expected, abs=2 * V**3)


@pytest.mark.parametrize("name", ["Gauss-Newton matrix", "Hessian matrix"])
def test_assembly_of_several_heads_is_nearly_what_torch_counts(name):
    spent, expected = count(MATRICES[name], point_of(MODELS["heads"]))
    # Outer products, which torch makes as matrix products of inner size 1, are not counted.
    assert 0.98 * expected < sum(spent.values()) <= expected


def test_hand_count_of_a_gradient_and_a_dense_step():
    point = point_of(Bilinear())
    spent, _ = count(lambda p: p.gradient, point)
    expected = Operations(
        attention=2 * N * M * (V + E), projections=2 * N * V * OUT + 2 * N * D * E
    )
    assert spent == expected.as_dict()

    def step(point):
        DenseSolver(assemble_gauss_newton(point), point.objective.operations).solve(
            point.gradient, 0.1
        )

    spent, _ = count(step, point)
    size = D * E
    assert spent["attention"] == 2 * N * M * (E + V)
    assert spent["comoments"] == 2 * N * M * V * E
    assert spent["row_products"] == 2 * N * OUT * V * E + 2 * N * E * OUT * E
    packed = (D * (D + 1) // 2) * (E * (E + 1) // 2)
    assert spent["row_sums"] == 2 * N * packed + 2 * N * V * D * OUT * E
    schur = 2 * V * V * OUT * size + 2 * size * V * OUT * size
    assert spent["dense"] == schur + size**3 // 3 + 4 * size**2
