"""Small problems of every kind and the models that are tried on each of them."""

import functools

from attnreg.models import Bilinear, MultiHead
from tests.twins import Case, Twin, normal

MODELS = {
    "bilinear": Bilinear(),
    "heads 2": MultiHead(2, head_dim=2),
    "grouped, narrow values": MultiHead(4, 2, 3, 2),
    "shared, wide values, no bias": MultiHead(2, 1, 2, 3, bias=False),
}
RAGGED = (7, 12, 3, 11)
CROSS = ((7, 5), (9, 14), (6, 2), (9, 11))


def visible(n, m, seed):
    mask = normal(n, m, seed=seed) > 0
    mask[:, 0] = True
    return mask


def inputs(lengths, width, seed):
    return [normal(n, width, seed=seed + i) for i, n in enumerate(lengths)]


def zeroed(lengths, seed):
    """Positive weights, every third of them 0."""
    weights = [w[:, 0].abs() for w in inputs(lengths, 1, seed)]
    for w in weights:
        w[::3] = 0.0
    return weights


def ragged(**changes):
    return Case(inputs(RAGGED, 4, 10), inputs(RAGGED, 3, 20), **changes)


def cross(**changes):
    n, m = zip(*CROSS, strict=True)
    return Case(inputs(n, 4, 30), inputs(n, 2, 40), inputs(m, 3, 50), inputs(m, 5, 60), **changes)


RIDGES = {"ridge_x": 0.03, "ridge_y": 0.2}
CASES = {
    "batch": lambda: Case(inputs((9,) * 3, 4, 1), inputs((9,) * 3, 4, 5), stack=True),
    "boolean mask and weights": lambda: Case(
        inputs((9,) * 4, 4, 1),
        inputs((9,) * 4, 3, 5),
        masks=[visible(9, 9, i) for i in range(4)],
        weights=zeroed((9,) * 4, 8),
        stack=True,
    ),
    "ragged, weights": lambda: ragged(weights=zeroed(RAGGED, 9), options={"scale": 0.7}),
    "ragged, causal, ridges": lambda: ragged(
        causal=True, weights=zeroed(RAGGED, 9), options=RIDGES
    ),
    "ragged, causal and masks": lambda: ragged(
        causal=True, masks=[visible(n, n, n) for n in RAGGED]
    ),
    "ragged, window": lambda: ragged(causal=True, window=4, weights=zeroed(RAGGED, 9)),
    "ragged, window and masks": lambda: ragged(
        causal=True, window=3, masks=[normal(n, n, seed=n) for n in RAGGED], options=RIDGES
    ),
    "cross": lambda: cross(options={"scale": 0.4}),
    "cross, additive masks, ridges": lambda: cross(
        masks=[normal(n, m, seed=n * m) for n, m in CROSS],
        weights=zeroed([n for n, _ in CROSS], 9),
        options=RIDGES | {"scale": 0.6},
    ),
    "cross, boolean masks, one ridge": lambda: cross(
        masks=[visible(n, m, n * m) for n, m in CROSS], options={"ridge_y": 0.1}
    ),
}
DAMPED = ("ragged, weights", "cross, additive masks, ridges")


@functools.cache
def twin(case, model):
    """The twin of a model on a case, by name, with a centre where there is a ridge."""
    made = Twin(CASES[case](), MODELS[model], damping=0.3 if case in DAMPED else 0.0)
    if any(name.startswith("ridge") for name in made.case.options):
        made.center = made.random(100)
    return made


def planted(model, noise=0.0, seed=0, size=0.4, sequences=8, n=24, d=4, d_out=3):
    """A case whose targets are a layer's output plus noise, and that layer's parameters."""
    case = Case(
        inputs((n,) * sequences, d, 1000 * seed), inputs((n,) * sequences, d_out, 0), stack=True
    )
    made = Twin(case, model)
    parameters = made.random(1000 * seed + 500)
    for name in ("X", "W_Q"):
        if name in parameters:
            parameters[name] *= size
    out = made.output(parameters).detach()
    out = out + noise * out.std() * normal(*out.shape, seed=1000 * seed + 900)
    case.B = list(out.split(n))
    return case, parameters


def moved(parameters, size, seed):
    """Parameters a random step of relative size ``size`` away."""
    return {
        name: p + size * p.norm() / p.numel() ** 0.5 * normal(*p.shape, seed=seed + i)
        for i, (name, p) in enumerate(parameters.items())
    }
