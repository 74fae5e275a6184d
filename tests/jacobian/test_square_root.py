"""The square root of the curvature, against dense float64 matrices."""

import pytest
import torch
import torch.nn.functional as F
from helpers.outputs import FORMS, Problem
from helpers.problems import assert_near
from torch import nn

from ngd_optim import linearize


@pytest.mark.parametrize("form", FORMS)
def test_square_root_of_the_curvature(form):
    problem = Problem(form)
    root = linearize(problem.closure, problem.model.parameters())._point.square_root()
    assert_near(root.rows.T @ root.rows, problem.curvature, 1e-12)
    assert_near(root.rows.T @ root.slope, problem.gradient, 1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_displacement_of_the_outputs(form):
    """Along ``d`` it is ``A d`` to first order."""
    problem = Problem(form)
    root = linearize(problem.closure, problem.model.parameters())._point.square_root()
    assert not root.displaced().any()
    d = 1e-6 * torch.randn_like(problem.theta)
    nn.utils.vector_to_parameters(problem.theta + d, problem.model.parameters())
    assert_near(root.displaced(), root.rows @ d, 1e-4)


def test_an_indefinite_metric_has_no_square_root():
    model = nn.Linear(2, 3).double()
    x = torch.randn(40, 2, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0])

    def closure():
        return (F.mse_loss(model(x), x[:, :1].expand(-1, 3), reduction="none") * signs).mean()

    point = linearize(closure, model.parameters())
    assert point._point.square_root() is None
    assert point._point.compute_cheap_diagonal() is None
