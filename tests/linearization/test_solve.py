"""``Linearization.solve`` and ``measure``, and ``NaturalCG.linearize``, against dense matrices."""

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import assert_near, seeded
from torch import nn
from torch.distributions import Categorical, kl_divergence

from ngd_optim import NaturalCG, linearize


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(40, 4, dtype=torch.float64, generator=seeded())
    return model, x, torch.randint(0, 3, (40,), generator=seeded())


def dense(point):
    n = len(point.gradient)
    return torch.stack([point.curvature(e) for e in torch.eye(n, dtype=torch.float64)])


@pytest.mark.parametrize("preconditioned", [False, True])
def test_solve_is_the_dense_solution(preconditioned):
    model, x, y = problem()
    point = linearize(lambda: F.cross_entropy(model(x), y), model.parameters())
    A = dense(point) + 0.01 * torch.eye(len(point.gradient), dtype=torch.float64)
    constraint = torch.randn(len(A), dtype=torch.float64, generator=seeded())
    B = torch.stack([point.gradient, constraint])
    inverse = torch.linalg.inv(A)
    found = point.solve(
        B, damping=0.01, tol=1e-12, preconditioner=inverse.mv if preconditioned else None
    )
    true = torch.linalg.solve(A, B.T).T
    assert_near(found.solutions, true)
    assert_near(found.scalars, B @ true.T)
    assert not preconditioned or found.products <= 6


def test_what_solve_refuses():
    model, x, y = problem()
    point = linearize(lambda: F.cross_entropy(model(x), y), model.parameters())
    g = point.gradient
    for wrong in (g[None] * 1j, g[None].numpy(), [g]):
        with pytest.raises(TypeError, match="right_sides must be a real tensor"):
            point.solve(wrong)
    for wrong in (g, g[None, :-1], g[None, None], g[:0].reshape(0, 43)):
        with pytest.raises(ValueError, match=r"right_sides must have shape \(k, 43\).*torch.stack"):
            point.solve(wrong)
    for damping in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping must be a finite number"):
            point.solve(g[None], damping=damping)
    with pytest.raises(ValueError, match="tol must be at least 0"):
        point.solve(g[None], tol=-1.0)


@pytest.mark.parametrize("recorded", [True, False])
def test_measure_is_the_loss_and_the_kl_where_the_parameters_are(recorded):
    model, x, y = problem()
    drawn = []

    def closure():
        if not recorded:
            drawn.append(torch.rand(()))
            float(model[0].bias.sum())  # a number that is read: no replay
        logits = model(x)
        return F.cross_entropy(logits, y), Categorical(logits=logits)

    old = Categorical(logits=model(x).detach())
    point = linearize(closure, model.parameters())
    random = torch.get_rng_state()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    new = Categorical(logits=model(x).detach())
    loss, kl = point.measure()
    assert loss == pytest.approx(F.cross_entropy(new.logits, y).item(), rel=1e-10)
    assert kl == pytest.approx(kl_divergence(old, new).mean().item(), rel=1e-10)
    assert torch.equal(torch.get_rng_state(), random)
    without = linearize(lambda: F.cross_entropy(model(x), y), model.parameters())
    assert without.measure() == (pytest.approx(loss), None)


def test_an_optimizer_linearizes_with_its_settings_and_checks_once():
    model, x, y = problem()
    for p in model[0].parameters():
        p.requires_grad_(False)
    runs = []

    def closure():
        runs.append(1)
        logits = model(x)
        return F.cross_entropy(logits, y), Categorical(logits=logits)

    optimizer = NaturalCG(model.parameters(), backend="torch.func")
    own, free = (
        optimizer.linearize(closure),
        linearize(closure, model.parameters(), backend="torch.func"),
    )
    assert own.backend == "torch.func"
    assert own.kind == "fisher"
    assert torch.equal(own.gradient, free.gradient)
    assert own.gradient.shape == (18,)
    assert_near(dense(own), dense(free))
    assert optimizer.last_step is None
    assert not optimizer.state
    optimizer.step(closure)
    runs.clear()
    again = optimizer.linearize(closure)
    assert len(runs) == 1
    assert_near(dense(again), dense(linearize(closure, model.parameters())))
