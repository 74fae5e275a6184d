"""When a run has ended: the tolerances of scipy, beside scipy and on published problems."""

import math

import pytest
import torch
from helpers.classics import NIST, rosenbrock
from helpers.mgh import MGH
from torch import nn

from ngd_optim import NaturalCG, least_squares

PROBLEMS = {**MGH, **{name: p for name, p in NIST.items() if name != "MGH10"}}


def start_of(problem):
    return nn.Parameter(torch.tensor(problem.starts[-1], dtype=torch.float64))


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_loop_ends_at_the_published_minimum(name):
    problem = PROBLEMS[name]
    theta = start_of(problem)
    optimizer = NaturalCG([theta])
    steps = 0
    while not optimizer.converged:
        optimizer.step(lambda: least_squares(problem.residuals(theta)))
        steps += 1
        assert steps <= 150, optimizer.last_step
    assert problem.solved(problem.residuals(theta.detach()).square().sum().item(), 1e-10)


@pytest.mark.parametrize("name", ["Thurber", "Rat43", "ENSO"])
@pytest.mark.parametrize("tolerance", ["xtol", "ftol"])
def test_a_tolerance_ends_the_run_at_the_first_step_that_meets_it(name, tolerance):
    problem = NIST[name]
    theta = start_of(problem)
    settings = {"xtol": 0.0, "ftol": 0.0, tolerance: 1e-5}
    optimizer = NaturalCG([theta], **settings)
    for _ in range(60):
        before = theta.detach().clone()
        optimizer.step(lambda: least_squares(problem.residuals(theta)))
        report = optimizer.last_step
        fell = report.loss - report.new_loss
        meets = {
            "xtol": report.step_norm <= 1e-5 * (1e-5 + before.norm()),
            "ftol": max(fell, report.predicted_decrease) <= 1e-5 * report.loss,
        }[tolerance]
        assert report.converged == optimizer.converged
        if report.converged:
            assert meets
            assert f"converged: the {'step' if tolerance == 'xtol' else 'loss'}" in report.reason
            return
        # A good step that the damping makes short is not the last one.
        assert not meets or report.reduction_ratio > 0.5 or report.reduction_ratio <= 0.25
    raise AssertionError("no end")


def test_gtol_is_the_largest_derivative_weight_decay_included():
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    target = torch.tensor([1.5, 1.001], dtype=torch.float64)

    def converged(gtol, **settings):
        optimizer = NaturalCG([x], lr=0.1, xtol=0, ftol=0, gtol=gtol, **settings)
        before = x.detach().clone()
        optimizer.step(lambda: 0.5 * (x - target).square().sum())
        with torch.no_grad():
            x.copy_(before)
        return optimizer.converged

    assert converged(0.501)
    assert not converged(0.499)
    assert converged(0.751, weight_decay=0.75)
    assert not converged(0.749, weight_decay=0.75)


def test_before_the_first_step_and_without_a_rate_nothing_has_converged():
    x = nn.Parameter(torch.ones(2))
    optimizer = NaturalCG([x], lr=0.0)
    assert optimizer.last_step is None
    assert not optimizer.converged
    optimizer.step(lambda: rosenbrock(x))
    assert not optimizer.converged


ENDLESS = {
    "no rate": ({"lr": 0.0}, lambda w: (w - 3).square().sum(), "accepted"),
    "nan": ({}, lambda w: math.nan * w.sum(), "the loss is nan"),
    "a bound that each step goes to": (
        {"trust_region": "boundary", "max_kl": 0.01, "max_backtracks": 0},
        lambda w: (w - 3).square().sum(),
        "accepted",
    ),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_loop_that_would_not_end_is_ended_by_an_error(name):
    settings, loss, reason = ENDLESS[name]
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = NaturalCG([w], **settings)

    def run():
        while not optimizer.converged:
            optimizer.step(lambda: loss(w))

    with pytest.raises(RuntimeError, match=rf"would not end; the last step was .*{reason}"):
        run()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.converged


def test_other_data_at_each_step_are_no_reason_to_end():
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = NaturalCG([w], damping=10.0, adapt_damping=False)
    torch.manual_seed(0)
    for _ in range(150):
        target = torch.randn(3, dtype=torch.float64)
        optimizer.step(lambda target=target: (w - target).square().sum())
        assert not optimizer.converged


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_is_not_finite_has_not_converged(loss):
    x = nn.Parameter(torch.ones(2))
    optimizer = NaturalCG([x])
    optimizer.step(lambda: x.sum() * loss)
    assert not optimizer.converged


@pytest.mark.parametrize("unit", [1e-12, 1e-7, 1e9])
def test_the_unit_of_the_loss_does_not_end_a_run(unit, caplog):
    """A damping of 0.1 outweighs a small loss: that is told, and is no end of it."""
    x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = NaturalCG([x], min_damping=0.0)
    steps = 0
    while not optimizer.converged and steps < 400 and not caplog.records:
        optimizer.step(lambda: unit * rosenbrock(x))
        steps += 1
    if optimizer.converged:
        torch.testing.assert_close(
            x.detach(), torch.ones(2, dtype=torch.float64), rtol=1e-3, atol=0
        )
    else:
        assert "set damping to a tenth of its scale" in caplog.text


def test_a_run_that_ends_is_not_told_to_lower_its_damping(caplog):
    problem = NIST["Misra1a"]
    theta = start_of(problem)
    optimizer = NaturalCG([theta], ftol=0.0, xtol=0.0)
    while not optimizer.converged:
        optimizer.step(lambda: least_squares(problem.residuals(theta)))
    assert not caplog.records


def test_a_fit_of_exact_data_ends_in_float32():
    """Its residuals vanish but for rounding, which is no small part of such a loss."""
    t = torch.linspace(0, 3, 40)
    y = 2 * torch.exp(-1.3 * t) + 0.3
    b = nn.Parameter(torch.ones(3))
    optimizer = NaturalCG([b])
    steps = 0
    while not optimizer.converged:
        optimizer.step(lambda: least_squares(b[0] * torch.exp(-b[1] * t) + b[2] - y))
        steps += 1
        assert steps <= 100, optimizer.last_step
    torch.testing.assert_close(b.detach(), torch.tensor([2.0, 1.3, 0.3]), rtol=1e-4, atol=0)


def test_a_smaller_rate_does_not_end_a_run_sooner():
    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = NaturalCG([x], lr=1e-9)
    optimizer.step(lambda: 0.5 * x.square().sum())
    assert not optimizer.converged


def test_a_loaded_state_has_not_converged_yet():
    problem = NIST["Rat43"]
    theta = start_of(problem)
    optimizer = NaturalCG([theta])
    start, saved = theta.detach().clone(), optimizer.state_dict()

    def fit():
        while not optimizer.converged:
            optimizer.step(lambda: least_squares(problem.residuals(theta)))
        return problem.residuals(theta.detach()).square().sum().item()

    first = fit()
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        theta.copy_(start)
    assert not optimizer.converged
    assert fit() == first
