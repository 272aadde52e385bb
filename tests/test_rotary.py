"""Layers with rotation, norms and single biases against loops over heads, rows and pairs."""

import pytest
import torch

from attnreg import AttentionProblem, FitResult, MultiHead, fit, verify
from attnreg.curvature.dense import assemble_hessian
from attnreg.curvature.preconditioner import gauss_newton_estimate
from attnreg.models import Features, Rotary
from attnreg.objective import Objective, Point
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


def test_reduced_hessian(made):
    """Products with the exact reduced Hessian against autograd through the solve."""
    t, problem, parameters, theta, _, _ = made
    objective = Objective(problem, t.model)
    point = objective_point(objective, theta)
    w = torch.cat(t.weights).sqrt()[:, None]
    b = torch.cat([normal(n, 2, seed=n + 5) for n in LENGTHS])

    def value(theta):
        f = t.of_theta(theta, parameters)
        if objective.layout.readout_bias:
            f = torch.cat([f, f.new_ones(len(f), 1)], 1)
        f = w * f
        return (f @ torch.linalg.solve(f.T @ f, f.T @ (w * b)) - w * b).square().sum()

    variable, direction = theta.clone().requires_grad_(), normal(theta.numel(), seed=4)
    (g,) = torch.autograd.grad(value(variable), variable, create_graph=True)
    (product,) = torch.autograd.grad(g @ direction, variable)
    assert relative(point.gradient, g.detach()) < 1e-9  # the normal equations square a condition
    assert relative(point.hessian(direction), product) < 1e-9


def test_estimate_and_dense_assembly(made):
    t, problem, _, theta, _, _ = made
    objective = Objective(problem, t.model)
    point = objective_point(objective, theta)
    solver = gauss_newton_estimate(point, torch.Generator().manual_seed(0))
    step = solver.inverse(1e-3 * solver.mean_eigenvalue)(point.gradient)
    assert float(step @ point.gradient) > 0
    assert float(step @ point.gauss_newton(step)) > 0
    if not objective.layout.plain:
        with pytest.raises(ValueError, match="the dense curvature is for layers without"):
            assemble_hessian(point)


def objective_point(objective, theta):
    return Point(objective, objective.features(theta))


def turns(t, length):
    """Matrices of the rotation at all positions, column by column."""
    e = t.model.head_dim
    eye = torch.eye(e, dtype=torch.float64)
    return [torch.stack([t.turned(c, p) for c in eye], 1) for p in range(length)]


@pytest.mark.parametrize("name", ["half-split", "partial, query and key bias", "Qwen3"])
def test_metric_averages_over_positions(name):
    """The right factors of queries and keys against a loop over all pairs of positions."""
    t = LayerTwin(LAYERS[name])
    problem, parameters = t.problem(), t.parameters()
    theta, readout = t.model.split(problem, parameters)
    found = t.model.natural_metric(problem, theta, readout)
    m, e = t.model, t.model.head_dim
    groups = m.kv_heads or m.heads
    count, rows = torch.zeros(max(LENGTHS), dtype=torch.float64), sum(LENGTHS)
    for n in LENGTHS:
        count[:n] += 1
    share, turn = count / rows, turns(t, max(LENGTHS))
    mean = sum(s * r for s, r in zip(share, turn, strict=True))
    w = torch.cat(t.weights)
    q = torch.cat(t.inputs[0]) @ parameters["W_Q"] + parameters.get("b_Q", 0.0)
    k = torch.cat(t.inputs[1]) @ parameters["W_K"] + parameters.get("b_K", 0.0)
    key_means = [x.mean(0) for x in k.split(LENGTHS)]
    for head in range(m.heads):
        g = head // (m.heads // groups)
        part, own = slice(g * e, (g + 1) * e), slice(head * e, (head + 1) * e)
        fq = fk = torch.ones(e, dtype=torch.float64)
        if m.norm_eps is not None:
            size = (w @ q[:, own].square().mean(1)) / w.sum() + m.norm_eps
            fq = parameters["g_Q"] / size.sqrt()
            fk = parameters["g_K"] / (k[:, part].square().mean() + m.norm_eps).sqrt()
        moment = fk[:, None] * (k[:, part].T @ k[:, part]) * fk
        between = sum(
            n * torch.outer(fk * x[part], fk * x[part])
            for n, x in zip(LENGTHS, key_means, strict=True)
        )
        seen = sum(s * r @ moment @ r.T for s, r in zip(share, turn, strict=True))
        seen = seen - mean @ between @ mean.T
        met = sum(s * r.T @ seen @ r for s, r in zip(share, turn, strict=True))
        expected = w.sum() * fq[:, None] * met * fq
        assert relative(found[0][head], expected) < 1e-12
        assert float(torch.linalg.eigvalsh(expected)[0]) > -1e-12 * float(expected.norm())


def planted(model, sequences=12, n=16, d=8):
    """A problem whose targets a layer gives exactly, and weights a small step from that layer."""
    inputs = [normal(n, d, seed=i) for i in range(sequences)]
    blank = AttentionProblem(inputs, [normal(n, 3, seed=0)] * sequences, mask=("causal", 9))
    shapes = model._shapes(blank)
    weights = {k: normal(*s, seed=i + 50) * s[0] ** -0.5 for i, (k, s) in enumerate(shapes.items())}
    theta, readout = model.split(blank, weights)
    rows = Features(blank, model, theta, products=False).columns @ readout
    near = {
        name: value if name.startswith("g_") else value + 0.1 * normal(*value.shape, seed=i)
        for i, (name, value) in enumerate(weights.items())
    }
    return blank.replace(B=list(rows.split(n))), near


@pytest.mark.parametrize("norm_eps", [None, 1e-3])
def test_a_ridge_holds_the_weights_and_leaves_the_gains(norm_eps):
    """It is quadratic about its centre, so that central differences are exact; gains are free."""
    model = MultiHead(2, 1, 4, 3, ("query", "key", "value"), HALF, norm_eps)
    problem, start = planted(model)
    problem = problem.replace(ridge_x=1e-3, ridge_y=1e-2, center=start)
    objective = Objective(problem, model)
    theta, readout = model.split(problem, start)
    assert objective.ridge_value(theta, readout) == 0.0
    generator = torch.Generator().manual_seed(3)
    away, along = torch.randn(2, len(theta), dtype=theta.dtype, generator=generator)
    gradient = torch.zeros_like(theta)
    objective.add_ridge_gradient(away, gradient)
    ends = [objective.ridge_value(theta + away + side * along, readout) for side in (1.0, -1.0)]
    assert float(gradient @ along) == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-9)
    if norm_eps is not None:
        assert bool((gradient[-8:] == 0).all())  # the gains of queries and keys come last
    result = fit(problem, model, init=start, max_iterations=3)
    assert result.regularised_loss <= result.history[0].regularised


@pytest.mark.parametrize("norm_eps", [None, 1e-3])
def test_fit_finds_a_planted_layer(norm_eps, tmp_path):
    model = MultiHead(2, 1, 4, 3, ("query", "key", "value"), HALF, norm_eps)
    problem, near = planted(model)
    result = fit(problem, model, init=near, max_iterations=200)
    assert result.converged
    assert result.relative_error < 1e-4
    assert result.window == 9
    certificate = verify(problem, result)
    assert certificate.gradient_norm < 1e-6
    assert any("gains" in text for text in certificate.assumptions) == (norm_eps is not None)
    assert all(torch.equal(result.parameters[k], near[k]) for k in near if k.startswith("g_"))
    assert not any("gain" in note for note in result.notes)
    result.save(tmp_path / "fit.safetensors")
    again = FitResult.load(tmp_path / "fit.safetensors")
    assert again.model == model
    inputs = normal(20, 8, seed=99)  # longer than the window
    outside = AttentionProblem(inputs, normal(20, 3, seed=1), mask=("causal", 9))
    assert torch.equal(again.predict(inputs), again.predict(outside))


def test_parity_with_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaAttention

    config = transformers.LlamaConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6
    )
    config._attn_implementation = "sdpa"  # its eager softmax is float32 whatever the inputs
    torch.manual_seed(0)
    layer = LlamaAttention(config, 0).double()
    frequencies = tuple(10000.0 ** (-i / 3) for i in range(3))
    x, n = normal(2, 9, 24, seed=0), 9
    angle = torch.arange(n).double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    angle = torch.cat([angle, angle], 1)[None]
    hidden = torch.full((n, n), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        expected = layer(x, position_embeddings=(angle.cos(), angle.sin()), attention_mask=hidden)
    names = {"W_Q": "q_proj", "W_K": "k_proj", "W_V": "v_proj", "W_O": "o_proj"}
    weights = {k: getattr(layer, v).weight.detach().T for k, v in names.items()}
    problem = AttentionProblem(x, x, mask="causal")
    model = MultiHead(4, 2, 6, bias=False, rotary=Rotary(frequencies))
    theta, readout = model.split(problem, weights)
    rows = Features(problem, model, theta, products=False).columns @ readout
    assert relative(rows.view(2, n, 24), expected[0]) < 1e-10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotary": Rotary((1.0, 0.5, 0.2)), "head_dim": 4}, "3 frequencies, which turn 6"),
        ({"bias": ("keys",)}, "tuple of names out of"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 was given"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        MultiHead(2, **options)


def test_rotary_refuses_cross_attention_and_empty_frequencies():
    problem = AttentionProblem(normal(4, 4), normal(4, 2), normal(5, 4), normal(5, 4, seed=1))
    with pytest.raises(ValueError, match="sequence 0 has 4 queries and 5 keys, and rotary"):
        MultiHead(2, rotary=Rotary((1.0,))).layout(problem)
    with pytest.raises(ValueError, match="finite numbers are expected"):
        Rotary(())
