"""How tight the proven constants are: the largest value found over the bound, at most 1.

Third derivative: gradient ascent over directions, at the parameters behind the targets of the
problems of benchmarks/certificate_problems.py. Spectrum: the extreme eigenvalues of the reduced
Hessian relative to the Gram matrices, at the optimal readout, where both ridges are positive.
Convexity: the downward curvature that is found, over the ridge that is asked for.

    python -m benchmarks.certificate_tightness
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnreg.certificate.bounds import GeometryObserver, SpectrumObserver, third_derivative
from attnreg.certificate.convexity import convexity
from attnreg.certificate.coordinates import Coordinates, Setting
from attnreg.certificate.curvature import CurvatureObserver
from attnreg.certificate.gradient import evaluate
from benchmarks.certificate_problems import Instance, Source, make
from benchmarks.common import command_line, machine, parse, print_table, save, show

STARTS, STEPS = 3, 15
EXACT = (1e-12,) * 3  # whitening errors, which play no part here


def third_share(instance: Instance) -> float | None:
    """Largest third derivative found over its bound."""
    setting = Setting.of(instance.problem, instance.truth)
    coordinates = Coordinates.of(setting, instance.problem.dtype)
    r1, r2, r3 = coordinates.shape
    if r1 * r2 == 0:
        return None
    observer = GeometryObserver(setting, coordinates)
    evaluate(setting, coordinates, observer)
    geometry = observer.result()
    if max(s.K for s in geometry.sequences) == 0:
        return None
    value = _loss(setting, coordinates)
    size = r1 * r2 + r3 * setting.y.shape[1]
    origin = torch.zeros(size, dtype=torch.float64)
    source, best = Source(instance.index), 0.0
    for start in range(STARTS):
        balance = 10.0 ** (start - 1) * float(setting.y.norm())  # between the parts of X and Y
        d = source.normal(size).requires_grad_()
        for _ in range(STEPS):
            x, y = d[: r1 * r2], d[r1 * r2 :]
            found = _third(value, origin, torch.cat([x / x.norm(), balance * y / y.norm()]))
            bound = third_derivative(geometry, 1.0, balance)
            best = max(best, abs(float(found.detach())) / bound)
            (slope,) = torch.autograd.grad(found.abs(), d)
            if not 0 < float(slope.norm()) < float("inf"):
                break
            d = (d + 0.5 * slope * d.norm() / slope.norm()).detach().requires_grad_()
    return best


def spectrum_shares(instance: Instance) -> dict[str, float] | None:
    """The reduced Hessian's ends beyond the ridge over their bounds."""
    problem = instance.problem
    if not (problem.ridge_x and problem.ridge_y):
        return None
    setting, coordinates, matrix = _at_optimal_readout(instance)
    n = coordinates.shape[0] * coordinates.shape[1]
    if n == 0:
        return None
    spectrum, geometry = SpectrumObserver(setting), GeometryObserver(setting, coordinates)
    evaluate(setting, coordinates, lambda rows: (spectrum(rows), geometry(rows)))  # type: ignore[arg-type, func-returns-value]
    bounds = spectrum.result()
    cross = torch.linalg.solve(matrix[n:, n:], matrix[n:, :n])
    values = torch.linalg.eigvalsh(matrix[:n, :n] - matrix[n:, :n].mT @ cross) / 2
    values = values * setting.scale**2 - problem.ridge_x
    upper, lower = bounds.kappa + bounds.tau, bounds.tau + bounds.nu**2 / problem.ridge_y
    needed = convexity(setting, geometry.result(), EXACT).needed
    if not min(upper, lower, needed) > 0:
        return None
    down = max(0.0, -float(values[0]))
    return {
        "largest eigenvalue": float(values[-1]) / upper,
        "smallest eigenvalue": down / lower,
        "ridge for convexity": down / needed,
    }


def _at_optimal_readout(instance: Instance) -> tuple[Setting, Coordinates, Tensor]:
    point = dict(instance.truth)
    for _ in range(3):  # one solve, and two of refinement
        setting = Setting.of(instance.problem, point)
        coordinates = Coordinates.of(setting, instance.problem.dtype)
        observer = CurvatureObserver(setting, coordinates)
        gradient = evaluate(setting, coordinates, observer)
        curvature = observer.result()
        block = curvature.matrix[curvature.split :, curvature.split :]
        step = torch.linalg.solve(block, gradient.y.reshape(-1)).view(gradient.y.shape)
        point["Y"] = point["Y"] - coordinates.t3 @ step
    return setting, coordinates, curvature.matrix


def _loss(setting: Setting, coordinates: Coordinates) -> Callable[[Tensor], Tensor]:
    r1, r2, r3 = coordinates.shape

    def value(z: Tensor) -> Tensor:
        x = setting.x + coordinates.t1 @ z[: r1 * r2].view(r1, r2) @ coordinates.t2.mT
        y = setting.y + coordinates.t3 @ z[r1 * r2 :].view(r3, -1)
        total = z.new_zeros(())
        for s in setting.sequences:
            logits, bias = setting.scale * s.a @ x @ s.k.mT, s.bias(slice(0, len(s.a)))
            logits = logits if bias is None else logits + bias
            residual = logits.softmax(-1) @ s.v @ y - s.b
            total = total + (s.w[:, None] * residual.square()).sum()
        return total

    return value


def _third(value: Callable[[Tensor], Tensor], origin: Tensor, direction: Tensor) -> Tensor:
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    found = value(origin + t * direction)
    for _ in range(3):
        (found,) = torch.autograd.grad(found, t, create_graph=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = command_line("certificate_tightness", __doc__, quick="14 problems")
    parser.add_argument("--problems", type=int, help="how many (210)")
    options = parse(parser, arguments, threads=1)
    count = options.problems or (14 if options.quick else 210)
    shares: dict[str, list[float]] = {"third derivative": []}
    for index in range(count):
        instance = make(index)
        third = third_share(instance)
        if third is not None:
            shares["third derivative"].append(third)
        for name, share in (spectrum_shares(instance) or {}).items():
            shares.setdefault(name, []).append(share)
    content: dict[str, Any] = {
        name: {"problems": len(v), "median": statistics.median(v), "largest": max(v)}
        for name, v in shares.items()
    }
    rows = [
        (name, str(c["problems"]), show(c["median"]), show(c["largest"]))
        for name, c in content.items()
    ]
    print_table("found over bound", ("bound", "problems", "median", "largest"), rows)
    save("certificate_tightness", {"machine": machine(), "shares": content}, quick=options.quick)


if __name__ == "__main__":
    main()
