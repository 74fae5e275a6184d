"""Gaussian processes of GPyTorch: Functions of its own, Cholesky factors, caches and stochastic estimates."""

import warnings

import pytest
import torch
from helpers.problems import assert_near

from ngd_optim import NaturalCG, linearize

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gpytorch = pytest.importorskip("gpytorch")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

X = torch.linspace(0, 1, 30, dtype=torch.float64)
Y = (6 * X).sin() + 0.1 * torch.randn(30, generator=torch.Generator().manual_seed(0)).double()


class Exact(gpytorch.models.ExactGP):
    def __init__(self, likelihood):
        super().__init__(X, Y, likelihood)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


class Sparse(gpytorch.models.ApproximateGP):
    def __init__(self):
        points = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
        q = gpytorch.variational.CholeskyVariationalDistribution(6)
        super().__init__(gpytorch.variational.VariationalStrategy(self, points, q))
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def exact():
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = Exact(likelihood).double().train()
    likelihood.train()
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    return list(model.parameters()), lambda: -objective(model(X), Y)


def sparse():
    likelihood, model = gpytorch.likelihoods.GaussianLikelihood().double(), Sparse().double()
    model(X[:, None])  # starts the variational distribution at the prior
    objective = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=30)
    params = [*model.parameters(), *likelihood.parameters()]
    return params, lambda: -objective(model(X[:, None]), Y)


def in_plain_operations(params):
    """The negative marginal likelihood of :func:`exact` (Rasmussen and Williams 2006, equation 2.30), of 30 points."""
    noise, mean, scale, length = (p.reshape(()) for p in params)
    softplus = torch.nn.functional.softplus
    distances = (X[:, None] - X[None]).square() / softplus(length).square()
    covariance = softplus(scale) * (-distances / 2).exp()
    covariance = covariance + (softplus(noise) + 1e-4) * torch.eye(30, dtype=torch.float64)
    return -torch.distributions.MultivariateNormal(mean.expand(30), covariance).log_prob(Y) / 30


MAKERS = [exact, sparse]


@pytest.mark.parametrize("make", MAKERS)
def test_it_trains(make):
    params, closure = make()
    optimizer = NaturalCG(params)
    losses = [optimizer.step(closure).item() for _ in range(15)]
    adam_params, adam_closure = make()
    adam = torch.optim.Adam(adam_params, lr=0.05)
    for _ in range(60):
        adam.zero_grad()
        loss = adam_closure()
        loss.backward()
        adam.step()
    assert losses[-1] < losses[0] - 0.3
    assert losses[-1] < loss.item()


def displaced_gradient(params, closure, d):
    start = [p.detach().clone() for p in params]
    pieces = torch.split(d, [p.numel() for p in params])
    with torch.no_grad():
        for p, piece in zip(params, pieces, strict=True):
            p.add_(piece.view_as(p))
    gradient = torch.autograd.grad(closure(), params, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        for p, value in zip(params, start, strict=True):
            p.copy_(value)
    return torch.cat([g.flatten() for g in gradient])


@pytest.mark.parametrize("make", MAKERS)
def test_its_products_are_differences_of_its_gradient(make):
    params, closure = make()
    with torch.no_grad():
        for p in params:
            p.add_(0.1 * torch.randn_like(p))
    point = linearize(closure, params)
    v, h = torch.randn_like(point.gradient), 1e-5
    ahead, behind = (displaced_gradient(params, closure, side * h * v) for side in (1, -1))
    assert point.kind == "hessian"
    assert_near(point.gradient, displaced_gradient(params, closure, 0 * v), 1e-8)
    assert_near(point.curvature(v), (ahead - behind) / (2 * h), 1e-4)


def test_the_marginal_likelihood_has_its_own_hessian():
    params, closure = exact()
    assert [p.numel() for p in params] == [1, 1, 1, 1]
    assert closure().item() == pytest.approx(in_plain_operations(params).item(), rel=1e-8)
    point = linearize(closure, params)
    hessian = torch.autograd.functional.hessian(
        lambda theta: in_plain_operations(list(theta)),
        torch.cat([p.flatten() for p in params]).detach(),
    )
    found = torch.stack([point.curvature(e) for e in torch.eye(4, dtype=torch.float64)])
    assert_near(found, hessian, 1e-4)
