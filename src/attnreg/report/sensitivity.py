"""Picture of a sensitivity profile: error of every layer at every setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import matplotlib as mpl
from matplotlib.figure import Figure


class Measured(Protocol):
    """What is drawn of a measurement (:class:`attnreg.transformers.sensitivity.Measured`)."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers."""

    @property
    def setting(self) -> object:
        """The setting; its text is the row's name."""

    @property
    def error(self) -> float:
        """The held-out relative error."""


def save_profile(
    path: Path, profile: Sequence[Sequence[Measured]], chosen: Sequence[Measured]
) -> None:
    """Writes a picture of the errors, layers across and settings down; the plan's are framed.

    Args:
        path: The file; its suffix says the format.
        profile: Measurements of each layer.
        chosen: Those in the plan.
    """
    names = list(dict.fromkeys(str(one.setting) for layer in profile for one in layer))
    table = [[float("nan")] * len(profile) for _ in names]
    for column, layer in enumerate(profile):
        for one in layer:
            table[names.index(str(one.setting))][column] = one.error
    with mpl.rc_context({"font.size": 9}):
        size = (1.8 + 0.5 * len(profile), 1.4 + 0.35 * len(names))
        figure = Figure(figsize=(max(size[0], 4.5), size[1]), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(table, cmap="viridis_r", vmin=0.0, aspect="auto")
        axes.set_xticks(range(len(profile)), [str(layer[0].layers[0]) for layer in profile])
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="layer")
        for column, one in enumerate(chosen):
            corner = (column - 0.5, names.index(str(one.setting)) - 0.5)
            frame = mpl.patches.Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2)
            axes.add_patch(frame)
        figure.colorbar(image, label="held-out relative error")
        axes.set_title("error of each layer alone; framed: the plan", fontsize=9)
        figure.savefig(path, dpi=120)
