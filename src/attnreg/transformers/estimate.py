"""Time and memory of a conversion, estimated from sizes: right to a factor of about two."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch

from attnreg.reduction.sharing import DIRECTIONS, STEPS
from attnreg.solvers.minibatches import BATCH_ROWS, stride
from attnreg.transformers.final_pass import STEP_TOKENS
from attnreg.transformers.shapes import AttentionShape
from attnreg.transformers.task import Task, whole_model_bytes

KEYS = 0.16
"""What a key of a mini-batch costs, in units of a row, about."""

PASSES = 4
"""Passes of the model over the text in a pass over the layers: both models, some parts twice."""


GENERATION = 4
"""Sampling a token costs so many times as much as reading one, about."""

ACTIVATIONS = 24
"""Numbers that a block keeps for its gradient, in widths of the model a token, about."""


@dataclass(frozen=True)
class Estimate:
    """What a conversion needs.

    Attributes:
        seconds: Wall time on this machine, from its speed in a matrix product.
        memory: Bytes beside what Python and torch take.
        disk: Bytes of the new folder and the journal.
    """

    seconds: float
    memory: int
    disk: int


def estimate(task: Task) -> Estimate:
    """Estimates a task from the sizes of the model and the text.

    Returns:
        The estimate.
    """
    fitted = task.fit.tokens + task.options.generate
    tokens = fitted + task.held_out.tokens
    length = max(max(map(len, part.ids)) for part in (task.fit, task.held_out))
    entries = task.checkpoint.entries
    total = sum(math.prod(entry.shape) for entry in entries.values())
    blocks = [
        sum(math.prod(e.shape) for name, e in entries.items() if name.startswith(f"{g.block}."))
        for g in task.groups
    ]
    runs = [len(group.applications) for group in task.groups]
    applied = sum(size * count for size, count in zip(blocks, runs, strict=True))
    rate = _rate(task.options.device)
    seconds = PASSES * 2 * applied * tokens / rate
    fits = 0.0
    for group, count in zip(task.groups, runs, strict=True):
        if group.changed:
            # An epoch of mini-batches is one pass forward and one back, by some of the rows.
            epoch = (KEYS + 1 / stride(length)) / (KEYS + 1)
            products = task.options.max_iterations * epoch * 4 + 20  # 20: the starts
            fits += products * count * fitted * _work(group.student, length) / rate
            if task.options.fit_pairs and 1 < group.student.kv_heads < group.original.kv_heads:
                fits += _pairs_work(group.original, length) / rate
    steps, vocabulary = task.final_steps, task.checkpoint.config.vocab_size
    width = task.groups[0].original.width
    head = vocabulary * width if task.predicts else 0
    step_tokens = min(fitted, STEP_TOKENS)
    # Forward and back; the head once more, for the original.
    if task.predicts:
        seconds += GENERATION * 2 * applied * task.options.generate / rate
    fits += steps * 2 * (3 * applied + 4 * head) * step_tokens / rate
    limit = task.options.max_seconds
    seconds += fits if limit is None else min(limit, fits)
    widest = max(g.student.heads * g.student.head_dim + 2 * width for g in task.groups)
    rows = 4 * tokens * (6 * width + max(runs) * 3 * widest)
    scores = 4 * max(g.student.heads for g in task.groups) * max(runs) * tokens * length
    memory = 4 * (total - sum(blocks) + 2 * max(blocks)) + rows + scores
    if steps:
        kept = 4 * step_tokens * (ACTIVATIONS * sum(runs) * width + 4 * vocabulary * (head > 0))
        memory = max(memory, whole_model_bytes(task) + 4 * tokens * width + kept)
    stored = task.dtype.itemsize * total
    attention = sum(math.prod(s) for g in task.groups for s in g.student.weights().values())
    return Estimate(seconds, memory, stored + 4 * (1 + 5 * bool(steps)) * attention)


def _work(shape: AttentionShape, length: int) -> int:
    """Operations of one attention pass for a token."""
    projections = 2 * sum(math.prod(size) for size in shape.weights().values())
    return projections + 4 * shape.heads * shape.head_dim * length


def _pairs_work(shape: AttentionShape, length: int) -> float:
    """Operations of the fits of all pairs of key/value heads."""
    pairs = math.comb(shape.kv_heads, 2)
    heads = 2 * shape.heads // shape.kv_heads * pairs
    width = min(shape.width, DIRECTIONS * shape.head_dim)
    together = replace(shape, width=width, heads=heads, kv_heads=pairs)
    tokens = STEPS * BATCH_ROWS * stride(length) ** 0.5
    read = (KEYS + 1 / stride(length)) / (KEYS + 1)
    # Forward and back; readouts and small products that run below the rate, as much again.
    return 2 * 3 * tokens * read * _work(together, length)


def _rate(device: str, size: int = 512) -> float:
    """Operations a second in a matrix product."""
    matrix = torch.ones(size, size, device=device)
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
