"""The shape of an attention layer: everything about it but its weights and its position."""

from __future__ import annotations

from dataclasses import dataclass

from attnreg.models.rotary import Rotary


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer of a model.

    Attributes:
        width: Width of the hidden states that go in and come out.
        heads: Number of query heads.
        kv_heads: Number of key/value heads; divides ``heads``.
        head_dim: Width of a query, key and value head.
        scale: Factor of the logits.
        causal: Whether position ``i`` sees positions ``0 ... i`` only.
        window: Of these the last ``window`` only; None for all.
        biases: Which of ``"query"``, ``"key"``, ``"value"``, ``"output"`` have a bias.
        rotary: Rotary position embedding, or None.
        norm_eps: Epsilon of the root-mean-square norm of every query and key head (Qwen3), whose
            gains are the weights ``g_Q`` and ``g_K``; None where there is none.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    causal: bool
    window: int | None = None
    biases: tuple[str, ...] = ()
    rotary: Rotary | None = None
    norm_eps: float | None = None
