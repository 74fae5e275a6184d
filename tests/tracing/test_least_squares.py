"""Closure form (e): residuals of any shapes, built with and without derivatives of the network."""

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import assert_near, flat_function, flatten, make_model
from torch import nn
from torch.func import grad, jacrev, vmap

from ngd_optim import NaturalCG, least_squares, linearize

X = torch.linspace(0.1, 0.9, 6, dtype=torch.float64).unsqueeze(1)
WEIGHTS = (2.0, torch.tensor(0.5, dtype=torch.float64))


class Ode:
    """``u″ + u = 0`` on (0, 1) with two boundary values: residuals of two shapes."""

    def __init__(self):
        self.model = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        self.output = flat_function(self.model, X)
        self.theta = flatten(self.model.parameters())

    def boundary(self):
        return self.model(torch.tensor([[0.0], [1.0]], dtype=torch.float64)) - 0.3

    def by_autograd(self):
        x = X.clone().requires_grad_()
        u = self.model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return bend + u

    def by_torch_func(self):
        def u(x):
            return self.model(x).squeeze()

        return vmap(lambda x: grad(lambda y: grad(u)(y).sum())(x) + u(x))(X)

    def residuals_at(self, theta):
        """The same as one function of the flat parameters, with the derivatives written out."""
        w1, b1, w2, b2 = theta.split([5, 5, 5, 1])
        h = torch.tanh(X * w1 + b1)
        interior = (-2 * h * (1 - h**2) * w1**2 + h) @ w2 + b2
        ends = (
            torch.tanh(torch.tensor([[0.0], [1.0]], dtype=torch.float64) * w1 + b1) @ w2 + b2 - 0.3
        )
        return interior, ends


@pytest.mark.parametrize("derivative", ["by_autograd", "by_torch_func"])
def test_loss_gradient_and_metric_are_those_of_the_residuals(derivative):
    ode = Ode()
    point = linearize(
        lambda: least_squares(getattr(ode, derivative)(), ode.boundary(), weights=WEIGHTS),
        ode.model.parameters(),
    )
    interior, ends = ode.residuals_at(ode.theta)
    J1, J2 = jacrev(ode.residuals_at)(ode.theta)
    loss = 0.5 * (2.0 * interior.square().mean() + 0.5 * ends.square().mean())
    torch.testing.assert_close(point.loss, loss, rtol=1e-12, atol=0)
    assert_near(point.gradient, 2.0 / 6 * J1.T @ interior + 0.5 / 2 * J2.T @ ends, 1e-10)
    v = torch.randn(16, dtype=torch.float64)
    assert_near(point.curvature(v), 2.0 / 6 * J1.T @ (J1 @ v) + 0.5 / 2 * J2.T @ (J2 @ v), 1e-10)


def test_it_is_half_the_mean_squared_error_and_adds_up_with_other_losses():
    model, x = make_model("mlp", 3)
    y = torch.randn(5, 3, dtype=torch.float64)
    whole = linearize(lambda: F.mse_loss(model(x), y), model.parameters())

    def closure():
        z = model(x)
        loss = least_squares(z[:, :2] - y[:, :2], weights=[2 / 3]) + F.mse_loss(z, y) / 2
        loss = loss + least_squares((z - y)[:, 2], weights=[1 / 3])
        loss.backward()
        return loss

    parts = linearize(closure, model.parameters())
    v = torch.randn_like(whole.gradient)
    assert_near(parts.gradient, whole.gradient, 1e-12)
    assert_near(parts.curvature(v), whole.curvature(v), 1e-12)


def test_a_linear_problem_is_solved_in_one_step():
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    optimizer = NaturalCG(
        model.parameters(), damping=0.0, adapt_damping=False, cg_progress_tol=0.0, cg_tol=1e-13
    )
    optimizer.step(lambda: least_squares(model(x) - y))
    design = torch.cat([x, torch.ones_like(y)], 1)
    assert_near(
        flatten(model.parameters()), torch.linalg.lstsq(design, y).solution.flatten(), 1e-10
    )


def test_outside_of_a_closure_it_is_a_plain_function():
    r = torch.tensor([3.0, 4.0], requires_grad=True)
    loss = least_squares(r, r.detach().reshape(1, 2), weights=[1.0, 3.0])
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 12.5 + 1.5 * 12.5)
    assert torch.equal(r.grad, torch.tensor([1.5, 2.0]))


@pytest.mark.parametrize(
    ("residuals", "weights", "error", "message"),
    [
        ((), None, ValueError, "at least one"),
        ((torch.zeros(0),), None, ValueError, "empty"),
        ((torch.zeros(2, dtype=torch.int64),), None, TypeError, "int64"),
        ((torch.zeros(2, dtype=torch.complex64),), None, TypeError, "complex64"),
        ((1.0,), None, TypeError, "float"),
        ((torch.zeros(2),), [1.0, 2.0], ValueError, "one weight for each residual, got 2 for 1"),
        ((torch.zeros(2),), [-1.0], ValueError, "at least 0"),
        ((torch.zeros(2),), [float("nan")], ValueError, "nan"),
        ((torch.zeros(2),), [torch.ones(2)], ValueError, "one element"),
    ],
)
def test_bad_arguments(residuals, weights, error, message):
    with pytest.raises(error, match=message):
        least_squares(*residuals, weights=weights)
