"""Loads any model folder, also one whose attention no configuration of transformers can express."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from torch import nn

from attnreg.transformers.checkpoint import Checkpoint


def load(folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> nn.Module:
    """Loads a model.

    A folder with an ``attnreg.json`` is built with the attention shapes that stand there; any other
    is loaded by transformers itself.

    Args:
        folder: A model folder, or the name of a model on the hub.
        dtype: The dtype of the weights in memory; None for that on disk.

    Returns:
        A model of transformers (a ``PreTrainedModel``) in evaluation mode, on the CPU.

    Raises:
        ValueError: If the folder is missing, damaged, or of a family that is not supported.
    """
    checkpoint = Checkpoint.open(folder)
    if checkpoint.layers is None:
        return _by_transformers(checkpoint, dtype or checkpoint.dtype)
    model = checkpoint.skeleton()
    checkpoint.load_into(model, dtype=dtype)
    wrapped: Any = model
    wrapped.name_or_path = str(checkpoint.folder)
    if (checkpoint.folder / "generation_config.json").is_file() and wrapped.can_generate():
        settings = transformers.GenerationConfig.from_pretrained(checkpoint.folder)
        wrapped.generation_config = settings
    return model


def _by_transformers(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    old = int(transformers.__version__.split(".", 1)[0]) < 5
    options = {"torch_dtype" if old else "dtype": dtype}
    model: nn.Module = checkpoint.model_class.from_pretrained(checkpoint.folder, **options)
    return model.eval()
