"""Slow, obviously right float64 twins of the models and of the objective.

Everything here works on the sequences as a user gives them, one at a time and without padding,
with named parameters, a loop over heads and a loop over rows. The whole objective is written as
one list of squares,

    V(theta, O) = || D(theta) O - T ||^2 + || e(theta) ||^2

(data, readout ridge and damping in ``D`` and ``T``, the ridge of theta in ``e``), so that values,
gradients, Gauss-Newton and Hessian matrices all follow by automatic differentiation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from attnreg.models import Bilinear, MultiHead
from attnreg.problem import AttentionProblem


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def forward_product(function, x, direction):
    """``J direction`` by two reverse passes: forward mode in torch warns of its own jit."""
    return torch.autograd.functional.jvp(function, x, direction)


def relative(a, b):
    """``||a - b|| / ||b||``."""
    return float((a - b).norm() / b.norm())


@dataclass(eq=False)
class Case:
    """A problem as lists of sequences; ``masks`` are additive or boolean, one a sequence."""

    A1: list
    B: list
    A2: list | None = None
    A3: list | None = None
    masks: list | None = None
    causal: bool = False
    window: int | None = None
    weights: list | None = None
    options: dict[str, Any] = field(default_factory=dict)  # scale, ridges
    stack: bool = False

    @property
    def sequences(self):
        """Per sequence A1, A2, A3, B, row weights and the additive mask, all written out."""
        for i, (a1, b) in enumerate(zip(self.A1, self.B, strict=True)):
            a2 = a1 if self.A2 is None else self.A2[i]
            a3 = a1 if self.A3 is None else self.A3[i]
            w = torch.ones(len(b), dtype=b.dtype) if self.weights is None else self.weights[i]
            bias = torch.zeros(len(a1), len(a2), dtype=b.dtype)
            if self.masks is not None and self.masks[i].dtype == torch.bool:
                bias[~self.masks[i]] = -torch.inf
            elif self.masks is not None:
                bias += self.masks[i]
            if self.causal:
                bias[torch.ones(bias.shape, dtype=torch.bool).triu(1)] = -torch.inf
            if self.window is not None:
                bias[torch.ones(bias.shape, dtype=torch.bool).tril(-self.window)] = -torch.inf
            yield a1, a2, a3, b, w, bias

    def problem(self, center=None, **changes):
        pack = torch.stack if self.stack else list
        given = {k: getattr(self, k) for k in ("A1", "B", "A2", "A3", "weights")}
        given = {k: None if v is None else pack(v) for k, v in given.items()}
        mask = None if self.masks is None else pack(self.masks)
        if self.causal:
            parts = [part for part in (self.window, mask) if part is not None]
            mask = ("causal", *parts) if parts else "causal"
        return AttentionProblem(**given, mask=mask, center=center, **(self.options | changes))


def padded(problem, rows):
    """Rows ``(n_i, k)`` of the sequences as one matrix over the batches, zeros on padding."""
    parts = []
    for batch in problem.batches:
        b, n, _ = batch.B.shape
        part = rows[0].new_zeros(b, n, rows[0].shape[1])
        for place, index in enumerate(batch.index):
            part[place, : len(rows[index])] = rows[index]
        parts.append(part.flatten(0, 1))
    return torch.cat(parts)


def unpadded(problem, matrix):
    """The real rows of a matrix over the batches, sequence after sequence."""
    found, start = {}, 0
    for batch in problem.batches:
        b, n, _ = batch.B.shape
        for place, (index, (length, _)) in enumerate(zip(batch.index, batch.lengths, strict=True)):
            found[index] = matrix[start + place * n :][:length]
        start += b * n
    return torch.cat([found[i] for i in range(len(found))])


@dataclass(eq=False)
class Twin:
    """The objective of a model on a case; ``theta`` is flat as in the package.

    Attributes:
        center: Named parameters of the centre of the ridges, or None.
        damping: Of the readout, its constant row excepted.
    """

    case: Case
    model: Bilinear | MultiHead
    center: dict | None = None
    damping: float = 0.0

    @functools.cached_property
    def sequences(self):
        return list(self.case.sequences)

    @functools.cached_property
    def sizes(self):
        a1, a2, a3, b, _, _ = self.sequences[0]
        return a1.shape[1], a2.shape[1], a3.shape[1], b.shape[1]

    @property
    def scale(self):
        given = self.case.options.get("scale")
        if given is not None:
            return given
        return 1.0 if isinstance(self.model, Bilinear) else self.widths[2] ** -0.5

    @property
    def widths(self):
        """Heads, key/value heads, width of a query head, width of a value head."""
        m = self.model
        e = m.head_dim or self.sizes[0] // m.heads
        return m.heads, m.kv_heads or m.heads, e, m.v_head_dim or e

    def shapes(self):
        d1, d2, d3, d_out = self.sizes
        if isinstance(self.model, Bilinear):
            return {"X": (d1, d2), "Y": (d3, d_out)}
        h, g, e, v = self.widths
        shapes = {"W_Q": (d1, h * e), "b_Q": (h * e,), "W_K": (d2, g * e), "b_K": (g * e,)}
        shapes |= {"W_V": (d3, g * v), "b_V": (g * v,), "W_O": (h * v, d_out), "b_O": (d_out,)}
        return {k: s for k, s in shapes.items() if self.model.bias or not k.startswith("b_")}

    def random(self, seed):
        return {
            name: normal(*shape, seed=seed + i)
            for i, (name, shape) in enumerate(self.shapes().items())
        }

    # ------------------------------------------------------------------ theta

    def flat(self, p):
        """Non-linear parameters in the package's order."""
        if isinstance(self.model, Bilinear):
            return p["X"].flatten()
        p = p | ({"b_Q": p["b_Q"] / self.bias_unit} if "b_Q" in p else {})
        names = [n for n in ("W_Q", "b_Q", "W_K", "W_V") if n in p]
        return torch.cat([p[n].flatten() for n in names])

    @functools.cached_property
    def bias_unit(self):
        """Weighted root mean square of the entries of A1."""
        a1 = torch.cat([s[0] for s in self.sequences])
        w = torch.cat([s[4] for s in self.sequences])
        return float((w @ a1.square().mean(1) / w.sum()).sqrt())

    def named(self, theta):
        """The inverse of :meth:`flat`, with zeros for ``b_K`` and ``b_V``."""
        shapes = self.shapes()
        names = [n for n in ("X", "W_Q", "b_Q", "W_K", "W_V") if n in shapes]
        p, start = {}, 0
        for name in names:
            size = torch.Size(shapes[name]).numel()
            p[name] = theta[start : start + size].view(shapes[name])
            start += size
        assert start == theta.numel()
        if "b_Q" in p:
            p["b_Q"] = p["b_Q"] * self.bias_unit
        for name in ("b_K", "b_V"):
            if name in shapes:
                p[name] = torch.zeros(shapes[name], dtype=theta.dtype)
        return p

    # ------------------------------------------------------------------ attention

    def heads(self, p, a1, a2, a3):
        """Queries, keys and values of each query head."""
        if isinstance(self.model, Bilinear):
            yield a1 @ p["X"], a2, a3
            return
        h, g, e, v = self.widths
        for head in range(h):
            group = head // (h // g)
            q, k = slice(head * e, (head + 1) * e), slice(group * e, (group + 1) * e)
            u = slice(group * v, (group + 1) * v)
            queries, keys = a1 @ p["W_Q"][:, q], a2 @ p["W_K"][:, k]
            values = a3 @ p["W_V"][:, u]
            if self.model.bias:
                queries, keys = queries + p["b_Q"][q], keys + p["b_K"][k]
                values = values + p["b_V"][u]
            yield queries, keys, values

    def features(self, p):
        """Attention features of all rows, sequence after sequence, without the constant."""
        rows = []
        for a1, a2, a3, _, _, bias in self.sequences:
            per_head = list(self.heads(p, a1, a2, a3))
            for j in range(len(a1)):
                seen = (bias[j] > -torch.inf).nonzero()[:, 0]
                row = []
                for queries, keys, values in per_head:
                    logits = self.scale * keys[seen] @ queries[j] + bias[j, seen]
                    e = (logits - logits.max().detach()).exp()
                    row.append((e / e.sum()) @ values[seen])
                rows.append(torch.cat(row))
        return torch.stack(rows)

    def output(self, p):
        """The layer's output with all named parameters, gauge biases included."""
        if isinstance(self.model, Bilinear):
            return self.features(p) @ p["Y"]
        out = self.features(p) @ p["W_O"]
        return out + p["b_O"] if self.model.bias else out

    # ------------------------------------------------------------------ objective

    @functools.cached_property
    def rows(self):
        """Pooled A1 (with its 1 where there is a bias), centred A2, A3, B and weights."""
        a1 = torch.cat([s[0] for s in self.sequences])
        if isinstance(self.model, MultiHead) and self.model.bias:
            a1 = torch.cat([a1, torch.ones(len(a1), 1, dtype=a1.dtype)], 1)
        centred = isinstance(self.model, MultiHead)
        a2 = torch.cat([s[1] - s[1].mean(0) * centred for s in self.sequences])
        a3, b, w = (torch.cat([s[i] for s in self.sequences]) for i in (2, 3, 4))
        return a1, a2, a3, b, w

    def constant(self, features):
        if isinstance(self.model, Bilinear) or not self.model.bias:
            return features
        return torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], 1)

    def split_center(self):
        """Centre as theta and readout matrix."""
        center = self.center or {}
        if isinstance(self.model, Bilinear):
            shapes = self.shapes()
            x, y = (center.get(n, torch.zeros(shapes[n], dtype=torch.float64)) for n in "XY")
            return x.flatten(), y
        o = center["W_O"]
        if self.model.bias:
            h, g, _, v = self.widths
            b_v = [center["b_V"][(i // (h // g)) * v :][:v] for i in range(h)]
            o = torch.cat([o, (center["b_O"] + torch.cat(b_v) @ o)[None]])
        return self.flat(center), o

    def design(self, theta):
        """``D``, ``T`` and ``e`` of the module's first lines."""
        _, _, a3, b, w = self.rows
        f = self.constant(self.features(self.named(theta)))
        root = w.sqrt()[:, None]
        design, target = [root * f], [root * b]
        damped = torch.eye(f.shape[1], dtype=f.dtype)[: self.features_width]
        design.append(self.damping**0.5 * damped)
        target.append(b.new_zeros(len(damped), b.shape[1]))
        rho_x = self.case.options.get("ridge_x", 0.0)
        rho_y = self.case.options.get("ridge_y", 0.0)
        extra = [theta.new_zeros(1)]
        if rho_x or rho_y:
            center, readout = self.split_center()
            if isinstance(self.model, Bilinear):
                left = a3
            else:
                left = root * self.constant(self.features(self.named(center)))
            design.append(rho_y**0.5 * left)
            target.append(rho_y**0.5 * left @ readout)
            extra += self.theta_ridge(theta - center, center, readout, rho_x, rho_y)
        return torch.cat(design), torch.cat(target), torch.cat(extra)

    @property
    def features_width(self):
        if isinstance(self.model, Bilinear):
            return self.sizes[2]
        return self.widths[0] * self.widths[3]

    def theta_ridge(self, change, center, readout, rho_x, rho_y):
        """Rows whose squares are the ridge of theta: changes of all pairs' logits, of outputs."""
        a1, a2, a3, _, w = self.rows
        root = w.sqrt()[:, None]
        d, c = self.named(change), self.named(center)
        if isinstance(self.model, Bilinear):
            return [(rho_x**0.5 * root * (a1 @ d["X"] @ a2.T)).flatten()]
        if self.model.bias:
            d["W_Q"] = torch.cat([d["W_Q"], d["b_Q"][None]])
            c["W_Q"] = torch.cat([c["W_Q"], c["b_Q"][None]])
        h, g, e, v = self.widths
        extra = []
        for head in range(h):
            group = head // (h // g)
            q, k = slice(head * e, (head + 1) * e), slice(group * e, (group + 1) * e)
            by_query = (a1 @ d["W_Q"][:, q]) @ (a2 @ c["W_K"][:, k]).T
            by_key = (a1 @ c["W_Q"][:, q]) @ (a2 @ d["W_K"][:, k]).T
            by_value = a3 @ d["W_V"][:, group * v : (group + 1) * v] @ readout[head * v :][:v]
            extra += [rho_x**0.5 * self.scale * root * z for z in (by_query, by_key)]
            extra.append(rho_y**0.5 * by_value)
        return [rows.flatten() for rows in extra]

    def readout(self, theta):
        design, target, _ = self.design(theta)
        return torch.linalg.solve(design.T @ design, design.T @ target)

    def value(self, theta):
        """The reduced objective."""
        design, target, extra = self.design(theta)
        o = torch.linalg.solve(design.T @ design, design.T @ target)
        return (design @ o - target).square().sum() + extra.square().sum()

    def gradient(self, theta):
        theta = theta.detach().clone().requires_grad_()
        return torch.autograd.grad(self.value(theta), theta)[0]

    def hessian_product(self, theta, direction):
        theta = theta.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(self.value(theta), theta, create_graph=True)
        return torch.autograd.grad(g @ direction, theta)[0]

    def gauss_newton(self, theta):
        """Schur complement of twice ``J^T J`` of all residuals in ``(theta, O)``."""
        o = self.readout(theta)

        def residual(theta, o):
            design, target, extra = self.design(theta)
            return torch.cat([(design @ o - target).flatten(), extra])

        value, pull_back = torch.func.vjp(residual, theta, o)
        # J^T is the Jacobian of u -> J^T u, which is cheaper than J: fewer outputs.
        jt, jo = torch.func.jacrev(pull_back)(torch.zeros_like(value))
        jt, jo = jt.T, jo.flatten(0, 1).T
        mixed = jt.T @ jo
        return 2 * (jt.T @ jt - mixed @ torch.linalg.solve(jo.T @ jo, mixed.T))
