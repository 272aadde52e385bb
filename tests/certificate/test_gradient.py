"""The gradient of the joint objective and its stated error, against 60 digits."""

import mpmath
import pytest
import torch

from attnreg.certificate.coordinates import Coordinates, Setting
from attnreg.certificate.curvature import CurvatureObserver
from attnreg.certificate.gradient import evaluate
from attnreg.models import Bilinear
from tests.cases import CASES, inputs, twin
from tests.certificate import exact
from tests.twins import Case, Twin, normal, relative

# A difference quotient is right to 1e-36, relative; gradients are rounded to float64 at the end.
ROUNDING = 2.0**-53


def tiny(**changes):
    lengths = (4, 3)
    options = {"scale": 0.6, "ridge_x": 0.03, "ridge_y": 0.2}
    case = Case(inputs(lengths, 2, 1), inputs(lengths, 2, 5), options=options)
    for name, value in changes.items():
        setattr(case, name, value)
    return case


CENTER = {"X": normal(2, 2, seed=70), "Y": normal(2, 2, seed=71)}
TINY = {
    "ridges": tiny,
    "causal, weights": lambda: tiny(
        causal=True, weights=[normal(n, seed=n).abs() for n in (4, 3)], options={}
    ),
    "ill-conditioned inputs": lambda: tiny(
        A1=[a * torch.tensor([1.0, 1e-6], dtype=torch.float64) for a in inputs((4, 3), 2, 1)]
    ),
    "sharp": lambda: tiny(A1=[10 * a for a in inputs((4, 3), 2, 1)]),
}


@pytest.mark.parametrize("name", TINY)
def test_gradient_is_within_its_error(name):
    with mpmath.workdps(exact.DIGITS):
        case, parameters = TINY[name](), {"X": normal(2, 2, seed=8), "Y": normal(2, 2, seed=9)}
        center = CENTER if "ridge_x" in case.options else None
        setting, coordinates, x, y = exact.whitened(case, center, parameters)
        found = evaluate(setting, coordinates)
        assert exact.distance(x, found.x) <= found.x_error
        assert exact.distance(y, found.y) <= found.y_error
        value = exact.value(
            case, center, exact.matrix(parameters["X"]), exact.matrix(parameters["Y"])
        )
        assert abs(found.value - value) <= 4 * ROUNDING * abs(value)
    # Hardly more than the last rounding: the bound is of use.
    assert found.x_error <= 4 * ROUNDING * float(found.x.norm())
    assert found.y_error <= 4 * ROUNDING * float(found.y.norm())


def test_cancellation_leaves_the_small_gradient():
    """At the minimiser of a planted problem the sums cancel; float64 would leave 1e-16."""
    case = tiny(options={})
    parameters = {"X": normal(2, 2, seed=8), "Y": normal(2, 2, seed=9)}
    made = Twin(case, Bilinear())
    case.B = list(made.output(parameters).detach().split([4, 3]))
    with mpmath.workdps(exact.DIGITS):
        setting, coordinates, x, y = exact.whitened(case, None, parameters)
        found = evaluate(setting, coordinates)
        assert 0 < float(found.x.norm()) < 1e-14
        assert exact.distance(x, found.x) <= found.x_error
        assert exact.distance(y, found.y) <= found.y_error
    assert found.x_error < 1e-18
    assert found.y_error < 1e-18


def joint(made, parameters, coordinates):
    """The joint objective of a twin in whitened coordinates, as a function of a flat vector."""
    r1, r2, r3 = coordinates.shape

    def value(z):
        x = parameters["X"] + coordinates.t1 @ z[: r1 * r2].view(r1, r2) @ coordinates.t2.mT
        y = parameters["Y"] + coordinates.t3 @ z[r1 * r2 :].view(r3, -1)
        design, target, extra = made.design(x.reshape(-1))
        return (design @ y - target).square().sum() + extra.square().sum()

    return value, torch.zeros(r1 * r2 + r3 * made.sizes[3], dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_gradient_and_hessian_of_every_kind_of_problem(name):
    made = twin(name, "bilinear")
    damping, made.damping = made.damping, 0.0
    try:
        parameters = made.random(3)
        problem = made.case.problem(center=made.center)
        setting = Setting.of(problem, parameters)
        coordinates = Coordinates.of(setting, problem.dtype)
        observer = CurvatureObserver(setting, coordinates)
        found = evaluate(setting, coordinates, observer)
        value, origin = joint(made, parameters, coordinates)
        origin.requires_grad_()
        gradient = torch.autograd.grad(value(origin), origin)[0]
        hessian = torch.autograd.functional.hessian(value, origin.detach())
    finally:
        made.damping = damping
    flat = torch.cat([found.x.flatten(), found.y.flatten()])
    assert relative(flat, gradient) < 1e-13  # autograd's rounding
    curvature = observer.result()
    n = curvature.split
    error = curvature.matrix - hessian
    assert relative(curvature.matrix, hessian) < 1e-13
    # The bounds on the rounding hold with autograd's rounding on top, and are of use.
    for part, bound in (
        (error[:n, :n], curvature.xx),
        (error[n:, :n], curvature.xy),
        (error[n:, n:], curvature.yy),
    ):
        assert float(torch.linalg.matrix_norm(part, 2)) <= bound
        assert bound < 1e-9 * float(hessian.norm())
