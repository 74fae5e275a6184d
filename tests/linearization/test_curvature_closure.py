"""A closure of its own for the curvature."""

import pytest
import torch
import torch.nn.functional as F
from helpers.batches import cross_entropy, data, make_model, policy_gradient
from torch.distributions import Categorical

from ngd_optim import NaturalCG


class TestCurvatureClosure:
    def test_curvature_comes_from_it_and_the_rest_from_the_closure(self):
        x, y = data()
        model = make_model()
        params = list(model.parameters())
        theta = torch.cat([p.detach().flatten() for p in params])
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x), y), params)]
        )
        jacobian = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(z, params, retain_graph=True)])
                for z in model(x[:4]).flatten()
            ]
        )
        z = model(x[:4]).detach()
        hessian = torch.func.hessian(lambda u: F.cross_entropy(u.view_as(z), y[:4]))(z.flatten())
        matrix = jacobian.T @ hessian @ jacobian
        optimizer = NaturalCG(
            params, max_kl=None, damping=0.1, max_backtracks=0, cg_tol=1e-14, cg_progress_tol=0
        )
        loss = optimizer.step(
            cross_entropy(model, x, y), curvature_closure=cross_entropy(model, x[:4], y[:4])
        )
        expected = theta - torch.linalg.solve(
            matrix + 0.1 * torch.eye(len(theta), dtype=torch.float64), gradient
        )
        moved = torch.cat([p.detach().flatten() for p in params])
        assert (moved - expected).norm() <= 1e-10 * (expected - theta).norm()
        assert optimizer.last_step.new_loss == pytest.approx(F.cross_entropy(model(x), y).item())
        assert loss.item() == optimizer.last_step.loss

    def test_kl_is_measured_on_the_closure(self):
        x, y = data()
        model = make_model()
        before = Categorical(logits=model(x).detach())
        optimizer = NaturalCG(model.parameters())
        optimizer.step(
            policy_gradient(model, x, y), curvature_closure=policy_gradient(model, x[:4], y[:4])
        )
        after = Categorical(logits=model(x).detach())
        measured = torch.distributions.kl_divergence(before, after).mean().item()
        assert optimizer.last_step.kl == pytest.approx(measured)

    def test_it_must_be_callable(self):
        model = make_model()
        with pytest.raises(TypeError, match="closure"):
            NaturalCG(model.parameters()).step(cross_entropy(model, *data()), curvature_closure=3)
