"""`fit(certify=True)`: the fit ends where a certificate bounds the gap, and says so otherwise."""

import pytest
import torch

from attnreg import AttentionProblem, FitResult, MultiHead, fit, verify
from attnreg.fitting import SOLVERS
from attnreg.records import Status
from tests.twins import normal

TOL = 1e-8


def noisy(**options):
    inputs = normal(3, 20, 3, seed=1)
    x, y = normal(3, 3, seed=2), normal(3, 2, seed=3)
    outputs = torch.softmax(inputs @ x @ inputs.mT, -1) @ inputs @ y
    return AttentionProblem(inputs, outputs + 0.1 * normal(3, 20, 2, seed=4), **options)


RIDGED = {"ridge_x": 1e-4, "ridge_y": 1e-2}


def test_mini_batches_are_refused():
    problem = AttentionProblem(torch.ones(3, 2), torch.ones(3, 2), ridge_x=1, ridge_y=1)
    with pytest.raises(ValueError, match="solver='stochastic' does not come as near"):
        fit(problem, solver="stochastic", certify=True)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "stochastic"])
def test_the_gap_is_certified_and_holds(solver, tmp_path):
    problem = noisy(**RIDGED)
    result = fit(problem, solver=solver, certify=True, tol=TOL)
    assert result.status is Status.CERTIFIED
    assert result.converged
    found = result.certificate
    assert found == verify(problem, result)
    assert found.certified
    assert found.gap <= TOL * problem.target_norm_squared
    best = fit(problem, init=result, tol=1e-15)
    assert result.regularised_loss - best.regularised_loss + 1e-14 * best.regularised_loss >= 0
    assert result.regularised_loss - best.regularised_loss <= found.gap + 1e-14 * found.value
    result.save(tmp_path / "fit.safetensors")
    loaded = FitResult.load(tmp_path / "fit.safetensors")
    assert (loaded.certificate, loaded.status) == (found, Status.CERTIFIED)


def test_a_certificate_that_is_too_weak_makes_the_gradient_smaller():
    problem = noisy(**RIDGED)
    loose = fit(problem, certify=True, tol=1e-3)
    tight = fit(problem, certify=True, tol=1e-21)
    assert tight.status is Status.CERTIFIED
    assert tight.certificate.gap <= 1e-21 * problem.target_norm_squared
    assert tight.gradient_norm < loose.gradient_norm


def test_what_cannot_be_certified_says_so():
    impossible = fit(noisy(), certify=True, tol=1e-300)
    assert impossible.status is Status.STALLED
    assert not impossible.converged
    assert any("the gap is not certified" in note for note in impossible.notes)


def test_a_fit_that_is_cut_short_has_no_certificate():
    result = fit(noisy(**RIDGED), certify=True, callback=lambda record: record.iteration == 2)
    assert result.status is Status.STOPPED
    assert result.certificate is None
    assert "the gap is not certified: the fit was cut short" in result.notes


def test_several_heads_have_no_gap():
    with pytest.raises(ValueError, match="certify=True needs a bound on the gap"):
        fit(noisy(), MultiHead(1, head_dim=2), certify=True)
