"""The shape of an attention layer: everything about it but its weights and its position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from attnreg.masks import Mask
from attnreg.models import MultiHead
from attnreg.models.rotary import Rotary

BIASES = ("query", "key", "value", "output")


@dataclass(frozen=True)
class Sizes:
    """What a student's layer may have less of; None: as the original.

    Attributes:
        kv_heads: Key/value heads.
        heads: Query heads.
        head_dim: Width of a head.
    """

    kv_heads: int | None = None
    heads: int | None = None
    head_dim: int | None = None

    def __str__(self) -> str:
        given = (f"{name}={value}" for name, value in self.given().items())
        return ", ".join(given) or "unchanged"

    def given(self) -> dict[str, int]:
        """The sizes that are given, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


ORIGINAL = Sizes()


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

    def __post_init__(self) -> None:
        for name in ("width", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.kv_heads} key/value heads do not divide {self.heads} heads: choose one of "
                + ", ".join(str(g) for g in range(1, self.heads + 1) if self.heads % g == 0)
            )
        unknown = set(self.biases) - set(BIASES)
        if unknown:
            raise ValueError(f"biases {sorted(unknown)} are unknown; expected some of {BIASES}")

    @property
    def sizes(self) -> Sizes:
        """Its sizes, all given."""
        return Sizes(self.kv_heads, self.heads, self.head_dim)

    def student(
        self,
        kv_heads: int | None = None,
        heads: int | None = None,
        head_dim: int | None = None,
        *,
        rotary: Rotary | None = None,
    ) -> AttentionShape:
        """The shape with other sizes; what is None stays.

        A logit scale of ``head_dim ** -0.5`` follows the head size, any other stays. Rotary
        frequencies follow from a model's configuration, which a shape does not hold: where they
        change, :meth:`attnreg.transformers.adapters.Adapter.shape` gives the student's shape.

        Returns:
            The student's shape.

        Raises:
            ValueError: If a size is impossible, or the head size of a layer with rotary position
                embedding changes and ``rotary`` is not given.
        """
        size = self.head_dim if head_dim is None else head_dim
        if self.rotary is not None and size != self.head_dim and rotary is None:
            raise ValueError(
                f"head_dim {self.head_dim} -> {size} changes the rotary frequencies: give "
                "`rotary`, or take the shape from Adapter.shape"
            )
        follows = math.isclose(self.scale, self.head_dim**-0.5, rel_tol=1e-12)
        return replace(
            self,
            kv_heads=self.kv_heads if kv_heads is None else kv_heads,
            heads=self.heads if heads is None else heads,
            head_dim=size,
            scale=size**-0.5 if follows else self.scale,
            rotary=self.rotary if rotary is None else rotary,
        )

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the layer's weights, ``y = x W + b``."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "W_Q": (self.width, queries),
            "W_K": (self.width, keys),
            "W_V": (self.width, keys),
            "W_O": (queries, self.width),
        }
        for name, letter, size in zip(
            BIASES, "QKVO", (queries, keys, keys, self.width), strict=True
        ):
            if name in self.biases:
                shapes[f"b_{letter}"] = (size,)
        if self.norm_eps is not None:
            shapes |= {"g_Q": (self.head_dim,), "g_K": (self.head_dim,)}
        return shapes

    def model(self) -> MultiHead:
        """The layer as a model to fit; mask and scale are the problem's."""
        return MultiHead(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            bias=self.biases,
            rotary=self.rotary,
            norm_eps=self.norm_eps,
        )

    def mask(self) -> Mask | None:
        """The mask of :class:`attnreg.AttentionProblem` that the layer has."""
        if not self.causal:
            return None
        return "causal" if self.window is None else ("causal", self.window)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which JSON holds without loss."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttentionShape:
        """The shape of :meth:`to_dict`, also after a round trip through JSON.

        Returns:
            An equal shape.

        Raises:
            ValueError: If names are missing or unknown.
        """
        given = dict(values)
        try:
            if given.get("rotary") is not None:
                rotary = dict(given["rotary"])
                rotary["frequencies"] = tuple(rotary["frequencies"])
                given["rotary"] = Rotary(**rotary)
            given["biases"] = tuple(given.get("biases", ()))
            return cls(**given)
        except (TypeError, KeyError) as error:
            raise ValueError(f"not the shape of an attention layer: {error}") from None
