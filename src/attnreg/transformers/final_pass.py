"""The final pass: all attention layers of a student together, towards what the original predicts.

A fit of one layer knows the residual stream and not what becomes of it. So after the fits all
attention weights of the changed blocks take steps down the gradient of one loss at the model's end:

    next-token models    KL(original || student) of the next token, nats a token
    all others           ||h - h_original||^2 / ||h_original||^2 of the last hidden state h

mean over the tokens of a mini-batch. The end of the original is known from its hidden states
after the last block, so that a step runs the student alone, forward and back. Derivatives are
torch's, through transformers' own modules; nothing but attention weights moves, and the gains of
head norms stay. The steps are Adam's (Kingma and Ba 2015); the rate of a tensor is that of
:data:`RATE` or :data:`ENCODER_RATE` times its root mean square at the start (0.01 for a tensor of
zeros) over the root of the model's width, rises over :data:`WARM_UP` steps and falls to zero along
a cosine. :data:`CHECKS` times in the pass the weights, rounded to the dtype that they are saved
in, are scored on the held-out windows, and the best are the result: the held-out numbers of a
conversion are those of the best of so many, which flatters them a little.

All blocks are in memory at once, in float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attnreg.transformers.adapters import Adapter
from attnreg.transformers.journal import Journal
from attnreg.transformers.streaming import Blockwise

STEP_TOKENS = 1024
"""Tokens of a mini-batch, padding included (or one window)."""

RATE, ENCODER_RATE = 0.16, 0.05
"""Of models that predict the next token and of all others: with the first an encoder learns its
text by heart (measured on 90,000 tokens)."""

WARM_UP = 20
MOMENTS = (0.9, 0.95)
CHECKS = 8
STATE = "final-state"
"""Name in the journal of the last check: weights, moments and the best weights so far."""


@dataclass(frozen=True)
class FinalPass:
    """What a final pass did.

    Attributes:
        steps: Steps taken; fewer than asked for where time was up or a loss was not finite.
        start_loss: Held-out loss at the start.
        held_out_loss: Held-out loss of the weights that are kept.
        best_step: The step that they are of; 0: the start.
    """

    steps: int
    start_loss: float
    held_out_loss: float
    best_step: int

    def record(self) -> dict[str, Any]:
        """The values by name."""
        return dict(vars(self))


class Refinement:
    """A final pass that can be left and taken up at any of its checks.

    Args:
        runner: Has the windows and what surrounds the blocks.
        blocks: All blocks by name, the changed ones with the student's weights; moved in place.
        changed: Names of the blocks whose attention is moved.
        original: The original's hidden states after the last block, rows.
        fit: Numbers of the windows to fit on.
        held_out: Numbers of the windows that decide which weights are kept.
        predicts: Whether the loss is that of the next token.
        saved: The dtype that the weights are saved in.
    """

    def __init__(
        self,
        runner: Blockwise,
        blocks: Mapping[str, nn.Module],
        changed: Sequence[str],
        original: Tensor,
        fit: Sequence[int],
        held_out: Sequence[int],
        *,
        predicts: bool,
        saved: torch.dtype,
    ) -> None:
        self._runner, self._blocks, self._original = runner, blocks, original
        self._held_out, self._predicts, self._saved = held_out, predicts, saved
        self._batches = list(runner.batches(STEP_TOKENS, fit))
        self._weights: list[nn.Parameter] = []
        for name, block in blocks.items():
            block.requires_grad_(False)
            if name in changed:
                self._weights += attention_weights(runner.adapter, block)
        for weight in self._weights:
            weight.requires_grad_(True)
        scale = (RATE if predicts else ENCODER_RATE) / original.shape[1] ** 0.5
        self._rates = [scale * _size(weight) for weight in self._weights]
        self._adam = torch.optim.Adam([{"params": w} for w in self._weights], 0, MOMENTS)

    def run(
        self,
        *,
        steps: int,
        seconds: float | None,
        seed: int,
        journal: Journal,
        progress: Callable[[int, float], None] | None = None,
    ) -> FinalPass:
        """Takes the steps, from the last check in the journal if there is one.

        Args:
            steps: Steps to take.
            seconds: Bound on the time; None: none.
            seed: Orders the mini-batches.
            journal: Keeps the state at every check.
            progress: Called with the step and the loss of its mini-batch.

        Returns:
            What it did; the blocks hold the weights that are kept.

        Raises:
            ValueError: If the held-out loss at the start is not finite.
        """
        entered = time.perf_counter()
        state, best = self._restored(journal) or self._beginning()
        began = entered - state["spent"]
        while state["done"] < 1:
            step = state["step"]
            loss = self._step(self._batch(step, seed), state["done"], step)
            if not math.isfinite(loss):
                break  # no later step comes back from it
            spent = time.perf_counter() - began
            done = max((step + 1) / steps, 0.0 if seconds is None else spent / seconds)
            due = int(done * CHECKS) > int(state["done"] * CHECKS)
            state |= {"step": step + 1, "spent": spent, "done": done}
            if progress is not None:
                progress(step + 1, loss)
            if due:
                held_out = self.held_out_loss()
                if held_out < state["best"]:
                    state |= {"best": held_out, "best_step": step + 1}
                    best = self._rounded()
                self._keep(journal, state, best)
        self._set(best)
        return FinalPass(state["step"], state["start"], state["best"], state["best_step"])

    def _beginning(self) -> tuple[dict[str, Any], list[Tensor]]:
        loss = self.held_out_loss()
        if not math.isfinite(loss):
            raise ValueError(
                "the held-out loss is not finite before the final pass: weights overflow in the "
                "dtype that they are saved in; give --dtype float32 or bfloat16"
            )
        state = {"step": 0, "spent": 0.0, "done": 0.0, "start": loss, "best": loss, "best_step": 0}
        return state, self._rounded()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The loss on the held-out windows with rounded weights, mean over the tokens.

        Returns:
            The loss; infinite where it is not a number.
        """
        kept = [weight.detach().clone() for weight in self._weights]
        self._set(self._rounded())
        total, count = 0.0, 0
        for batch in self._runner.batches(STEP_TOKENS, self._held_out):
            losses = self._losses(batch)
            total, count = total + float(losses.double().sum()), count + losses.numel()
        self._set(kept)
        loss = total / count
        return loss if math.isfinite(loss) else math.inf

    def _step(self, batch: Sequence[int], done: float, step: int) -> float:
        """One step; the loss that it was taken at."""
        factor = 0.5 * (1 + math.cos(math.pi * done)) * min(1.0, (step + 1) / WARM_UP)
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate
        loss = self._losses(batch).mean()
        self._adam.zero_grad()
        loss.backward()
        self._adam.step()
        return float(loss.detach())

    def _losses(self, batch: Sequence[int]) -> Tensor:
        """The loss of every token of a batch."""
        runner, predicts = self._runner, self._predicts
        target = runner.end(batch, self._original, head=predicts)
        output = runner.whole(batch, self._blocks, head=predicts)
        if predicts:
            target, output = target.float().log_softmax(-1), output.float().log_softmax(-1)
            return nn.functional.kl_div(output, target, reduction="none", log_target=True).sum(-1)
        return (output - target).square().sum(-1) / target.square().sum(-1)

    def _batch(self, step: int, seed: int) -> list[int]:
        """The mini-batch of a step: each once an epoch, in random order."""
        epoch, place = divmod(step, len(self._batches))
        generator = torch.Generator().manual_seed(seed + epoch)
        return self._batches[int(torch.randperm(len(self._batches), generator=generator)[place])]

    # ------------------------------------------------------------------ state

    def _rounded(self) -> list[Tensor]:
        return [weight.detach().to(self._saved, copy=True).float() for weight in self._weights]

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)

    def _keep(self, journal: Journal, state: Mapping[str, Any], best: Sequence[Tensor]) -> None:
        tensors: dict[str, Tensor] = {}
        for i, (weight, value) in enumerate(zip(self._weights, best, strict=True)):
            moments = self._adam.state[weight]
            tensors |= {f"weight.{i}": weight.detach(), f"best.{i}": value}
            tensors |= {f"{name}.{i}": moments[name] for name in ("exp_avg", "exp_avg_sq", "step")}
        journal.write(STATE, {name: value.cpu() for name, value in tensors.items()}, state)

    def _restored(self, journal: Journal) -> tuple[dict[str, Any], list[Tensor]] | None:
        """The record of the last check and the best weights; weights and moments are set."""
        found = journal.read(STATE)
        if found is None:
            return None
        tensors, state = found
        device = self._runner.device
        count = range(len(self._weights))
        self._set([tensors[f"weight.{i}"] for i in count])
        for i, weight in enumerate(self._weights):
            self._adam.state[weight] = {
                "exp_avg": tensors[f"exp_avg.{i}"].to(device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{i}"].to(device),
                "step": tensors[f"step.{i}"],
            }
        return state, [tensors[f"best.{i}"].to(device) for i in count]


def attention_weights(adapter: Adapter, block: nn.Module) -> list[nn.Parameter]:
    """The parameters of the projections of a block's attention; no norm's."""
    modules = adapter.attention(block).modules()
    linears = [module for module in modules if isinstance(module, nn.Linear | Conv1D)]
    return [weight for module in linears for weight in module.parameters(recurse=False)]


def _size(weight: Tensor) -> float:
    """Root mean square; of a tensor of zeros, such as a bias, a small number instead."""
    return float(weight.detach().double().square().mean().sqrt()) or 1e-2
