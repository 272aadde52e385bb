"""Floating-point operations of the matrix products, counted from their shapes.

Each place that multiplies matrices adds what it is about to spend; nothing is timed or traced,
and a count costs an addition of integers. A multiplication with its addition counts 2. ``n`` is
rows in all, ``m`` keys a sequence, ``d`` any width:

================  ====================  ======================================================
kind              shape                 where
================  ====================  ======================================================
``attention``     ``n x m x d``         a pass: features, Jacobian products, softmax matrices
                                        computed again
``projections``   ``n x d x d``         queries, keys, values and their gradients; the readout
``comoments``     ``n x m x d^2``       second and third co-moments of the rows
``row_products``  ``n x d x d^2``       ``C = O^T D``, ``C^T C`` and scores of the rows
``row_sums``      ``n x d^2 x d^2``     sums over the rows in the assembly
``dense``         ``d^2 x d^2 x d^2``   Schur complement and Cholesky factor
``small``         ``d x d x d``         preconditioner, ridge, the readout's normal matrix
================  ====================  ======================================================

The first and the second are the paper's ``T_mat(n, n, d)`` and ``T_mat(n, d, d)``, ``dense`` its
``d^(2 omega)`` with ``omega = 3``. Sums of entries, exponentials and factorisations of ``d x d``
matrices (a fixed number an iteration) are left out; so are the race of starts of a cold fit, the
search among many starts, and the fits of pairs of heads on the way to fewer.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Operations:
    """Counters, one a kind (see the module)."""

    attention: int = 0
    projections: int = 0
    comoments: int = 0
    row_products: int = 0
    row_sums: int = 0
    dense: int = 0
    small: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counts so far by kind."""
        return dataclasses.asdict(self)


def product(rows: int, inner: int, columns: int) -> int:
    """Operations of a matrix product ``(rows x inner) (inner x columns)``."""
    return 2 * rows * inner * columns


def cholesky(size: int) -> int:
    """Operations of a Cholesky factor."""
    return size**3 // 3
