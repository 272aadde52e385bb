"""First-order baselines with torch's own optimisers and fused attention, all weights free.

Same start, data, dtype and threads as ours. Their traces are on the fitted data: L-BFGS's own
loss, and for Adam the error of each mini-batch, which costs nothing extra.
"""

from __future__ import annotations

import contextlib
import math
import time

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnreg.models import MultiHead, Parameters
from attnreg.problem import AttentionProblem
from attnreg.report.trace import Trace

BATCH = 8

Run = tuple[dict[str, Tensor], Trace]


def lbfgs(
    problem: AttentionProblem, model: MultiHead, start: dict[str, Tensor], seconds: float
) -> Run:
    """Full-batch L-BFGS with a strong Wolfe line search."""
    weights = _leaves(start)
    optimizer = torch.optim.LBFGS(
        list(weights.values()), history_size=30, max_iter=10**6, line_search_fn="strong_wolfe"
    )
    inputs, targets = problem.batches[0].A1, problem.batches[0].B
    trace = Trace("torch L-BFGS")
    began = time.perf_counter()
    best = {name: w.detach().clone() for name, w in weights.items()}

    class _OutOfTimeError(Exception):
        pass

    def closure() -> float:
        now = time.perf_counter() - began
        if now > seconds:
            raise _OutOfTimeError
        optimizer.zero_grad()
        loss = (fused_layer(model, weights, inputs) - targets).square().sum()
        loss.backward()
        error = problem.relative_error(loss.item())
        if error < min(trace.errors, default=math.inf):
            trace.add(now, error)
            for name, w in weights.items():
                best[name].copy_(w.detach())
        return loss.item()

    with contextlib.suppress(_OutOfTimeError):
        optimizer.step(closure)
    return best, trace


def adam(
    problem: AttentionProblem,
    model: MultiHead,
    start: dict[str, Tensor],
    seconds: float,
    rate: float,
) -> Run:
    """Mini-batch Adam; the rate falls along a cosine that ends at ``seconds``."""
    weights = _leaves(start)
    optimizer = torch.optim.Adam(list(weights.values()), lr=rate)
    inputs, targets = problem.batches[0].A1, problem.batches[0].B
    trace = Trace(f"Adam, rate {rate:g}")
    generator = torch.Generator().manual_seed(0)
    count = inputs.shape[0]
    began = time.perf_counter()
    while (now := time.perf_counter() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * rate * (1 + math.cos(math.pi * now / seconds))
        chosen = torch.randperm(count, generator=generator)[:BATCH]
        optimizer.zero_grad()
        loss = (fused_layer(model, weights, inputs[chosen]) - targets[chosen]).square().sum()
        loss.backward()
        optimizer.step()
        trace.add(now, problem.relative_error(loss.item() * count / BATCH))
    return {name: w.detach() for name, w in weights.items()}, trace


def _leaves(start: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone().requires_grad_() for name, value in start.items()}


def fused_layer(model: MultiHead, w: Parameters, x: Tensor) -> Tensor:
    """The layer's output with torch's fused attention, differentiable once.

    Args:
        model: Heads and key/value heads.
        w: Named weights and biases.
        x: Inputs ``(sequences, tokens, width)``.

    Returns:
        ``(sequences, tokens, d_out)``.
    """
    kv_heads = model.kv_heads or model.heads
    q, k, v = (
        (x @ w[f"W_{name}"] + w[f"b_{name}"]).unflatten(2, (count, -1)).transpose(1, 2)
        for name, count in (("Q", model.heads), ("K", kv_heads), ("V", kv_heads))
    )
    heads = scaled_dot_product_attention(q, k, v, enable_gqa=kv_heads != model.heads)
    return heads.transpose(1, 2).flatten(2) @ w["W_O"] + w["b_O"]
