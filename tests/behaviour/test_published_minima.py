"""From published starts to published minima with default settings, where MINPACK's Levenberg-Marquardt gets there."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.classics import MGH, NIST, Classic
from scipy.optimize import leastsq
from torch import Tensor, nn
from torch.func import jacrev

from ngd_optim import NaturalCG, least_squares

FAR_VALLEY = pytest.mark.xfail(
    strict=True,
    reason="by default (Marquardt's scale) it creeps along a valley at b1 near 1e-50, where MINPACK's first steps "
    "do not lead; damping_scale='identity' gets to the minimum: see the test below",
)
CASES = [
    pytest.param(
        problem,
        start,
        id=f"{name}-{number}",
        marks=[FAR_VALLEY] if (name, number) == ("MGH10", 1) else [],
    )
    for family in (NIST, MGH)
    for name, problem in family.items()
    for number, start in enumerate(problem.starts, start=1)
]
STEPS = 1000
NOTHING_LEFT = 1e-20


def fit(problem: Classic, start: list[float], **settings: Any) -> Tensor:
    theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = NaturalCG([theta], **settings)
    for _ in range(STEPS):
        loss = optimizer.step(lambda: least_squares(problem.residuals(theta)))
        assert optimizer.last_step.solver == "dense"
        if not optimizer.last_step.accepted or 2 * loss <= min(
            problem.sum_of_squares, NOTHING_LEFT
        ):
            break
    return theta.detach()


def sum_of_squares(problem: Classic, theta: Tensor) -> float:
    return problem.residuals(theta).square().sum().item()


def solved(problem: Classic, found: float) -> bool:
    """To the published digits, of which the oldest source gives six."""
    return found <= problem.sum_of_squares * (1 + 3e-6) + NOTHING_LEFT


@pytest.mark.parametrize(("problem", "start"), CASES)
def test_reaches_the_published_minimum_where_minpack_does(problem, start):
    theta, _ = leastsq(
        lambda b: problem.residuals(torch.tensor(b)).numpy(),
        np.array(start),
        Dfun=lambda b: jacrev(problem.residuals)(torch.tensor(b)).numpy(),
        maxfev=10_000,
    )
    by_minpack = sum_of_squares(problem, torch.tensor(theta))
    assert solved(problem, sum_of_squares(problem, fit(problem, start))) or not solved(
        problem, by_minpack
    )


def test_the_far_valley_is_left_without_marquardts_scale():
    problem = NIST["MGH10"]
    assert solved(
        problem, sum_of_squares(problem, fit(problem, problem.starts[0], damping_scale="identity"))
    )


@pytest.mark.parametrize("name", NIST)
def test_certified_parameters_and_standard_errors(name):
    problem = NIST[name]
    theta = fit(problem, problem.starts[1])
    certified, errors = (
        torch.tensor(v, dtype=torch.float64) for v in (problem.solution, problem.standard_errors)
    )
    assert ((theta - certified).abs() <= 1e-4 * errors + 1e-9 * certified.abs()).all()
    if problem.sum_of_squares > NOTHING_LEFT:
        J = jacrev(problem.residuals)(theta)
        variance = sum_of_squares(problem, theta) / (len(J) - len(theta))
        torch.testing.assert_close(
            (variance * torch.linalg.inv(J.T @ J).diagonal()).sqrt(), errors, rtol=1e-3, atol=0
        )
