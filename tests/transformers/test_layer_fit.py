"""How one layer of a conversion is fitted: which solver, on which rows, and what is handed out."""

import pytest
import torch

import attnreg
from attnreg.solvers.choice import REDUNDANT, solver_for
from attnreg.transformers import regularised
from attnreg.transformers.layer_fit import fit_layer, relative_error, sample

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


def test_the_solver_follows_the_residuals_of_a_weight():
    assert solver_for(REDUNDANT * 100, 100) == "stochastic"
    assert solver_for(REDUNDANT * 100 - 1, 100) == "trust-region"


@pytest.mark.parametrize(("sequences", "solver"), [(4, "trust-region"), (64, "stochastic")])
def test_the_fit_uses_it_and_is_never_worse_held_out_than_its_start(monkeypatch, sequences, solver):
    used = []

    def recorded(*arguments, **options):
        used.append(options["solver"])
        return attnreg.fit(*arguments, **options)

    monkeypatch.setattr(regularised, "fit", recorded)
    problem, weights = layer(sequences + 8)
    fitted, held_out = (
        problem.subset(range(sequences)),
        problem.subset(range(sequences, sequences + 8)),
    )
    found = fit_layer(
        fitted,
        held_out,
        (TEACHER, weights),
        STUDENT,
        max_iterations=5,
        max_seconds=None,
        seed=0,
        saved=torch.float32,
    )
    assert set(used) == {solver}
    assert len(used) == len(found.path)
    assert found.held_out_error <= found.start_error
    assert found.held_out_error == relative_error(held_out, STUDENT, found.weights)
    assert found.held_out_error <= min(found.path.values())
    assert found.iterations <= 5
    # Rounding to float32 is none here: the error is that of the weights.
    assert found.error == pytest.approx(relative_error(fitted, STUDENT, found.weights), rel=1e-5)
    assert found.tried[found.start] == min(found.tried.values())


def test_a_sample_spreads_over_the_problem():
    problem, _ = layer(16)
    few = sample(problem, 40)
    assert few.n_sequences == 4
    for i, position in enumerate((0, 4, 8, 12)):
        assert torch.equal(few.batches[0].A1[i], problem.batches[0].A1[position])
    assert sample(problem, 10**6) is problem
