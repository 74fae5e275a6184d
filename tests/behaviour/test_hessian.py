"""Closure form (d): the exact Hessian, and what happens along negative curvature."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.classics import rosenbrock
from helpers.landscapes import LANDSCAPES, OTHERS, is_minimum
from helpers.problems import flat_function, flatten
from scipy.optimize import minimize
from torch import nn

from ngd_optim import NaturalCG, conjugate_gradient, linearize


def custom_loss(z, y):
    return (z - y).abs().pow(3).mean()


@pytest.fixture
def problem():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    output, theta = flat_function(model, x), flatten(model.parameters())
    return (
        model,
        lambda: custom_loss(model(x), y),
        torch.func.hessian(lambda t: custom_loss(output(t), y))(theta),
    )


@pytest.mark.parametrize("curvature", ["auto", "hessian"])
def test_product_is_the_dense_hessian(problem, curvature):
    model, closure, hessian = problem
    assert torch.linalg.eigvalsh(hessian).min() < 0
    point = linearize(closure, model.parameters(), curvature=curvature)
    v = torch.randn(len(hessian), dtype=torch.float64)
    assert (point.curvature(v) - hessian @ v).norm() <= 1e-10 * (hessian @ v).norm()


def test_hessian_can_be_asked_for_where_gauss_newton_is_the_default():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    v = torch.randn(8, dtype=torch.float64)
    by_name = linearize(lambda: F.mse_loss(model(x), y), model.parameters(), curvature="hessian")
    by_hand = linearize(lambda: (model(x) - y).square().mean(), model.parameters())
    gauss_newton = linearize(lambda: F.mse_loss(model(x), y), model.parameters())
    assert (by_name.curvature(v) - by_hand.curvature(v)).norm() <= 1e-12 * by_hand.curvature(
        v
    ).norm()
    assert (by_name.curvature(v) - gauss_newton.curvature(v)).norm() > 1e-3 * by_hand.curvature(
        v
    ).norm()


@pytest.mark.parametrize("curvature", ["fisher", "ggn"])
def test_a_curvature_that_the_closure_does_not_offer(problem, curvature):
    model, closure, _ = problem
    with pytest.raises(ValueError, match=f"curvature='{curvature}' needs"):
        NaturalCG(model.parameters(), curvature=curvature).step(closure)


class TestNegativeCurvature:
    def test_from_zero_the_solve_goes_along_b_to_the_boundary(self):
        matrix, b = (
            torch.diag(torch.tensor([-2.0, -3.0]).double()),
            torch.tensor([1.0, 1.0]).double(),
        )
        result = conjugate_gradient(lambda v: matrix @ v, b, boundary=0.5)
        assert (result.stop, result.iterations) == ("negative_curvature", 1)
        assert torch.allclose(result.solution, b * (0.5 / 5) ** 0.5)
        assert result.x_dot_ax == pytest.approx(-0.5)

    def test_later_it_goes_from_the_last_iterate_to_the_boundary(self):
        matrix = torch.diag(torch.tensor([4.0, 1.0, -0.1]).double())
        b = torch.tensor([1.0, 0.5, 0.1]).double()
        result = conjugate_gradient(lambda v: matrix @ v, b, boundary=10.0)
        inside = conjugate_gradient(lambda v: matrix @ v, b, max_iters=result.iterations - 1)
        assert result.stop == "negative_curvature"
        assert inside.stop == "max_iters"
        p = result.solution - inside.solution
        assert inside.x_dot_ax + (p @ matrix @ p).abs() == pytest.approx(10.0)
        assert result.x_dot_ax == pytest.approx((result.solution @ matrix @ result.solution).item())
        assert result.x_dot_r == pytest.approx(
            (result.solution @ (b - matrix @ result.solution)).item()
        )

    def test_without_a_boundary_the_first_direction_is_the_right_hand_side(self):
        b = torch.tensor([1.0, -2.0]).double()
        assert torch.equal(conjugate_gradient(lambda v: -v, b).solution, b)

    def test_a_flat_direction_is_followed_a_finite_way(self):
        result = conjugate_gradient(torch.zeros_like, torch.ones(3).double(), boundary=1.0)
        assert result.solution.isfinite().all()

    @pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
    def test_without_an_end_the_size_of_the_curvature_tells_how_far(self, unit):
        matrix = unit * torch.diag(torch.tensor([4.0, 1.0, -0.1]).double())
        b = unit * torch.tensor([1.0, 0.5, 0.1]).double()
        result = conjugate_gradient(lambda v: matrix @ v, b, boundary=math.inf)
        inside = conjugate_gradient(lambda v: matrix @ v, b, max_iters=result.iterations - 1)
        assert (result.stop, inside.stop) == ("negative_curvature", "max_iters")
        p = result.solution - inside.solution
        # As along a positive curvature, where pᵀr = pᵀA p.
        assert p @ (b - matrix @ inside.solution) == pytest.approx((p @ matrix @ p).abs().item())

    def test_a_curvature_of_zero_tells_nothing(self):
        b = torch.ones(3).double()
        found = conjugate_gradient(torch.zeros_like, b, boundary=math.inf)
        assert torch.equal(found.solution, b)

    @pytest.mark.filterwarnings("ignore:damping=1e.07 is above:UserWarning")
    @pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
    def test_leaves_a_saddle_whatever_the_unit_of_the_loss(self, unit):
        x = nn.Parameter(torch.tensor([0.5, 1e-3]).double())
        optimizer = NaturalCG([x], damping=0.1 * unit)
        for _ in range(20):
            optimizer.step(lambda: unit * (x[0] ** 2 - x[1] ** 2 + x[1] ** 4))
        assert x.detach().square().tolist() == pytest.approx([0.0, 0.5], abs=1e-6)

    @pytest.mark.parametrize("max_kl", [0.1, 10.0])
    def test_leaves_a_saddle(self, max_kl):
        x = nn.Parameter(torch.tensor([0.5, 1e-3]).double())

        def closure():
            return x[0] ** 2 - x[1] ** 2 + x[1] ** 4

        optimizer = NaturalCG([x], max_kl=max_kl)
        stops = set()
        for _ in range(40):
            optimizer.step(closure)
            stops.add(optimizer.last_step.cg_stop)
        assert "negative_curvature" in stops
        assert closure().item() == pytest.approx(-0.25, abs=1e-6)

    def test_without_a_region_every_step_still_descends(self):
        x = nn.Parameter(torch.tensor([0.5, 1e-3]).double())
        optimizer = NaturalCG([x], max_kl=None)
        for _ in range(10):
            optimizer.step(lambda: x[0] ** 2 - x[1] ** 2 + x[1] ** 4)
            assert optimizer.last_step.new_loss < optimizer.last_step.loss


def test_rosenbrock_is_minimised_by_its_hessian():
    x = nn.Parameter(torch.full((6,), -1.2).double())
    optimizer = NaturalCG([x], max_kl=None)
    for _ in range(60):
        optimizer.step(lambda: rosenbrock(x))
    assert rosenbrock(x).item() < 1e-12


def descend(name):
    """From a landscape's start, by default settings."""
    function, start = LANDSCAPES[name]
    x = nn.Parameter(torch.tensor(start).double())
    optimizer = NaturalCG([x])
    for step in range(500):
        optimizer.step(lambda: function(x))
        if step % 10 == 9 and is_minimum(name, x.detach()):
            break
    return x.detach()


def descend_by_trust_exact(name):
    function, start = LANDSCAPES[name]
    value, slope, bend = (
        lambda b, f=f: f(torch.tensor(b)).numpy()
        for f in (function, torch.func.grad(function), torch.func.hessian(function))
    )
    options = {"maxiter": 500, "gtol": 1e-9}
    end = minimize(
        value, np.array(start), jac=slope, hess=bend, method="trust-exact", options=options
    )
    return torch.tensor(end.x)


@pytest.mark.parametrize("name", OTHERS)
def test_finds_a_minimum_by_default(name):
    assert is_minimum(name, descend(name))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_finds_as_many_minima_as_trust_exact():
    found, peer = (
        {name for name in LANDSCAPES if is_minimum(name, run(name))}
        for run in (descend, descend_by_trust_exact)
    )
    assert len(found) >= len(peer), (sorted(peer - found), sorted(found - peer))
