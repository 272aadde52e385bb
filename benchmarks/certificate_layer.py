"""Seconds of `verify` at width 384, without a Hessian: a real layer, and the bilinear model.

The layer is the embedded one (see attnreg.demo), 12 heads fitted with 4 key/value heads. After a
short fit the point is seldom stationary; what is timed does not depend on that. The bilinear
problem is a planted one with noise and strong ridges: 294,912 parameters.

    python -m benchmarks.certificate_layer
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from attnreg import (
    AttentionProblem,
    Bilinear,
    FitResult,
    MultiHead,
    fit,
    pool_kv_heads,
    predict,
    verify,
)
from attnreg.demo import HEADS, Layer
from benchmarks.common import command_line, machine, parse, print_table, save

KV_HEADS = 4


def layer_case(sequences: int, seconds: float) -> dict[str, Any]:
    """A multi-head fit of the layer."""
    layer = Layer.load()
    problem = layer.problem(range(sequences))
    model = MultiHead(HEADS, KV_HEADS)
    start = pool_kv_heads(layer.weights, HEADS, KV_HEADS)
    return timed("layer", problem, fit(problem, model, init=start, max_seconds=seconds))


def bilinear_case(width: int) -> dict[str, Any]:
    """A planted bilinear problem with noise."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A = normal(8, 128, width)
    truth = {"X": normal(width, width) / width, "Y": normal(width, width) / width**0.5}
    blank = AttentionProblem(A, torch.zeros_like(A), ridge_x=20.0, ridge_y=1.0)
    problem = blank.replace(B=predict(Bilinear(), truth, blank) + 0.1 * normal(*A.shape))
    return timed("bilinear", problem, fit(problem, init=truth, tol=1e-10, max_iterations=30))


def timed(name: str, problem: AttentionProblem, result: FitResult) -> dict[str, Any]:
    """Certifies a fit."""
    began = time.perf_counter()
    certificate = verify(problem, result)
    return {
        "name": name,
        "tokens": problem.n_rows,
        "width": problem.d_query,
        "seconds": time.perf_counter() - began,
        "kind": certificate.kind.name,
        "gap": certificate.gap,
        "loss": certificate.loss,
        "gradient_norm": certificate.gradient_norm,
        "mu": certificate.mu,
        "failure_probability": certificate.failure_probability,
        "reason": certificate.reason,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = command_line("certificate_layer", __doc__, quick="2 sequences")
    parser.add_argument("--seconds", type=float, default=20.0, help="bound on the layer's fit")
    options = parse(parser, arguments)
    cases = [layer_case(2 if options.quick else 16, options.seconds)]
    cases.append(bilinear_case(72 if options.quick else 384))
    for case in cases:
        rows = [(key, str(value)) for key, value in case.items()]
        print_table(f"verify: {case['name']}", ("what", "found"), rows)
    content = {"machine": machine(), "fit_seconds": options.seconds, "cases": cases}
    save("certificate_layer", content, quick=options.quick)


if __name__ == "__main__":
    main()
