"""The problem: sequences, mask, weights, scale and regulariser; checked once, then frozen.

    L(X, Y) = sum_j w_j || softmax(scale a_j X A2^T + mask) A3 Y - b_j ||^2

summed over the rows j of all sequences: a_j is a row of A1, b_j of B, and the softmax runs over
the rows (keys) of the sequence's A2. The regularised value adds

    ridge_x <X - X0, G1 (X - X0) G2> + ridge_y <Y - Y0, G3 (Y - Y0)>

with unnormalised Gram matrices pooled over the sequences,

    G1 = sum A1^T diag(w) A1,    G2 = sum A2^T A2,    G3 = sum A3^T A3.

For one sequence with unit weights and X0 = Y0 = 0 that is the paper's
``ridge_x ||A1 X A2^T||_F^2 + ridge_y ||A3 Y||_F^2``; for several it stays one Kronecker product.
A weight of 2 is the same as the row twice, in G1 too.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from attnreg.arrays import Array, Arrays, Structure, as_number, dtype_name, join
from attnreg.batching import Batch, Sequences, make_batches
from attnreg.masks import Mask
from attnreg.moments import (
    gram,
    grams_about_means,
    spread_and_size,
    sum_of_rows,
    sum_of_squares,
)
from attnreg.packing import as_arguments, as_mask_argument, pack, unpack
from attnreg.storage import content_digest, read_tensors, write_tensors
from attnreg.validation import as_center, as_device, as_problem_sequences

__all__ = ["AttentionProblem", "Batch"]


class AttentionProblem:
    """Inputs and outputs of an attention layer, from which its weights are to be fitted.

    Arrays are NumPy arrays or torch tensors, all float32 or all float64: a matrix for one
    sequence, a three-dimensional array for a batch, or a list of matrices of any lengths. They
    are copied; what is done to them later does not reach the problem.

    Args:
        A1: Query inputs (n, d_query).
        B: Outputs to reproduce (n, d_out).
        A2: Key inputs (m, d_key); A1 by default.
        A3: Value inputs (m, d_value); A1 by default.
        mask: ``"causal"``, a boolean mask (True: may attend), an additive one (-inf: forbidden),
            or ``("causal", mask)`` for both; ``("causal", w)`` or ``("causal", w, mask)`` with an
            int ``w`` where query i sees keys i - w + 1 to i only. A matrix (n, m) holds for every
            sequence; a three-dimensional array or a list has one for each.
        weights: Non-negative weights of the rows of B, (n,) for each sequence; 1 by default.
        scale: Factor of the logits, above 0; None leaves it to the model.
        ridge_x: Strength of the regulariser of X, at least 0.
        ridge_y: Strength of the regulariser of Y, at least 0.
        center: Parameters that the regulariser pulls towards, by name; zero where absent.
        device: Where to put everything; None leaves it where A1 is.

    Attributes:
        batches: The sequences, padded to a few batches (equal lengths: one batch, in order).
        structure: How they were given: ``"single"``, ``"batch"`` or ``"list"``.
        scale: Factor of the logits, or None.
        ridge_x: Strength of the regulariser of X.
        ridge_y: Strength of the regulariser of Y.
        center: Read-only mapping of centres by parameter name.

    Raises:
        ValueError: If an input is refused; one line says what was given and what was expected.
    """

    batches: tuple[Batch, ...]
    structure: Structure
    scale: float | None
    ridge_x: float
    ridge_y: float
    center: Mapping[str, Tensor]
    _sequences: Sequences

    def __init__(
        self,
        A1: Arrays,
        B: Arrays,
        A2: Arrays | None = None,
        A3: Arrays | None = None,
        *,
        mask: Mask | None = None,
        weights: Arrays | None = None,
        scale: float | None = None,
        ridge_x: float = 0.0,
        ridge_y: float = 0.0,
        center: Mapping[str, Array] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        structure, given = as_problem_sequences(A1, B, A2, A3, mask, weights, as_device(device))
        batches, sequences = make_batches(given)
        self.__dict__.update(
            batches=batches,
            structure=structure,
            scale=None if scale is None else as_number("scale", scale, positive=True),
            ridge_x=as_number("ridge_x", ridge_x),
            ridge_y=as_number("ridge_y", ridge_y),
            center=as_center(center, batches[0].A1),
            _sequences=sequences,
        )

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} cannot be set: a problem is frozen; use replace()")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name} cannot be deleted: a problem is frozen")

    def __repr__(self) -> str:
        queries, keys = (_span(sizes) for sizes in zip(*self.lengths, strict=True))
        parts = [
            f"{self.n_sequences} sequence(s) of {queries} queries and {keys} keys",
            f"d_query={self.d_query}, d_key={self.d_key}, d_value={self.d_value}",
            f"d_out={self.d_out}, {dtype_name(self.dtype)} on {self.device}",
        ]
        parts += ["causal"] if self.causal else []
        parts += [] if self.window is None else [f"window={self.window}"]
        parts += ["masked"] if self._sequences.masks is not None else []
        parts += [] if self.scale is None else [f"scale={self.scale:g}"]
        parts += [f"ridge_x={self.ridge_x:g}"] if self.ridge_x else []
        parts += [f"ridge_y={self.ridge_y:g}"] if self.ridge_y else []
        parts += [f"center of {' and '.join(self.center)}"] if self.center else []
        return f"AttentionProblem({', '.join(parts)})"

    # -- sizes and kind

    @property
    def d_query(self) -> int:
        """Columns of A1."""
        return self.batches[0].A1.shape[-1]

    @property
    def d_key(self) -> int:
        """Columns of A2."""
        return self.batches[0].A2.shape[-1]

    @property
    def d_value(self) -> int:
        """Columns of A3."""
        return self.batches[0].A3.shape[-1]

    @property
    def d_out(self) -> int:
        """Columns of B."""
        return self.batches[0].B.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        return self.batches[0].A1.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.batches[0].A1.device

    @property
    def causal(self) -> bool:
        """Whether query i sees keys 0 to i only."""
        return self._sequences.causal

    @property
    def window(self) -> int | None:
        """How many keys a query sees where the mask is causal; None for all up to its own."""
        return self._sequences.window

    @property
    def self_attention(self) -> bool:
        """Whether A1, A2 and A3 are the same."""
        return self._sequences.A1 is self._sequences.A2 is self._sequences.A3

    @cached_property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """Numbers of queries and keys of each sequence."""
        return self._sequences.lengths

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def n_rows(self) -> int:
        """Number of rows of B over all sequences."""
        return sum(queries for queries, _ in self.lengths)

    @property
    def n_keys(self) -> int:
        """Number of rows of A2 over all sequences."""
        return sum(keys for _, keys in self.lengths)

    @property
    def mask(self) -> Mask | None:
        """The mask as the constructor takes it, additive where it is not only ``"causal"``."""
        return as_mask_argument(self.structure, self._sequences)

    @property
    def without_mask(self) -> bool:
        """Whether there is no mask but ``"causal"`` and its window."""
        return self._sequences.masks is None

    # -- pooled second moments

    @cached_property
    def gram_query(self) -> Tensor:
        """G1, the weighted Gram matrix of A1: (d_query, d_query), float64."""
        if self._queries_are_keys:
            return self.gram_key
        return gram((b.A1 for b in self.batches), (b.weights for b in self.batches))

    @property
    def gram_key(self) -> Tensor:
        """G2, the Gram matrix of A2: (d_key, d_key), float64."""
        return self._key_moments[1]

    @cached_property
    def gram_value(self) -> Tensor:
        """G3, the Gram matrix of A3: (d_value, d_value), float64."""
        if self._sequences.A3 is self._sequences.A2:
            return self.gram_key
        return gram(b.A3 for b in self.batches)

    @cached_property
    def sum_query(self) -> Tensor:
        """The weighted sum of the rows of A1: (d_query,), float64."""
        if self._queries_are_keys:
            return self.sum_key
        return sum_of_rows((b.A1 for b in self.batches), (b.weights for b in self.batches))

    @property
    def sum_key(self) -> Tensor:
        """The sum of the rows of A2: (d_key,), float64."""
        return self._key_moments[2]

    @cached_property
    def sum_value(self) -> Tensor:
        """The sum of the rows of A3: (d_value,), float64."""
        if self._sequences.A3 is self._sequences.A2:
            return self.sum_key
        return sum_of_rows(b.A3 for b in self.batches)  # padding is 0

    @property
    def gram_key_centered(self) -> Tensor:
        """G2 with each sequence's mean key subtracted: (d_key, d_key), float64.

        A constant added to a row of logits does not change the softmax, so that this is what it
        can see of the keys.
        """
        return self._key_moments[0]

    @cached_property
    def input_sizes(self) -> dict[str, float]:
        """Root mean squares of A1 (weighted), A2 and A3: ``"query"``, ``"key"``, ``"value"``.

        Kept as numbers: a mini-batch that asked a device for one would wait for its answer.
        """
        given = self._sequences
        key = sum_of_squares(given.A2)
        value = key if given.A3 is given.A2 else sum_of_squares(given.A3)
        query = key if self._queries_are_keys else sum_of_squares(given.A1, given.weights)
        sums = {
            "query": (query, self.total_weight * self.d_query),
            "key": (key, self.n_keys * self.d_key),
            "value": (value, self.n_keys * self.d_value),
        }
        return {name: (total / entries) ** 0.5 for name, (total, entries) in sums.items()}

    @cached_property
    def _key_moments(self) -> tuple[Tensor, Tensor, Tensor]:
        return grams_about_means(self._sequences.A2)

    @cached_property
    def _queries_are_keys(self) -> bool:
        """Whether A1 is A2 and its rows have weight 1."""
        return self._sequences.A1 is self._sequences.A2 and not self._sequences.weighted

    @cached_property
    def total_weight(self) -> float:
        """Sum of the weights of all rows of B, in float64."""
        return float(sum(weights.double().sum() for weights in self._sequences.weights))

    # -- errors

    @property
    def target_norm_squared(self) -> float:
        """``||B - mean||_F^2`` with weights; the mean of each column is over all rows.

        Exactly 0 where the rows of B of positive weight are equal.
        """
        return self._spread_and_size[0]

    @cached_property
    def _spread_and_size(self) -> tuple[float, float]:
        return spread_and_size(self._sequences.B, self._sequences.weights)

    def relative_error(self, loss: float) -> float:
        """``||prediction - B||_F / ||B - mean||_F`` with weights.

        The denominator is ``||B||_F`` where B is constant, and 1 where B is zero.

        Args:
            loss: The loss L, without the regulariser.

        Returns:
            The relative error.
        """
        spread, size = self._spread_and_size
        return math.sqrt(max(loss, 0.0) / (spread or size or 1.0))

    def unpad(self, values: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Rows of the batches in the order and structure the sequences were given in.

        Args:
            values: A tensor (b, n, k) for each of ``batches``.

        Returns:
            (n, k), (b, n, k) or a list of (n_i, k), as A1 was given.
        """
        rows = {}
        for batch, value in zip(self.batches, values, strict=True):
            for i, (queries, _), row in zip(batch.index, batch.lengths, value, strict=True):
                rows[i] = row[:queries]
        return join(self.structure, [rows[i] for i in range(len(rows))])

    # -- other problems

    def subset(self, indices: Iterable[int]) -> Self:
        """The problem of some of the sequences, with the same settings.

        Args:
            indices: Positions of the sequences, in the order wanted; one may come twice.

        Returns:
            A new problem with copies of the data.

        Raises:
            ValueError: If there is no index, or one is not an integer or out of range.
        """
        chosen = [self._position(i) for i in indices]
        if not chosen:
            raise ValueError("indices is empty; expected the position of at least one sequence")
        return type(self)(**self._arguments(self._sequences.take(chosen)))

    def _position(self, index: Any) -> int:
        expected = f"expected integers from 0 to {self.n_sequences - 1}"
        is_bool = isinstance(index, bool) or getattr(index, "dtype", None) in (bool, torch.bool)
        if is_bool or not hasattr(index, "__index__"):
            raise ValueError(f"indices holds {index!r}; {expected}")
        position = operator.index(index)
        if not 0 <= position < self.n_sequences:
            raise ValueError(f"indices holds {position}; {expected}")
        return position

    def replace(self, **changes: Any) -> Self:
        """The problem with some arguments replaced: ``problem.replace(ridge_x=1e-3)``.

        Args:
            **changes: Arguments of the constructor by name. The others stay, A2 and A3 too where
                they were left out and A1 is replaced.

        Returns:
            A new problem with copies of the data.
        """
        return type(self)(**{**self._arguments(self._sequences), **changes})

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> Self:
        """The problem with inputs ``A1 query``, ``A2 key`` and ``A3 value``.

        The center, which is in the coordinates of the old inputs, is left out.

        Args:
            query: ``(d_query, columns)``, in the dtype of the problem.
            key: ``(d_key, columns)``.
            value: ``(d_value, columns)``.

        Returns:
            A new problem.
        """
        given = self._sequences
        a1, a2, a3 = (
            [rows @ matrix for rows in inputs]
            for inputs, matrix in ((given.A1, query), (given.A2, key), (given.A3, value))
        )
        sequences = replace(given, A1=a1, A2=a2, A3=a3)
        return type(self)(**{**self._arguments(sequences), "center": None})

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Self:
        """The problem in another precision or on another device.

        Args:
            dtype: float32 or float64; None keeps it.
            device: Any torch device; None keeps it.

        Returns:
            A new problem with copies of the data.
        """
        arguments = self._arguments(self._sequences)
        return type(self)(**{k: _cast(v, dtype) for k, v in arguments.items()}, device=device)

    def _arguments(self, sequences: Sequences) -> dict[str, Any]:
        """What the constructor takes for these sequences and the settings."""
        inputs = as_arguments(self.structure, sequences)
        return {**inputs, **self._settings, "center": self.center}

    @property
    def _settings(self) -> dict[str, float | None]:
        return {"scale": self.scale, "ridge_x": self.ridge_x, "ridge_y": self.ridge_y}

    # -- files

    def digest(self) -> str:
        """SHA-256 of the data and settings, whatever the device; a saved file holds the same.

        Returns:
            64 hexadecimal digits.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return content_digest(*self._packed())

    def _packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return pack(self.structure, self._sequences, self.center, self._settings)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the problem to one safetensors file, atomically.

        Args:
            path: The file; an old one is replaced once the new one is complete.
        """
        write_tensors(path, *self._packed())

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None
    ) -> Self:
        """Read a problem that :meth:`save` wrote, or the tensors of any safetensors file.

        Args:
            path: The file. One that is not from attnreg holds tensors A1 and B and may hold A2,
                A3, mask and weights; the settings are then the default ones.
            device: Where to put everything; None means the CPU.

        Returns:
            The problem.

        Raises:
            ValueError: If the file cannot be read, is damaged, or holds something else.
        """
        tensors, metadata = read_tensors(path)
        try:
            return cls(**unpack(tensors, metadata), device=device)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Cast every tensor of an argument."""
    if isinstance(value, Tensor):
        return value.to(dtype or value.dtype)
    if isinstance(value, Mapping):
        return {name: _cast(item, dtype) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _span(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low} to {high}"
