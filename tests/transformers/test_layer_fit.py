"""How one layer of a conversion is fitted: on which rows, and what is handed out."""

from types import SimpleNamespace

import pytest
import torch

import attnreg
from attnreg.judging import ENOUGH
from attnreg.reduction.starts import best_start
from attnreg.result import relative_error
from attnreg.transformers import layer_fit
from attnreg.transformers.layer_fit import fit_layer

TEACHER = attnreg.MultiHead(heads=4, kv_heads=4, head_dim=2, bias=False)
STUDENT = attnreg.MultiHead(heads=4, kv_heads=2, head_dim=2, bias=False)


def layer(sequences, rows=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn((sequences, rows, 8), generator=generator)
    blank = attnreg.AttentionProblem(inputs, torch.zeros_like(inputs), mask="causal")
    weights = {
        name: torch.randn(value.shape, generator=generator) * 0.5
        for name, value in TEACHER.start(blank, 0).items()
    }
    outputs = attnreg.predict(TEACHER, weights, blank)
    return attnreg.AttentionProblem(inputs, outputs, mask="causal"), weights


def fitted_layer(sequences, held_out, max_iterations, saved, progress):
    """The fit of a random layer, its sequences that are fitted and held out, and its weights."""
    problem, weights = layer(sequences + held_out)
    parts = tuple(
        problem.subset(range(*part)) for part in ((0, sequences), (sequences, sequences + held_out))
    )
    found = fit_layer(
        *parts,
        (TEACHER, weights),
        STUDENT,
        max_iterations=max_iterations,
        max_seconds=None,
        seed=0,
        saved=saved,
        progress=progress,
    )
    return found, *parts, weights


@pytest.mark.parametrize(("sequences", "few"), [(4, True), (192, False)])
def test_the_fit_is_never_worse_held_out_than_its_start(sequences, few):
    seen = []
    found, fitted, held_out, weights = fitted_layer(
        sequences, 8, 30, torch.bfloat16, lambda iteration, error: seen.append(iteration)
    )
    assert few == (fitted.n_rows * 8 < ENOUGH * sum(w.numel() for w in found.weights.values()))
    assert len(found.path) == 1
    assert few or (found.ridge, found.center) == (0.0, "")
    init = best_start(fitted, TEACHER, weights, STUDENT)
    init = init.unsolved if few else init.weights  # what little data are pulled towards
    rounded = {name: value.bfloat16().float() for name, value in init.items()}
    start_error = relative_error(held_out, STUDENT, rounded)
    assert found.start_error == pytest.approx(start_error, rel=1e-5)
    assert found.held_out_error <= found.start_error
    assert found.held_out_error <= min(found.path.values())
    assert found.iterations == max(seen) <= 30
    # Sums in float64 against predictions in float32, of the weights that are kept.
    for error, part in ((found.held_out_error, held_out), (found.error, fitted)):
        assert error == pytest.approx(relative_error(part, STUDENT, found.weights), rel=1e-5)
    for value in found.weights.values():
        assert torch.equal(value, value.bfloat16().float())
    assert found.tried[found.start] == min(found.tried.values())


def test_an_interrupted_fit_is_not_a_finished_one():
    def interrupt(iteration, error):
        if iteration:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted_layer(6, 6, 5, torch.float32, interrupt)


@pytest.mark.parametrize(
    ("spent", "left"),
    [(2.0, 4.0), (5.0, 2.0)],  # of 6 s; a third is left at least
)
def test_fits_of_pairs_have_a_part_of_the_time(monkeypatch, spent, left):
    problem, weights = layer(12)
    asked, clock = {}, iter((0.0, spent))
    best = layer_fit.best_start

    def best_start(*given, pairs, max_seconds):
        asked.update(rows=pairs.n_rows, max_seconds=max_seconds)
        return best(*given)

    def held_out_fit(*given, bounds, **options):
        asked.update(left=bounds.seconds)
        raise InterruptedError

    monkeypatch.setattr(layer_fit, "best_start", best_start)
    monkeypatch.setattr(layer_fit, "held_out_fit", held_out_fit)
    monkeypatch.setattr(layer_fit, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with pytest.raises(InterruptedError):
        fit_layer(
            problem.subset(range(8)),
            problem.subset(range(8, 12)),
            (TEACHER, weights),
            STUDENT,
            max_iterations=3,
            max_seconds=6.0,
            seed=0,
            saved=torch.float32,
            fit_pairs=True,
        )
    assert asked == {"rows": 80, "max_seconds": pytest.approx(2.0), "left": pytest.approx(left)}
