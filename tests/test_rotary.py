"""Layers with rotation, norms and single biases against loops over heads, rows and pairs."""

import pytest
import torch

from attnreg import AttentionProblem, MultiHead
from attnreg.models import Features, Rotary
from tests.twins import forward_product, normal, padded, relative, unpadded

SIZES = (5, 7, 3)  # widths of A1, A2 and A3
LENGTHS = (6, 11, 4, 9)
HALF = Rotary((1.3, 0.4))
PARTIAL = Rotary((0.7,), interleaved=True, factor=1.2)
LAYERS = {
    "half-split": MultiHead(2, head_dim=4, bias=False, rotary=HALF),
    "interleaved, all biases": MultiHead(2, 1, 4, 3, rotary=Rotary((1.3, 0.4), interleaved=True)),
    "partial, query and key bias": MultiHead(4, 2, 5, 2, ("query", "key"), PARTIAL),
    "Qwen2": MultiHead(4, 2, 4, bias=("query", "key", "value"), rotary=HALF),
    "Qwen3": MultiHead(4, 2, 4, bias=False, rotary=HALF, norm_eps=1e-2),
    "norms and biases": MultiHead(2, 1, 3, 2, norm_eps=0.3),
    "value bias": MultiHead(2, 1, 3, 2, ("value",)),
    "key and output bias": MultiHead(2, 1, 3, 2, ("output", "key")),
}


class LayerTwin:
    """A layer by loops, with all its named weights; sequences of different lengths, causal."""

    def __init__(self, model):
        self.model = model
        self.inputs = [
            [normal(n, size, seed=10 * i + n) + 0.3 for n in LENGTHS]
            for i, size in enumerate(SIZES)
        ]
        self.weights = [normal(n, seed=n).abs() for n in LENGTHS]
        self.scale = 0.6

    def problem(self, targets=None, **options):
        a1, a2, a3 = self.inputs
        targets = targets or [normal(n, 2, seed=n + 5) for n in LENGTHS]
        return AttentionProblem(
            a1, targets, a2, a3, mask="causal", weights=self.weights, scale=self.scale, **options
        )

    def parameters(self, seed=1):
        shapes = self.model._shapes(self.problem())
        return {k: normal(*s, seed=seed + i) * 0.7 for i, (k, s) in enumerate(shapes.items())}

    def turned(self, x, position):
        """A head at a position, pair by pair with complex numbers."""
        rotary = self.model.rotary
        if rotary is None:
            return x
        parts = list(x)
        for i, frequency in enumerate(rotary.frequencies):
            a, b = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + len(rotary.frequencies))
            angle = torch.tensor(position * frequency, dtype=torch.float64)
            turn = rotary.factor * torch.polar(torch.ones((), dtype=torch.float64), angle)
            pair = torch.complex(x[a], x[b]) * turn
            parts[a], parts[b] = pair.real, pair.imag
        return torch.stack(parts)

    def normed(self, x, gain):
        if self.model.norm_eps is None:
            return x
        return x / (x.square().mean() + self.model.norm_eps).sqrt() * gain

    def features(self, p, *, turns=True):
        m = self.model
        groups, e = m.kv_heads or m.heads, m.head_dim
        v = m.v_head_dim or e
        rows = []
        for a1, a2, a3 in zip(*self.inputs, strict=True):
            q, k, u = (
                a @ p[f"W_{letter}"] + p.get(f"b_{letter}", 0.0)
                for a, letter in ((a1, "Q"), (a2, "K"), (a3, "V"))
            )
            for i in range(len(a1)):
                row = []
                for head in range(m.heads):
                    g = head // (m.heads // groups)
                    query = self.normed(q[i, head * e : (head + 1) * e], p.get("g_Q"))
                    query = self.turned(query, i)
                    logits = []
                    for j in range(i + 1):
                        key = self.normed(k[j, g * e : (g + 1) * e], p.get("g_K"))
                        logits.append(self.scale * query @ self.turned(key, j))
                    s = torch.softmax(torch.stack(logits), 0)
                    row.append(s @ u[: i + 1, g * v : (g + 1) * v])
                rows.append(torch.cat(row))
        return torch.stack(rows)

    def output(self, p):
        return self.features(p) @ p["W_O"] + p.get("b_O", 0.0)

    def of_theta(self, theta, parameters):
        """Features at theta, gauge biases at 0 as in the package and gains held."""
        problem = self.problem()
        blocks = theta.split([b.size for b in self.model.layout(problem).blocks])
        p = dict(parameters)
        flat = {"Q": 0, "K": 1, "V": 2}
        for letter, i in flat.items():
            block = self.model.layout(problem).blocks[i]
            matrix = blocks[i].view(block.rows, -1)
            width = SIZES[i]
            p[f"W_{letter}"] = matrix[:width]
            p.pop(f"b_{letter}", None)
            if block.rows > width:
                p[f"b_{letter}"] = matrix[width] * self.unit(i)
        return self.features(p)

    def unit(self, i):
        rows = torch.cat(self.inputs[i])
        w = torch.cat(self.weights) if i == 0 else torch.ones(len(rows), dtype=torch.float64)
        return float((w @ rows.square().mean(1) / w.sum()).sqrt())


@pytest.fixture(params=LAYERS, scope="module")
def made(request):
    t = LayerTwin(LAYERS[request.param])
    problem, parameters = t.problem(), t.parameters()
    theta, readout = t.model.split(problem, parameters)
    return t, problem, parameters, theta, readout, Features(problem, t.model, theta)


def test_features_and_output(made):
    t, problem, parameters, theta, readout, found = made
    width = found.layout.features
    expected = t.of_theta(theta, parameters)
    assert relative(unpadded(problem, found.columns[:, :width]), expected) < 1e-12
    assert relative(unpadded(problem, found.columns @ readout), t.output(parameters)) < 1e-12
    again = t.model.join(problem, theta, readout, parameters)
    assert list(again) == list(parameters)
    for name, value in parameters.items():
        assert torch.allclose(again[name], value, rtol=0, atol=1e-13), name


def test_derivatives(made):
    t, problem, parameters, theta, _, found = made
    fitted = sum(b.size for b in found.layout.blocks[:3])
    direction = normal(theta.numel(), seed=1)
    total, width = sum(LENGTHS), found.layout.features
    u, du = normal(total, width, seed=2), normal(total, width, seed=3)

    def function(theta):
        return t.of_theta(theta, parameters)

    _, change = forward_product(function, theta, direction)
    assert relative(unpadded(problem, found.jvp(direction)), change) < 1e-10
    cotangent, moved = (padded(problem, x.split(LENGTHS)) for x in (u, du))
    variable = theta.clone().requires_grad_()
    g, g2 = (
        torch.autograd.grad(
            (function(variable) * x).sum(), variable, create_graph=True, materialize_grads=True
        )[0]
        for x in (u, du)
    )
    (second,) = torch.autograd.grad(g @ direction, variable, materialize_grads=True)
    gradient = found.vjp(cotangent)
    product = found.vjp_derivative(direction, cotangent, moved)
    assert relative(gradient, g.detach()) < 1e-10
    assert relative(product, second + g2.detach()) < 1e-10
    assert not bool(gradient[fitted:].any())
    assert not bool(product[fitted:].any())
