"""Multi-head attention with grouped key/value heads, all weights free."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.kronecker import ParameterBlock, split_blocks
from attnreg.models.base import Layout, Model, Parameters, Ridge
from attnreg.models.checks import checked
from attnreg.models.features import Features
from attnreg.problem import AttentionProblem, Batch


@dataclass(frozen=True)
class MultiHead(Model):
    """Fits ``W_Q, W_K, W_V, W_O`` and biases of an attention layer; ``y = x W + b`` throughout.

    Query head ``h`` attends with key/value head ``h // (heads // kv_heads)``. Two biases are pure
    gauge and keep the value that ``init`` gives them: ``b_K`` adds the same number to all logits
    of a row, and ``b_V`` is a constant that ``b_O`` makes up for.

    Attributes:
        heads: Number of query heads.
        kv_heads: Number of key/value heads; divides ``heads``. Default: ``heads``.
        head_dim: Width of a query and key head. Default: ``d_query / heads``.
        v_head_dim: Width of a value head. Default: ``head_dim``.
        bias: Whether the four maps have biases.
    """

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    bias: bool = True

    def __post_init__(self) -> None:
        """Checks the sizes that do not depend on a problem.

        Raises:
            ValueError: If a size is not a positive integer or ``kv_heads`` does not divide
                ``heads``.
        """
        for name in ("heads", "kv_heads", "head_dim", "v_head_dim"):
            value = getattr(self, name)
            if value is None and name != "heads":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} was given, a positive integer is expected")
        if self.heads % self._groups:
            raise ValueError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}: every key/value "
                f"head serves the same number of query heads; choose a divisor of {self.heads}"
            )

    def layout(self, problem: AttentionProblem) -> Layout:
        """Sizes on this problem.

        Returns:
            Three parameter blocks (query, key, value) and the readout's shape.

        Raises:
            ValueError: If ``head_dim`` is not given and ``heads`` does not divide ``d_query``.
        """
        e, v = self._widths(problem)
        blocks = (
            ParameterBlock("query", problem.d_query + int(self.bias), self.heads, e),
            ParameterBlock("key", problem.d_key, self._groups, e),
            ParameterBlock("value", problem.d_value, self._groups, v),
        )
        repeats = self.heads // self._groups
        return Layout(blocks, self._groups, repeats, v, self.bias, True, True)

    def start(self, problem: AttentionProblem, seed: int) -> dict[str, Tensor]:
        """Random weights with entries of variance ``1 / fan-in``; zero biases and readout."""
        generator = torch.Generator().manual_seed(seed)
        parameters = {}
        for name, shape in self._shapes(problem).items():
            value = torch.zeros(shape, dtype=problem.dtype)
            if name in ("W_Q", "W_K", "W_V"):
                noise = torch.randn(shape, generator=generator, dtype=torch.float64)
                value = (noise / math.sqrt(shape[0])).to(problem.dtype)
            parameters[name] = value.to(problem.device)
        return parameters

    def split(self, problem: AttentionProblem, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Checks the weights.

        Returns:
            ``theta`` of ``[W_Q; b_Q / c], W_K, W_V`` (``c`` as in :meth:`project`) and the
            readout ``[W_O; b_O + b_V W_O]``.

        Raises:
            ValueError: If a weight is missing, has another shape, or is not finite.
        """
        shapes = self._shapes(problem)
        weights = dict(zip(shapes, checked(problem, parameters, shapes), strict=True))
        query, readout = weights["W_Q"], weights["W_O"]
        if self.bias:
            query = torch.cat([query, weights["b_Q"][None] / self._constant(problem)])
            constant = weights["b_O"] + self._repeated(problem, weights["b_V"]) @ readout
            readout = torch.cat([readout, constant[None]])
        blocks = (query, weights["W_K"], weights["W_V"])
        return torch.cat([block.reshape(-1) for block in blocks]), readout

    def join(
        self, problem: AttentionProblem, theta: Tensor, readout: Tensor, template: Parameters
    ) -> dict[str, Tensor]:
        """Named weights; ``b_K`` and ``b_V`` are those of ``template``."""
        query, key, value = split_blocks(theta, self.layout(problem).blocks)
        named = {"W_Q": query, "W_K": key, "W_V": value, "W_O": readout}
        if self.bias:
            b_v = torch.as_tensor(template["b_V"]).to(readout)
            b_o = readout[-1] - self._repeated(problem, b_v) @ readout[:-1]
            b_q = query[-1] * self._constant(problem)
            named |= {"W_Q": query[:-1], "b_Q": b_q, "b_V": b_v, "W_O": readout[:-1]}
            named |= {"b_K": torch.as_tensor(template["b_K"]).to(readout), "b_O": b_o}
        return {name: named[name].clone() for name in self._shapes(problem)}

    def logit_scale(self, problem: AttentionProblem) -> float:
        """The problem's scale; ``head_dim^-0.5`` where it has none."""
        return self._widths(problem)[0] ** -0.5 if problem.scale is None else problem.scale

    def query_inputs(self, problem: AttentionProblem, batch: Batch) -> Tensor:
        """``scale [A1 c]`` (``c`` as in :meth:`project`); ``scale A1`` without biases."""
        a1 = batch.A1
        if self.bias:
            constant = a1.new_full((*a1.shape[:2], 1), self._constant(problem))
            a1 = torch.cat([a1, constant], dim=2)
        return a1 * self.logit_scale(problem)

    def project(
        self, problem: AttentionProblem, batch: Batch, theta: list[Tensor], *, change: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Queries, keys and values; with ``change`` their changes, the same linear maps.

        The constant input of ``b_Q`` is not 1 but ``c``, the root mean square of ``A1``, so that
        inputs of any size have a well-scaled second moment.

        Returns:
            ``scale (A1 W_Q + b_Q)``, ``A2 W_K`` and ``A3 W_V``.
        """
        query, key, value = theta
        query = query * self.logit_scale(problem)
        if self.bias:
            a1 = batch.A1.flatten(0, 1)
            queries = torch.addmm(
                query[-1], a1, query[:-1], beta=self._constant(problem)
            ).unflatten(0, batch.A1.shape[:2])
        else:
            queries = batch.A1 @ query
        return queries, batch.A2 @ key, batch.A3 @ value

    def pull_back(
        self,
        problem: AttentionProblem,
        batch: Batch,
        gradients: tuple[Tensor, Tensor | None, Tensor | None],
        out: list[Tensor],
    ) -> None:
        """Adds ``scale [A1 c]^T gQ``, ``A2^T gK`` and ``A3^T gV``."""
        gq, gk, gv = gradients
        assert gk is not None
        assert gv is not None
        gq = gq.flatten(0, 1)
        scale = self.logit_scale(problem)
        if self.bias:
            out[0][-1].add_(gq.sum(0), alpha=scale * self._constant(problem))
        weights = out[0][:-1] if self.bias else out[0]
        weights.addmm_(batch.A1.flatten(0, 1).mT, gq, alpha=scale)
        out[1].addmm_(batch.A2.flatten(0, 1).mT, gk.flatten(0, 1))
        out[2].addmm_(batch.A3.flatten(0, 1).mT, gv.flatten(0, 1))

    def input_moments(self, problem: AttentionProblem) -> tuple[Tensor, ...]:
        """Means over rows for ``scale [A1 c]``, the centred ``A2``, and ``A3``."""
        keys = _key_rows(problem)
        query = self._gram_query(problem) * (self.logit_scale(problem) ** 2 / problem.total_weight)
        return (query, problem.gram_key_centered / keys, problem.gram_value / keys)

    def natural_metric(
        self, problem: AttentionProblem, theta: Tensor, readout: Tensor
    ) -> tuple[Tensor, ...]:
        """Size of the logits that changes of queries and keys make, and of the outputs of values.

        Linearised at ``theta``: a change ``dW_Q`` of head ``h`` moves the logits by
        ``scale [A1 c] dW_Q (A2 W_K)^T``, and so on. Invariant to the gauge ``W_Q M, W_K M^-T``.
        Outputs are measured in the root mean square of the targets, so that the dual norm of a
        gradient has the unit of the loss in every block.

        Returns:
            The right factors of the three blocks.
        """
        layout = self.layout(problem)
        query, key, _ = (
            _per_head(matrix.double(), block.heads)
            for matrix, block in zip(split_blocks(theta, layout.blocks), layout.blocks, strict=True)
        )
        g1, g2 = self._gram_query(problem), problem.gram_key_centered
        key_size = (key.mT @ g2 @ key).repeat_interleave(layout.repeats, dim=0)
        query_size = query.mT @ g1 @ query
        query_size = query_size.unflatten(0, (layout.groups, layout.repeats)).sum(1)
        out = readout[: layout.features].double()
        out = out.unflatten(0, (layout.groups, layout.repeats, layout.value_width))
        out_size = torch.einsum("grvo,grwo->gvw", out, out)
        keys = _key_rows(problem)
        return (
            problem.total_weight * key_size,
            keys * self.logit_scale(problem) ** 2 * query_size,
            keys * out_size / _mean_square(problem),
        )

    def ridge(self, problem: AttentionProblem) -> Ridge | None:
        """Squared distance to the weights in ``problem.center``, in the natural metric there.

        ``ridge_x`` weighs the change of the logits that ``W_Q`` and ``W_K`` make, ``ridge_y`` the
        change of the outputs that ``W_V`` and ``W_O`` make, each linearised at the centre.

        Returns:
            The ridge, or None where both strengths are 0.

        Raises:
            ValueError: If a ridge is positive and the problem has no centre.
        """
        if problem.ridge_x == 0 and problem.ridge_y == 0:
            return None
        if not problem.center:
            raise ValueError(
                "a MultiHead ridge is the distance to given weights, and this problem has none: "
                "pass AttentionProblem(..., center=weights), or set ridge_x and ridge_y to 0"
            )
        theta, readout = self.split(problem, problem.center)
        metric = self.natural_metric(problem, theta, readout)
        output = problem.ridge_y * _mean_square(problem)  # the metric measures outputs in its root
        strengths = (problem.ridge_x, problem.ridge_x, output)
        right = tuple(s * m for s, m in zip(strengths, metric, strict=True))
        columns = Features(problem, self, theta, products=False).columns.double()
        weights = torch.cat([batch.weights.flatten() for batch in problem.batches]).double()
        gram = columns.mT @ (weights[:, None] * columns)
        return Ridge(theta, right, readout, problem.ridge_y * gram)

    # ------------------------------------------------------------------ sizes

    @property
    def _groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    def _widths(self, problem: AttentionProblem) -> tuple[int, int]:
        head_dim = self.head_dim
        if head_dim is None:
            if problem.d_query % self.heads:
                raise ValueError(
                    f"heads={self.heads} does not divide the width {problem.d_query} of A1: "
                    "pass head_dim"
                )
            head_dim = problem.d_query // self.heads
        return head_dim, head_dim if self.v_head_dim is None else self.v_head_dim

    def _constant(self, problem: AttentionProblem) -> float:
        """Root mean square of ``A1``; 1 where that is 0."""
        mean_square = float(problem.gram_query.trace()) / problem.total_weight / problem.d_query
        return mean_square**0.5 or 1.0

    def _shapes(self, problem: AttentionProblem) -> dict[str, tuple[int, ...]]:
        e, v = self._widths(problem)
        shapes: dict[str, tuple[int, ...]] = {
            "W_Q": (problem.d_query, self.heads * e),
            "b_Q": (self.heads * e,),
            "W_K": (problem.d_key, self._groups * e),
            "b_K": (self._groups * e,),
            "W_V": (problem.d_value, self._groups * v),
            "b_V": (self._groups * v,),
            "W_O": (self.heads * v, problem.d_out),
            "b_O": (problem.d_out,),
        }
        return {k: s for k, s in shapes.items() if self.bias or not k.startswith("b_")}

    def _repeated(self, problem: AttentionProblem, b_v: Tensor) -> Tensor:
        """``b_V`` once per query head."""
        per_head = b_v.view(self._groups, -1)
        return per_head.repeat_interleave(self.heads // self._groups, dim=0).flatten()

    def _gram_query(self, problem: AttentionProblem) -> Tensor:
        if not self.bias:
            return problem.gram_query
        mean = problem.gram_query.new_zeros(problem.d_query)
        for batch in problem.batches:
            mean += (batch.weights[..., None] * batch.A1).double().sum((0, 1))
        constant = self._constant(problem)
        mean *= constant
        corner = mean.new_tensor([[problem.total_weight * constant**2]])
        top = torch.cat([problem.gram_query, mean[:, None]], dim=1)
        return torch.cat([top, torch.cat([mean[None], corner], dim=1)])


def pool_kv_heads(weights: Parameters, heads: int, kv_heads: int) -> dict[str, Tensor]:
    """Averages key/value heads over groups: the usual start of a conversion to fewer of them.

    Args:
        weights: ``W_K``, ``W_V`` (``d x (heads * width)``), optionally ``b_K`` and ``b_V``, and
            any others, which are kept.
        heads: Number of key/value heads in ``weights``.
        kv_heads: Number wanted; divides ``heads``.

    Returns:
        A new mapping with the pooled weights.

    Raises:
        ValueError: If ``kv_heads`` does not divide ``heads``, or a width is not a multiple of
            ``heads``.
    """
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"kv_heads={kv_heads} does not divide heads={heads}: choose a divisor of {heads}"
        )
    pooled = {name: torch.as_tensor(value) for name, value in weights.items()}
    for name in ("W_K", "b_K", "W_V", "b_V"):
        if name not in pooled:
            continue
        value = pooled[name]
        if value.shape[-1] % heads:
            raise ValueError(f"{name} has {value.shape[-1]} columns, no multiple of heads={heads}")
        groups = value.unflatten(-1, (kv_heads, heads // kv_heads, -1))
        pooled[name] = groups.mean(dim=-2).flatten(-2)
    return pooled


def _mean_square(problem: AttentionProblem) -> float:
    """Mean squared distance of a target row from the mean row; 1 where that is 0."""
    return problem.target_norm_squared / problem.total_weight or 1.0


def _key_rows(problem: AttentionProblem) -> int:
    return sum(keys for _, keys in problem.lengths)


def _per_head(matrix: Tensor, heads: int) -> Tensor:
    """``(rows, heads * width)`` as ``(heads, rows, width)``."""
    return matrix.unflatten(1, (heads, -1)).transpose(0, 1)
