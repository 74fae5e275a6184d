"""Closure form (a): the Gauss-Newton matrix of every recognised loss function."""

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import real
from torch import nn

from ngd_optim import NaturalCG, linearize
from ngd_optim.tracing.losses import LOSSES

N, C, T = 5, 4, 6
POSITIVE = torch.rand(N, C, dtype=torch.float64) + 0.5


def labels():
    return torch.randint(0, C, (N,))


def distribution():
    return real(N, C).softmax(-1)


REDUCTIONS = ["mean", "sum"]

# Convex in the output: the matrix is JᵀHJ with the exact H. name: make a function of the output z, shape (N, C)
CONVEX = {
    "cross_entropy": lambda r: (lambda y: lambda z: F.cross_entropy(z, y, reduction=r))(labels()),
    "label_smoothing": lambda r: (
        lambda y: lambda z: F.cross_entropy(z, y, label_smoothing=0.1, reduction=r)
    )(labels()),
    "class_weights": lambda r: (lambda y, w: lambda z: F.cross_entropy(z, y, w, reduction=r))(
        labels(), POSITIVE[0]
    ),
    "ignore_index": lambda r: (
        lambda y: (
            lambda z: F.cross_entropy(z, y.index_fill(0, torch.tensor([1]), -100), reduction=r)
        )
    )(labels()),
    "soft_targets": lambda r: (lambda y: lambda z: F.cross_entropy(z, y, reduction=r))(
        distribution()
    ),
    "bce_with_logits": lambda r: (
        lambda y: (
            lambda z: F.binary_cross_entropy_with_logits(z, y, pos_weight=POSITIVE[0], reduction=r)
        )
    )(distribution()),
    "bce": lambda r: (lambda y: lambda z: F.binary_cross_entropy(z.sigmoid(), y, reduction=r))(
        distribution()
    ),
    "mse": lambda r: (lambda y: lambda z: F.mse_loss(z, y, reduction=r))(real(N, C)),
    "huber": lambda r: (lambda y: lambda z: F.huber_loss(z, y, delta=0.7, reduction=r))(real(N, C)),
    "smooth_l1": lambda r: (lambda y: lambda z: F.smooth_l1_loss(z, y, beta=0.7, reduction=r))(
        real(N, C)
    ),
    "poisson": lambda r: (lambda y: lambda z: F.poisson_nll_loss(z, y, reduction=r))(
        real(N, C).exp().round()
    ),
    "soft_margin": lambda r: (lambda y: lambda z: F.soft_margin_loss(z, y, reduction=r))(
        real(N, C).sign()
    ),
    "multilabel": lambda r: (lambda y: lambda z: F.multilabel_soft_margin_loss(z, y, reduction=r))(
        real(N, C).sign().clamp(min=0)
    ),
}


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C)).double()


def flat_form(function, params):
    """The parameters as one flat vector, and a function of them as a function of that."""
    flat = torch.cat([p.detach().flatten() for p in params])

    def at(theta):
        pieces = theta.split([p.numel() for p in params])
        return function([piece.view_as(p) for piece, p in zip(pieces, params, strict=True)])

    return flat, at


def outputs_of(model, x):
    names = [name for name, _ in model.named_parameters()]
    return lambda tensors: torch.func.functional_call(
        model, dict(zip(names, tensors, strict=True)), (x,)
    )


def check(closure, params, matrix, rtol=1e-9):
    point = linearize(closure, params)
    v = torch.randn(len(matrix), dtype=torch.float64)
    assert (point.curvature(v) - matrix @ v).norm() <= rtol * (matrix @ v).norm()
    plain = torch.autograd.grad(closure(), params)
    expected = torch.cat([g.flatten() for g in plain])
    assert (point.gradient - expected).norm() <= 1e-12 * expected.norm()
    return point


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", CONVEX)
def test_convex_losses_have_their_own_hessian(model, name, reduction):
    x, loss, params = real(N, 3), CONVEX[name](reduction), list(model.parameters())
    flat, z_of = flat_form(outputs_of(model, x), params)
    inner = (lambda z: z.sigmoid()) if name == "bce" else (lambda z: z)
    jacobian = torch.func.jacrev(lambda t: inner(z_of(t)))(flat).flatten(0, 1)
    z = inner(model(x)).detach()
    outer = (lambda p: loss(p.logit())) if name == "bce" else loss
    hessian = torch.autograd.functional.hessian(lambda u: outer(u.view_as(z)), z.flatten())
    matrix = jacobian.T @ hessian @ jacobian
    check(lambda: loss(model(x)), params, matrix)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_nll_loss_has_the_matrix_of_cross_entropy(model, reduction, weighted):
    x, y, params = real(N, 3), labels(), list(model.parameters())
    weight = POSITIVE[0] if weighted else None
    y[0] = -100
    v = real(sum(p.numel() for p in params))
    by_nll, by_cross_entropy = (
        linearize(lambda f=f: f(model(x)).sum(), params)
        for f in (
            lambda z: F.nll_loss(z.log_softmax(-1), y, weight, reduction=reduction),
            lambda z: F.cross_entropy(z, y, weight, reduction=reduction),
        )
    )
    for a, b in (
        (by_nll.gradient, by_cross_entropy.gradient),
        (by_nll.curvature(v), by_cross_entropy.curvature(v)),
    ):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
def test_kl_div_has_the_matrix_of_cross_entropy_with_soft_targets(model, reduction, log_target):
    x, y, params = real(N, 3), distribution(), list(model.parameters())
    scale = {"batchmean": 1 / N, "mean": 1 / (N * C)}.get(reduction, 1.0)
    target = y.log() if log_target else y
    v = real(sum(p.numel() for p in params))
    a = linearize(
        lambda: F.kl_div(
            model(x).log_softmax(-1), target, reduction=reduction, log_target=log_target
        ).sum(),
        params,
    )
    b = linearize(lambda: scale * F.cross_entropy(model(x), y, reduction="sum"), params)
    assert (a.gradient - b.gradient).norm() <= 1e-12 * b.gradient.norm()
    assert (a.curvature(v) - b.curvature(v)).norm() <= 1e-12 * b.curvature(v).norm()


@pytest.mark.parametrize("shape", ["full", "column", "short"])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "none"])
def test_gaussian_nll_has_the_fisher_matrix_of_a_normal(reduction, shape):
    width = C if shape == "full" else 1
    model = nn.Linear(3, C + width).double()
    x, y, params = real(N, 3), real(N, C), list(model.parameters())

    def mean_and_variance(z):
        return z[:, :C], z[:, C:].exp()

    def gaussian():
        mean, variance = mean_and_variance(model(x))
        return F.gaussian_nll_loss(
            mean, y, variance.squeeze(-1) if shape == "short" else variance, reduction=reduction
        ).sum()

    scale = 1 / C if reduction == "mean" else N

    def normal():
        mean, variance = mean_and_variance(model(x))
        return gaussian(), torch.distributions.Independent(
            torch.distributions.Normal(mean, variance.sqrt()), 1
        )

    v = real(sum(p.numel() for p in params))
    a, b = linearize(gaussian, params), linearize(normal, params)
    assert (a.curvature(v) - scale * b.curvature(v)).norm() <= 1e-10 * a.curvature(v).norm()


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "none"])
def test_cosine_embedding_is_least_squares_of_unit_vectors(model, reduction):
    x, y, params = real(N, 3), real(N, C), list(model.parameters())
    target = torch.tensor([1, 1, 1, -1, -1])
    flat, z_of = flat_form(outputs_of(model, x), params)
    jacobian = torch.func.jacrev(lambda t: F.normalize(z_of(t), dim=-1))(flat)
    active = (target > 0) | (F.cosine_similarity(model(x), y) > 0.1)
    matrix = sum(j.T @ j for j, use in zip(jacobian, active, strict=True) if use)

    def closure():
        return F.cosine_embedding_loss(model(x), y, target, margin=0.1, reduction=reduction).sum()

    check(closure, params, matrix / N if reduction == "mean" else matrix)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "none"])
def test_ctc_has_the_fisher_matrix_of_its_frames(reduction):
    model = nn.Linear(3, C).double()
    x, params = real(T, N, 3), list(model.parameters())
    targets, target_lengths = torch.randint(1, C, (N, 3)), torch.tensor([3, 2, 1, 3, 2])
    lengths = torch.tensor([6, 6, 5, 6, 4])

    def closure():
        return F.ctc_loss(
            model(x).log_softmax(-1), targets, lengths, target_lengths, reduction=reduction
        ).sum()

    flat, z_of = flat_form(outputs_of(model, x), params)
    jacobian, p = torch.func.jacrev(z_of)(flat), model(x).softmax(-1).detach()
    matrix = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for n in range(N):
        for t in range(lengths[n]):
            h = p[t, n].diag() - p[t, n].outer(p[t, n])
            part = jacobian[t, n].T @ h @ jacobian[t, n]
            matrix += part / (N * target_lengths[n]) if reduction == "mean" else part
    check(closure, params, matrix)


def test_every_recognised_loss_is_positive_semidefinite():
    """In its arguments, at random points: what CG relies on."""
    arguments = {
        F.ctc_loss: lambda z: (
            z.log_softmax(-1)[:, None],
            torch.tensor([[1, 2]]),
            torch.tensor([N]),
            torch.tensor([2]),
        ),
        F.nll_loss: lambda z: (z.log_softmax(-1), labels()),
        F.kl_div: lambda z: (z.log_softmax(-1), distribution()),
        F.cross_entropy: lambda z: (z, labels()),
        F.binary_cross_entropy: lambda z: (z.sigmoid(), distribution()),
        F.gaussian_nll_loss: lambda z: (z, real(N, C), z.square() + 0.1),
        F.cosine_embedding_loss: lambda z: (z, real(N, C), torch.ones(N)),
        F.soft_margin_loss: lambda z: (z, real(N, C).sign()),
    }
    for function in LOSSES:
        call = arguments.get(function, lambda z: (z, distribution()))
        z = nn.Parameter(real(N, C))
        fixed = torch.get_rng_state()

        def closure(function=function, call=call, z=z, fixed=fixed):
            torch.set_rng_state(fixed)
            return function(*call(z))

        point = linearize(closure, [z])
        matrix = torch.stack([point.curvature(e) for e in torch.eye(N * C, dtype=torch.float64)])
        assert torch.allclose(matrix, matrix.T, atol=1e-12)
        assert torch.linalg.eigvalsh(matrix).min() >= -1e-12 * matrix.norm(), function.__name__


class TestSeveralLosses:
    def test_added_and_weighted(self, model):
        x, y, t, params = real(N, 3), labels(), real(N, C), list(model.parameters())

        def total():
            z = model(x)
            return F.cross_entropy(z, y) + 0.3 * F.mse_loss(z.tanh(), t)

        parts = [
            linearize(lambda: F.cross_entropy(model(x), y), params),
            linearize(lambda: 0.3 * F.mse_loss(model(x).tanh(), t), params),
        ]
        v = real(sum(p.numel() for p in params))
        expected = sum(part.curvature(v) for part in parts)
        assert (linearize(total, params).curvature(v) - expected).norm() <= 1e-12 * expected.norm()

    def test_weight_penalty_keeps_its_hessian(self, model):
        x, y, params = real(N, 3), labels(), list(model.parameters())
        v = real(sum(p.numel() for p in params))
        plain = linearize(lambda: F.cross_entropy(model(x), y), params)
        penalised = linearize(
            lambda: (
                F.cross_entropy(model(x), y)
                + 0.05 * sum(p.square().sum() for p in model.parameters())
            ),
            params,
        )
        expected = plain.curvature(v) + 0.1 * v
        assert (penalised.curvature(v) - expected).norm() <= 1e-12 * expected.norm()

    def test_penalty_with_negative_curvature_acts_by_its_gradient_alone(self, model, caplog):
        x, y, params = real(N, 3), labels(), list(model.parameters())
        v = real(sum(p.numel() for p in params))
        plain = linearize(lambda: F.cross_entropy(model(x), y), params)

        def closure():
            return F.cross_entropy(model(x), y) + sum(
                (p.square() - 1).square().sum() for p in model.parameters()
            )

        with caplog.at_level("INFO", logger="ngd_optim"):
            penalised = linearize(closure, params)
        assert torch.equal(penalised.curvature(v), plain.curvature(v))
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(closure(), params)])
        assert (penalised.gradient - expected).norm() <= 1e-12 * expected.norm()
        assert "negative curvature" in caplog.text

    def test_absolute_penalty_has_no_hessian(self, model):
        x, y, params = real(N, 3), labels(), list(model.parameters())
        optimizer = NaturalCG(params)
        optimizer.step(
            lambda: (
                F.cross_entropy(model(x), y) + 1e-3 * sum(p.abs().sum() for p in model.parameters())
            )
        )
        assert optimizer.last_step.accepted
