"""The planted, noisy attention regression problem.

    A = G diag(sigma) per sequence, G standard normal, sigma from 1 down to 10^-decades
    B = softmax(A X* A^T) A Y* + noise

X* and Y* are standard normal in the ordinary coordinates, X* scaled so that the logits have the
wanted standard deviation within their rows (the softmax sees nothing else), and the noise so that
its expected square is `noise`^2 times the prediction's: that is the noise floor. A is scaled to
||A||_F^2 = rows * d whatever the decades.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.base import PlantedArrays, loss_of

SEQUENCES, ROWS, WIDTH = 8, 128, 32
NOISE = 0.1
START_SCALE = 0.01


@dataclass(frozen=True)
class Planted:
    """One instance: data, the start of every method, the planted matrices, losses."""

    arrays: PlantedArrays
    start: dict[str, Tensor]
    X: Tensor
    Y: Tensor
    initial_loss: float
    noise_floor: float  # noise^2 ||prediction||_F^2, the expected loss at the planted matrices
    planted_loss: float  # the loss at the planted matrices


def planted(
    decades: float,
    seed: int,
    logit_std: float = 4.0,
    sequences: int = SEQUENCES,
    rows: int = ROWS,
    width: int = WIDTH,
    noise: float = NOISE,
) -> Planted:
    """Makes an instance in float64.

    Args:
        decades: log10 of the ratio of the inputs' largest and smallest column scale.
        seed: Of everything random.
        logit_std: Standard deviation of the logits within a row.
        sequences: Number of sequences.
        rows: Rows of each.
        width: d, of inputs and outputs.
        noise: Its norm over the prediction's, in expectation.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sigma = torch.logspace(0, -decades, width, dtype=torch.float64)
    sigma *= (width / sigma.square().sum()).sqrt()
    A = normal(sequences, rows, width) * sigma
    X, Y = normal(width, width), normal(width, width)
    logits = (A @ X) @ A.mT
    X *= logit_std / float((logits - logits.mean(-1, keepdim=True)).square().mean().sqrt())
    prediction = torch.softmax((A @ X) @ A.mT, -1) @ A @ Y
    power = float(prediction.square().sum())
    added = normal(*prediction.shape) * (noise * (power / prediction.numel()) ** 0.5)
    arrays = PlantedArrays(A, prediction + added)
    X0, Y0 = normal(width, width) * START_SCALE, torch.zeros(width, width, dtype=torch.float64)
    return Planted(
        arrays=arrays,
        start={"X": X0, "Y": Y0},
        X=X,
        Y=Y,
        initial_loss=float(loss_of(arrays, X0, Y0)),
        noise_floor=noise**2 * power,
        planted_loss=float(loss_of(arrays, X, Y)),
    )
