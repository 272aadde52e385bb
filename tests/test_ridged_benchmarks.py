"""What the benchmarks of the regularised problems stand on."""

import pytest
import torch

from attnreg.curvature.dense import assemble_gauss_newton
from benchmarks import complexity, convergence, sketch
from benchmarks.ridged_problem import ridged


@pytest.mark.parametrize(("sequences", "decades"), [(1, 0.0), (3, 6.0)])
def test_ridge_is_the_stated_multiple_of_the_top(sequences, decades):
    made = ridged(60, 4, ratio=0.1, ridge_y=0.2, sequences=sequences, decades=decades)
    problem = made.problem
    rows = 60 * sequences * torch.eye(4, dtype=torch.float64)
    assert torch.allclose(problem.gram_query, rows, rtol=1e-10, atol=1e-8)
    metric = 2 * torch.kron(problem.gram_query, problem.gram_key)
    values = torch.linalg.eigvals(torch.linalg.solve(metric, assemble_gauss_newton(made.point())))
    # Lanczos runs to the end on 16 unknowns.
    assert float(values.real.max()) - problem.ridge_x == pytest.approx(made.top, rel=1e-8)
    assert problem.ridge_x == pytest.approx(0.1 * made.top, rel=1e-12)


def test_whitening_leaves_the_prediction():
    flat, steep = (ridged(50, 3, ratio=1.0, ridge_y=1e-9, decades=k) for k in (0.0, 5.0))
    for made in (flat, steep):
        # B is the planted prediction with 10 % noise, whatever the inputs' condition.
        size = float(made.problem.batches[0].B.square().sum())
        assert made.point().loss < 0.02 * size


def test_fitted_exponents_are_those_of_a_product_of_powers():
    entries = [{"rows": n, "width": d} for n in (10, 100, 1000) for d in (2, 8, 32)]
    found = complexity.exponents(entries, [e["rows"] ** 2 * e["width"] ** 0.5 for e in entries])
    assert found["n"][0] == pytest.approx(2.0, abs=1e-12)
    assert found["d"][0] == pytest.approx(0.5, abs=1e-12)
    assert max(error for _, error in found.values()) < 1e-10


def test_an_iteration_is_measured_with_its_operations():
    entry = complexity.measure(complexity.Cell("sketch", 64, 4), 1)
    assert entry["rows_sampled"] <= 64
    assert entry["operations"]["attention"] > 0
    assert entry["operations"]["dense"] >= 16**3 // 3
    assert entry["seconds"] > 0.0


def test_line_through_iterations():
    found = {"1e-2": 0, "1e-4": 3, "1e-6": 4, "1e-8": 5, "1e-10": None}
    line = convergence.line(found)
    assert line["b"] == pytest.approx(0.5)
    assert line["a"] == pytest.approx(1.0)
    assert line["a_bound"] == pytest.approx(1.0)
    assert line["largest_residual"] == pytest.approx(0.0, abs=1e-12)


def test_a_case_of_the_sketch():
    case = sketch.Case(1, 100, 3, 10.0, 1.0, 0.6, 0.01)
    full = sketch.run(case, seeds=3)["rates"]["1"]
    assert len(full["distortions"]) == 3
    assert full["failures"] == 0
    assert full["sampled"] <= full["candidates"] <= 100
