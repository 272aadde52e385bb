"""The proven constants against sampled maxima: never exceeded, and how tight."""

import math

import pytest
import torch

from attnreg.certificate.bounds import (
    C2,
    C3,
    C4,
    GeometryObserver,
    SpectrumObserver,
    diameter,
    third_derivative,
)
from attnreg.certificate.convexity import convexity
from attnreg.certificate.coordinates import Coordinates, Setting
from attnreg.certificate.curvature import CurvatureObserver
from attnreg.certificate.gradient import evaluate
from attnreg.models import Bilinear
from tests.cases import CASES, inputs, twin, visible
from tests.certificate.test_gradient import joint
from tests.twins import Case, Twin, normal

ROUNDING = 1 + 1e-10  # of autograd's derivatives


# ------------------------------------------------------------------ softmax cumulants


def cumulants(p, w, z):
    """Second, third and fourth cumulant of rows of distributions, ``k(w, z, ...)``."""
    mean = (p * z).sum(-1, keepdim=True)
    z, w = z - mean, w - (p * w).sum(-1, keepdim=True)
    variance = (p * z.square()).sum(-1)
    second = (p * w * z).sum(-1)
    third = (p * w * z.square()).sum(-1)
    fourth = (p * w * z**3).sum(-1) - 3 * variance * second
    return second, third, fourth


def climb(order, seed, steps=300):
    """Largest cumulant found by gradient ascent from many starts, with ranges of 1."""
    logits, w, z = (normal(64, 4, seed=seed + i).requires_grad_() for i in range(3))
    optimiser = torch.optim.Adam([logits, w, z], lr=0.05)
    for _ in range(steps):
        found = cumulants(logits.softmax(-1), torch.sigmoid(w), torch.sigmoid(z))[order - 2]
        optimiser.zero_grad()
        (-found.abs().sum()).backward()
        optimiser.step()
    return float(found.abs().max().detach())


@pytest.mark.parametrize(("order", "bound"), [(2, C2), (3, C3), (4, C4)])
def test_cumulants_of_a_softmax(order, bound):
    largest = max(climb(order, seed) for seed in (0, 10))
    assert largest <= bound
    assert largest > 0.97 * bound  # near attained: the constants are the right ones


def test_the_third_cumulant_is_attained():
    p = 0.5 - 1 / (2 * math.sqrt(3))  # w = z = the indicator of an event: p (1 - p) (1 - 2 p)
    third = cumulants(
        *(torch.tensor([v], dtype=torch.float64) for v in ([p, 1 - p], [1, 0], [1, 0]))
    )
    assert abs(float(third[1])) == pytest.approx(C3, rel=1e-12)


def test_bound_of_the_fourth_cumulant():
    """The last step of the proof: the bounds on ``Var phi`` stay below ``(2 C4)^2``."""
    m = torch.linspace(0.5, 1.0, 2001, dtype=torch.float64)
    top = m * (1 - m)
    # Increasing in v: largest at v = M (1 - M); the slope of the whole in M is below 1.
    first = (m.square() * top.square() + 3 * top**3).max()
    second = (4 * m**6 / 81).max()
    assert float(max(first, second)) + 0.5 / 2000 * 0.2 <= (2 * C4) ** 2


# ------------------------------------------------------------------ third derivative


def whitened(made, parameters):
    problem = made.case.problem(center=made.center)
    setting = Setting.of(problem, parameters)
    return setting, Coordinates.of(setting, problem.dtype)


def geometry_at(setting, coordinates):
    observer = GeometryObserver(setting, coordinates)
    evaluate(setting, coordinates, observer)
    return observer.result()


def third(value, origin, direction):
    """``D^3 F[d, d, d]`` as a differentiable function of the direction."""
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    found = value(origin + t * direction)
    for _ in range(3):
        (found,) = torch.autograd.grad(found, t, create_graph=True)
    return found


@pytest.mark.parametrize("name", CASES)
def test_third_derivative_is_never_exceeded(name, record_property):
    made = twin(name, "bilinear")
    damping, made.damping = made.damping, 0.0
    parameters = {k: 0.7 * v for k, v in made.random(40).items()}
    setting, coordinates = whitened(made, parameters)
    geometry = geometry_at(setting, coordinates)
    value, origin = joint(made, parameters, coordinates)
    split = coordinates.shape[0] * coordinates.shape[1]
    tightest = 0.0
    for seed in (1, 3):
        d = normal(len(origin), seed=seed).requires_grad_()
        balance = 10.0 ** (seed - 2)  # between the two parts
        for _ in range(4):
            x, y = d[:split], d[split:]
            unit = torch.cat([x / x.norm(), balance * y / y.norm()])
            found = third(value, origin, unit)
            bound = third_derivative(geometry, 1.0, balance)
            size = abs(float(found.detach()))
            assert size <= bound * ROUNDING
            tightest = max(tightest, size / bound)
            (slope,) = torch.autograd.grad(found.abs(), d)
            d = (d + 0.5 * slope * d.norm() / slope.norm()).detach().requires_grad_()
    made.damping = damping
    record_property("tightest", tightest)
    assert tightest > 1e-4  # it is a bound on this quantity, not on something far larger


@pytest.mark.parametrize("name", CASES)
def test_enlarged_sizes_hold_on_the_ball(name):
    made = twin(name, "bilinear")
    parameters = made.random(40)
    setting, coordinates = whitened(made, parameters)
    geometry = geometry_at(setting, coordinates)
    r1, r2, r3 = coordinates.shape
    for seed, (x, y) in enumerate([(0.1, 0.1), (3.0, 0.0), (0.0, 3.0), (2.0, 2.0)]):
        dx, dy = normal(r1, r2, seed=seed), normal(r3, setting.y.shape[1], seed=seed + 9)
        moved = {
            "X": parameters["X"] + coordinates.t1 @ (x * dx / dx.norm()) @ coordinates.t2.mT,
            "Y": parameters["Y"] + coordinates.t3 @ (y * dy / dy.norm()),
        }
        there = geometry_at(Setting.of(made.case.problem(center=made.center), moved), coordinates)
        ball = geometry.enlarged(x, y)
        assert there.features <= ball.features
        for found, bound in zip(there.sequences, ball.sequences, strict=True):
            for size in ("K", "delta", "omega", "beta", "alpha", "rho", "rho_alpha"):
                assert getattr(found, size) <= getattr(bound, size) * ROUNDING, size


def test_diameter():
    points = normal(300, 3, seed=2)
    wanted = max(float((a - b).norm()) for a in points for b in points[:40])
    assert diameter(points) >= wanted
    assert diameter(points[:40]) == pytest.approx(
        max(float((a - b).norm()) for a in points[:40] for b in points[:40])
    )
    assert diameter(normal(5000, 2, seed=3)) >= diameter(normal(5000, 2, seed=3)[:4000])
    assert diameter(points[:1]) == 0.0


# ------------------------------------------------------------------ spectrum


def ridged(**changes):
    """Sequences with the product of pooled Gram matrices as ridge."""
    lengths = (8, 6, 9)
    options = {"ridge_x": 0.3, "ridge_y": 0.7, "scale": 0.8}
    case = Case(inputs(lengths, 3, 10), inputs(lengths, 2, 20), options=options)
    for name, value in changes.items():
        setattr(case, name, value)
    return case


RIDGED = {
    "several sequences": ridged,
    "causal, weights": lambda: ridged(
        causal=True, weights=[normal(n, seed=n).abs() + 0.1 for n in (8, 6, 9)]
    ),
    "masks": lambda: ridged(masks=[visible(n, n, n) for n in (8, 6, 9)]),
}


def reduced(made, parameters):
    """``theta`` with its optimal readout, and the coordinates' Kronecker map of a direction."""
    theta = parameters["X"].flatten()
    optimal = {"X": parameters["X"], "Y": made.readout(theta).detach()}
    setting, coordinates = whitened(made, optimal)
    return theta, setting, coordinates, torch.kron(coordinates.t1, coordinates.t2)


def hessian(made, theta):
    eye = torch.eye(len(theta), dtype=torch.float64)
    return torch.stack([made.hessian_product(theta, row) for row in eye])


@pytest.mark.parametrize("name", RIDGED)
@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
def test_spectrum(name, size, record_property):
    made = Twin(RIDGED[name](), Bilinear())
    theta, setting, coordinates, map_ = reduced(
        made, {k: size * v for k, v in made.random(7).items()}
    )
    observer = SpectrumObserver(setting)
    evaluate(setting, coordinates, observer)
    bounds = observer.result()
    rho_x, rho_y = setting.ridge_x, setting.ridge_y
    scale = setting.scale**2  # the coordinates whiten scale^2 G
    newton = scale * torch.linalg.eigvalsh(map_.mT @ hessian(made, theta) @ map_)
    gauss = scale * torch.linalg.eigvalsh(map_.mT @ made.gauss_newton(theta) @ map_)
    assert 2 * rho_x <= float(gauss[0]) * ROUNDING
    assert float(gauss[-1]) <= 2 * (rho_x + bounds.kappa) * ROUNDING
    assert float(newton[0]) >= 2 * (rho_x - bounds.tau - bounds.nu**2 / rho_y) - 1e-9
    assert float(newton[-1]) <= 2 * (rho_x + bounds.kappa + bounds.tau) * ROUNDING
    record_property("kappa", float(gauss[-1]) / 2 - rho_x)
    record_property("kappa bound", bounds.kappa)


# ------------------------------------------------------------------ global convexity


@pytest.mark.parametrize("name", RIDGED)
@pytest.mark.parametrize("centred", [False, True])
def test_reduced_hessian_everywhere(name, centred):
    made = Twin(RIDGED[name](), Bilinear())
    if centred:
        made.center = {k: 0.3 * v for k, v in made.random(90).items()}
    made.case.options["ridge_x"] = 0.0
    probe, coordinates = whitened(made, made.random(1))
    need = convexity(probe, geometry_at(probe, coordinates), (1e-12,) * 3).needed
    made.case.options["ridge_x"] = 1.1 * need
    largest = 0.0
    for seed in range(6):
        parameters = {k: 10.0 ** (seed - 3) * v for k, v in made.random(seed).items()}
        theta, setting, coordinates, map_ = reduced(made, parameters)
        geometry = geometry_at(setting, coordinates)
        modulus = convexity(setting, geometry, (1e-12,) * 3).modulus
        assert modulus > 0
        smallest = float(torch.linalg.eigvalsh(map_.mT @ hessian(made, theta) @ map_)[0])
        assert smallest >= modulus
        largest = max(largest, 2 * 1.1 * need / setting.scale**2 - smallest)
    assert largest > 0  # the data part does pull downwards


def test_without_a_ridge_on_y_nothing_is_claimed():
    made = Twin(ridged(options={"ridge_x": 1e6}), Bilinear())
    setting, coordinates = whitened(made, made.random(1))
    found = convexity(setting, geometry_at(setting, coordinates), (1e-12,) * 3)
    assert found.modulus == -math.inf


def test_curvature_is_symmetric_in_exact_sense():
    made = Twin(ridged(), Bilinear())
    setting, coordinates = whitened(made, made.random(1))
    observer = CurvatureObserver(setting, coordinates)
    evaluate(setting, coordinates, observer)
    matrix = observer.result().matrix
    assert torch.equal(matrix, matrix.mT)
