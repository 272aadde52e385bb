"""What is proven of a point, as a value that can be saved, sent and checked again.

A saved certificate is a JSON file with the SHA-256 digest of its content. The digest finds
accidents; who changes a certificate can renew it. What a certificate is worth is found out by
:meth:`Certificate.check` against one that was computed anew from the problem and the parameters.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from attnreg.storage import content_digest, write_text

FORMAT_VERSION = 1
AGREEMENT = 1e-4
"""Relative difference of numbers that another machine's rounding may make."""


class Kind(enum.Enum):
    """What a certificate states, the weakest first."""

    NOT_CERTIFIED = "not_certified"
    STATIONARY = "stationary"
    LOCAL = "local"
    GLOBAL = "global"

    def implies(self, other: Kind) -> bool:
        """Whether this statement is at least as strong as another."""
        order = list(Kind)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True)
class Certificate:
    """A statement about a point of a problem; a number that is not stated is None.

    Attributes:
        kind: The statement. ``STATIONARY``: the gradient is within the tolerance. ``LOCAL``: a ball
            around the point holds exactly one minimiser. ``GLOBAL``: the reduced objective is
            strongly convex, and the minimiser is the global one.
        gap: Bound on the regularised value at the point less that at the minimiser.
        radius: ``LOCAL``: radius of the ball. ``GLOBAL``: bound on the distance of ``X`` from the
            minimiser. Both in ``norm``.
        mu: Strong convexity in ``norm``: on the ball, or of the reduced objective.
        lipschitz: Lipschitz constant of the Hessian on the ball, in its norm.
        tolerance: What ``gradient_norm`` was compared with.
        assumptions: What the statement rests on besides exact arithmetic.
        reason: Why it is this kind and no stronger one, and what to try.
        gradient_norm: Bound on the dual norm of the joint gradient in the natural metric over
            ``||B - mean||_F^2``.
        norm: ``"hessian"`` (at the point), ``"natural"`` (``scale^2 G1 (x) G2`` on ``X``) or
            ``"none"``.
        loss: ``L`` at the point.
        value: ``L`` plus the ridges.
        method: How it was computed: ``"doubled"``, ``"rigorous"`` or ``"matrix-free"``.
        failure_probability: Of the randomised parts; 0 where there are none.
        problem_digest: Digest of the problem.
        parameters_digest: Digest of the parameters.
    """

    kind: Kind
    gap: float | None
    radius: float | None
    mu: float | None
    lipschitz: float | None
    tolerance: float
    assumptions: tuple[str, ...]
    reason: str
    gradient_norm: float
    norm: str
    loss: float
    value: float
    method: str
    failure_probability: float
    problem_digest: str
    parameters_digest: str

    @property
    def certified(self) -> bool:
        """Whether there is a bound on the gap: ``LOCAL`` or ``GLOBAL``."""
        return self.kind.implies(Kind.LOCAL)

    def check(self, computed: Certificate) -> None:
        """Compares with a certificate that was computed anew.

        Args:
            computed: What :func:`attnreg.verify` returns for the problem and the parameters.

        Raises:
            ValueError: If this one belongs to another problem or other parameters, or a statement
                or number of it is not the computed one.
        """
        for name, what in (("problem_digest", "problem"), ("parameters_digest", "fit")):
            if getattr(self, name) != getattr(computed, name):
                raise ValueError(
                    f"the certificate belongs to another {what}: its {name} is "
                    f"{getattr(self, name)}, that of the file is {getattr(computed, name)}"
                )
        for field in fields(self):
            given, found = getattr(self, field.name), getattr(computed, field.name)
            if not _agree(given, found):
                raise ValueError(
                    f"the certificate is doctored or of another version: its {field.name} is "
                    f"{_plain(given)}, computed anew it is {_plain(found)}; make it again"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file, whole or not at all.

        Args:
            path: The file; an old one is replaced once the new one is complete.
        """
        content = self.as_dict()
        content["digest"] = _digest(content)
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values by name."""
        values = {name: _plain(value) for name, value in asdict(self).items()}
        return {"type": "attnreg certificate", "format_version": FORMAT_VERSION, **values}

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Certificate:
        """Reads what :meth:`save` wrote; what it states is for :meth:`check` to find out.

        Args:
            path: The file.

        Returns:
            The certificate.

        Raises:
            ValueError: If the file is missing, damaged, or no certificate.
        """
        name = os.fspath(path)
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{name} is not JSON ({error}); expected a certificate") from error
        if not isinstance(content, dict) or content.get("type") != "attnreg certificate":
            raise ValueError(f"{name} holds no certificate; expected a file of Certificate.save()")
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{name} has format version {content.get('format_version')!r}; this attnreg reads "
                f"version {FORMAT_VERSION}: upgrade attnreg"
            )
        digest = content.pop("digest", None)
        if digest != _digest(content):
            raise ValueError(
                f"{name} is damaged: its content does not match the SHA-256 digest it was saved "
                "with; make the certificate again"
            )
        try:
            return Certificate.of_dict(content)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    @staticmethod
    def of_dict(content: Mapping[str, Any]) -> Certificate:
        """Undoes :meth:`as_dict`.

        Args:
            content: Values by name.

        Returns:
            The certificate.

        Raises:
            ValueError: If an entry is missing, unknown or of another type.
        """
        try:
            return _parsed(content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no complete certificate: {error}") from error


def parameters_digest(parameters: Mapping[str, Tensor], model: str) -> str:
    """Digest of named parameters.

    Args:
        parameters: Tensors by name.
        model: Description of the model.

    Returns:
        64 hexadecimal digits.
    """
    return content_digest(parameters, {"model": model})


_NUMBERS = ("tolerance", "gradient_norm", "loss", "value", "failure_probability")
_OPTIONAL = ("gap", "radius", "mu", "lipschitz")
_UNBOUNDED = ("gradient_norm", "loss", "value")  # infinite where they overflow: null in JSON
_TEXTS = ("reason", "norm", "method", "problem_digest", "parameters_digest")


def _parsed(content: Mapping[str, Any]) -> Certificate:
    """A certificate from JSON values, each of the type it must have."""
    known = {field.name for field in fields(Certificate)} | {"type", "format_version"}
    if set(content) != known:
        raise ValueError(f"its entries are {sorted(content)}; expected {sorted(known)}")
    values: dict[str, Any] = {"kind": Kind(content["kind"])}
    for name in (*_NUMBERS, *_OPTIONAL):
        value = content[name]
        if value is None and name in (*_OPTIONAL, *_UNBOUNDED):
            values[name] = None if name in _OPTIONAL else math.inf
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is {value!r}; expected a number")
        values[name] = float(value)
    for name in _TEXTS:
        if not isinstance(content[name], str):
            raise ValueError(f"{name} is {content[name]!r}; expected text")
        values[name] = content[name]
    assumptions = content["assumptions"]
    if not isinstance(assumptions, list) or not all(isinstance(a, str) for a in assumptions):
        raise ValueError(f"assumptions is {assumptions!r}; expected a list of texts")
    return Certificate(**values, assumptions=tuple(assumptions))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return list(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _agree(given: Any, found: Any) -> bool:
    """Equal; numbers to :data:`AGREEMENT`, and numbers within texts whatever they are."""
    if isinstance(given, float) and isinstance(found, float):
        return given == found or abs(given - found) <= AGREEMENT * min(abs(given), abs(found))
    if isinstance(given, str) and isinstance(found, str):
        return _words(given) == _words(found)
    if isinstance(given, tuple) and isinstance(found, tuple):
        return len(given) == len(found) and all(map(_agree, given, found))
    return bool(given == found)


def _words(text: str) -> str:
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", text)
