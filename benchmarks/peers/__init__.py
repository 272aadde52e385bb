"""The methods that are compared: one small file each, found here.

A new peer is a file in this folder whose `PEERS` names its rows with the settings tried. What a
method implements is `base.Method`.
"""

import importlib
import pkgutil
from collections.abc import Iterable

from benchmarks.peers.base import Method, Peer, PlantedArrays, Status, Trace, Weights, run
from benchmarks.peers.ours import OURS, Validated

__all__ = [
    "OURS",
    "Method",
    "Peer",
    "PlantedArrays",
    "Status",
    "Trace",
    "Validated",
    "Weights",
    "found",
    "installed",
    "run",
]


def found() -> tuple[Peer, ...]:
    """All peers of the files in this folder, in their order; no package is imported."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(
        peer
        for name in modules
        for peer in getattr(importlib.import_module(f"{__name__}.{name}"), "PEERS", ())
    )


def installed(peers: Iterable[Peer]) -> tuple[tuple[Peer, ...], dict[str, str]]:
    """The peers that can be run, and for each of the others why it cannot."""
    missing = {peer.name: peer.missing for peer in peers if peer.missing}
    return tuple(peer for peer in peers if peer.name not in missing), missing
