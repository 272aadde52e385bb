r"""The reduced Gauss-Newton matrix from a sample of the query rows.

The joint Gauss-Newton matrix in ``(X, Y)`` is a sum over the rows and a ridge (halved here, as
the factor 2 is common to all of it)::

    N = sum_j w_j J_j^T J_j + R,   J_j = [scale a_j^T (x) C_j,  f_j^T (x) I],
    R = rho_x G1 (x) G2  (+)  rho_y G3 (x) I

Row ``j`` is kept with probability ``q_j = min(1, c l_j)``, independently, and then counts
``1 / q_j`` times. Where each score ``l_j`` is at least the row's leverage
``w_j ||J_j N^-1 J_j^T||`` and

    c = (8/3) eps^-2 ln(2 dimension / failure),      eps <= 1,

the matrix Bernstein inequality (Tropp 2012) gives ``(1 - eps) N <= N~ <= (1 + eps) N`` in the
Loewner order with probability ``1 - failure`` at least, and the Schur complement, the reduced
matrix, inherits it (proofs in ``docs/theory.md``). The expected number of rows is at most
``m = c S``, ``S`` the sum of the scores. Where every ``q_j`` is 1 the matrix is exact.

Scores. With ``kappa_j = ||C_j G2^+ C_j^T||``,
``x_j = w_j scale^2 (a_j^T G1^+ a_j) kappa_j / rho_x``,
``y_j = w_j f_j^T G3^+ f_j / rho_y``, ``z_j = w_j f_j^T M^-1 f_j`` and ``kappa`` at least
``scale^2 max_j kappa_j / rho_x``, two bounds of the leverage hold; the smaller one is used::

    x_j + y_j                                      from N >= R
    (sqrt(x_j) + sqrt(kappa z_j))^2 + z_j          from the block inverse of N

``kappa_j`` needs the co-moments of the row, which cost as much as all else. So a bound of it
that takes one attention pass chooses candidates, and the candidates are thinned by the score
itself with the same random number: the sample is the one that all scores would have given. With
``mu`` any vector, over the keys that the row sees::

    kappa_j <= s_max min(trace Cov_s w, s_max lambda_max(sum_i (w_i - mu)(w_i - mu)^T))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.curvature.dense import assemble_gauss_newton
from attnreg.kronecker import LeftFactor
from attnreg.objective import Point
from attnreg.operations import product


@dataclass(frozen=True)
class Sketch:
    """An approximation of the reduced Gauss-Newton matrix.

    Attributes:
        matrix: ``(size, size)``, ridge included.
        sampled: Rows that entered it.
        available: Rows of positive weight.
        exact: Whether every row entered with its own weight.
    """

    matrix: Tensor
    sampled: int
    available: int
    exact: bool


def sketch_gauss_newton(
    point: Point, distortion: float, failure: float, generator: torch.Generator
) -> Sketch:
    """Samples the rows so that the matrix is within ``1 +- distortion`` of the exact one.

    Args:
        point: Where; a bilinear model with both ridges.
        distortion: ``eps``, above 0 and at most 1.
        failure: Bound on the probability that the matrix is not within it.
        generator: Source of the sample.

    Returns:
        The matrix and how many rows it took.

    Raises:
        ValueError: If a number is out of its range.
    """
    if not 0.0 < distortion <= 1.0:
        raise ValueError(f"distortion={distortion} was given, above 0 and at most 1 is expected")
    if not 0.0 < failure < 1.0:
        raise ValueError(f"failure={failure} was given, a probability inside (0, 1) is expected")
    dimension = point.theta.numel() + point.readout.numel()
    sample = RowSample(point, oversampling(dimension, distortion, failure), generator)
    matrix = assemble_gauss_newton(point, sample)
    exact = sample.certain == sample.available
    return Sketch(matrix, sample.sampled, sample.available, exact)


def oversampling(dimension: int, distortion: float, failure: float) -> float:
    """``c = (8/3) eps^-2 ln(2 dimension / failure)``: rows to expect for each unit of score."""
    return 8.0 / 3.0 * distortion**-2 * math.log(2.0 * dimension / failure)


class RowSample:
    """The rows kept, chosen while the matrix is assembled (a `RowSelection`).

    Args:
        point: Where.
        rate: ``c``.
        generator: Source of one random number a row.

    Attributes:
        candidates: Rows whose score is needed; None means all.
        sampled: Rows kept so far.
        certain: Those of them that were kept with probability 1.
        available: Rows of positive weight.
    """

    def __init__(self, point: Point, rate: float, generator: torch.Generator) -> None:
        objective = point.objective
        self._scores, self._rate = _Scores(point), rate
        weights = objective.weights
        rows = objective.targets.shape[0]
        self.available = rows if weights is None else int((weights > 0).sum())
        draws = torch.rand(rows, generator=generator, dtype=torch.float64)
        self._draws = draws.to(point.theta.device)
        wanted = self._draws < rate * self._scores.bounds()
        self.candidates = None if bool(wanted.all()) else wanted.nonzero()[:, 0]
        self.sampled = self.certain = 0

    def keep(self, index: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """Thins candidates by their scores.

        Args:
            index: Positions of the rows, ``(k,)``.
            change: ``C`` of each, ``(k, d_out, e)``.

        Returns:
            Places within ``index`` of the rows kept, and ``1 / q`` of each.
        """
        probability = (self._rate * self._scores.exact(index, change)).clamp_max(1.0)
        kept = (self._draws[index] < probability).nonzero()[:, 0]
        probability = probability[kept]
        self.sampled += len(kept)
        self.certain += int((probability == 1.0).sum())
        return kept, probability.reciprocal().to(change.dtype)


def spectral_bound(matrices: Tensor) -> Tensor:
    """``(sum of lambda^8)^(1/8)``: at least ``||C C^T||``, at most ``size^(1/8)`` times that.

    Args:
        matrices: ``C``, ``(k, p, q)``.

    Returns:
        ``(k,)``.
    """
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    power = matrices @ matrices.mT
    trace = power.diagonal(dim1=1, dim2=2).sum(-1)
    power = power / trace.clamp_min(torch.finfo(trace.dtype).tiny)[:, None, None]
    for _ in range(2):
        power = power @ power
    return trace * torch.linalg.vector_norm(power, dim=(1, 2)) ** 0.25


class _Scores:
    """Leverage scores of the rows at a point, float64."""

    def __init__(self, point: Point) -> None:
        objective = point.objective
        problem, ridge = objective.problem, objective.ridge
        assert ridge is not None
        self._point, self._dtype = point, point.theta.dtype
        self._strength = problem.ridge_x / objective.model.logit_scale(problem) ** 2
        weights = objective.weights
        self._weights = 1.0 if weights is None else weights[:, 0].double()
        queries = torch.cat([batch.A1.flatten(0, 1) for batch in problem.batches])
        columns = point.features.columns
        self._query = self._leverage(queries, problem.gram_query)
        self._value = self._leverage(columns, problem.gram_value) / problem.ridge_y
        objective.operations.projections += product(
            len(columns), columns.shape[1], columns.shape[1]
        )
        solved = columns @ point.apply_readout_inverse(torch.eye(columns.shape[1]).to(columns))
        self._readout = (solved * columns).sum(1).double().clamp_min(0.0) * self._weights
        self._whitener = _whitener(problem.gram_key, self._dtype)
        self._top = 0.0

    def bounds(self) -> Tensor:
        """Bounds of all scores, ``(rows,)``; one attention pass."""
        point = self._point
        sizes, centres, top = [], [], 0.0
        spent = point.objective.operations
        for batch in point.objective.problem.batches:
            outputs = batch.A3 @ point.coupling  # (b, m, d_out)
            entries = outputs.numel()
            spent.projections += 2 * entries * (batch.A3.shape[2] + outputs.shape[2])
            centre = outputs.mean(1, keepdim=True)
            outputs = outputs - centre
            sizes.append(outputs.square().sum(-1))
            centres.append(centre.expand_as(batch.B).flatten(0, 1))
            gram = outputs.mT @ outputs
            top = max(top, float(torch.linalg.eigvalsh(gram.double())[:, -1].max()))
        peak, size = point.features.peaks(sizes)
        spent.projections += 2 * point.residual.numel() * point.readout.shape[0]
        means = point.features.columns @ point.readout - torch.cat(centres)
        trace = (size - means.square().sum(1)).clamp_min(0.0).double()
        peak = peak.double()
        kappa = peak * torch.minimum(trace, peak * top)
        self._top = float(kappa.max()) / self._strength
        return self._combined(self._query * kappa / self._strength, self._value, self._readout)

    def exact(self, index: Tensor, change: Tensor) -> Tensor:
        """Scores of some rows from their ``C``."""
        whitened = change @ self._whitener
        k, out, rank = whitened.shape
        small = min(out, rank)
        spent = product(k * out, change.shape[2], rank) + product(k * small, max(out, rank), small)
        self._point.objective.operations.row_products += spent + 2 * product(
            k * small, small, small
        )
        kappa = spectral_bound(whitened).double()
        share = self._query[index] * kappa / self._strength
        return self._combined(share, self._value[index], self._readout[index])

    def _combined(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.minimum(x + y, (x.sqrt() + (self._top * z).sqrt()).square() + z)

    def _leverage(self, rows: Tensor, gram: Tensor) -> Tensor:
        """``w_j r_j^T gram^+ r_j``."""
        whitener = _whitener(gram, self._dtype)
        self._point.objective.operations.projections += product(
            len(rows), rows.shape[1], whitener.shape[1]
        )
        whitened = rows @ whitener
        return whitened.square().sum(1).double() * self._weights


def _whitener(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """``W`` with ``W W^T`` the pseudo-inverse of a Gram matrix of data in ``dtype``."""
    factor = LeftFactor.of(gram, dtype)
    return factor.vectors * factor.values.rsqrt()
