r"""The weights of a layer head by head, as bilinear forms, with the second moments of their inputs.

A bias is one more row of its matrix, for a constant input of 1. A pair of coordinates that turns
by rotary position embedding is one complex column: with ``q = x W_Q`` and ``k = z W_K`` read as
complex numbers the logit of positions ``i, j`` is ``sum_f Re(conj(q_f) k_f e^{i f (j - i)})``, so
that pair ``f`` of a head is the form ``conj(W_Qf) W_Kf^T`` of rank one. Only a complex factor a
pair commutes with the turning. The size of a form is taken as if phases were spread evenly, which
leaves ``||G1^{1/2} X G2^{1/2}||_F``; for slow pairs on short texts that is a heuristic.

Keys that do not turn are centred in their metric, values too where the output has a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreg.models import MultiHead
from attnreg.models.rotary import Rotary
from attnreg.problem import AttentionProblem

NAMES = {"Q": "query", "K": "key", "V": "value", "O": "output"}


@dataclass(frozen=True)
class Family:
    """Forms ``L_h R_g^T``: head ``h`` meets ``g = h // (heads // kv_heads)``.

    Attributes:
        left: ``(heads, rows, w)``, float64 or complex128.
        right: ``(kv_heads, rows, w)``.
        left_gram: ``L_h^H G1 L_h``, ``(heads, w, w)``.
        right_gram: ``R_g^H G2 R_g2``, ``(kv_heads, kv_heads, w, w)``.
    """

    left: Tensor
    right: Tensor
    left_gram: Tensor
    right_gram: Tensor

    @staticmethod
    def of(left: Tensor, right: Tensor, g1: Tensor, g2: Tensor) -> Family:
        """The family with its Gram matrices."""
        left_gram = left.mH @ (g1.to(left.dtype) @ left)
        measured = g2.to(right.dtype) @ right
        right_gram = right.conj().mT[:, None] @ measured[None]
        return Family(left, right, left_gram, right_gram)

    @property
    def width(self) -> int:
        """Columns of a factor."""
        return self.left.shape[-1]

    @property
    def energy(self) -> Tensor:
        """Squared size of each head's columns on their own, ``(heads, w)``."""
        own = self.right_gram.diagonal(dim1=0, dim2=1).permute(2, 0, 1)  # (kv_heads, w, w)
        size = own.diagonal(dim1=1, dim2=2).real
        repeats = len(self.left) // len(self.right)
        return self.left_gram.diagonal(dim1=1, dim2=2).real * size.repeat_interleave(repeats, 0)


@dataclass(frozen=True)
class Split:
    """A layer as families of forms.

    Attributes:
        turning: Complex columns, one a turning pair; width 0 without rotary.
        plain: The other columns of queries and keys.
        values: ``W_O^T`` and ``W_V``.
        constant: ``b_O``, or None.
        gains: ``g_Q`` and ``g_K`` where there are norms.
    """

    turning: Family
    plain: Family
    values: Family
    constant: Tensor | None
    gains: Mapping[str, Tensor]


def bias_names(model: MultiHead) -> tuple[str, ...]:
    """Which of the four maps have a bias."""
    if isinstance(model.bias, bool):
        return tuple(NAMES.values()) if model.bias else ()
    return tuple(model.bias)


def rotary_of(model: MultiHead) -> Rotary | None:
    """The model's rotary position embedding."""
    return model.rotary


def turning_width(rotary: Rotary | None) -> int:
    """Coordinates of a head that turn."""
    return 0 if rotary is None else 2 * len(rotary.frequencies)


def norm_of(model: MultiHead) -> float | None:
    """Epsilon of the norms of queries and keys."""
    return model.norm_eps


def sizes(problem: AttentionProblem, model: MultiHead) -> tuple[int, int, int, int]:
    """Heads, key/value heads, and the widths of a key and of a value head."""
    layout = model.layout(problem)
    key = next(block for block in layout.blocks if block.name == "key")
    return layout.groups * layout.repeats, layout.groups, key.width, layout.value_width


def check_student(problem: AttentionProblem, teacher: MultiHead, student: MultiHead) -> None:
    """Refuses a student that the teacher's weights cannot be brought into.

    Args:
        problem: Gives the widths.
        teacher: The original.
        student: The layer wanted.

    Raises:
        ValueError: If it has more or wider heads, or the two are of different kinds.
    """
    names = ("heads", "kv_heads", "head_dim", "v_head_dim")
    have, want = sizes(problem, teacher), sizes(problem, student)
    for name, old, new in zip(names, have, want, strict=True):
        if new > old:
            raise ValueError(
                f"the student has {name}={new} and the original {old}: a start from its weights "
                "has not more"
            )
    missing = [
        n for n in NAMES.values() if n in set(bias_names(teacher)) - set(bias_names(student))
    ]
    if missing:
        raise ValueError(
            f"the original has a bias of {' and '.join(missing)} and the student has none: give it "
            "the same biases"
        )
    if (norm_of(teacher) is None) != (norm_of(student) is None):
        raise ValueError(
            f"norm_eps is {norm_of(teacher)} in the original and {norm_of(student)} in the "
            "student: both have norms of queries and keys, or neither"
        )
    old_rotary, new_rotary = rotary_of(teacher), rotary_of(student)
    if (old_rotary is None) != (new_rotary is None):
        raise ValueError(
            "one of original and student has rotary position embedding and the other has not: give "
            "both, or neither"
        )
    if old_rotary is not None and new_rotary is not None:
        turning = turning_width(old_rotary), turning_width(new_rotary)
        if turning[1] > turning[0] or want[2] - turning[1] > have[2] - turning[0]:
            raise ValueError(
                f"heads of {have[2]} coordinates, {turning[0]} of them turning, were given, and "
                f"the student has {want[2]} and {turning[1]}: not more of either kind is expected"
            )


def split_heads(
    problem: AttentionProblem, model: MultiHead, weights: Mapping[str, Tensor]
) -> Split:
    """Takes the weights apart.

    Args:
        problem: Its inputs give the metrics.
        model: Description of the layer.
        weights: By name as :class:`attnreg.models.MultiHead` has them.

    Returns:
        The families, float64; the logit scale is part of the queries (not where norms undo it).
    """
    heads, groups, _, _ = sizes(problem, model)
    given = {name: torch.as_tensor(w).detach().to(problem.device) for name, w in weights.items()}
    count = {"Q": heads, "K": groups, "V": groups}
    query, key, value = (
        _per_head(given[f"W_{n}"].double(), given.get(f"b_{n}"), count[n]) for n in "QKV"
    )
    if norm_of(model) is None:
        query = query * model.logit_scale(problem)
    (query_turning, query_plain), (key_turning, key_plain) = (
        _turning(part, rotary_of(model)) for part in (query, key)
    )
    output = given["W_O"].double().unflatten(0, (heads, -1)).mT  # (heads, d_out, v)
    constant = given["b_O"].double() if "b_O" in given else None
    g1, g2, centred, g3 = metrics(problem, "output" in bias_names(model))
    return Split(
        Family.of(query_turning.conj().resolve_conj(), key_turning, g1, g2),
        Family.of(query_plain, key_plain, g1, centred),
        Family.of(output, value, torch.eye(problem.d_out, dtype=g1.dtype, device=g1.device), g3),
        constant,
        {name: given[name].double() for name in ("g_Q", "g_K") if name in given},
    )


def join_heads(
    problem: AttentionProblem,
    model: MultiHead,
    pieces: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    constant: Tensor | None,
    gains: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The weights of a student; biases that it has and the original had not are 0.

    Args:
        problem: Gives dtype and logit scale.
        model: Description of the student.
        pieces: Left and right factors of turning, plain and value columns.
        constant: ``b_O``, or None.
        gains: ``g_Q`` and ``g_K`` where there are norms.

    Returns:
        Weights by name, in the problem's dtype.
    """
    left_turning, right_turning, left_plain, right_plain, left_value, right_value = pieces
    rotary = rotary_of(model)
    query = _unturned(left_turning.conj().resolve_conj(), left_plain, rotary)
    key = _unturned(right_turning, right_plain, rotary)
    if norm_of(model) is None:
        query = query / model.logit_scale(problem)
    named = dict(gains)
    for name, part in (("Q", query), ("K", key), ("V", right_value)):
        flat = part.transpose(0, 1).flatten(1)
        named |= {f"W_{name}": flat[:-1], f"b_{name}": flat[-1]}
    named["W_O"] = left_value.mT.flatten(0, 1)
    named["b_O"] = named["W_O"].new_zeros(problem.d_out) if constant is None else constant
    wanted = bias_names(model)
    return {
        name: value.to(problem.dtype).contiguous()
        for name, value in named.items()
        if not name.startswith("b_") or NAMES[name[2:]] in wanted
    }


def metrics(
    problem: AttentionProblem, constant_is_free: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean second moments of the inputs with a constant 1 after them, float64.

    Args:
        problem: Its inputs.
        constant_is_free: Whether a constant added to all values changes nothing.

    Returns:
        Of queries, of keys, of centred keys, and of values (centred where the constant is free).
    """
    keys = sum(m for _, m in problem.lengths)
    query_sum = problem.gram_query.new_zeros(problem.d_query)
    key_sum = problem.gram_key.new_zeros(problem.d_key)
    value_sum = problem.gram_value.new_zeros(problem.d_value)
    for batch in problem.batches:  # padding is zero
        query_sum += (batch.weights[..., None] * batch.A1).double().sum((0, 1))
        key_sum += batch.A2.double().sum((0, 1))
        value_sum += batch.A3.double().sum((0, 1))
    query = _with_constant(problem.gram_query, query_sum, problem.total_weight)
    key = _with_constant(problem.gram_key, key_sum, keys)
    centred = torch.zeros_like(key)
    centred[:-1, :-1] = problem.gram_key_centered / keys
    value = _with_constant(problem.gram_value, value_sum, keys)
    if constant_is_free:
        value = value - torch.outer(value[-1], value[-1])
    return query, key, centred, value


def _with_constant(gram: Tensor, total: Tensor, count: float) -> Tensor:
    top = torch.cat([gram, total[:, None]], dim=1)
    bottom = torch.cat([total, total.new_tensor([count])])
    return torch.cat([top, bottom[None]]) / count


def _per_head(matrix: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """``(heads, rows + 1, width)``."""
    row = matrix.new_zeros(matrix.shape[1]) if bias is None else bias.double()
    return torch.cat([matrix, row[None]]).unflatten(1, (heads, -1)).transpose(0, 1)


def _turning(heads: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """The turning pairs as complex columns times the rotary factor, and the other columns."""
    pairs = 0 if rotary is None else len(rotary.frequencies)
    turning = heads[..., : 2 * pairs]
    if rotary is not None and rotary.interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning[..., :pairs], turning[..., pairs:]
    factor = 1.0 if rotary is None else rotary.factor
    return factor * torch.complex(first.contiguous(), second.contiguous()), heads[..., 2 * pairs :]


def _unturned(turning: Tensor, plain: Tensor, rotary: Rotary | None) -> Tensor:
    if rotary is None:
        return plain
    first, second = turning.real / rotary.factor, turning.imag / rotary.factor
    if rotary.interleaved:
        both = torch.stack([first, second], dim=-1).flatten(-2)
    else:
        both = torch.cat([first, second], dim=-1)
    return torch.cat([both, plain], dim=-1)
