"""Closure form (e): residuals of any shapes, built with and without derivatives of the network."""

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import assert_near, flat_function, flatten, make_model
from scipy.optimize import least_squares as scipy_least_squares
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


def exponential(b, t):
    return b[0] * torch.exp(-b[1] * t) + b[2]


def outliers(noise):
    """As in scipy's own tests: an exponential with normal noise, and some points far off."""
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 10, 50, dtype=torch.float64)
    truth = torch.tensor([2.0, 0.5, 0.3], dtype=torch.float64)
    y = exponential(truth, t) + noise * torch.randn(50, generator=generator, dtype=torch.float64)
    y[torch.randperm(50, generator=generator)[:6]] += 5.0
    return t, y, truth


ROBUST = ["soft_l1", "huber", "cauchy", "arctan"]


@pytest.mark.parametrize("loss", ["linear", *ROBUST])
@pytest.mark.parametrize("scale", [0.3, torch.tensor(2.0, dtype=torch.float64)])
def test_the_cost_and_its_gradient_are_scipys(loss, scale):
    r = torch.tensor([-7.0, -0.3, 0.0, 1e-6, 0.3, 2.0, 40.0], dtype=torch.float64)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    point = linearize(lambda: least_squares(weight * r, loss=loss, scale=scale), [weight])
    scaled = r.numpy()
    result = scipy_least_squares(
        lambda w: w * scaled,
        [1.0],
        jac=lambda w: scaled[:, None],
        loss=loss,
        f_scale=float(scale),
        max_nfev=1,
        xtol=None,
        ftol=None,
    )
    assert point.loss.item() == pytest.approx(result.cost / len(r), rel=1e-12)
    assert point.gradient.item() == pytest.approx(result.grad.item() / len(r), rel=1e-12)


@pytest.mark.parametrize("loss", ROBUST)
def test_the_curvature_is_that_of_a_parabola_above_the_loss(loss):
    z = torch.linspace(-5, 5, 41, dtype=torch.float64)
    for at in (0.1, 1.0, 3.0):
        r = torch.tensor([at], dtype=torch.float64, requires_grad=True)
        point = linearize(lambda r=r: least_squares(r, loss=loss), [r])
        h = point.curvature(torch.ones(1, dtype=torch.float64))
        assert h.item() == pytest.approx(point.gradient.item() / at, rel=1e-12)
        above = point.loss + point.gradient * (z - at) + 0.5 * h * (z - at) ** 2
        values = torch.stack([least_squares(v.reshape(1), loss=loss) for v in z])
        assert (above >= values - 1e-12).all()


@pytest.mark.parametrize("noise", [0.1, 0.3])
@pytest.mark.parametrize("loss", ROBUST)
def test_robust_fits_reach_scipys_minimum_nearer_to_the_truth(loss, noise):
    t, y, truth = outliers(noise)

    def fit(loss):
        b = nn.Parameter(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
        optimizer = NaturalCG([b], xtol=1e-12, ftol=1e-12)
        for _ in range(60):
            optimizer.step(lambda: least_squares(exponential(b, t) - y, loss=loss, scale=0.5))
            if optimizer.converged:
                return b.detach(), optimizer.last_step.new_loss
        raise AssertionError(f"no end: {optimizer.last_step.reason}")

    plain, _ = fit("linear")
    b, cost = fit(loss)
    peer = scipy_least_squares(
        lambda b: (exponential(torch.tensor(b), t) - y).numpy(),
        [1.0, 1.0, 0.0],
        jac=lambda b: jacrev(lambda b: exponential(b, t))(torch.tensor(b)).numpy(),
        loss=loss,
        f_scale=0.5,
        ftol=1e-14,
        xtol=1e-14,
        gtol=1e-14,
    )
    assert cost == pytest.approx(peer.cost / 50, rel=1e-9)
    torch.testing.assert_close(b, torch.tensor(peer.x), rtol=1e-5, atol=1e-6)
    assert (b - truth).norm() < (plain - truth).norm()


def test_weights_of_elements_are_those_of_repeated_residuals():
    model, x = make_model("mlp", 3)
    y = torch.randn(5, 3, dtype=torch.float64)
    counts = torch.tensor([1, 2, 3, 1, 1])
    expected = linearize(
        lambda: least_squares((model(x) - y).repeat_interleave(counts, 0), loss="cauchy"),
        model.parameters(),
    )
    weights = (counts * 5 / 8).double().unsqueeze(1)
    for given in (weights, [weights], [weights.expand(5, 3)]):
        point = linearize(
            lambda given=given: least_squares(model(x) - y, weights=given, loss="cauchy"),
            model.parameters(),
        )
        torch.testing.assert_close(point.loss, expected.loss)
        assert_near(point.gradient, expected.gradient, 1e-12)
        v = torch.randn_like(point.gradient)
        assert_near(point.curvature(v), expected.curvature(v), 1e-12)


def test_a_vector_of_weights_of_several_tensors_still_has_one_each():
    r = torch.ones(3, dtype=torch.float64)
    loss = least_squares(r, 2 * r, weights=torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert loss.item() == pytest.approx(0.5 * 1 + 0.5 * 3 * 4)


@pytest.mark.parametrize("loss", ["l2", None, "Huber"])
def test_bad_losses(loss):
    with pytest.raises(ValueError, match="loss must be one of"):
        least_squares(torch.zeros(2), loss=loss)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), "1", torch.ones(2)])
def test_bad_scales(scale):
    with pytest.raises(ValueError, match="scale must be a finite number above 0"):
        least_squares(torch.zeros(2), loss="huber", scale=scale)


def test_a_residual_that_lost_its_graph_is_told_of_once(caplog):
    ode = Ode()

    def closure():
        x = X.clone().requires_grad_()
        u = ode.model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, retain_graph=True)  # no create_graph
        return least_squares(ode.boundary(), slope - 1)

    optimizer = NaturalCG(ode.model.parameters())
    for _ in range(2):
        optimizer.step(closure)
    told = [r.getMessage() for r in caplog.records if "depends on no parameter" in r.getMessage()]
    assert len(told) == 1
    assert "residual 2 of 2" in told[0]
    assert "create_graph=True" in told[0]


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
        ((1.0,), None, TypeError, "float"),
        (
            (torch.zeros(2),),
            [1.0, 2.0],
            ValueError,
            "one weight for each residual tensor, got 2 for 1",
        ),
        ((torch.zeros(2),), 2.0, ValueError, "a sequence"),
        ((torch.zeros(2),), "1", ValueError, "a sequence"),
        ((torch.zeros(2), torch.zeros(2)), torch.tensor(1.0), ValueError, "a sequence"),
        ((torch.zeros(2),), [-1.0], ValueError, "at least 0"),
        ((torch.zeros(2),), [float("nan")], ValueError, "nan"),
        (
            (torch.zeros(2),),
            [torch.ones(3)],
            ValueError,
            r"shape of its residuals, \(2,\), got shape \(3,\)",
        ),
        ((torch.zeros(2),), torch.ones(3), ValueError, r"\(2,\), got shape \(3,\)"),
        ((torch.zeros(2),), torch.ones(3, 2), ValueError, r"got shape \(3, 2\)"),
    ],
)
def test_bad_arguments(residuals, weights, error, message):
    with pytest.raises(error, match=message):
        least_squares(*residuals, weights=weights)


@pytest.mark.parametrize("weights", [[float("inf")], [float("nan")], torch.ones(3) * 1j])
def test_weights_are_real_and_finite(weights):
    with pytest.raises(ValueError, match=r"weights must be (real|finite numbers)"):
        least_squares(torch.ones(3), weights=weights)


def test_a_complex_scale_is_refused():
    with pytest.raises(ValueError, match="scale must be a finite number above 0"):
        least_squares(torch.ones(3), loss="huber", scale=torch.tensor(1j))
