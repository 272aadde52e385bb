"""Doctored certificates, fits and problems: every one must be refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from attnreg import Certificate, verify
from benchmarks.certificate_problems import Instance, converged, make

NUMBERS = ("gap", "radius", "mu", "lipschitz", "tolerance", "gradient_norm", "loss", "value")
FACTORS = (0.0, 0.5, 0.999, 1.001, -1.0)
TEXTS = ("reason", "norm", "method", "problem_digest", "parameters_digest")


def mutations(instance: Instance, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Names of doctored cases and calls that must raise ValueError."""
    problem, result = instance.problem, converged(instance)
    true = verify(problem, result)
    path = folder / f"{instance.index}.json"

    def checked(certificate: Certificate) -> Callable[[], None]:
        return lambda: certificate.check(true)

    for name in NUMBERS:
        for factor in FACTORS:
            value = getattr(true, name)
            if value:
                changed = dataclasses.replace(true, **{name: value * factor})
                yield f"{name} times {factor}", checked(changed)
    for kind in type(true.kind):
        if kind is not true.kind:
            yield f"kind {kind.value}", checked(dataclasses.replace(true, kind=kind))
    for name in TEXTS:
        text = getattr(true, name)
        changed = text[::-1] if "digest" in name else text + "!"
        yield name, checked(dataclasses.replace(true, **{name: changed}))
    yield "no assumptions", checked(dataclasses.replace(true, assumptions=()))
    yield "gap left out", checked(dataclasses.replace(true, gap=None))
    for renew in (False, True):
        for change in ({"gap": 0.0}, {"kind": "certain"}, {"gap": "none"}, {"more": 1}):
            yield f"file, {change}, digest {renew}", _file(path, true, change, renew)
    for name, tensor in result.parameters.items():
        moved = dict(result.parameters) | {name: torch.nextafter(tensor, tensor + 1)}
        yield (
            f"{name} one bit away",
            lambda moved=moved: true.check(verify(problem, moved["X"], moved["Y"])),
        )  # type: ignore[misc]
    others = {
        "ridge_x": problem.replace(ridge_x=problem.ridge_x * 1.0001 + 1e-12),
        "ridge_y": problem.replace(ridge_y=problem.ridge_y * 1.0001 + 1e-12),
        "scale": problem.replace(scale=(problem.scale or 1.0) * 1.0001),
    }
    for name, other in others.items():
        yield f"problem, {name}", lambda other=other: true.check(verify(other, result))  # type: ignore[misc]


def refusals(count: int, folder: Path) -> dict[str, Any]:
    """How many of at least ``count`` doctored cases are refused."""
    tried, accepted, index = 0, list[str](), 0
    while tried < count:
        instance = make(index)
        for name, call in mutations(instance, folder):
            tried += 1
            try:
                call()
            except ValueError:
                continue
            accepted.append(f"{instance.index}: {name}")
        index += 1
    return {"tried": tried, "accepted": accepted}


def _file(path: Path, true: Certificate, change: dict[str, Any], renew: bool) -> Callable[[], None]:
    def call() -> None:
        content = {**true.as_dict(), **change}
        digest = hashlib.sha256(json.dumps(true.as_dict(), sort_keys=True).encode()).hexdigest()
        if renew:
            digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(content | {"digest": digest}))
        Certificate.load(path).check(true)

    return call
