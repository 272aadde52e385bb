"""``attnreg.json``: the shapes of the attention layers that no configuration can express."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from attnreg.transformers.shapes import AttentionShape
from attnreg.transformers.shards import read_json

LAYERS_FILE = "attnreg.json"
FORMAT = 1


def layers_file(shapes: Sequence[AttentionShape]) -> bytes:
    """The content of ``attnreg.json``.

    Args:
        shapes: One for each application of a block, in order.

    Returns:
        JSON as UTF-8.
    """
    content = {"format": FORMAT, "layers": [shape.to_dict() for shape in shapes]}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def read_layers(path: Path) -> tuple[AttentionShape, ...]:
    """Reads ``attnreg.json``.

    Args:
        path: The file.

    Returns:
        The shapes, one for each application of a block.

    Raises:
        ValueError: If it is damaged or of a newer format.
    """
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {content.get('format')!r}; this attnreg reads format {FORMAT}: "
            "upgrade attnreg"
        )
    try:
        return tuple(AttentionShape.from_dict(layer) for layer in content["layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not describe layers ({error}); write the folder again"
        ) from error
