"""What a conversion lost and gained: two models on the same held-out windows.

Three kinds of models are told apart. A *causal* one has a head of logits and causal attention:
each window's tokens but the first are predicted from those before. A *masked* one has a head and
sees both sides: a share of the tokens, drawn with a seed, is replaced by the mask token and
predicted. An *encoder* has no head of logits. The last two embed a window as the mean of its last
hidden states.

Windows are run in batches padded on the right; padding is in no score.
"""

from __future__ import annotations

import inspect
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.calibration import Windows
from attnreg.transformers.layer_errors import LayerError, LayerErrors, cache_bytes, recorded
from attnreg.transformers.scores import Cosines, TokenScores

BATCH = 8
MAX_NUMBERS = 2**26
"""Logits, or recorded numbers, of one batch: with large models batches are smaller."""
MASKED_SHARE = 0.15
REPEATS = 3
CAUSAL, MASKED, ENCODER = "causal", "masked", "encoder"

Observer = Callable[[int, int], None]
"""Is told the windows done and their number."""


@dataclass(frozen=True)
class ModelScores:
    """What one model costs and how well it predicts.

    Attributes:
        parameters: Numbers in the model, tied ones counted once.
        kv_cache_bytes: Bytes of keys and values for a token of context, in the dtype that the model
            has in memory; None where attention is not causal, since nothing is kept there.
        tokens_per_second: Tokens of whole windows run through the model: the median of three times,
            taken in turn with the other model. Not the speed of generating.
        nats: Mean negative log likelihood of a predicted token; None for an encoder.
        perplexity: ``exp(nats)``, for a causal model.
        masked_accuracy: Share of the masked tokens that are the first choice, for a masked model.
    """

    parameters: int
    kv_cache_bytes: int | None
    tokens_per_second: float
    nats: float | None = None
    perplexity: float | None = None
    masked_accuracy: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Two models compared.

    Attributes:
        kind: ``"causal"``, ``"masked"`` or ``"encoder"``.
        windows: Number of windows.
        tokens: Tokens in them, special ones among them.
        predicted: Tokens predicted.
        digest: SHA-256 of the windows' ids.
        seed: Seed of the masks.
        original: Scores of the original.
        converted: Scores of the converted model.
        excess: Nats that a predicted token costs more with the converted model.
        kl: Mean ``KL(original || converted)`` of the predictions, nats for a token.
        agreement: Share of the predicted tokens at which the first choices are equal.
        cosine_mean: Mean cosine between the embeddings of a window; None for a causal model.
        cosine_min: The smallest.
        layers: Errors of the attentions, each given the original's input.
    """

    kind: str
    windows: int
    tokens: int
    predicted: int
    digest: str
    seed: int
    original: ModelScores
    converted: ModelScores
    excess: float | None
    kl: float | None
    agreement: float | None
    cosine_mean: float | None
    cosine_min: float | None
    layers: tuple[LayerError, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds."""
        return asdict(self)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


@dataclass(frozen=True)
class Masking:
    """How tokens are masked for a masked language model.

    Attributes:
        token: Id of the mask token.
        special: Ids that are never masked.
        seed: Seed of the draw; a window's masks depend on it and on the window's number alone.
    """

    token: int
    special: Collection[int] = ()
    seed: int = 0

    def chosen(self, number: int, ids: tuple[int, ...]) -> list[int]:
        """Positions of window ``number`` to mask: 15 % of its tokens, at least one."""
        places = [i for i, token in enumerate(ids) if token not in self.special]
        wanted = min(max(1, round(MASKED_SHARE * len(places))), len(places))
        return sorted(random.Random(f"{self.seed} {number}").sample(places, wanted))


@torch.no_grad()
def evaluate(
    original: nn.Module,
    converted: nn.Module,
    windows: Windows,
    *,
    batch: int = BATCH,
    masking: Masking | None = None,
    observer: Observer | None = None,
) -> Evaluation:
    """Compares two models on the same windows.

    Args:
        original: A model of a supported family in evaluation mode.
        converted: One with the same vocabulary, width and number of layers.
        windows: Held-out windows.
        batch: Windows run together at most; fewer where what is kept of them would be large.
        masking: For masked language models.
        observer: Is told the windows done and their number.

    Returns:
        The scores.

    Raises:
        ValueError: If the models cannot be compared, one is in training mode, or a score is not
            finite.
    """
    kind = check_comparable(original, converted)
    if kind == MASKED and masking is None:
        raise ValueError(
            "this is a masked language model and no mask token is known: its tokenizer needs one, "
            "or give `masking`"
        )
    size = _batch_size(original, windows, batch, kind)
    run = _Run(kind, original, converted, masking if kind == MASKED else None)
    done = 0
    for ids, mask in windows.batches(size, _device(original)):
        run.add(ids, mask, done)
        done += len(ids)
        if observer is not None:
            observer(done, len(windows))
    speeds = _speeds(run.models, *next(windows.batches(size, _device(original))), kind)
    return run.result(windows, speeds)


def check_comparable(original: nn.Module, converted: nn.Module) -> str:
    """The kind of two models.

    Args:
        original: A model of a supported family.
        converted: Another.

    Returns:
        ``"causal"``, ``"masked"`` or ``"encoder"``.

    Raises:
        ValueError: If they cannot be compared.
    """
    facts: list[dict[str, Any]] = []
    for name, model in (("original", original), ("converted", converted)):
        config: Any = model.config
        if model.training:
            raise ValueError(
                f"the {name} model is in training mode (dropout); call model.eval() first"
            )
        facts.append(
            {
                "kind": _kind(model),
                "vocabulary": config.vocab_size,
                "width": config.hidden_size,
                "number of layers": len(adapter_for(config).blocks(model)),
                "device": str(_device(model)),
            }
        )
    for name, value in facts[0].items():
        if facts[1][name] != value:
            raise ValueError(
                f"the {name} of the original is {value}, of the converted model {facts[1][name]}; "
                "expected the same: give a model and a conversion of it"
            )
    return str(facts[0]["kind"])


class _Run:
    """The sums of one evaluation."""

    def __init__(
        self, kind: str, original: nn.Module, converted: nn.Module, masking: Masking | None
    ) -> None:
        self.kind, self.models, self.masking = kind, (original, converted), masking
        self.scores, self.cosines = TokenScores(), Cosines()
        self.errors = LayerErrors(original, converted)

    def add(self, ids: Tensor, mask: Tensor, first: int) -> None:
        """Adds a batch whose first window has the number ``first``."""
        with recorded(self.models[0]) as reference:
            left = _call(self.models[0], ids, mask, head=self.kind == CAUSAL)
        with recorded(self.models[1], reference.inputs) as replaced:
            _call(self.models[1], ids, mask, head=False)
        self.errors.add(reference, replaced, mask)
        right = _call(self.models[1], ids, mask, head=self.kind == CAUSAL)
        if self.kind == CAUSAL:
            followed = mask[:, 1:].bool()
            self.scores.add(left[:, :-1][followed], right[:, :-1][followed], ids[:, 1:][followed])
        else:
            self.cosines.add(left, right, mask)
        if self.kind == MASKED:
            self._add_masked(ids, mask, first)

    def _add_masked(self, ids: Tensor, mask: Tensor, first: int) -> None:
        assert self.masking is not None
        hidden = torch.zeros_like(mask, dtype=torch.bool)
        for i, (row, kept) in enumerate(zip(ids.cpu(), mask.cpu(), strict=True)):
            tokens = tuple(row[: int(kept.sum())].tolist())
            hidden[i, self.masking.chosen(first + i, tokens)] = True
        covered = ids.masked_fill(hidden, self.masking.token)
        left, right = (_call(model, covered, mask, head=True)[hidden] for model in self.models)
        self.scores.add(left, right, ids[hidden])

    def result(self, windows: Windows, speeds: tuple[float, float]) -> Evaluation:
        """The scores of what was added."""
        sums, count = self.scores, self.scores.count
        if self.kind != ENCODER and not count:
            raise ValueError(f"{windows.source} has no token to predict; give more text")
        both = []
        for i, model in enumerate(self.models):
            nats = sums.nats[i] / count if count else None
            causal, masked = self.kind == CAUSAL, self.kind == MASKED
            both.append(
                ModelScores(
                    parameters=sum(p.numel() for p in model.parameters()),
                    kv_cache_bytes=cache_bytes(model) if _causal(model) else None,
                    tokens_per_second=speeds[i],
                    nats=nats,
                    perplexity=_exp(nats) if causal and nats is not None else None,
                    masked_accuracy=sums.right[i] / count if masked and count else None,
                )
            )
        cosines = self.cosines.values
        return Evaluation(
            kind=self.kind,
            windows=len(windows),
            tokens=windows.tokens,
            predicted=count,
            digest=windows.digest,
            seed=0 if self.masking is None else self.masking.seed,
            original=both[0],
            converted=both[1],
            excess=(sums.nats[1] - sums.nats[0]) / count if count else None,
            kl=max(sums.kl / count, 0.0) if count else None,
            agreement=sums.agree / count if count else None,
            cosine_mean=statistics.fmean(cosines) if cosines else None,
            cosine_min=min(cosines) if cosines else None,
            layers=self.errors.values(),
        )


# -- parts


def _call(model: Any, ids: Tensor, mask: Tensor, *, head: bool) -> Tensor:
    """Logits, or last hidden states of the model without its head; (b, n, ...)."""
    called = model if head else model.base_model
    options: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "use_cache" in inspect.signature(called.forward).parameters:
        options["use_cache"] = False
    output = called(**options)
    # a model for pretraining has a second head, and another name for the logits of tokens
    names = ("logits", "prediction_logits") if head else ("last_hidden_state",)
    found: Tensor = next(output[name] for name in names if name in output)
    return found


def _causal(model: nn.Module) -> bool:
    config: Any = model.config
    return adapter_for(config).shape(config, 0).causal


def _kind(model: Any) -> str:
    if model.get_output_embeddings() is None:
        return ENCODER
    return CAUSAL if _causal(model) else MASKED


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _batch_size(model: Any, windows: Windows, batch: int, kind: str) -> int:
    if batch < 1:
        raise ValueError(f"the batch size is {batch}; expected at least 1")
    if not len(windows):
        raise ValueError("there is no window; give more text")
    largest = max(max(row) for row in windows.ids)
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"the windows hold id {largest}, the models have {model.config.vocab_size} embeddings: "
            "the tokenizer is not theirs"
        )
    layers = len(adapter_for(model.config).blocks(model))
    recorded_numbers = 6 * layers * model.config.hidden_size  # two recordings of three tensors
    logits = 0 if kind == ENCODER else model.config.vocab_size
    numbers = max(recorded_numbers, logits) * max(map(len, windows.ids))
    return max(1, min(batch, MAX_NUMBERS // numbers))


def _speeds(
    models: tuple[nn.Module, nn.Module], ids: Tensor, mask: Tensor, kind: str
) -> tuple[float, float]:
    """Tokens per second of both, one call of each in turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in (0, 1) * REPEATS:
        _wait(ids.device)
        start = time.perf_counter()
        _call(models[i], ids, mask, head=kind != ENCODER)
        _wait(ids.device)
        seconds[i].append(time.perf_counter() - start)
    tokens = int(mask.sum())
    original, converted = (tokens / statistics.median(taken) for taken in seconds)
    return original, converted


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _exp(nats: float) -> float:
    """The perplexity, at most the largest number: JSON has no infinity."""
    return math.exp(min(nats, 709.0))
