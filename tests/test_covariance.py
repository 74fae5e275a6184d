"""Standard errors of a fit, beside curve_fit's, NIST's, and dense formulas."""

import numpy as np
import pytest
import torch
from helpers.classics import NIST
from scipy.optimize import curve_fit
from torch import nn
from torch.func import hessian, jacrev

from ngd_optim import NaturalCG, estimate_covariance, least_squares

T = torch.linspace(0, 4, 30, dtype=torch.float64)
SIGMA = 0.02 + 0.03 * T


def decay(b, t=T):
    return b[0] * torch.exp(-b[1] * t) + b[2]


def data(noise=1.0):
    generator = torch.Generator().manual_seed(1)
    truth = torch.tensor([2.0, 1.3, 0.5], dtype=torch.float64)
    return decay(truth) + noise * SIGMA * torch.randn(30, generator=generator, dtype=torch.float64)


def fit(residuals, start=(1.0, 1.0, 0.0), **options):
    """Parameters at the minimum, and the closure."""
    b = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = NaturalCG([b], xtol=1e-13, ftol=1e-13)

    def closure():
        found = residuals(b)
        return least_squares(*(found if isinstance(found, tuple) else (found,)), **options)

    for _ in range(100):
        optimizer.step(closure)
        if optimizer.converged:
            return b, closure
    raise AssertionError("no end")


@pytest.mark.parametrize("name", [n for n in NIST if n not in ("Lanczos1", "MGH10")])
def test_certified_standard_errors(name):
    problem = NIST[name]
    b, closure = fit(problem.residuals, problem.starts[1])
    found = estimate_covariance(closure, [b])
    expected = torch.tensor(problem.standard_errors, dtype=torch.float64)
    torch.testing.assert_close(found.standard_errors, expected, rtol=1e-6, atol=0)
    total = problem.minima[0]
    assert found.variance.item() == pytest.approx(total / found.degrees_of_freedom, rel=1e-6)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("weighted", ["divided", "weights"])
def test_it_is_that_of_curve_fit(absolute, weighted):
    y = data()
    peer, covariance = curve_fit(
        lambda t, *b: decay(torch.tensor(b), torch.tensor(t)).numpy(),
        T.numpy(),
        y.numpy(),
        p0=[1.0, 1.0, 0.0],
        sigma=SIGMA.numpy(),
        absolute_sigma=absolute,
        jac=lambda t, *b: jacrev(decay)(torch.tensor(b)).numpy(),
        ftol=1e-14,
        xtol=1e-14,
    )
    if weighted == "divided":
        b, closure = fit(lambda b: (decay(b) - y) / SIGMA)
    else:
        b, closure = fit(lambda b: decay(b) - y, weights=SIGMA**-2)
    found = estimate_covariance(closure, [b], absolute_sigma=absolute)
    torch.testing.assert_close(b.detach(), torch.tensor(peer), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.matrix, torch.tensor(covariance), rtol=1e-5, atol=0)
    correlation = np.corrcoef(
        np.random.default_rng(0).multivariate_normal(peer, covariance, 200_000).T
    )
    torch.testing.assert_close(found.correlation, torch.tensor(correlation), rtol=0, atol=0.01)


def test_several_tensors_count_as_they_do_in_the_loss():
    """A weight of 2 and half as many residuals: four times as much each."""
    y = data()
    parts = torch.arange(30) < 10
    weights = (2.0, 1.0)
    b, closure = fit(lambda b: ((decay(b) - y)[parts], (decay(b) - y)[~parts]), weights=weights)
    factor = torch.where(parts, (2.0 * 30 / 10) ** 0.5, (30 / 20) ** 0.5)
    c, joined = fit(lambda b: factor * (decay(b) - y))
    torch.testing.assert_close(b.detach(), c.detach(), rtol=1e-8, atol=0)
    torch.testing.assert_close(
        estimate_covariance(closure, [b]).matrix,
        estimate_covariance(joined, [c]).matrix,
        rtol=1e-6,
        atol=0,
    )


def test_parameters_of_several_tensors_are_in_their_order():
    y = data()
    b, closure = fit(lambda b: decay(b) - y)
    whole = estimate_covariance(closure, [b]).matrix
    rate, rest = nn.Parameter(b[1:2].detach()), nn.Parameter(b[[0, 2]].detach())
    parts = estimate_covariance(
        lambda: least_squares(rest[0] * torch.exp(-rate * T) + rest[1] - y), [rate, rest]
    )
    order = torch.tensor([1, 0, 2])
    torch.testing.assert_close(parts.matrix, whole[order][:, order], rtol=1e-9, atol=0)


@pytest.mark.parametrize("loss", ["soft_l1", "huber", "cauchy"])
def test_a_robust_fit_has_the_sandwich_of_dense_matrices(loss):
    y = data().index_fill(0, torch.tensor([3, 17]), 4.0)
    b, closure = fit(lambda b: decay(b) - y, loss=loss, scale=0.2)
    found = estimate_covariance(closure, [b])

    def each(r):
        return torch.stack([least_squares(part, loss=loss, scale=0.2) for part in r.reshape(-1, 1)])

    r = (decay(b) - y).detach()
    J = jacrev(decay)(b.detach())
    # Of H the term with the model's own second derivatives is left out, as in J^T J.
    curvature = hessian(lambda r: each(r).sum())(r).diagonal()
    slopes = jacrev(lambda r: each(r).sum())(r)
    H = J.T @ (curvature[:, None] * J)
    G = J.T @ (slopes.square()[:, None] * J)
    expected = 30 / 27 * torch.linalg.inv(H) @ G @ torch.linalg.inv(H)
    torch.testing.assert_close(found.matrix, expected, rtol=1e-7, atol=0)
    assert found.variance.isnan()


def line(b):
    return b[0] + b[1] * T


@pytest.mark.parametrize("loss", ["linear", "huber", "cauchy"])
def test_errors_are_how_far_fits_of_new_data_are_apart(loss):
    generator = torch.Generator().manual_seed(0)
    fits, errors = [], []
    for _ in range(60):
        normal = torch.randn(4, 30, generator=generator, dtype=torch.float64)
        y = line([1.0, 2.0]) + 0.1 * normal[0] / normal[1:].square().mean(0).sqrt()  # Student's t
        b, closure = fit(lambda b, y=y: line(b) - y, (0.0, 0.0), loss=loss, scale=0.2)
        fits.append(b.detach())
        errors.append(estimate_covariance(closure, [b]).standard_errors)
    ratio = torch.stack(errors).square().mean(0).sqrt() / torch.stack(fits).std(0)
    assert ((ratio > 0.7) & (ratio < 1.4)).all()  # 60 fits tell a standard deviation to a tenth


def test_away_from_the_minimum_it_says_so(caplog):
    y = data()
    b = nn.Parameter(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))
    estimate_covariance(lambda: least_squares(decay(b) - y), [b])
    assert "standard errors from the minimum" in caplog.text


PAIR = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
REFUSED = {
    "another loss": (lambda: (PAIR - 1).square().sum(), {}, "whose loss is least_squares"),
    "a penalty": (
        lambda: least_squares(line(PAIR) - 1) + PAIR.square().sum(),
        {},
        "such as a penalty, as residuals",
    ),
    "few residuals": (lambda: least_squares(PAIR - 1), {}, "2 residuals leave no degree"),
    "one direction": (lambda: least_squares(T * PAIR.sum() - 1), {}, "determine 1 of 2"),
    "absolute and two": (
        lambda: least_squares(line(PAIR) - 1, PAIR),
        {"absolute_sigma": True},
        "one tensor of residuals",
    ),
    "absolute and robust": (
        lambda: least_squares(line(PAIR) - 1, loss="huber"),
        {"absolute_sigma": True},
        "loss='linear'",
    ),
    "absolute and a factor": (
        lambda: 30 * least_squares(line(PAIR) - 1),
        {"absolute_sigma": True},
        "times 30: leave the factor out",
    ),
    "not finite": (lambda: least_squares(line(PAIR) * torch.nan), {}, "not finite"),
    "few that count": (
        lambda: least_squares(line(PAIR) - 1, weights=(T < 0.2).double()),
        {},
        "2 residuals leave no degree",
    ),
    "no minimum": (
        lambda: least_squares(line(PAIR) - 30, loss="cauchy", scale=0.1),
        {},
        "not convex",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    closure, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        estimate_covariance(closure, [PAIR], **options)


@pytest.mark.parametrize("loss", ["linear", "huber"])
def test_residuals_without_weight_are_no_data(loss):
    y, weights = data(), (T < 3).double()
    some = weights.bool()
    b, closure = fit(lambda b: decay(b) - y, weights=weights, loss=loss, scale=0.1)
    found = estimate_covariance(closure, [b])
    expected = estimate_covariance(
        lambda: least_squares((decay(b) - y)[some], loss=loss, scale=0.1), [b]
    )
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-7, atol=0)
    assert found.degrees_of_freedom == expected.degrees_of_freedom == int(some.sum()) - 3


def test_a_constant_in_the_loss_is_no_variance():
    y = data()
    b, closure = fit(lambda b: decay(b) - y)
    found = estimate_covariance(lambda: closure() + 5.0, [b])
    expected = estimate_covariance(closure, [b])
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-9, atol=0)


def test_params_may_have_names_and_must_be_several():
    y = data()
    b, closure = fit(lambda b: decay(b) - y)
    named = estimate_covariance(closure, [("b", b)])
    assert torch.equal(named.matrix, estimate_covariance(closure, [b]).matrix)
    with pytest.raises(TypeError, match="params must be tensors"):
        estimate_covariance(closure, b)
