r"""The problem in the coordinates of its certificate.

A direction is written ``dX = T1 X' T2^T``, ``dY = T3 Y'`` with fixed float64 matrices ``T1``,
``T2`` and ``T3``. They are *defined* as they are stored, so that the change of coordinates is exact
whatever the rounding with which they were computed. With ``V diag(sigma) U^T`` the singular value
decomposition of ``sqrt(w) scale A1``, of ``A2`` and of ``A3`` they are ``U / sigma``: inputs are
whitened without forming a Gram matrix, and the Frobenius norms of ``X'`` and ``Y'`` are, to
rounding, the natural norms ``x = ||dX||_{scale^2 G1 (x) G2}`` and ``y = ||A3 dY||_F``.

Directions whose singular value cannot be told from rounding are left out: there the parameters
keep the values they were given, as in the solver. The keys of a problem without ``ridge_x`` are
centred in each sequence first: what all keys of a sequence share moves no softmax (the gauge), so
that those directions are null. With ``ridge_x`` they have the curvature of the ridge and stay.

Rows of weight 0 and keys that no other row sees carry no data and are left out, save in the Gram
matrices of the ridges. The whitened rows are computed in doubled arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.certificate.doubled import Doubled, Number, add, matmul, multiply
from attnreg.masks import hidden_keys
from attnreg.models.checks import checked
from attnreg.problem import AttentionProblem, Batch

WHITENING_SLICES = 6
"""Slices of the products that whiten: they lose as many digits as the inputs' condition has."""


@dataclass(frozen=True, eq=False)
class Sequence:
    """The rows of positive weight of one sequence, in float64 on the CPU.

    Attributes:
        a: Query inputs, ``(n, d_query)``.
        k: Keys, ``(m, d_key)``.
        v: Values, ``(m, d_value)``.
        b: Targets, ``(n, d_out)``.
        w: Weights, ``(n,)``, all positive.
        position: Place of each row in its sequence, ``(n,)``.
        mask: Additive mask ``(n or 1, m)``, or None.
        causal: Whether, besides, a row sees the keys up to its own place only.
        window: Of these the last so many only; None for all.
        seen: Which keys some row sees, ``(m,)``.
    """

    a: Tensor
    k: Tensor
    v: Tensor
    b: Tensor
    w: Tensor
    position: Tensor
    mask: Tensor | None
    causal: bool
    seen: Tensor
    window: int | None

    def bias(self, rows: slice) -> Tensor | None:
        """The additive mask of some rows, causal part included; None where it adds nothing."""
        bias = None
        if self.mask is not None:
            bias = self.mask if self.mask.shape[0] == 1 else self.mask[rows]
        if self.causal:
            hidden = hidden_keys(self.position[rows], torch.arange(len(self.k)), self.window)
            start = self.k.new_zeros(hidden.shape) if bias is None else bias.expand(hidden.shape)
            bias = start.masked_fill(hidden, -torch.inf)
        return bias


@dataclass(frozen=True, eq=False)
class Setting:
    """A bilinear problem and a point, ready for exact evaluation.

    Attributes:
        sequences: The data.
        keys: All keys of all sequences, stacked: what ``G2`` is the Gram matrix of.
        values: All values of all sequences, stacked: what ``G3`` is the Gram matrix of.
        x: ``X``, float64.
        y: ``Y``.
        x_shift: ``X - X0`` in doubled numbers, X0 the centre of the ridge.
        y_shift: ``Y - Y0``.
        y_center: ``Y0``.
        scale: Logit scale.
        ridge_x: Strength of the ridge of ``X``.
        ridge_y: Strength of the ridge of ``Y``.
    """

    sequences: tuple[Sequence, ...]
    keys: Tensor
    values: Tensor
    x: Tensor
    y: Tensor
    x_shift: Doubled
    y_shift: Doubled
    y_center: Tensor
    scale: float
    ridge_x: float
    ridge_y: float

    @staticmethod
    def of(problem: AttentionProblem, parameters: Mapping[str, Tensor]) -> Setting:
        """Copies a problem and a point in float64, exactly.

        Args:
            problem: The problem; a scale of None is 1.
            parameters: ``X`` and ``Y``, promoted to float64 as they are.

        Returns:
            The setting.

        Raises:
            ValueError: If a parameter is missing, has another shape, or is not finite.
        """
        shapes = {
            "X": (problem.d_query, problem.d_key),
            "Y": (problem.d_value, problem.d_out),
        }
        exact = {name: torch.as_tensor(value).double() for name, value in parameters.items()}
        zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
        wide = problem.to(torch.float64, "cpu")
        x, y = checked(wide, exact, shapes)
        x0, y0 = checked(wide, zeros | dict(wide.center), shapes)
        found = {
            index: sequence
            for batch in wide.batches
            for index, sequence in zip(batch.index, _sequences(batch), strict=True)
        }
        lengths = wide.lengths
        order = range(len(lengths))
        keys, values = _stacked(wide, "A2"), _stacked(wide, "A3")
        return Setting(
            sequences=tuple(found[i] for i in order if len(found[i].a)),
            keys=keys,
            values=values,
            x=x,
            y=y,
            x_shift=add(Doubled.of(x), -x0),
            y_shift=add(Doubled.of(y), -y0),
            y_center=y0,
            scale=1.0 if wide.scale is None else wide.scale,
            ridge_x=wide.ridge_x,
            ridge_y=wide.ridge_y,
        )


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The matrices ``T1``, ``T2`` and ``T3``, and what they leave out.

    Attributes:
        t1: ``(d_query, r1)``; the logit scale is part of it.
        t2: ``(d_key, r2)``.
        t3: ``(d_value, r3)``.
        held: Directions left out of queries, keys and values.
        floor: Relative size of the singular values below which directions are left out, each.
    """

    t1: Tensor
    t2: Tensor
    t3: Tensor
    held: tuple[int, int, int]
    floor: tuple[float, float, float]

    @staticmethod
    def of(setting: Setting, dtype: torch.dtype) -> Coordinates:
        """Whitens the inputs.

        Args:
            setting: The data.
            dtype: The dtype in which they were given, whose rounding decides about null directions.

        Returns:
            The coordinates.
        """
        a = torch.cat([s.a * s.w.sqrt()[:, None] for s in setting.sequences])
        k, v = setting.keys, setting.values
        if setting.ridge_x == 0:
            seen = [s.k[s.seen] for s in setting.sequences]
            seen = [part - part[:1] for part in seen]  # equal keys: exactly 0
            k = torch.cat([part - part.mean(0) for part in seen])
        if setting.ridge_y == 0:
            v = torch.cat([s.v[s.seen] for s in setting.sequences])
        parts = [_whiten(matrix, dtype) for matrix in (a, k, v)]
        (t1, *_), (t2, *_), (t3, *_) = parts
        return Coordinates(
            t1 / setting.scale,
            t2,
            t3,
            (parts[0][1], parts[1][1], parts[2][1]),
            (parts[0][2], parts[1][2], parts[2][2]),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(r1, r2, r3)``: the sizes of ``X'`` are ``r1 x r2``, those of ``Y'`` ``r3 x d_out``."""
        return self.t1.shape[1], self.t2.shape[1], self.t3.shape[1]

    def queries(self, rows: Number, scale: float) -> Doubled:
        """``scale A1 T1``."""
        product = matmul(rows, self.t1, WHITENING_SLICES)
        return multiply(product, torch.full_like(product.hi, scale))

    def keys(self, rows: Number) -> Doubled:
        """``A2 T2``."""
        return matmul(rows, self.t2, WHITENING_SLICES)

    def values(self, rows: Number) -> Doubled:
        """``A3 T3``."""
        return matmul(rows, self.t3, WHITENING_SLICES)


def _whiten(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, int, float]:
    """``U / sigma`` of the directions kept, the number left out, and the floor."""
    width = rows.shape[1]
    eps = torch.finfo(torch.float64).eps
    # As kronecker.LeftFactor decides it on the moments, whose eigenvalues are squares.
    floor = max(8 * width**0.5 * torch.finfo(dtype).eps, (4 * width * eps) ** 0.5)
    triangle = torch.linalg.qr(rows, mode="r").R if len(rows) > width else rows
    _, sigma, vt = torch.linalg.svd(triangle, full_matrices=False)
    kept = sigma > floor * sigma[0]
    return vt[kept].mT / sigma[kept], width - int(kept.sum()), floor


def _sequences(batch: Batch) -> list[Sequence]:
    found = []
    for row, (n, m) in enumerate(batch.lengths):
        weighty = (batch.weights[row, :n] > 0).nonzero()[:, 0]
        mask = None
        if batch.bias is not None:
            mask = batch.bias[row if batch.bias.shape[0] > 1 else 0][:, :m]
            mask = mask[weighty] if mask.shape[0] > 1 else mask
            mask = mask if bool(mask.any()) else None
        seen = torch.ones(m, dtype=torch.bool)
        if batch.causal and len(weighty):
            seen = ~hidden_keys(weighty, torch.arange(m), batch.window).all(0)
        if mask is not None:
            visible = mask > -torch.inf
            if batch.causal:
                visible = visible & ~hidden_keys(weighty, torch.arange(m), batch.window)
            seen = seen & visible.any(0)
        found.append(
            Sequence(
                batch.A1[row, :n][weighty],
                batch.A2[row, :m],
                batch.A3[row, :m],
                batch.B[row, :n][weighty],
                batch.weights[row, :n][weighty],
                weighty,
                mask,
                batch.causal,
                seen,
                batch.window,
            )
        )
    return found


def _stacked(problem: AttentionProblem, name: str) -> Tensor:
    parts = (
        getattr(batch, name)[row, :keys]
        for batch in problem.batches
        for row, (_, keys) in enumerate(batch.lengths)
    )
    return torch.cat(list(parts))
