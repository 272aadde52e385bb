"""The random problems on which certificates are tried: families, points, and the exact answer.

Problem ``i`` is made from the seed ``i`` alone. Families take turns; sizes, logit sizes, scales,
noise and ridges are drawn within each, so that the condition of the Hessian runs over many decades.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnreg import AttentionProblem, Bilinear, Certificate, Kind, fit, predict
from attnreg.certificate.balls import Balls, working_precision
from attnreg.certificate.coordinates import Coordinates, Setting
from attnreg.certificate.curvature import CurvatureObserver
from attnreg.certificate.gradient import evaluate

FAMILIES = ("planted", "noisy", "rank-deficient", "masked", "sequences", "cross", "ill-conditioned")
POINTS = ("stopped early", "perturbed", "stationary", "wrong problem")
Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Instance:
    """A problem with the parameters that its targets come from.

    Attributes:
        index: Its number.
        family: Its family.
        problem: The problem.
        truth: Parameters before the noise.
    """

    index: int
    family: str
    problem: AttentionProblem
    truth: Parameters


class Source:
    """Random numbers of one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def between(self, low: float, high: float) -> float:
        """One uniform number."""
        share = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        return low + (high - low) * share

    def whole(self, low: int, high: int) -> int:
        """One whole number from ``low`` to ``high``."""
        return int(torch.randint(low, high + 1, (), generator=self._generator))


def make(index: int) -> Instance:
    """Problem number ``index``."""
    source, family = Source(index), FAMILIES[index % len(FAMILIES)]
    d = source.whole(1, 6) if family != "rank-deficient" else source.whole(3, 6)
    widths = (d, d, d, d)
    if family == "cross":
        widths = tuple(source.whole(1, 5) for _ in range(4))  # type: ignore[assignment]
    lengths = _lengths(source, family, d)
    arguments = _inputs(source, family, lengths, widths)
    scale = 10.0 ** source.between(-1, 1) if source.whole(0, 1) else None
    blank = AttentionProblem(**arguments, scale=scale)
    model = Bilinear()
    x = source.normal(widths[0], widths[1])
    x *= 10.0 ** source.between(-1, 0.6) / model.logit_size(blank)
    truth = {"X": x, "Y": source.normal(widths[2], widths[3])}
    output = predict(model, truth, blank)
    size = float(torch.cat([b.reshape(-1) for b in output]).square().mean()) ** 0.5
    noise = 0.0 if family == "planted" else 10.0 ** source.between(-3, 0.3)
    targets = [b + noise * size * source.normal(*b.shape) for b in output]
    ridges = {"ridge_x": 0.0, "ridge_y": 0.0}
    if source.whole(0, 5):  # one in six has none
        mass = size**2 * sum(b.numel() for b in targets)
        strong = index % 40 == 7
        ridges["ridge_x"] = mass * 10.0 ** (
            source.between(1, 3) if strong else source.between(-11, -1)
        )
        ridges["ridge_y"] = 10.0 ** (0.5 if strong else source.between(-8, 0))
    center = None
    if ridges["ridge_x"] and source.whole(0, 3) == 0:
        center = {
            k: v + 0.3 * v.norm() * source.normal(*v.shape) / v.numel() ** 0.5
            for k, v in truth.items()
        }
    problem = blank.replace(B=targets, center=center, **ridges)
    return Instance(index, family, problem, truth)


def converged(instance: Instance, problem: AttentionProblem | None = None) -> Any:
    """A fit of the problem from its truth; every fifth from a cold start."""
    init = None if instance.index % 5 == 4 else instance.truth
    return fit(problem or instance.problem, init=init, tol=1e-15, max_iterations=200)


def other_point(instance: Instance, result: Any, which: str) -> tuple[Instance, Parameters] | None:
    """A problem and a point that is no minimiser of it; None where there is none of its kind."""
    source, problem = Source(10**6 + instance.index), instance.problem
    if which == "stopped early":
        start = {k: v + 0.1 * source.normal(*v.shape) for k, v in instance.truth.items()}
        stopped = fit(problem, init=start, max_iterations=source.whole(1, 6))
        return instance, dict(stopped.parameters)
    if which == "perturbed":
        size = 10.0 ** source.between(-9, -2)
        moved = {k: v + size * source.normal(*v.shape) for k, v in result.parameters.items()}
        return instance, moved
    if which == "wrong problem":
        noise = 10.0 ** source.between(-9, 0)
        targets = [b + noise * source.normal(*b.shape) for b in _targets(problem)]
        factor = 1 + 10.0 ** source.between(-8, 0)
        other = problem.replace(B=targets, ridge_x=problem.ridge_x * factor)
        return instance, dict(converged(instance, other).parameters)
    return _saddle(instance, source)


def _saddle(instance: Instance, source: Source) -> tuple[Instance, Parameters] | None:
    """Targets for which the truth is stationary with large residuals: mostly a saddle point.

    The gradient is affine in the residuals, so that random ones are projected to where it is 0.
    """
    point = instance.truth
    blank = instance.problem.replace(B=_as_list(predict(Bilinear(), point, instance.problem)))
    setting = Setting.of(blank, point)
    coordinates = Coordinates.of(setting, blank.dtype)
    ridge = evaluate(setting, coordinates)
    r1, r2, r3 = coordinates.shape
    sequences = setting.sequences
    if any(len(s.a) < n for s, (n, _) in zip(sequences, blank.lengths, strict=True)):
        return None

    def outputs(z: Tensor) -> Tensor:
        x = setting.x + coordinates.t1 @ z[: r1 * r2].view(r1, r2) @ coordinates.t2.mT
        y = setting.y + coordinates.t3 @ z[r1 * r2 :].view(r3, -1)
        rows = []
        for s in sequences:
            logits, bias = setting.scale * s.a @ x @ s.k.mT, s.bias(slice(0, len(s.a)))
            logits = logits if bias is None else logits + bias
            rows.append(logits.softmax(-1) @ s.v @ y)
        return torch.cat(rows).reshape(-1)

    origin = torch.zeros(r1 * r2 + r3 * setting.y.shape[1], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(outputs, origin)
    width = setting.y.shape[1]
    weights = torch.cat([s.w for s in sequences]).repeat_interleave(width)
    slope = jacobian.mT * weights
    pull = torch.cat([ridge.x.reshape(-1), ridge.y.reshape(-1)]) / 2
    residual = 3 * outputs(origin).norm() / len(weights) ** 0.5 * source.normal(len(weights))
    residual -= torch.linalg.pinv(slope) @ (slope @ residual + pull)
    if float((slope @ residual + pull).norm()) > 1e-9 * float(residual.norm()):
        return None  # fewer residuals than parameters
    moves = residual.view(-1, width).split([len(s.a) for s in sequences])
    targets = [b - r for b, r in zip(_targets(blank), moves, strict=True)]
    return replace(instance, problem=blank.replace(B=targets)), point


@dataclass(frozen=True)
class Answer:
    """What the minimiser near a point is, to more than 50 digits.

    Attributes:
        resolved: Whether Newton's method converged.
        gap: True gap, rounded.
        distance: From the point, in the certificate's norm.
    """

    resolved: bool
    gap: float
    distance: float


def exact_answer(
    instance: Instance, point: Parameters, certificate: Certificate, near: Parameters | None = None
) -> Answer:
    """Finds the minimiser by Newton's method in ball arithmetic, from the point or from ``near``.

    Args:
        instance: The problem.
        point: What was certified.
        certificate: Says in which norm the distance is wanted.
        near: Parameters close to the minimiser, for points that are far from it.

    Returns:
        The answer.
    """
    setting = Setting.of(instance.problem, point)
    coordinates = Coordinates.of(setting, instance.problem.dtype)
    with working_precision() as flint:
        balls = Balls(flint, setting, coordinates)
        first = balls.evaluate()
        size = first.gradient.nrows()
        offset = flint.arb_mat(size, 1)
        if certificate.kind is Kind.GLOBAL and near is not None:
            offset = flint.arb_mat(size, 1, _offset(coordinates, point, near))
        found = balls.evaluate(offset) if near is not None else first
        for _ in range(12):
            norm = float(max(abs(e.mid()) for e in found.gradient.entries()))
            if norm <= 1e-55 * (instance.problem.target_norm_squared or 1.0):
                break
            step = found.hessian.mid().solve(found.gradient.mid())
            offset = (offset - step).mid()
            found = balls.evaluate(offset)
        else:
            return Answer(False, 0.0, 0.0)
        gap = float(first.value - found.value)
        if certificate.norm == "hessian":
            square = (offset.transpose() * first.hessian * offset)[0, 0]
        else:
            split = coordinates.shape[0] * coordinates.shape[1]
            square = sum((e * e for e in offset.entries()[:split]), flint.arb(0))
        return Answer(True, gap, float(square.abs_upper().sqrt()))


def condition(problem: AttentionProblem, point: Parameters) -> float | None:
    """Condition of the joint Hessian, each block scaled to norm 1; None where it is indefinite."""
    setting = Setting.of(problem, point)
    coordinates = Coordinates.of(setting, problem.dtype)
    observer = CurvatureObserver(setting, coordinates)
    evaluate(setting, coordinates, observer)
    curvature = observer.result()
    n = curvature.split
    scale = torch.ones(len(curvature.matrix), dtype=torch.float64)
    for part in (slice(0, n), slice(n, None)):
        if len(scale[part]):
            scale[part] = torch.linalg.matrix_norm(curvature.matrix[part, part], 2) ** -0.5
    values = torch.linalg.eigvalsh(scale[:, None] * curvature.matrix * scale)
    return float(values[-1] / values[0]) if float(values[0]) > 1e-13 * float(values[-1]) else None


def _offset(coordinates: Coordinates, point: Parameters, near: Parameters) -> list[float]:
    inverse = [torch.linalg.pinv(t) for t in (coordinates.t1, coordinates.t2, coordinates.t3)]
    x = inverse[0] @ (near["X"] - point["X"]) @ inverse[1].mT
    y = inverse[2] @ (near["Y"] - point["Y"])
    return [*x.reshape(-1).tolist(), *y.reshape(-1).tolist()]


def _lengths(source: Source, family: str, d: int) -> list[tuple[int, int]]:
    low = max(3, d)
    if family == "sequences":
        count = source.whole(2, 5)
        sizes = [source.whole(3, 64 // count) for _ in range(count)]
        return [(n, n) for n in sizes]
    if family == "cross":
        return [(source.whole(low, 32), source.whole(5, 32)) for _ in range(source.whole(1, 2))]
    n = source.whole(low, 64)
    return [(n, n)]


def _inputs(
    source: Source, family: str, lengths: list[tuple[int, int]], widths: tuple[int, ...]
) -> dict[str, Any]:
    d1, d2, d3, out = widths
    a1 = [source.normal(n, d1) for n, _ in lengths]
    arguments: dict[str, Any] = {"A1": a1, "B": [a.new_zeros(len(a), out) for a in a1]}
    if family == "cross":
        arguments["A2"] = [source.normal(m, d2) for _, m in lengths]
        arguments["A3"] = [source.normal(m, d3) for _, m in lengths]
    if family == "rank-deficient":
        drop = source.normal(d1)
        drop /= drop.norm()
        arguments["A1"] = [a - (a @ drop)[:, None] * drop for a in a1]
    if family == "ill-conditioned":
        sizes = 10.0 ** (
            -source.between(0, 4) * torch.arange(d1, dtype=torch.float64) / max(1, d1 - 1)
        )
        mix = torch.linalg.qr(source.normal(d1, d1)).Q
        arguments["A1"] = [a * sizes @ mix for a in a1]
    if family == "sequences" and source.whole(0, 1):
        arguments["weights"] = [source.normal(n).abs() + 0.05 for n, _ in lengths]
    if family == "masked":
        n, m = lengths[0]
        kind = source.whole(0, 2)
        seen = source.normal(n, m) > 0
        seen[:, 0] = True
        masks: tuple[Any, ...] = ("causal", [seen], [source.normal(n, m)])
        arguments["mask"] = masks[kind]
    return arguments


def _targets(problem: AttentionProblem) -> list[Tensor]:
    return _as_list(problem.unpad([batch.B for batch in problem.batches]))


def _as_list(values: Any) -> list[Tensor]:
    return list(values)
