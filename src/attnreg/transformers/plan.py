"""Which sizes each layer shall have: a plan, from options, a TOML or JSON file, or a budget.

A plan file has a section ``default`` for all layers and sections of single layers, which overrule
it::

    [default]
    kv_heads = 2

    [layers.0]
    kv_heads = 4

Keys are ``kv_heads``, ``heads`` and ``head_dim``; what is not given stays as it is.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attnreg.transformers.adapters import Adapter
from attnreg.transformers.shapes import AttentionShape, Sizes

KEYS = ("kv_heads", "heads", "head_dim")


@dataclass(frozen=True)
class Setting(Sizes):
    """Sizes of a student's layer as a plan has them."""

    def student(
        self, adapter: Adapter, config: Any, layer: int, shape: AttentionShape
    ) -> AttentionShape:
        """The student's shape of a layer.

        Args:
            adapter: The adapter of the model's family.
            config: The original's configuration, from which frequencies and scale follow.
            layer: Number of the layer.
            shape: The original's shape of it.

        Returns:
            ``shape`` with the given sizes.

        Raises:
            ValueError: If a size is larger than the original's or the sizes do not go together.
        """
        for name, value in self.given().items():
            if value > getattr(shape, name):
                raise ValueError(
                    f"{name} = {value} was given, the original has {getattr(shape, name)}: "
                    "expected a smaller number"
                )
        sizes = replace(shape.sizes, **self.given())
        return shape if sizes == shape.sizes else adapter.shape(config, layer, sizes)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Setting:
        """A setting from a section of a plan.

        Args:
            values: Sizes by name.
            where: The section's name, for messages.

        Returns:
            The setting.

        Raises:
            ValueError: If there is another key or a size is no positive integer.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{where} is {values!r}; expected a section with {', '.join(KEYS)}")
        for name, value in values.items():
            if name not in KEYS:
                raise ValueError(f"{where} has {name!r}; expected only {', '.join(KEYS)}")
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{where} has {name} = {value!r}; expected a positive integer")
        return cls(**values)


@dataclass(frozen=True)
class Plan:
    """Settings of all layers.

    Attributes:
        default: Of the layers that have none of their own.
        layers: Of single layers, by number.
        only: The layers that may be changed; None: all.
    """

    default: Setting = Setting()
    layers: Mapping[int, Setting] = field(default_factory=dict)
    only: frozenset[int] | None = None

    def shapes(
        self, adapter: Adapter, config: Any, original: Sequence[AttentionShape]
    ) -> tuple[AttentionShape, ...]:
        """The student's shapes.

        Args:
            adapter: The adapter of the model's family.
            config: The original's configuration.
            original: The original's, one for each application of a block.

        Returns:
            As many shapes.

        Raises:
            ValueError: If a layer does not exist, its sizes do not go together, or the plan
                changes nothing.
        """
        count = len(original)
        for number in sorted({*self.layers, *(self.only or ())}):
            if not 0 <= number < count:
                raise ValueError(
                    f"layer {number} was given, the model has {count}: expected 0 to {count - 1}"
                )
        shapes = []
        for number, shape in enumerate(original):
            setting = self.layers.get(number, self.default)
            if self.only is not None and number not in self.only:
                setting = Setting()
            try:
                shapes.append(setting.student(adapter, config, number, shape))
            except ValueError as error:
                raise ValueError(f"layer {number}: {error}") from error
        if tuple(shapes) == tuple(original):
            raise ValueError(
                "nothing is to be changed: give --kv-heads, --heads, --head-dim or a --plan with "
                "sizes below the original's "
                f"({original[0].heads} heads, {original[0].kv_heads} key/value heads, "
                f"head_dim {original[0].head_dim})"
            )
        return tuple(shapes)

    def toml(self, comment: str = "") -> str:
        """The plan as a TOML file; ``only`` is not part of it."""
        lines = [f"# {line}" for line in comment.splitlines()]
        sections = [("default", self.default)]
        sections += [(f"layers.{number}", self.layers[number]) for number in sorted(self.layers)]
        for name, setting in sections:
            if name != "default" or setting.given():
                lines += ["", f"[{name}]"] if lines else [f"[{name}]"]
                lines += [f"{key} = {value}" for key, value in setting.given().items()]
        return "\n".join(lines) + "\n"


def read_plan(path: Path) -> Plan:
    """Reads a plan file.

    Args:
        path: A ``.json`` file, or TOML.

    Returns:
        The plan.

    Raises:
        ValueError: If there is no such file, or it is no plan.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; expected a plan in TOML or JSON") from error
    except OSError as error:
        raise ValueError(f"the plan {path} cannot be read: {error.strerror}") from error
    try:
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ValueError(f"{path} is not {kind}: {error}") from error
    try:
        return _plan(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_layers(text: str) -> frozenset[int]:
    """Numbers of layers from a list such as ``"0,2-4"``.

    Returns:
        The numbers.

    Raises:
        ValueError: If it is no such list.
    """
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise ValueError(f"--layers is {text!r}; expected numbers from 0 such as 0,2-4")
        last = int(high) if dash else int(low)
        if last < int(low):
            raise ValueError(f"--layers has {part.strip()!r}; expected the smaller number first")
        found.update(range(int(low), last + 1))
    return frozenset(found)


def _plan(content: Any) -> Plan:
    if not isinstance(content, Mapping):
        raise ValueError(f"a {type(content).__name__} was given; expected default and layers")
    strange = sorted(set(content) - {"default", "layers"})
    if strange:
        raise ValueError(
            f"the plan has {strange[0]!r}; expected default and layers (such as [layers.3])"
        )
    layers = content.get("layers", {})
    if not isinstance(layers, Mapping):
        raise ValueError("layers is no section; expected sections such as [layers.3]")
    for name in layers:
        if not name.isdecimal():
            raise ValueError(f"layers has {name!r}; expected the number of a layer, from 0")
    settings = {int(name): Setting.of(layers[name], f"layers.{name}") for name in layers}
    if not settings and "default" not in content:
        raise ValueError("the plan is empty; expected a section default or layers")
    return Plan(Setting.of(content.get("default", {}), "default"), settings)


@dataclass(frozen=True)
class Choice:
    """Something that a layer may have.

    Attributes:
        index: Its number among the layer's choices.
        cost: What it costs, a whole number of units.
        error: What it loses.
    """

    index: int
    cost: int
    error: float


def cheapest(choices: Sequence[Sequence[Choice]], budget: int) -> tuple[Choice, ...] | None:
    """The plan with the least sum of errors whose costs sum to at most the budget.

    Exact for errors that add up: dynamic programming over the costs, in as many steps as choices
    times different sums. Of equal sums of errors the cheaper one is taken.

    Args:
        choices: For each layer what it may have, at least one.
        budget: Largest sum of costs.

    Returns:
        One choice for each layer; None if every plan costs more.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    rest = [sum(min(c.cost for c in layer) for layer in choices[i:]) for i in range(len(choices))]
    for number, layer in enumerate(choices):
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        needed = rest[number + 1] if number + 1 < len(choices) else 0
        for cost, (error, picks) in best.items():
            for index, choice in enumerate(layer):
                total = cost + choice.cost
                if total + needed > budget:
                    continue
                candidate = (error + choice.error, (*picks, index))
                if total not in after or candidate < after[total]:
                    after[total] = candidate
        best = _undominated(after)
    if not best:
        return None
    _, picks = min(best.values())
    return tuple(layer[index] for layer, index in zip(choices, picks, strict=True))


def _undominated(
    states: Mapping[int, tuple[float, tuple[int, ...]]],
) -> dict[int, tuple[float, tuple[int, ...]]]:
    """Without the states that cost more than another and are no better."""
    kept: dict[int, tuple[float, tuple[int, ...]]] = {}
    least = float("inf")
    for cost in sorted(states):
        if states[cost][0] < least:
            kept[cost] = states[cost]
            least = states[cost][0]
    return kept
