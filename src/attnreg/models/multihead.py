"""Multi-head attention with grouped key/value heads, all weights free."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.kronecker import ParameterBlock, split_blocks
from attnreg.models.base import Layout, Model, Parameters, Ridge
from attnreg.models.checks import as_bias, checked
from attnreg.models.features import Features
from attnreg.models.heads import HeadMap, HeadNorm, Rows
from attnreg.models.inputs import (
    PROJECTIONS,
    add_transpose,
    affine,
    constant_input,
    input_gram,
)
from attnreg.models.pooling import repeat_heads
from attnreg.models.rotary import Rotary, rotation
from attnreg.models.sizes import norm_factors, shaped_sizes
from attnreg.problem import AttentionProblem, Batch


@dataclass(frozen=True)
class MultiHead(Model):
    """Fits ``W_Q, W_K, W_V, W_O`` and biases of an attention layer; ``y = x W + b`` throughout.

    Query head ``h`` attends with key/value head ``h // (heads // kv_heads)``. Biases that are pure
    gauge keep the value that ``init`` gives them: ``b_K`` adds the same number to all logits of a
    row, unless keys are rotated or normalised; ``b_V`` is a constant that ``b_O``, where there is
    one, makes up for. The others are fitted. The gains of the norms, ``g_Q`` and ``g_K``, are part
    of ``theta`` but keep their value too.

    Attributes:
        heads: Number of query heads.
        kv_heads: Number of key/value heads; divides ``heads``. Default: ``heads``.
        head_dim: Width of a query and key head. Default: ``d_query / heads``.
        v_head_dim: Width of a value head. Default: ``head_dim``.
        bias: Which of ``"query"``, ``"key"``, ``"value"`` and ``"output"`` have a bias; True for
            all four, False for none.
        rotary: Rotary position embedding of queries and keys at positions 0, 1, ... of every
            sequence, or None.
        norm_eps: Epsilon of the root-mean-square norm of every query and key head before they are
            rotated, with gains ``g_Q`` and ``g_K`` ``(head_dim,)``; None where there is none.
    """

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    bias: bool | tuple[str, ...] = True
    rotary: Rotary | None = None
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        """Checks what does not depend on a problem.

        Raises:
            ValueError: If a size is not a positive integer, ``kv_heads`` does not divide ``heads``,
                a bias is unknown, more coordinates turn than a head has, or ``norm_eps`` is
                negative.
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
        object.__setattr__(self, "bias", as_bias(self.bias))
        if self.norm_eps is not None and not 0 <= self.norm_eps < math.inf:
            raise ValueError(
                f"norm_eps={self.norm_eps!r} was given, a number that is not negative is expected"
            )
        if self.head_dim is not None:
            self._check_rotary(self.head_dim)

    def layout(self, problem: AttentionProblem) -> Layout:
        """Sizes on this problem.

        Returns:
            Three parameter blocks (query, key, value), two more of the gains where there are
            norms, and the readout's shape.

        Raises:
            ValueError: If ``head_dim`` is not given and ``heads`` does not divide ``d_query``, or
                heads are rotated and a sequence has not as many keys as queries.
        """
        e, v = self._widths(problem)
        if self.rotary is not None:
            for i, (n, m) in enumerate(problem.lengths):
                if n != m:
                    raise ValueError(
                        f"sequence {i} has {n} queries and {m} keys, and rotary puts both at "
                        "positions 0, 1, ...: equal numbers are expected; pass rotary=None for "
                        "cross-attention"
                    )
        blocks = [
            ParameterBlock("query", problem.d_query + self._fits("query"), self.heads, e, "A1"),
            ParameterBlock("key", problem.d_key + self._fits("key"), self._groups, e, "A2"),
            ParameterBlock("value", problem.d_value + self._fits("value"), self._groups, v, "A3"),
        ]
        if self.norm_eps is not None:
            blocks += [ParameterBlock(name, 1, 1, e) for name in self._gains]
        return Layout(
            tuple(blocks),
            self._groups,
            self.heads // self._groups,
            v,
            self._has("output"),
            True,
            True,
            held=len(blocks) - 3,
            plain=not (self._shapes_heads or self._fits("key") or self._fits("value")),
        )

    def start(self, problem: AttentionProblem, seed: int) -> dict[str, Tensor]:
        """Random weights with entries of variance ``1 / fan-in``; zero biases and readout."""
        generator = torch.Generator().manual_seed(seed)
        parameters = {}
        for name, shape in self._shapes(problem).items():
            value = torch.full(shape, float(name in self._gains), dtype=problem.dtype)
            if name in ("W_Q", "W_K", "W_V"):
                noise = torch.randn(shape, generator=generator, dtype=torch.float64)
                value = (noise / math.sqrt(shape[0])).to(problem.dtype)
            parameters[name] = value.to(problem.device)
        return parameters

    def split(self, problem: AttentionProblem, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Checks the weights.

        Returns:
            ``theta`` of ``[W_Q; b_Q / c], [W_K; b_K / c], [W_V; b_V / c]`` (``c`` as in
            :meth:`project`, the last row where the bias is fitted and no gauge), ``g_Q`` and
            ``g_K``; and the readout ``[W_O; b_O + b_V W_O]``.

        Raises:
            ValueError: If a weight is missing, has another shape, or is not finite.
        """
        shapes = self._shapes(problem)
        weights = dict(zip(shapes, checked(problem, parameters, shapes), strict=True))
        blocks = []
        for name, letter in PROJECTIONS.items():
            block = weights[f"W_{letter}"]
            if self._fits(name):
                bias = weights[f"b_{letter}"][None] / constant_input(problem, name)
                block = torch.cat([block, bias])
            blocks.append(block)
        blocks += [weights[name] for name in self._gains]
        readout = weights["W_O"]
        if self._has("output"):
            constant = weights["b_O"]
            if self._has("value"):
                constant = constant + self._repeated(weights["b_V"]) @ readout
            readout = torch.cat([readout, constant[None]])
        return torch.cat([block.reshape(-1) for block in blocks]), readout

    def join(
        self, problem: AttentionProblem, theta: Tensor, readout: Tensor, template: Parameters
    ) -> dict[str, Tensor]:
        """Named weights; gauge biases are those of ``template``."""
        blocks = split_blocks(theta, self.layout(problem).blocks)
        named = {"W_O": readout}
        for (name, letter), block in zip(PROJECTIONS.items(), blocks, strict=False):
            named[f"W_{letter}"] = block
            if self._fits(name):
                named[f"W_{letter}"] = block[:-1]
                named[f"b_{letter}"] = block[-1] * constant_input(problem, name)
            elif self._has(name):
                named[f"b_{letter}"] = torch.as_tensor(template[f"b_{letter}"]).to(readout)
        if self._has("output"):
            named |= {"W_O": readout[:-1], "b_O": readout[-1]}
            if self._has("value"):
                b_v = self._repeated(named["b_V"])
                named["b_O"] = readout[-1] - b_v @ readout[:-1]
        named |= {n: gain[0] for n, gain in zip(self._gains, blocks[3:], strict=True)}
        return {name: named[name].clone() for name in self._shapes(problem)}

    def logit_scale(self, problem: AttentionProblem) -> float:
        """The problem's scale; ``head_dim^-0.5`` where it has none."""
        return self._widths(problem)[0] ** -0.5 if problem.scale is None else problem.scale

    def query_inputs(self, problem: AttentionProblem, batch: Batch) -> Tensor:
        """``scale [A1 c]`` (``c`` as in :meth:`project`); ``scale A1`` without a query bias."""
        a1 = batch.A1
        if self._fits("query"):
            constant = a1.new_full((*a1.shape[:2], 1), constant_input(problem, "query"))
            a1 = torch.cat([a1, constant], dim=2)
        return a1 * self.logit_scale(problem)

    def project(
        self, problem: AttentionProblem, batch: Batch, theta: list[Tensor], *, change: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Queries, keys and values; with ``change`` their changes, the same linear maps.

        The constant input of a bias is not 1 but ``c``, the root mean square of the inputs, so that
        inputs of any size have a well-scaled second moment. As the rows of a softmax sum to 1, the
        constant input of the values adds ``b_V`` to every head.

        Returns:
            ``scale (A1 W_Q + b_Q)``, ``A2 W_K + b_K`` and ``A3 W_V + b_V``, each bias only where it
            is fitted and no gauge.
        """
        query, key, value = theta[:3]
        query = query * self.logit_scale(problem)
        return (
            affine(batch.A1, query, self._constant(problem, "query")),
            affine(batch.A2, key, self._constant(problem, "key")),
            affine(batch.A3, value, self._constant(problem, "value")),
        )

    def head_map(
        self, problem: AttentionProblem, batch: Batch, theta: list[Tensor], rows: Rows
    ) -> HeadMap | None:
        """Norms and rotation of queries and keys.

        The queries hold the logit scale ``s`` already, so that their norm is taken with
        ``s^2 epsilon`` and multiplied by ``s g_Q``.

        Returns:
            The map, or None where there is neither.
        """
        if not self._shapes_heads:
            return None
        norms = None
        if self.norm_eps is not None:
            queries, keys, _ = rows
            assert keys is not None
            scale = self.logit_scale(problem)
            norms = (
                HeadNorm(queries, scale * theta[3][0], scale**2 * self.norm_eps),
                HeadNorm(keys, theta[4][0], self.norm_eps),
            )
        turns = None
        if self.rotary is not None:  # as many queries as keys, unless only some rows are here
            turn = rotation(self.rotary, batch.A2.shape[1], problem.dtype, problem.device)
            turns = (turn if batch.rows is None else turn.at(batch.rows), turn)
        return HeadMap(self._widths(problem)[0], norms, turns)

    def pull_back(
        self,
        problem: AttentionProblem,
        batch: Batch,
        gradients: tuple[Tensor, Tensor | None, Tensor | None],
        out: list[Tensor],
    ) -> None:
        """Adds ``scale [A1 c]^T gQ``, ``[A2 c]^T gK`` and ``[A3 c]^T gV``."""
        parts = zip(
            PROJECTIONS,
            (batch.A1, batch.A2, batch.A3),
            gradients,
            (self.logit_scale(problem), 1.0, 1.0),
            out,
            strict=False,
        )
        for name, inputs, gradient, scale, weights in parts:
            assert gradient is not None
            add_transpose(inputs, gradient, self._constant(problem, name), scale, weights)

    def input_moments(self, problem: AttentionProblem) -> tuple[Tensor, ...]:
        """Means over rows for ``scale [A1 c]``, ``[A2 c]`` and ``[A3 c]``; 0 for gains.

        Keys are centred, sequence by sequence, where neither a rotation nor a norm comes after the
        projection: only then does what all keys of a sequence share move no softmax.

        Returns:
            One matrix for each block.
        """
        keys = problem.n_keys
        scale = self.logit_scale(problem)
        query = self._gram(problem, "query") * (scale**2 / problem.total_weight)
        moments = (query, self._gram(problem, "key") / keys, self._gram(problem, "value") / keys)
        return (*moments, *(query.new_zeros((1, 1)) for _ in self._gains))

    def natural_metric(
        self, problem: AttentionProblem, theta: Tensor, readout: Tensor
    ) -> tuple[Tensor, ...]:
        """Size of the logits that changes of queries and keys make, and of the outputs of values.

        Linearised at ``theta``: a change ``dW_Q`` of head ``h`` moves the logits by
        ``scale [A1 c] dW_Q (A2 W_K)^T``, and so on. Invariant to the gauge ``W_Q M, W_K M^-T``.
        Outputs are measured in the root mean square of the targets, so that the dual norm of a
        gradient has the unit of the loss in every block. Norms and rotations enter as
        :mod:`.sizes` says.

        Returns:
            The right factors of the blocks; 0 for gains.
        """
        layout, e = self.layout(problem), self._widths(problem)[0]
        matrices = split_blocks(theta, layout.blocks)
        query, key = (
            _per_head(matrix.double(), block.heads)
            for matrix, block in zip(matrices[:2], layout.blocks[:2], strict=True)
        )
        query_size = query.mT @ self._gram(problem, "query") @ query
        key_size = key.mT @ self._gram(problem, "key") @ key
        if self._shapes_heads:
            centred = input_gram(problem, "key", constant=self._fits("key"), centred=True)
            key_means = key_size - key.mT @ centred @ key
            factors = self._norm_factors(problem, query_size, key_size, matrices[3:])
            moments = (query_size, key_size, key_means)
            key_size, query_size = shaped_sizes(problem, self.rotary, moments, factors)
        else:
            key_size = key_size.repeat_interleave(layout.repeats, dim=0)
            query_size = query_size.unflatten(0, (layout.groups, layout.repeats)).sum(1)
        out = readout[: layout.features].double()
        out = out.unflatten(0, (layout.groups, layout.repeats, layout.value_width))
        out_size = torch.einsum("grvo,grwo->gvw", out, out)
        keys = problem.n_keys
        return (
            problem.total_weight * key_size,
            keys * self.logit_scale(problem) ** 2 * query_size,
            keys * out_size / _mean_square(problem),
            *(gain.new_zeros((1, e, e), dtype=torch.float64) for gain in matrices[3:]),
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
        strengths = (problem.ridge_x, problem.ridge_x, output, *(0.0 for _ in self._gains))
        right = tuple(s * m for s, m in zip(strengths, metric, strict=True))
        columns = Features(problem, self, theta, products=False).columns.double()
        weights = torch.cat([batch.weights.flatten() for batch in problem.batches]).double()
        gram = columns.mT @ (weights[:, None] * columns)
        return Ridge(theta, right, readout, problem.ridge_y * gram)

    # ------------------------------------------------------------------ sizes

    @property
    def _groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def _gains(self) -> tuple[str, ...]:
        return () if self.norm_eps is None else ("g_Q", "g_K")

    @property
    def _shapes_heads(self) -> bool:
        """Whether queries and keys go through a norm or a rotation."""
        return self.rotary is not None or self.norm_eps is not None

    def _has(self, bias: str) -> bool:
        return self.bias is True or (self.bias is not False and bias in self.bias)

    def _fits(self, bias: str) -> bool:
        """Whether a projection has a bias that is fitted: one that is no gauge."""
        if bias == "key" and not self._shapes_heads:
            return False
        return self._has(bias) and not (bias == "value" and self._has("output"))

    def _constant(self, problem: AttentionProblem, name: str) -> float | None:
        return constant_input(problem, name) if self._fits(name) else None

    def _gram(self, problem: AttentionProblem, name: str) -> Tensor:
        centred = name == "key" and not self._shapes_heads
        return input_gram(problem, name, constant=self._fits(name), centred=centred)

    def _norm_factors(
        self, problem: AttentionProblem, queries: Tensor, keys: Tensor, gains: list[Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        if self.norm_eps is None:
            return None
        return (
            norm_factors(queries, problem.total_weight, gains[0][0], self.norm_eps),
            norm_factors(keys, problem.n_keys, gains[1][0], self.norm_eps),
        )

    def _widths(self, problem: AttentionProblem) -> tuple[int, int]:
        head_dim = self.head_dim
        if head_dim is None:
            if problem.d_query % self.heads:
                raise ValueError(
                    f"heads={self.heads} does not divide the width {problem.d_query} of A1: "
                    "pass head_dim"
                )
            head_dim = problem.d_query // self.heads
            self._check_rotary(head_dim)
        return head_dim, head_dim if self.v_head_dim is None else self.v_head_dim

    def _check_rotary(self, head_dim: int) -> None:
        if self.rotary is not None and self.rotary.width > head_dim:
            raise ValueError(
                f"rotary has {len(self.rotary.frequencies)} frequencies, which turn "
                f"{self.rotary.width} coordinates, and head_dim={head_dim}: at most "
                f"{head_dim // 2} frequencies are expected"
            )

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
        biases = {f"b_{letter}": name for name, letter in (PROJECTIONS | {"output": "O"}).items()}
        kept = {k: s for k, s in shapes.items() if k not in biases or self._has(biases[k])}
        return kept | dict.fromkeys(self._gains, (e,))

    def _repeated(self, b_v: Tensor) -> Tensor:
        """``b_V`` once per query head."""
        return repeat_heads(b_v, len(b_v) // self._groups, self.heads // self._groups)


def _mean_square(problem: AttentionProblem) -> float:
    """Mean squared distance of a target row from the mean row; 1 where that is 0."""
    return problem.target_norm_squared / problem.total_weight or 1.0


def _per_head(matrix: Tensor, heads: int) -> Tensor:
    """``(rows, heads * width)`` as ``(heads, rows, width)``."""
    return matrix.unflatten(1, (heads, -1)).transpose(0, 1)
