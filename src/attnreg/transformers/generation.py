"""Calibration text that the original writes itself, where there is little of its user's.

A student of many weights learns a short text by heart: its loss on that text falls and on any other
rises. Windows sampled from the original are more of the text that it was trained on, and of the
user's kind, since each begins as a window of the user's text does. They are only ever fitted on;
what is held out is the user's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from attnreg.transformers.calibration import Windows
from attnreg.transformers.checkpoint import Checkpoint
from attnreg.transformers.loading import load

PROMPT_TOKENS = 8
"""Tokens that a window takes from the user's text, with special ones; at most half of it."""

SEQUENCES, FEWEST = 64, 8
"""Windows that are sampled together, at most and at least."""


def generate_windows(
    checkpoint: Checkpoint,
    windows: Windows,
    tokens: int,
    *,
    length: int,
    seed: int,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Windows:
    """Samples windows from a model: temperature 1, no truncation of the distribution.

    Args:
        checkpoint: The model; it is in memory as a whole, in float32, while this runs.
        windows: What the samples begin like: with the first tokens of these, drawn at random.
        tokens: Tokens wanted, at least 2; the last window is cut so that there are no more (one
            less where a window of a single token would be left).
        length: Tokens of a window at most; it ends where the model ends its text.
        seed: Seed of the draws; torch's own generator is left as it was.
        device: Where to compute.
        progress: Called with the number of tokens there are.

    Returns:
        The windows.

    Raises:
        ValueError: If the model ends every text at once.
    """
    model: Any = load(checkpoint.folder, dtype=torch.float32).to(device)
    settings = _settings(model, length)
    ends = settings.eos_token_id
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    model.generation_config = settings
    size = min(PROMPT_TOKENS, length // 2)
    prompts = [row[:size] for row in windows.ids if len(row) > size] or [
        (row[0],) for row in windows.ids
    ]
    rows: list[list[int]] = []
    count = 0
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        while count < tokens:
            wanted = min(SEQUENCES, max(FEWEST, math.ceil((tokens - count) / length)))
            drawn = torch.randint(len(prompts), (wanted,)).tolist()
            given = torch.tensor([prompts[i] for i in drawn], device=device)
            sampled = model.generate(given, attention_mask=torch.ones_like(given))
            found = [_ended(row, given.shape[1], ends) for row in sampled.tolist()]
            found = [row for row in found if len(row) > given.shape[1]]
            if not found:
                raise ValueError(
                    f"{checkpoint.folder} ends its text after every one of {wanted} prompts; "
                    "give more text in place of --generate"
                )
            rows += found
            count = sum(map(len, rows))
            if progress is not None:
                progress(min(count, tokens))
    return Windows.of(_cut(rows, tokens), f"sampled from {checkpoint.folder.name}")


def _settings(model: Any, length: int) -> transformers.GenerationConfig:
    """Plain sampling that stops where the model's own settings stop."""
    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else model.config.eos_token_id
    padding = own.pad_token_id
    if padding is None:
        padding = ends[0] if isinstance(ends, list) else ends
    return transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=length,
        eos_token_id=ends,
        pad_token_id=0 if padding is None else padding,
    )


def _ended(row: Sequence[int], prompt: int, ends: set[int]) -> list[int]:
    """A row up to where the model ended its text."""
    for place in range(prompt, len(row)):
        if row[place] in ends:
            return list(row[:place])
    return list(row)


def _cut(rows: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Rows with so many tokens in all; none of a single token."""
    kept, left = [], tokens
    for row in rows:
        if min(left, len(row)) >= 2:
            kept.append(row[:left])
        left -= len(row)
        if left <= 0:
            break
    return kept
