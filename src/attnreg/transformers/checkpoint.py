"""A model folder that is read a layer at a time.

:meth:`Checkpoint.open` looks at everything that can be wrong with a folder (configuration, index,
headers and sizes of the weight files, names and shapes of the tensors) before anything is computed.
Names are those of the model's ``state_dict``, whatever prefix the file uses; tied weights are
stored once and are found under each of their names.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from attnreg.transformers import shards
from attnreg.transformers.adapters import adapter_for
from attnreg.transformers.hub import model_folder
from attnreg.transformers.layers_file import LAYERS_FILE, read_layers
from attnreg.transformers.shapes import AttentionShape
from attnreg.transformers.skeleton import build_skeleton, exchange, resize_attention

CONFIG = "config.json"


class Checkpoint:
    """A checked model folder. Made by :meth:`open`.

    Attributes:
        folder: The folder.
        config: The transformers configuration.
        layers: The shapes of the attention layers where the folder has an ``attnreg.json``, which
            overrule the configuration; else None.
        entries: What is stored, by name, in the order of the model; a tied weight once, under the
            first of its names.
        aliases: The names of tied weights that are not in ``entries``, with the one that is.
        unused: Stored names that the model has no use for (masks of old versions, other heads).
        dtype: The dtype of most of the stored numbers.
    """

    def __init__(
        self, folder: Path, config: Any, layers: tuple[AttentionShape, ...] | None
    ) -> None:
        self.folder = folder
        self.config = config
        self.layers = layers
        stored = shards.read_entries(folder)
        model = self.skeleton()
        stored_names = model.state_dict().keys()
        self._transient = {  # buffers that are computed, not stored
            name: buffer
            for name, buffer in model.named_buffers(remove_duplicate=False)
            if name not in stored_names
        }
        self.entries, self.aliases = _matched(folder, model, stored)
        used = {entry.name for entry in self.entries.values()}
        self.unused = tuple(name for name in stored if name not in used)
        numbers: Counter[torch.dtype] = Counter()
        for entry in self.entries.values():
            numbers[entry.dtype] += entry.bytes // entry.dtype.itemsize
        self.dtype = numbers.most_common(1)[0][0]

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> Checkpoint:
        """Opens a folder, or a model of the hub, and checks it.

        Args:
            source: A folder with a model, or the name of one on the Hugging Face hub, which is
                downloaded into the hub's own cache (environment variables as there).

        Returns:
            The checkpoint; no weights have been read.

        Raises:
            ValueError: If there is no such folder and the hub has no such model or cannot be
                reached; if the configuration is missing, damaged, of a family that is not
                supported, needs code of its own or is quantised; if a weight file is missing or
                damaged, or a tensor is missing or of another shape than the model's.
        """
        folder = model_folder(source)
        config = _read_config(folder)
        layers = read_layers(folder / LAYERS_FILE) if (folder / LAYERS_FILE).is_file() else None
        return cls(folder, config, layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stored tensors, in the order of the model; tied weights once."""
        return tuple(self.entries)

    @property
    def model_class(self) -> Any:
        """The class of transformers that the configuration names."""
        return model_class(self.config)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Reads tensors, a file at a time, and no others.

        Args:
            names: Names of :attr:`names` or :attr:`aliases`.

        Returns:
            Tensors on the CPU by the names given, in their order and in the dtype on disk.

        Raises:
            ValueError: If there is no tensor of that name, or a file has become unreadable.
        """
        wanted = {name: self._entry(name) for name in names}
        values = dict(shards.read_values(wanted))
        return {name: values[name] for name in wanted}

    def skeleton(self) -> nn.Module:
        """The model without weights.

        Returns:
            A module of :attr:`model_class` in evaluation mode, with its parameters on the meta
            device and its attention of the shapes that the folder has.

        Raises:
            ValueError: If transformers refuses the configuration.
        """
        build = self.model_class
        config = copy.deepcopy(self.config)
        try:
            model = build_skeleton(lambda: build(config))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"transformers cannot build {build.__name__} from {self.folder / CONFIG}: "
                f"{_first_line(error)}"
            ) from error
        if self.layers is not None:
            source = str(self.folder / LAYERS_FILE)
            resize_attention(model, adapter_for(self.config), self.layers, source)
        return model

    def load_into(
        self, module: nn.Module, prefix: str = "", dtype: torch.dtype | None = None
    ) -> None:
        """Fills what is on the meta device in a module of a skeleton, and leaves the rest.

        Args:
            module: The skeleton or a module of it; its parameters keep their identity.
            prefix: The module's name in the skeleton; empty for the skeleton itself.
            dtype: The dtype of weights in memory; None for that on disk.

        Raises:
            ValueError: If a tensor is not in the folder, has another shape than the module's or is
                not finite, or a file has become unreadable.
        """
        start = f"{prefix}." if prefix else ""
        parameters = {start + name: value for name, value in module.named_parameters()}
        wanted = {name: self._entry(name) for name, value in parameters.items() if value.is_meta}
        for name, value in shards.read_values(wanted):
            _require_shape(self.folder, name, value.shape, parameters[name].shape)
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{wanted[name].file} is damaged: {name!r} holds numbers that are not finite; "
                    "copy or download it again"
                )
            exchange(parameters[name], value.to(dtype or value.dtype))
        self._fill_buffers(module, start)

    def _fill_buffers(self, module: nn.Module, start: str) -> None:
        for name, buffer in list(module.named_buffers(remove_duplicate=False)):
            if buffer.is_meta:
                path, _, last = name.rpartition(".")
                full = start + name
                computed = self._transient.get(full)
                value = self.tensors([full])[full] if computed is None else computed.clone()
                module.get_submodule(path)._buffers[last] = value

    def _entry(self, name: str) -> shards.Entry:
        entry = self.entries.get(self.aliases.get(name, name))
        if entry is None:
            raise ValueError(f"{self.folder} has no tensor {name!r}")
        return entry


def model_class(config: Any) -> Any:
    """The class of transformers that a configuration names.

    Args:
        config: A configuration; without ``architectures`` it means the base model.

    Returns:
        The class.

    Raises:
        ValueError: If transformers has no such class.
    """
    names = getattr(config, "architectures", None)
    if not names:
        return transformers.AutoModel._model_mapping[type(config)]
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"the configuration names the architecture {names[0]!r}, which transformers "
            f"{transformers.__version__} does not have"
        )
    return found


def _read_config(folder: Path) -> Any:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG}; expected the folder of a Hugging Face model")
    raw = shards.read_json(path)
    if raw.get("auto_map"):
        raise ValueError(
            f"{folder} needs trust_remote_code (its {CONFIG} has auto_map), and code of a model "
            "folder is never run; take a model of a family that transformers has"
        )
    adapter_for(SimpleNamespace(model_type=raw.get("model_type")))
    if raw.get("quantization_config"):
        raise ValueError(f"{folder} is a quantised model; take the unquantised one")
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # which ones differs between versions of transformers
        raise ValueError(f"transformers cannot read {path}: {_first_line(error)}") from error


def _matched(
    folder: Path, model: nn.Module, stored: Mapping[str, shards.Entry]
) -> tuple[dict[str, shards.Entry], dict[str, str]]:
    """Stored tensors by the model's names, and the further names of tied ones."""
    prefix = getattr(model, "base_model_prefix", "")
    groups: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        groups.setdefault(id(value), []).append(name)
    entries: dict[str, shards.Entry] = {}
    aliases: dict[str, str] = {}
    for names in groups.values():
        found = {name: key for name in names if (key := _stored_name(name, prefix, stored))}
        if not found:
            raise ValueError(
                f"{folder} lacks the tensor {names[0]!r} that {type(model).__name__} needs; "
                "the weights and the configuration are not of the same model"
            )
        first = next(iter(found))
        entries[first] = stored[found[first]]
        _require_shape(folder, first, entries[first].shape, state[first].shape)
        _require_equal({name: stored[key] for name, key in found.items()})
        aliases |= {name: first for name in names if name != first}
    return entries, aliases


def _stored_name(name: str, prefix: str, stored: Mapping[str, shards.Entry]) -> str | None:
    """The name in the file: with or without the base model's prefix, or as TensorFlow had it."""
    plain = name.removeprefix(f"{prefix}.")
    for candidate in (name, f"{prefix}.{plain}", plain):
        old = candidate.replace("LayerNorm.weight", "LayerNorm.gamma")
        old = old.replace("LayerNorm.bias", "LayerNorm.beta")
        for key in (candidate, old):
            if key in stored:
                return key
    return None


def _require_equal(tied: Mapping[str, shards.Entry]) -> None:
    """Tied weights that are stored several times must be the same."""
    if len({entry.name for entry in tied.values()}) < 2:
        return
    (first, value), *others = shards.read_values(tied)
    for name, other in others:
        if not torch.equal(value, other):
            raise ValueError(
                f"{tied[name].file} holds different values for {first!r} and {name!r}, which the "
                'configuration ties; set "tie_word_embeddings" in config.json to false'
            )


def _require_shape(folder: Path, name: str, given: Iterable[int], expected: Iterable[int]) -> None:
    if tuple(given) != tuple(expected):
        raise ValueError(
            f"{folder} holds {name!r} of shape {tuple(given)}; the model needs {tuple(expected)}: "
            "the weights and the configuration are not of the same model"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
