"""From what a user calls a model to a folder: a path, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

import huggingface_hub

_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "*/*.bin")
_UNWANTED = ("onnx/*", "openvino/*", "coreml/*", "original/*", "*.h5", "consolidated*")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def model_folder(source: str | os.PathLike[str]) -> Path:
    """Finds the folder of a model; downloads it where the source is a name on the hub.

    Args:
        source: A folder, or a name such as ``owner/model``.

    Returns:
        The folder, in the hub's cache for a name.

    Raises:
        ValueError: If there is no such folder, and the source is not the name of a model that the
            hub has and can be reached for, or that its cache holds.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; expected the folder of a model")
    name = os.fspath(source)
    if isinstance(source, Path) or not _HUB_NAME.fullmatch(name):
        raise ValueError(f"there is no folder {name}; expected a local model folder or a hub name")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)
            )
        )
    except Exception as error:  # the errors of the network libraries differ between versions
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"there is no folder {name!r}, and the hub gave no model of that name "
            f"({type(error).__name__}: {cause}); point at a local folder, or download the model "
            "where there is a network"
        ) from error
