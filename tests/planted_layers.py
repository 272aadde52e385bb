"""A small layer whose sequences have different lengths, for the tests of mini-batches."""

import torch

import attnreg

MODEL = attnreg.MultiHead(heads=2, kv_heads=1, head_dim=3, bias=True)


def planted(seed=0, *, noise=0.05, ridge=0.0, lengths=(9, 12, 12, 10, 7, 11) * 4):
    """Sequences of a random layer's inputs and outputs, some rows weighted."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [normal(n, 6) for n in lengths]
    blank = attnreg.AttentionProblem(inputs, [normal(n, 4) for n in lengths], mask="causal")
    truth = MODEL.start(blank, seed)
    truth = {name: normal(*value.shape) * 0.6 for name, value in truth.items()}
    outputs = [b + noise * normal(*b.shape) for b in attnreg.predict(MODEL, truth, blank)]
    weights = [0.5 + torch.rand(n, generator=generator, dtype=torch.float64) for n in lengths]
    start = {name: value + 0.3 * normal(*value.shape) for name, value in truth.items()}
    options = {"ridge_x": ridge, "ridge_y": ridge, "center": start if ridge else None}
    problem = attnreg.AttentionProblem(inputs, outputs, mask="causal", weights=weights, **options)
    return problem, start
