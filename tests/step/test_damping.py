"""The Levenberg-Marquardt rule, alone and in the optimizer."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import flatten
from torch import nn
from torch.distributions import Categorical

from ngd_optim import NaturalCG, least_squares
from ngd_optim.step.damping import (
    damping_factor,
    new_data_factor,
    nielsen_factor,
    retry_factor,
    smoothing_factor,
)

RULE = [
    # reduction ratio, accepted, overshot, factor
    (0.9, True, False, 1 / 2),
    (1.7, True, False, 1 / 2),
    (0.4001, True, False, 1 / 2),
    (0.4, True, False, 1.0),
    (0.3, True, False, 1.0),
    (0.2, True, False, 1.0),
    (0.1999, True, False, 2.0),
    (-3.0, True, False, 2.0),
    (math.nan, True, False, 1.0),
    (0.9, True, True, 2.0),
    (0.5, True, True, 2.0),
    (0.9, False, False, 4.0),
    (math.nan, False, True, 4.0),
    (math.nan, False, False, 1.0),
    (-1.0, False, True, 4.0),
]


@pytest.mark.parametrize(("ratio", "accepted", "overshot", "factor"), RULE)
def test_rule(ratio, accepted, overshot, factor):
    assert damping_factor(ratio, accepted=accepted, overshot=overshot) == factor


SMOOTHING = [
    # promised, hidden, reduction ratio, accepted, factor
    (1.0, 1.0, 1.0, True, 1.1),
    (1.0, 0.0, 1.0, True, 1.1),  # all kinks are farther than the width
    (0.05, 1.0, 5.0, True, 1.0),
    (0.032, 1.0, 1.0, True, 0.8),
    (0.001, 1.0, 1.0, True, 0.25),
    (0.0, 1.0, math.nan, True, 0.25),
    (1.0, 1.0, 0.2, True, 1.1),
    (1.0, 1.0, 0.1999, True, 0.75),
    (1.0, 1.0, 1.0, False, 0.75),
]


@pytest.mark.parametrize(("promised", "hidden", "ratio", "accepted", "factor"), SMOOTHING)
def test_rule_for_kinks(promised, hidden, ratio, accepted, factor):
    found = smoothing_factor(promised, hidden, ratio, accepted=accepted)
    assert found == pytest.approx(factor)
    # The loss's unit does not matter.
    assert smoothing_factor(1e-9 * promised, 1e-9 * hidden, ratio, accepted=accepted) == (
        pytest.approx(factor)
    )


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [(0.0, 2.0), (0.5, 1.0), (1.0, 1 / 3), (0.75, 0.875), (2.0, 1 / 3), (math.nan, 1.0)],
)
def test_rule_of_direct_solvers(ratio, factor):
    """Nielsen's: 1 − (2ρ − 1)³, not below a third; not extrapolated beyond a ratio of 1."""
    assert nielsen_factor(ratio) == pytest.approx(factor, rel=1e-12)


def test_the_damping_grows_faster_the_more_often_a_system_is_solved():
    assert [retry_factor(attempt) for attempt in (1, 2, 3, 4)] == [2, 4, 8, 16]


def test_a_kl_just_above_its_bound_does_not_speak_against_the_model():
    """At the boundary every other step goes a little over it; the damping must not grow for that."""
    generator = torch.Generator().manual_seed(0)
    policy = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, advantages = (
        torch.randn(*shape, generator=generator).double() for shape in ((64, 4), (64,))
    )
    actions = torch.randint(0, 3, (64,), generator=generator)
    optimizer = NaturalCG(policy.parameters(), max_kl=0.01, trust_region="boundary")
    backtracks, expected = 0, 0.1
    for _ in range(8):
        with torch.no_grad():
            old = Categorical(logits=policy(x)).log_prob(actions)

        def closure(old=old):
            new = Categorical(logits=policy(x))
            return -((new.log_prob(actions) - old).exp() * advantages).mean(), new

        optimizer.step(closure)
        backtracks += optimizer.last_step.backtracks
        report = optimizer.last_step
        own = damping_factor(report.reduction_ratio, accepted=True, overshot=False)
        expected *= (
            own
            if math.isnan(report.new_slope)
            else new_data_factor(report.new_slope) * max(own, 1.0)
        )
    assert backtracks > 0
    assert optimizer.param_groups[0]["damping"] == pytest.approx(expected)


def test_what_is_below_the_rounding_of_the_loss_tells_nothing():
    w = nn.Parameter(torch.tensor([3.0]))
    optimizer = NaturalCG([w])
    for _ in range(60):
        optimizer.step(lambda: 1e3 + F.mse_loss(w, torch.zeros(1)))
    assert optimizer.param_groups[0]["damping"] <= 0.1
    assert "below the loss's rounding" in optimizer.last_step.reason or optimizer.last_step.accepted


def bowl(start):
    """Least squares of tanh: the further out, the worse is its quadratic model."""
    w = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    return w, lambda: F.mse_loss(w.tanh(), torch.zeros(1, dtype=torch.float64))


IN_THE_OPTIMIZER = [
    # start, most backtracks, reduction ratio between, factor
    (0.3, 0, (0.9, 1.1), 1 / 2),
    (0.85, 0, (0.4, 0.9), 1 / 2),
    (0.95, 0, (0.2, 0.4), 1.0),
    (1.05, 0, (0.0, 0.2), 2.0),
    (1.2, 0, (-9.0, 0.0), 2.0),
    (1.2, 10, (0.0, 0.2), 2.0),
    (1.5, 10, (0.2, 9.0), 2.0),
]


@pytest.mark.parametrize(("start", "max_backtracks", "between", "factor"), IN_THE_OPTIMIZER)
@pytest.mark.parametrize("damping", [1e-6, 1e-3])
def test_damping_follows_the_measured_ratio(start, max_backtracks, between, factor, damping):
    w, closure = bowl(start)
    optimizer = NaturalCG([w], damping=damping, max_kl=None, max_backtracks=max_backtracks)
    slope, curvature = 2 * math.tanh(start) / math.cosh(start) ** 2, 2 / math.cosh(start) ** 4
    optimizer.step(closure)
    report = optimizer.last_step
    d = 0.8**report.backtracks * -slope / (curvature + damping)
    assert w.item() == pytest.approx(start + d, rel=1e-10)
    predicted = -(slope * d + 0.5 * curvature * d**2)
    assert report.predicted_decrease == pytest.approx(predicted, rel=1e-8)
    ratio = (math.tanh(start) ** 2 - math.tanh(start + d) ** 2) / predicted
    assert report.reduction_ratio == pytest.approx(ratio, rel=1e-8)
    assert between[0] < ratio < between[1]
    assert (report.backtracks > 0) == (max_backtracks > 0)
    assert report.damping == damping
    assert optimizer.param_groups[0]["damping"] == damping * factor


@pytest.mark.parametrize(
    ("start", "damping", "limits", "after"),
    [
        (0.3, 1e-3, {"min_damping": 9e-4}, 9e-4),
        (0.3, 1e-3, {"min_damping": 1e-2}, 1e-2),
        (1.2, 1e-3, {"max_damping": 1.2e-3}, 1.2e-3),
        (1.2, 0.0, {}, 1e-8),
        (1.2, 1e-3, {"adapt_damping": False}, 1e-3),
        (0.3, 0.0, {"adapt_damping": False}, 0.0),
    ],
)
def test_damping_stays_in_its_limits(start, damping, limits, after):
    w, closure = bowl(start)
    optimizer = NaturalCG([w], damping=damping, max_kl=None, **limits)
    optimizer.step(closure)
    assert optimizer.param_groups[0]["damping"] == after


def test_a_rejected_step_raises_the_damping_fourfold():
    w, closure = bowl(0.3)
    optimizer = NaturalCG([w], damping=0.1)
    # No step of any length stays where this is flat.
    optimizer.step(lambda: closure() + 1e6 * ((w - 0.3).abs() - 1e-9).relu().sum())
    assert not optimizer.last_step.accepted
    assert optimizer.param_groups[0]["damping"] == 0.4
    assert optimizer.last_step.damping == 0.1


def test_a_step_at_the_minimum_leaves_the_damping():
    w, closure = bowl(0.0)
    optimizer = NaturalCG([w], damping=0.1)
    optimizer.step(closure)
    assert optimizer.last_step.accepted
    assert math.isnan(optimizer.last_step.reduction_ratio)
    assert optimizer.param_groups[0]["damping"] == 0.1


def test_each_group_keeps_its_own():
    w, closure = bowl(0.3)
    v = nn.Parameter(torch.tensor([0.2], dtype=torch.float64))
    groups = [{"params": [w], "damping": 1e-4}, {"params": [v], "damping": 1e-3}]
    optimizer = NaturalCG(groups)
    optimizer.step(lambda: closure() + F.mse_loss(v.tanh(), torch.zeros_like(v)))
    assert [g["damping"] for g in optimizer.param_groups] == [5e-5, 5e-4]
    assert optimizer.last_step.damping == 1e-3


@pytest.mark.parametrize(
    ("slope", "factor"),
    [(-5.0, 1 / 2), (-2 / 3, 1 / 2), (1 / 3, 1.0), (0.0, 2 ** (-1 / 3)), (4 / 3, 2.0), (9.0, 2.0)],
)
def test_the_rule_for_new_data(slope, factor):
    assert new_data_factor(slope) == pytest.approx(factor)


def regression(n, generator, noise=1.0):
    """A batch of a linear regression in 20 dimensions whose true weights are 1."""
    x = torch.randn(n, 20, generator=generator, dtype=torch.float64)
    return x, x.sum(1, keepdim=True) + noise * torch.randn(
        n, 1, generator=generator, dtype=torch.float64
    )


@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1}, {"lr": 0.5}, {"solver": "dense", "max_kl": 1e-3}]
)
def test_new_data_tell_how_steep_they_are_along_the_last_step(settings):
    generator, model = torch.Generator().manual_seed(0), nn.Linear(20, 1).double()
    optimizer = NaturalCG(model.parameters(), **settings)
    before = None
    for _ in range(4):
        x, y = regression(30, generator)
        decay = settings.get("weight_decay", 0.0)
        theta = flatten(model.parameters())
        loss = F.mse_loss(model(x), y)
        gradient = flatten(torch.autograd.grad(loss, list(model.parameters()))) + decay * theta
        damping = optimizer.param_groups[0]["damping"]
        optimizer.step(lambda x=x, y=y: F.mse_loss(model(x), y))
        report = optimizer.last_step
        assert report.accepted
        if before is None:
            assert math.isnan(report.new_slope)
        else:
            assert report.new_slope == pytest.approx(
                (gradient @ before[1] / abs(before[0] @ before[1])).item()
            )
            assert report.damping == pytest.approx(damping * new_data_factor(report.new_slope))
            assert optimizer.param_groups[0]["damping"] >= report.damping
        before = gradient, flatten(model.parameters()) - theta


def test_the_same_data_tell_nothing_new():
    model = nn.Linear(20, 1)
    x, y = (t.float() for t in regression(30, torch.Generator().manual_seed(0)))
    optimizer = NaturalCG(model.parameters(), adapt_damping=True)
    for _ in range(6):
        optimizer.step(lambda: F.mse_loss(model(x).tanh(), y))
        assert math.isnan(optimizer.last_step.new_slope)


def test_a_damping_that_does_not_adapt_stays_on_new_data_too():
    generator, model = torch.Generator().manual_seed(0), nn.Linear(20, 1).double()
    optimizer = NaturalCG(model.parameters(), damping=0.3, adapt_damping=False)
    for _ in range(3):
        x, y = regression(30, generator)
        optimizer.step(lambda x=x, y=y: F.mse_loss(model(x), y))
    assert not math.isnan(optimizer.last_step.new_slope)
    assert optimizer.param_groups[0]["damping"] == 0.3


@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_steps_on_noisy_batches_average_their_noise(solver):
    """A batch of 30 alone tells 20 weights with a squared error of 20 / (30 - 20 - 1)."""
    generator, model = torch.Generator().manual_seed(0), nn.Linear(20, 1, bias=False).double()
    optimizer = NaturalCG(model.parameters(), solver=solver)
    for _ in range(60):
        x, y = regression(30, generator)
        optimizer.step(lambda x=x, y=y: F.mse_loss(model(x), y))
    assert (model.weight - 1).square().sum() < (20 / 9) / 4
    assert optimizer.param_groups[0]["damping"] > 0.1


def test_no_momentum_after_a_step_that_was_rejected():
    """Else more damping would pull to the step that did not work, and the next ones would fail as well."""
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = NaturalCG([w], momentum=0.9, max_backtracks=2)
    optimizer.step(lambda: F.mse_loss(w, torch.zeros(3, dtype=torch.float64)))
    there = w.detach().clone()
    optimizer.step(
        lambda: (w - there).abs().sum() + F.mse_loss(w, there + 1)
    )  # a kink, which no step gets over
    assert not optimizer.last_step.accepted
    optimizer.step(lambda: F.mse_loss(w, there + 1.0))
    assert optimizer.last_step.reduction_ratio == pytest.approx(1.0)
    solution = torch.full((3,), 2 / 3) / (2 / 3 + optimizer.last_step.damping)
    torch.testing.assert_close(w.detach() - there, solution.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("trust_region", ["boundary", "damped"])
def test_the_scale_of_the_advantages_changes_no_step_to_the_edge(trust_region):
    """The problem is to lower a linear objective within a bound on the KL: its solution has no such scale."""
    runs = {}
    for scale in (1.0, 1e-3):
        torch.manual_seed(0)
        policy = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        optimizer = NaturalCG(
            policy.parameters(), max_kl=0.01, trust_region=trust_region, cg_tol=1e-10
        )
        x = torch.randn(64, 4, dtype=torch.float64)
        for _ in range(12):
            with torch.no_grad():
                old = Categorical(logits=policy(x))
                actions = old.sample()
            advantages = scale * (actions == 1).double()

            def closure(policy=policy, x=x, old=old, actions=actions, advantages=advantages):
                new = Categorical(logits=policy(x))
                return -(
                    (new.log_prob(actions) - old.log_prob(actions)).exp() * advantages
                ).mean(), new

            optimizer.step(closure)
            report = optimizer.last_step
            assert report.accepted
            assert 0.2 < report.reduction_ratio < 2  # the decrease that the slope promises
        runs[scale] = flatten(policy.parameters()), optimizer.param_groups[0]["damping"]
    assert runs[1e-3][1] == pytest.approx(runs[1.0][1], rel=1e-6)
    torch.testing.assert_close(runs[1e-3][0], runs[1.0][0], rtol=1e-5, atol=1e-6)


def test_residuals_that_can_all_vanish_are_not_held_back():
    """Their steps overshoot for the next batch, in directions soon corrected: the damping follows the ratio alone."""
    torch.manual_seed(0)
    teacher, student = (
        nn.Sequential(nn.Linear(8, n), nn.Tanh(), nn.Linear(n, 1)).double() for n in (8, 16)
    )
    optimizer, before = NaturalCG(student.parameters()), 0.1
    for _ in range(60):
        x = torch.randn(256, 8, dtype=torch.float64)
        y = teacher(x).detach()
        optimizer.step(lambda x=x, y=y: least_squares(student(x) - y))
        report = optimizer.last_step
        assert report.damping == before or report.backtracks
        before = optimizer.param_groups[0]["damping"]
    assert not math.isnan(report.new_slope)


def test_the_slope_is_along_the_step_that_was_taken_however_the_rates_change():
    generator, model = torch.Generator().manual_seed(0), nn.Linear(20, 1).double()
    optimizer = NaturalCG([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}], lr=0.3)
    (x, y), (x2, y2) = (regression(30, generator) for _ in range(2))
    start, params = flatten(model.parameters()), list(model.parameters())
    before = flatten(torch.autograd.grad(F.mse_loss(model(x), y), params))
    optimizer.step(lambda: F.mse_loss(model(x), y))
    step = flatten(model.parameters()) - start
    after = flatten(torch.autograd.grad(F.mse_loss(model(x2), y2), params))
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 1.0, 0.0
    optimizer.step(lambda: F.mse_loss(model(x2), y2))
    assert optimizer.last_step.new_slope == pytest.approx(
        (after @ step / abs(before @ step)).item()
    )


def test_what_other_parameters_left_tells_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double()
    x, y = (torch.randn(30, n, dtype=torch.float64) for n in (3, 1))
    optimizer = NaturalCG(model.parameters())
    for frozen in (False, True, True, False, False):
        model[0].requires_grad_(not frozen)
        optimizer.step(lambda: F.mse_loss(model(x).tanh(), y))
        assert math.isnan(optimizer.last_step.new_slope)


def test_noisy_batches_are_seen_in_bfloat16():
    generator, model = torch.Generator().manual_seed(0), nn.Linear(20, 1).bfloat16()
    optimizer, slopes = NaturalCG(model.parameters()), []
    for _ in range(8):
        x, y = (t.bfloat16() for t in regression(30, generator, noise=3.0))
        optimizer.step(lambda x=x, y=y: F.mse_loss(model(x), y))
        slopes.append(optimizer.last_step.new_slope)
    assert sum(not math.isnan(slope) for slope in slopes) >= 4


def told_if_above(damping):
    """The limit moves with a damping that is larger, which is told."""
    if damping > 1e6:
        return pytest.warns(UserWarning, match=r"the limit moves with it")
    return nullcontext()


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_the_automatic_range_has_the_unit_of_the_loss(scale, solver):
    """The same training in another unit: no damping is cut without a word."""
    dampings, settings = [], {"solver": solver, "damping_scale": "identity"}
    for unit in (1.0, scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x, y = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 3
        with told_if_above(0.1 * unit):
            optimizer = NaturalCG(model.parameters(), damping=0.1 * unit, **settings)
        for _ in range(6):
            optimizer.step(lambda m=model, x=x, y=y, u=unit: u * F.cross_entropy(m(x), y))
            dampings.append(optimizer.param_groups[0]["damping"] / unit)
    assert dampings[:6] == pytest.approx(dampings[6:], rel=1e-6)
    assert len(set(dampings[:6])) > 2


@pytest.mark.parametrize("damping", [1e-20, 1e-9, 1e7, 1e9, 1e30])
@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_a_damping_beyond_the_usual_range_is_kept(damping, solver):
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    with told_if_above(damping):
        optimizer = NaturalCG([w], damping=damping, solver=solver, max_backtracks=2)
    optimizer.step(lambda: w.pow(4).sum())
    assert optimizer.last_step.damping == damping
    assert 0.2 * damping <= optimizer.param_groups[0]["damping"] <= 5 * damping


def test_a_scale_that_one_batch_made_huge_is_forgotten():
    """Residuals on fresh points, one of them weighted 1e4 times at step 5."""
    losses = []
    for outlier in (1.0, 1e4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        optimizer = NaturalCG(model.parameters(), damping_scale="diagonal")
        grid = torch.linspace(-1, 1, 100, dtype=torch.float64).unsqueeze(1)
        for step in range(80):
            x = 2 * torch.rand(40, 1, dtype=torch.float64) - 1
            weight = torch.ones_like(x)
            weight[0] = outlier if step == 5 else 1.0
            optimizer.step(
                lambda m=model, x=x, w=weight: least_squares(w * (m(x) - torch.sin(4 * x)))
            )
        losses.append(least_squares(model(grid) - torch.sin(4 * grid)).item())
    assert losses[1] < 100 * losses[0] < 1e-3


def scales(residuals, start, steps=8):
    """The scale that each step keeps, and the diagonal of the curvature where it begins."""
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer, found = NaturalCG([w], damping_scale="diagonal"), []
    for _ in range(steps):
        J = torch.func.jacrev(residuals)(w.detach())
        optimizer.step(lambda: least_squares(residuals(w)))
        found.append((optimizer.state[w]["largest_curvature"], J.square().mean(0)))
    return found


def test_the_scale_of_the_same_data_falls_only_as_a_whole():
    """Moré's rule for relative sizes: beside the one that has lost the least, no diagonal falls."""
    found = scales(lambda w: torch.stack([w[0] ** 2, w[1] - w[0]]), [3.0, 1.0])
    largest = torch.zeros(2, dtype=torch.float64)
    for kept, diagonal in found:
        largest = torch.maximum(largest, diagonal)
        largest *= (diagonal / largest).max()
        torch.testing.assert_close(kept, largest)
    assert largest[0] > found[-1][1][0]


def test_a_size_that_all_have_lost_is_forgotten_at_once():
    """Far out on a quartic the curvature is a million times that at its end."""
    found = scales(lambda w: w.square(), [1e3, 1e3], steps=25)
    torch.testing.assert_close(found[-1][0], found[-1][1])
    assert found[-1][0].max() < 1e-6 * found[0][0].max()


@pytest.mark.parametrize("unit", [1e-6, 1e-12])
def test_the_least_damping_has_the_unit_of_the_loss(unit):
    """From λ far above the curvature, which it hides, down to where it no longer matters."""
    X = torch.randn(50, 4, dtype=torch.float64) * torch.logspace(0, -1, 4, dtype=torch.float64)
    y = torch.randint(0, 2, (50,)).double()
    found = []
    for scale, steps in ((1.0, 40), (unit, 120)):
        model = nn.Linear(4, 1, dtype=torch.float64)
        nn.init.ones_(model.weight)
        optimizer = NaturalCG(model.parameters())
        for _ in range(steps):
            optimizer.step(
                lambda model=model, scale=scale: (
                    scale * F.binary_cross_entropy_with_logits(model(X)[:, 0], y)
                )
            )
        found.append(optimizer.last_step.loss / scale)
        assert optimizer.param_groups[0]["damping"] < 1e-3 * scale
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_a_least_damping_that_was_asked_for_is_kept():
    w = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = NaturalCG([w], min_damping=1e-8, damping=1e-7)
    for _ in range(6):
        optimizer.step(lambda: 1e-12 * (w.cosh() - 1).sum())
    assert optimizer.param_groups[0]["damping"] == 1e-8
