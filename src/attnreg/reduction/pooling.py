r"""One key head for several: coefficients from second moments alone.

A family is a few left factors ``L_h`` (queries of the query heads) that each meet one of ``r``
right factors ``R_g`` (keys of the key/value heads) in a bilinear form ``L_h R_g^T``: ``(rows of
the left inputs, rows of the right inputs)``. Values are the same with ``L_h = W_Oh^T`` and
``R_g = W_Vg``. The forms are measured by ``||G1^{1/2} L R^T G2^{1/2}||_F`` with the second moments
``G1``, ``G2`` of the inputs. A form does not change under the gauge ``L M^{-T}, R M``.

All that a family replaces its factors by are linear combinations

    R' = sum_g R_g C_g,        L'_h = L_h T_g(h),

so the inputs' widths drop out: the functions here see the Gram matrix of the right columns,
``B[g, g2] = R_g^H G2 R_g2``, and that of the left ones summed over the heads of each ``g``,
``A[g] = sum_h L_h^H G1 L_h``. Factors are real, or complex where a column is a turning pair (see
:mod:`attnreg.reduction.headwise`); there a gauge is one complex number a column.

`truncated` is the best approximation of all forms of the family with one right factor: by Eckart
and Young its span is the leading right singular space of the stacked forms. `aligned` keeps the
left factors up to gauge: the right factors are made white, turned onto each other, and averaged
with the left factors' energies as weights. With equal energies the turns are generalised
Procrustes, a descent to a local minimum; with others each turn is the best one for its weights, and
the repetition is a heuristic. Both are exact where all right factors are one up to gauge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_SWEEPS = 100
_RANK = 1e-13  # of an eigenvalue relative to the largest: the rounding of a Gram matrix


class NotApplicable(Exception):
    """A start cannot be made; the text says why."""


@dataclass(frozen=True)
class Combination:
    """Coefficients of new factors.

    Attributes:
        right: ``C``, ``(r, w, c)``.
        left: ``T``, ``(r, w, c)``.
    """

    right: Tensor
    left: Tensor

    def then(self, other: Combination) -> Combination:
        """This one, followed by one of its single right factor."""
        return Combination(self.right @ other.right[0], self.left @ other.left[0])

    def columns(self, chosen: Tensor) -> Combination:
        """Some of the new columns."""
        return Combination(self.right[..., chosen], self.left[..., chosen])


def moments_of(right: Tensor, left: Tensor, made: Combination) -> tuple[Tensor, Tensor]:
    """Gram matrices of the factors that a combination makes.

    Args:
        right: ``B``, ``(r, r, w, w)``.
        left: ``A``, ``(r, w, w)``.
        made: The combination.

    Returns:
        ``B`` ``(1, 1, c, c)`` and ``A`` ``(1, c, c)`` of the single new factor.
    """
    new_right = torch.einsum("gac,ghab,hbd->cd", made.right.conj(), right, made.right)
    new_left = (made.left.mH @ left @ made.left).sum(0)
    return new_right[None, None], new_left[None]


def mean(right: Tensor, left: Tensor) -> Combination:
    """The average of the right factors; left ones stay."""
    same = _identity(left)
    return Combination(same / len(left), same)


def first(right: Tensor, left: Tensor) -> Combination:
    """The first right factor; left ones stay."""
    same = _identity(left)
    only = torch.zeros_like(same)
    only[0] = same[0]
    return Combination(only, same)


def residual(right: Tensor, left: Tensor, rank: int) -> float:
    """Squared size of what :func:`truncated` leaves out, with its cost one eigendecomposition.

    Args:
        right: ``B``, ``(r, r, w, w)``.
        left: ``A``, ``(r, w, w)``.
        rank: Width of the new factors.

    Returns:
        A number of at least 0.
    """
    values = torch.linalg.eigvalsh(_stacked(right, left)[0])
    return float(values[: max(len(values) - rank, 0)].clamp_min(0.0).sum())


def truncated(right: Tensor, left: Tensor, rank: int, scale: Tensor | None = None) -> Combination:
    """The best right factor of a width for all forms, and the best left factors to it.

    Args:
        right: ``B``, ``(r, r, w, w)``.
        left: ``A``, ``(r, w, w)``.
        rank: Width of the new factors.
        scale: Factor of every column's form, ``(w,)``: the forms approximated are
            ``L_h diag(scale) R_g^T``. Default: ones.

    Returns:
        Coefficients in the gauge where left and right columns have equal energy. Columns beyond
        the rank of the forms are zero.
    """
    if rank == 0:
        return Combination(left.new_zeros(*left.shape[:2], 0), left.new_zeros(*left.shape[:2], 0))
    scale = torch.ones_like(left[0, 0]) if scale is None else scale.to(left)
    left = scale.conj()[:, None] * left * scale
    energy, root = _stacked(right, left)
    values, vectors = torch.linalg.eigh(energy)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    if len(values) < rank:
        missing = rank - len(values)
        values = torch.cat([values, values.new_zeros(missing)])
        vectors = torch.cat([vectors, vectors.new_zeros(len(vectors), missing)], dim=1)
    kept = values > _RANK * values[0]
    inverse = torch.where(kept, values.reciprocal(), 0.0)
    balance = torch.where(kept, values.clamp_min(0.0) ** 0.25, 0.0)
    columns = torch.block_diag(*root) @ vectors
    flat = right.transpose(1, 2).flatten(0, 1).flatten(1)
    r, w = left.shape[:2]
    onto = (flat @ columns).conj() * inverse * balance
    undo = torch.where(kept, balance.reciprocal(), 0.0)
    return Combination(
        (columns * undo).unflatten(0, (r, w)), scale[:, None] * onto.unflatten(0, (r, w))
    )


def aligned(right: Tensor, left: Tensor) -> Combination:
    """The weighted average of the right factors after they are turned onto each other.

    Args:
        right: ``B``, ``(r, r, w, w)``.
        left: ``A``, ``(r, w, w)``.

    Returns:
        Coefficients; the left ones are a gauge transform.

    Raises:
        NotApplicable: If the columns of a right factor are linearly dependent on the inputs.
    """
    r = len(left)
    white = torch.stack([_inverse_root(right[g, g], g) for g in range(r)])
    inverse = torch.linalg.inv(white)
    weight = inverse @ left.conj() @ inverse.mH
    cross = torch.einsum("gab,ghbc,hcd->ghad", white.mH, right, white)
    reference = int(weight.diagonal(dim1=-2, dim2=-1).real.sum(-1).argmax())
    turn = _polar(weight @ cross[:, reference])
    for _ in range(_SWEEPS):
        average = _weighted(turn, weight)  # (r, w, w)
        new = _polar(weight @ torch.einsum("ghab,hbc->gac", cross, average))
        moved = float((new - turn).abs().max())
        turn = new
        if moved < 1e-13:
            break
    made = white @ turn
    combination = Combination(white @ _weighted(turn, weight), torch.linalg.inv(made).mT)
    return balanced(right, left, combination)


def by_column(
    right: Tensor, left: Tensor, pool: Callable[[Tensor, Tensor], Combination]
) -> Combination:
    """A pooling of every turning pair on its own.

    Args:
        right: ``B``, ``(r, r, w, w)``.
        left: ``A``, ``(r, w, w)``.
        pool: What pools families of width 1.

    Returns:
        Diagonal coefficients.
    """
    new_right, new_left = torch.zeros_like(left), torch.zeros_like(left)
    for c in range(left.shape[-1]):
        one = slice(c, c + 1)
        made = pool(right[..., one, one], left[..., one, one])
        new_right[:, one, one], new_left[:, one, one] = made.right, made.left
    return Combination(new_right, new_left)


def ranks_one(right: Tensor, left: Tensor, scales: Tensor) -> Combination:
    """The best form of rank one for each weighing of the columns.

    Args:
        right: ``B``, ``(r, r, w, w)``.
        left: ``A``, ``(r, w, w)``.
        scales: The weighings, ``(c, w)``; see :func:`truncated`.

    Returns:
        Coefficients of ``c`` columns.
    """
    r, width = left.shape[:2]
    new_right = left.new_zeros(r, width, len(scales))
    new_left = torch.zeros_like(new_right)
    for c, scale in enumerate(scales):
        used = (scale != 0).nonzero()[:, 0]
        made = truncated(
            right[..., used, :][..., used], left[..., used, :][..., used], 1, scale[used]
        )
        new_right[:, used, c], new_left[:, used, c] = made.right[..., 0], made.left[..., 0]
    return Combination(new_right, new_left)


def balanced(right: Tensor, left: Tensor, made: Combination) -> Combination:
    """The same forms with left and right columns of equal energy."""
    new_right, new_left = moments_of(right, left, made)
    energies = (
        m[..., :, :].diagonal(dim1=-2, dim2=-1).real.flatten() for m in (new_left, new_right)
    )
    by_left, by_right = energies
    usable = (by_left > 0) & (by_right > 0)
    size = torch.where(usable, (by_left / by_right) ** 0.25, 1.0)
    return Combination(made.right * size, made.left / size)


def _identity(left: Tensor) -> Tensor:
    r, w = left.shape[:2]
    return torch.eye(w, dtype=left.dtype).expand(r, w, w).clone()


def _stacked(right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """``S^H B S`` with ``S S^H`` the conjugate of ``A``, and ``S`` ``(r, w, w)``."""
    values, vectors = torch.linalg.eigh(left.conj())
    root = vectors * values.clamp_min(0.0).sqrt()[..., None, :]
    energy = torch.einsum("gba,ghbc,hcd->gahd", root.conj(), right, root)
    r, w = left.shape[:2]
    energy = energy.reshape(r * w, r * w)
    return 0.5 * (energy + energy.mH), root


def _weighted(turn: Tensor, weight: Tensor) -> Tensor:
    """``O_g W_g (sum W)^-1`` with the weights turned: what each turned factor enters by."""
    turned = turn.mH @ weight @ turn
    total = turned.sum(0)
    floor = _RANK * total.diagonal().real.max()
    total = total + floor * torch.eye(len(total), dtype=total.dtype)
    return turn @ torch.linalg.solve(total, turned, left=False)


def _polar(matrix: Tensor) -> Tensor:
    """The nearest unitary matrices."""
    u, _, vh = torch.linalg.svd(matrix)
    return u @ vh


def _inverse_root(gram: Tensor, head: int) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    if not float(values[0]) > _RANK * float(values[-1]):
        raise NotApplicable(
            f"head {head} of a group has linearly dependent columns on these inputs "
            f"(eigenvalues {float(values[0]):.1e} to {float(values[-1]):.1e} of their second "
            "moment), so that there is no gauge to align"
        )
    return (vectors / values.sqrt()) @ vectors.mH
