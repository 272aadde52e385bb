"""Command lines and data for the tests of the command line."""

import torch

from attnreg import AttentionProblem, Bilinear, predict

FIT = ("fit", "problem.safetensors", "--out", "fit.safetensors")
MULTI = (*FIT, "--heads", 2, "--kv-heads", 1)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def planted(rows=(2, 12), d=3, **settings):
    """A problem with an exact solution."""
    A = random(*rows, d)
    problem = AttentionProblem(A, torch.zeros_like(A), **settings)
    truth = {"X": 0.5 * random(d, d, seed=1), "Y": random(d, d, seed=2)}
    return problem.replace(B=predict(Bilinear(), truth, problem))


def layer_weights(d=4, heads=2, kv_heads=1, seed=3):
    width = d // heads
    shapes = {
        "W_Q": (d, d),
        "b_Q": (d,),
        "W_K": (d, kv_heads * width),
        "b_K": (kv_heads * width,),
        "W_V": (d, kv_heads * width),
        "b_V": (kv_heads * width,),
        "W_O": (d, d),
        "b_O": (d,),
    }
    return {
        name: 0.5 * random(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())
    }
