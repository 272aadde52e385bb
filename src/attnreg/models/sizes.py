r"""Sizes of queries and keys, as the natural metric has them.

The metric weighs a change ``dW`` of a head's queries by the second moment of the keys they meet,
and the other way round. Without norms and rotations these are ``W_K^T G_K W_K`` (keys centred) and
``W_Q^T G_Q W_Q``. Here are the same for heads that are normalised and rotated, linearised at the
point, each an average that is exact where it says so:

* A norm maps a change ``dx`` of a head to about ``g o dx / rho`` with the gain ``g`` and ``rho^2``
  the mean square of all entries of the head over all rows (its own row's in truth, less the part of
  ``dx`` along ``x``).
* A key at position ``j`` meets a query at ``i`` as ``R_i^T R_j k``. The average of
  ``R_i^T R_j M R_j^T R_i`` over the positions of all sequences, ``i`` apart from ``j``, is exact;
  that the moment ``M`` is the same at all positions, and that every ``i`` sees every ``j``, is the
  metric's approximation.
* What all keys of a sequence share after the rotation moves no softmax: the mean rotation's
  part of the mean keys is taken off. Without rotation that leaves the centred keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnreg.models.rotary import MeanRotation, Rotary
from attnreg.problem import AttentionProblem


def norm_factors(moments: Tensor, rows: float, gain: Tensor, epsilon: float) -> Tensor:
    """``g / rho`` of every head.

    Args:
        moments: Second moments summed over the rows, ``(heads, e, e)``, float64.
        rows: Number or weight of the rows.
        gain: ``(e,)``.
        epsilon: Of the norm.

    Returns:
        ``(heads, e)``, float64.
    """
    mean_square = moments.diagonal(dim1=1, dim2=2).mean(1) / rows + epsilon
    return gain.double() / mean_square.clamp_min(torch.finfo(torch.float64).tiny).sqrt()[:, None]


def shaped_sizes(
    problem: AttentionProblem,
    rotary: Rotary | None,
    moments: tuple[Tensor, Tensor, Tensor],
    factors: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Second moments of keys as changes of queries meet them, and of queries as those of keys do.

    Args:
        problem: Gives the positions.
        rotary: The rotation, or None.
        moments: Second moments before norm and rotation, float64: of the queries
            ``(heads, e, e)``, of the keys, not centred, ``(groups, e, e)``, and the part of these
            that is the mean keys of the sequences.
        factors: What :func:`norm_factors` gives of queries and keys, or None without norms.

    Returns:
        ``(heads, e, e)`` and ``(groups, e, e)``.
    """
    queries, keys, means = moments
    heads, groups = queries.shape[0], keys.shape[0]
    if factors is not None:
        by_query, by_key = (f[:, :, None] * f[:, None, :] for f in factors)
        queries, keys, means = queries * by_query, keys * by_key, means * by_key
    if rotary is None:
        keys = keys - means
    else:
        mean = MeanRotation(rotary, [n for n, _ in problem.lengths], queries.shape[-1])
        keys = mean.backward(mean.forward(keys) - mean.of_mean(means))
        queries = mean.backward(mean.forward(queries))
    keys = keys.repeat_interleave(heads // groups, dim=0)
    queries = queries.unflatten(0, (groups, heads // groups)).sum(1)
    if factors is not None:
        keys, queries = keys * by_query, queries * by_key
    return keys, queries
