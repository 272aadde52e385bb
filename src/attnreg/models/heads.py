r"""What queries and keys go through between the projection and the attention, head by head.

First the root-mean-square norm of every head where there is one (Qwen3), then the rotation. With
a head ``x`` of ``e`` coordinates, gain ``g``, ``rho = (mean(x^2) + eps)^{-1/2}``, ``y = rho x`` and
the entrywise product ``o``, the norm is ``g o y``. In the direction ``dx``, and for a cotangent
``u`` with ``v = g o u``::

    dy = rho (dx - mean(y o dx) y)              the change of the norm is g o dy
    G  = rho (v - mean(y o v) y)                the gradient by x

    dG = rho (dv - mean(y o dv) y) - rho mean(y o dx) G - rho (mean(y o v) dy + mean(dy o v) y)

The last line is the derivative of the gradient while the cotangent moves by ``du``. The gains are
given and do not move.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnreg.models.rotary import Rotation

Rows = tuple[Tensor, Tensor | None, Tensor | None]
"""Something of queries, keys and values; None where they are fixed."""


class HeadNorm:
    """Root-mean-square norm of the heads of some rows.

    Args:
        rows: ``(b, n, heads * width)``.
        gain: ``(width,)``.
        epsilon: Added to the mean square.
    """

    def __init__(self, rows: Tensor, gain: Tensor, epsilon: float) -> None:
        self._gain = gain
        heads = self._by_head(rows)
        self._inverse = (heads.square().mean(-1, keepdim=True) + epsilon).rsqrt()  # rho
        self._unit = heads * self._inverse  # y

    @property
    def rows(self) -> Tensor:
        """The normalised rows."""
        return (self._gain * self._unit).flatten(2)

    def jvp(self, change: Tensor) -> Tensor:
        """Change of :attr:`rows`."""
        return (self._gain * self._tangent(self._by_head(change))).flatten(2)

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Gradient by the rows that were given."""
        return self._tangent(self._gain * self._by_head(cotangent)).flatten(2)

    def vjp_derivative(self, change: Tensor, cotangent: Tensor, cotangent_change: Tensor) -> Tensor:
        """Derivative of :meth:`vjp` along a change of the rows and of the cotangent."""
        dx = self._by_head(change)
        v, dv = (self._gain * self._by_head(u) for u in (cotangent, cotangent_change))
        y, dy = self._unit, self._tangent(dx)
        result = self._tangent(dv)
        moved = _mean(y, dx) * self._tangent(v) + _mean(y, v) * dy + _mean(dy, v) * y
        return result.sub_(moved.mul_(self._inverse)).flatten(2)

    def _tangent(self, heads: Tensor) -> Tensor:
        """``rho (z - mean(y o z) y)``."""
        return (heads - _mean(self._unit, heads) * self._unit).mul_(self._inverse)

    def _by_head(self, rows: Tensor) -> Tensor:
        return rows.unflatten(2, (-1, self._gain.shape[0]))


def _mean(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).mean(-1, keepdim=True)


@dataclass(frozen=True)
class HeadMap:
    """Norms and rotation of the queries and keys of one batch, linearised at a point.

    Attributes:
        width: Of a query or key head.
        norms: Those of queries and keys, or None.
        rotations: Those of queries and keys, or None.
    """

    width: int
    norms: tuple[HeadNorm, HeadNorm] | None
    rotations: tuple[Rotation, Rotation] | None

    @property
    def curved(self) -> bool:
        """Whether it is not linear."""
        return self.norms is not None

    def apply(self, rows: Rows) -> Rows:
        """The queries and keys that the attention sees; values are left alone."""
        queries, keys, values = rows
        assert keys is not None
        if self.norms is not None:
            queries, keys = (norm.rows for norm in self.norms)
        return *self._turned(queries, keys), values

    def jvp(self, change: Rows) -> Rows:
        """Change of what :meth:`apply` gives."""
        dq, dk, dv = change
        assert dk is not None
        if self.norms is not None:
            dq, dk = self.norms[0].jvp(dq), self.norms[1].jvp(dk)
        return *self._turned(dq, dk), dv

    def vjp(self, gradients: Rows) -> Rows:
        """Gradients by what :meth:`apply` was given."""
        gq, gk, gv = self._turned_back(gradients)
        if self.norms is not None:
            assert gk is not None
            gq, gk = self.norms[0].vjp(gq), self.norms[1].vjp(gk)
        return gq, gk, gv

    def vjp_derivative(self, change: Rows, gradients: Rows | None, gradients_change: Rows) -> Rows:
        """Derivative of :meth:`vjp` along ``change`` while the gradients given to it move.

        Args:
            change: Of what :meth:`apply` was given.
            gradients: By what it gave; None will do where the map is linear.
            gradients_change: Their change.

        Returns:
            Changes of the gradients by what :meth:`apply` was given.
        """
        hq, hk, hv = self._turned_back(gradients_change)
        if self.norms is not None:
            assert gradients is not None
            (dq, dk, _), (gq, gk, _) = change, self._turned_back(gradients)
            assert dk is not None
            assert gk is not None
            assert hk is not None
            hq = self.norms[0].vjp_derivative(dq, gq, hq)
            hk = self.norms[1].vjp_derivative(dk, gk, hk)
        return hq, hk, hv

    def _turned(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        if self.rotations is None:
            return queries, keys
        query, key = self.rotations
        return query.apply(queries, self.width), key.apply(keys, self.width)

    def _turned_back(self, gradients: Rows) -> Rows:
        gq, gk, gv = gradients
        if self.rotations is not None:
            assert gk is not None
            query, key = self.rotations
            gq, gk = query.transpose(gq, self.width), key.transpose(gk, self.width)
        return gq, gk, gv
