"""Small problems of every kind that the tests of problems and files share."""

import torch

from attnreg.problem import AttentionProblem


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def single(**options):
    return AttentionProblem(normal(5, 3), normal(5, 2), **options)


def batch(**options):
    return AttentionProblem(normal(4, 5, 3), normal(4, 5, 2), **options)


def ragged(**options):
    return AttentionProblem(
        [normal(n, 3) for n in (5, 2, 5, 7)], [normal(n, 2) for n in (5, 2, 5, 7)], **options
    )


def cross(**options):
    sizes = ((5, 4), (2, 6), (5, 4))
    return AttentionProblem(
        [normal(n, 3) for n, _ in sizes],
        [normal(n, 2, seed=1) for n, _ in sizes],
        [normal(m, 4, seed=2) for _, m in sizes],
        [normal(m, 1, seed=3) for _, m in sizes],
        **options,
    )


def visible(n, m, seed=0):
    mask = normal(n, m, seed=seed) > 0
    mask[:, 0] = True
    return mask


def positive(n, seed=0):
    return normal(n, seed=seed).abs()


SETTINGS = {
    "scale": 0.3,
    "ridge_x": 1e-3,
    "ridge_y": 1e-300,
    "center": {"X": normal(3, 3), "Y": normal(3, 2)},
}
PROBLEMS = {
    "single": lambda: single(),
    "settings": lambda: single(**SETTINGS),
    "causal": lambda: single(mask="causal"),
    "float32": lambda: single().to(torch.float32),
    "one row": lambda: AttentionProblem(normal(1, 1), normal(1, 1)),
    "batch": lambda: batch(weights=normal(4, 5).abs(), **SETTINGS),
    "batch, one mask": lambda: batch(mask=visible(5, 5)),
    "batch, masks": lambda: batch(mask=torch.stack([visible(5, 5, seed=i) for i in range(4)])),
    "batch of one": lambda: AttentionProblem(normal(1, 5, 3), normal(1, 5, 2)),
    "list": lambda: ragged(**SETTINGS),
    "list of one": lambda: AttentionProblem([normal(5, 3)], [normal(5, 2)], mask="causal"),
    "list, weights": lambda: ragged(weights=[positive(n) for n in (5, 2, 5, 7)]),
    "window": lambda: single(mask=("causal", 2)),
    "list, window": lambda: ragged(mask=("causal", 3)),
    "batch, window and mask": lambda: batch(mask=("causal", 2, torch.ones(5, 5).bool().tril())),
    "list, causal and masks": lambda: ragged(
        mask=("causal", [visible(n, n) for n in (5, 2, 5, 7)])
    ),
    "equal list, one mask": lambda: AttentionProblem(
        [normal(5, 3)] * 3, [normal(5, 2)] * 3, mask=visible(5, 5)
    ),
    "cross": lambda: cross(**SETTINGS),
    "cross, additive masks": lambda: cross(
        mask=[normal(n, m) for n, m in ((5, 4), (2, 6), (5, 4))]
    ),
    "values are keys": lambda: AttentionProblem(
        normal(5, 3), normal(5, 2), normal(4, 6), normal(4, 6)
    ),
    "values are queries": lambda: AttentionProblem(normal(5, 3), normal(5, 2), normal(5, 6)),
}


def assert_same(found, expected):
    """Equal in everything but the device, batches included."""
    for name in (
        "scale",
        "ridge_x",
        "ridge_y",
        "structure",
        "lengths",
        "dtype",
        "causal",
        "window",
    ):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.self_attention == expected.self_attention
    assert found.center.keys() == expected.center.keys()
    assert all(torch.equal(found.center[name], expected.center[name]) for name in found.center)
    assert len(found.batches) == len(expected.batches)
    for one, other in zip(found.batches, expected.batches, strict=True):
        assert (one.index, one.lengths, one.causal) == (other.index, other.lengths, other.causal)
        assert (one.A3 is one.A2) == (other.A3 is other.A2)
        assert (one.bias is None) == (other.bias is None)
        for name in ("A1", "A2", "A3", "B", "weights", "bias"):
            if getattr(one, name) is not None:
                assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert found.digest() == expected.digest()
