"""What ``check_metric`` and ``check_preconditioner`` tell."""

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import FAMILIES, flatten, make_model, real
from torch import nn

from ngd_optim import Diagonal, Nystrom, linearize
from ngd_optim.testing import check_metric, check_preconditioner


@pytest.mark.parametrize("name", FAMILIES)
def test_distributions_measure_what_their_metric_says(name):
    family = FAMILIES[name]
    model, x = make_model("mlp", family.size)
    report = check_metric(
        lambda: (model(x).square().mean(), family.predict(model(x))), model.parameters()
    )
    assert report.ok, report
    assert report.kind == "fisher"
    assert report.asymmetry < 1e-12
    assert report.is_semidefinite
    assert report.kl_at_start is None or abs(report.kl_at_start) < 1e-12
    assert report.kl_error is None or report.kl_error < 0.05


def test_a_kl_that_is_not_the_one_of_its_metric_is_a_problem():
    model, x = make_model("mlp", 2)
    old = model(x).detach()

    def closure():  # far from here it grows faster than its curvature says
        change = (model(x) - old).square().mean()
        return model(x).mean(), change + 1e8 * change**2

    report = check_metric(closure, model.parameters())
    assert not report.ok
    assert "differs from ½ dᵀF d" in str(report)


def test_negative_curvature_is_a_problem_of_a_metric_only():
    model, x = make_model("mlp", 2)
    old = model(x).detach()

    def closure():
        change = model(x) - old
        return model(x).mean(), change[:, 0].square().mean() - change[:, 1].square().mean()

    report = check_metric(closure, model.parameters())
    assert not report.is_semidefinite
    assert "negative curvature" in report.problems[0]
    report = check_metric(lambda: model(x).sin().mean(), model.parameters())
    assert report.ok
    assert not report.is_semidefinite
    assert "indefinite" in str(report)


def test_what_cannot_be_linearised_is_told():
    model, x = make_model("linear", 2)
    report = check_metric(lambda: (model(x).mean(), model(x).square().mean()), model.parameters())
    assert "must be zero at the current parameters" in report.problems[0]


def problem():
    """A classifier whose features have scales of their own."""
    model = nn.Linear(8, 3).double()
    x, y = real(60, 8) * torch.logspace(0, 2, 8, dtype=torch.float64), torch.arange(60) % 3
    return lambda: F.cross_entropy(model(x), y), list(model.parameters())


def exact(closure, params, damping):
    point = linearize(closure, params)
    n = len(point.gradient)
    matrix = torch.stack([point.curvature(row) for row in torch.eye(n, dtype=torch.float64)])
    inverse = torch.linalg.inv(matrix + damping * torch.eye(n))
    return lambda r: inverse @ r


@pytest.mark.parametrize(
    "kind", ["kfac", "diagonal", Diagonal(), Nystrom(rank=10), "exact"], ids=str
)
def test_preconditioners_are_right_and_save_iterations(kind):
    closure, params = problem()
    before = flatten(params)
    given = exact(closure, params, 1e-2) if kind == "exact" else kind
    report = check_preconditioner(given, closure, params, damping=1e-2)
    assert report.ok, report
    assert report.is_definite
    assert report.asymmetry < 1e-9
    assert report.nonlinearity < 1e-9
    if "diagonal" not in report.name:  # which is of no use where features are correlated
        assert report.iterations < report.iterations_without
    if kind == "exact":
        assert report.iterations <= 2
    assert torch.equal(flatten(params), before)


@pytest.mark.parametrize(
    ("function", "sentence"),
    {
        (lambda r: -r): "not positive definite",
        (lambda r: r / r.norm()): "not linear",
        (lambda r: r + r.cumsum(0)): "not symmetric",
    }.items(),
)
def test_what_is_no_preconditioner_is_told(function, sentence):
    closure, params = problem()
    assert sentence in " ".join(check_preconditioner(function, closure, params).problems)


def test_one_that_is_of_no_use_is_noted():
    closure, params = problem()
    sizes = torch.logspace(0, 3, 27, dtype=torch.float64)
    report = check_preconditioner(lambda r: sizes * r, closure, params)
    assert report.ok
    assert "it makes the solve longer" in report.notes[-1]
    scalar = nn.Parameter(real(3))
    report = check_preconditioner("auto", lambda: scalar.square().sum().exp(), [scalar])
    assert "no preconditioner was formed" in report.notes[-1]
    report = check_preconditioner("kfac", lambda: scalar.square().sum().exp(), [scalar])
    assert "use preconditioner='auto'" in report.problems[0]


@pytest.mark.parametrize("given", [None, "kfca", 3])
def test_bad_preconditioners_are_refused(given):
    with pytest.raises(ValueError, match="preconditioner must be a function, one of"):
        check_preconditioner(given, *problem())
    with pytest.raises(ValueError, match="damping must be above 0"):
        check_preconditioner("kfac", *problem(), damping=0.0)
