"""Certificates on random problems against the minimiser to more than 50 digits; doctored ones.

The problems and the exact answer are those of benchmarks/certificates.py, which runs 2,000.
"""

import pytest

from attnreg import Kind, verify
from benchmarks.certificate_mutations import refusals
from benchmarks.certificate_problems import FAMILIES, condition, converged, exact_answer, make
from benchmarks.certificates import problem_case, summary

PROBLEMS = 100


@pytest.mark.parametrize("family", FAMILIES)
def test_converged_points(family):
    """Gap and radius are true, and certificates are issued where the condition is moderate."""
    issued, possible = 0, 0
    for index in range(PROBLEMS):
        instance = make(index)
        if instance.family != family:
            continue
        result = converged(instance)
        certificate = verify(instance.problem, result)
        if certificate.certified:
            answer = exact_answer(instance, dict(result.parameters), certificate)
            assert answer.resolved, index
            assert answer.gap <= certificate.gap, index
            assert answer.distance <= certificate.radius, index
        if result.gradient_norm <= 1e-12:
            number = condition(instance.problem, result.parameters)
            if number is not None and number <= 1e6:
                possible += 1
                issued += certificate.certified
    assert possible >= 4  # 4 or 5 of the ill-conditioned ones, as rounding has it
    assert issued >= possible - 1


@pytest.mark.slow
def test_other_points():
    """Stopped early, perturbed, stationary with large residuals, and of another problem."""
    found = summary([problem_case(index) for index in range(PROBLEMS)])
    assert found["violations"] == 0
    assert found["unresolved"] == 0
    assert found["issued"] > PROBLEMS
    assert Kind.NOT_CERTIFIED.name in found["other_points"]["stopped early"]
    assert Kind.STATIONARY.name in found["other_points"]["stationary"]


def test_doctored_certificates(tmp_path):
    found = refusals(200, tmp_path)
    assert found["tried"] >= 200
    assert found["accepted"] == []
