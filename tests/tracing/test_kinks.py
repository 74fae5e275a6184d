"""Losses by hand that end in a kink: Gauss-Newton with the parabola of iteratively reweighted least squares."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import real
from torch import nn

from ngd_optim import NaturalCG, least_squares, linearize
from ngd_optim.distributed import ALONE
from ngd_optim.linearization import linearize_mean
from ngd_optim.parameters import FlatParameters
from ngd_optim.recognised import irls_weight
from ngd_optim.tracing import TracedClosure

N, C = 6, 3
torch.manual_seed(1)
TARGET = real(N, C)
SIGNS = real(N, C).sign()


def pinball(z):
    return torch.maximum(0.9 * (TARGET - z), 0.1 * (z - TARGET)).mean()


def huber(z):
    r = z - TARGET
    return torch.where(r.abs() < 0.5, 0.5 * r**2, 0.5 * (r.abs() - 0.25)).mean()


def each(h, size):
    """The diagonal of weights that are the mean's."""
    return torch.diag(h.expand(N, C).flatten() / size)


# name: loss of the output z, shape (N, C), and the dense Hessian that it takes at z
CURVED = {
    "abs": (lambda z: (z - TARGET).abs().mean(), lambda z: each(irls_weight(z - TARGET), N * C)),
    "abs_operator": (
        lambda z: 3 * abs(TARGET - z).sum() / N,
        lambda z: each(3 * irls_weight(z - TARGET), N),
    ),
    "weights": (
        lambda z: ((z - TARGET).abs() * TARGET.square()).sum(),
        lambda z: each(irls_weight(z - TARGET, TARGET.square()), 1),
    ),
    "pinball": (pinball, lambda z: each(irls_weight(z - TARGET, 0.5), N * C)),
    "minimum": (
        lambda z: -torch.minimum(z, TARGET).mean(),
        lambda z: each(irls_weight(z - TARGET, 0.5), N * C),
    ),
    "hinge": (
        lambda z: F.relu(1 - SIGNS * z).mean(),
        lambda z: each(irls_weight(1 - SIGNS * z, 0.5), N * C),
    ),
    "hinge_by_clamp": (
        lambda z: (1 - SIGNS * z).clamp(min=0).mean(),
        lambda z: each(irls_weight(1 - SIGNS * z, 0.5), N * C),
    ),
    "power": (
        lambda z: (z - TARGET).abs().pow(1.5).mean(),
        lambda z: each(1.5 * irls_weight(z - TARGET).sqrt(), N * C),
    ),
    "rows": (
        lambda z: (z - TARGET).norm(dim=1).mean(),
        lambda z: each(irls_weight((z - TARGET).norm(dim=1, keepdim=True)), N),
    ),
    "huber": (
        huber,
        lambda z: each(
            torch.where(
                (z - TARGET).abs() < 0.5,
                1.0,
                irls_weight(z - TARGET, 0.5 * ((z - TARGET).abs() >= 0.5)),
            ),
            N * C,
        ),
    ),
    "concave": (lambda z: (z - TARGET).square().mean() - 2 * z.abs().mean(), None),
}


@pytest.mark.parametrize("backend", ["double-backward", "torch.func"])
@pytest.mark.parametrize("name", CURVED)
def test_the_matrix_is_that_of_the_parabola(name, backend):
    loss, hessian = CURVED[name]
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)).double(), real(N, 4)
    params = list(model.parameters())
    point = linearize(lambda: loss(model(x)), params, backend=backend)
    assert point.kind == "ggn"
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(z, params, retain_graph=True)])
        for z in model(x).flatten()
    ]
    jacobian, z = torch.stack(rows), model(x).detach()
    dense = 2 * torch.eye(N * C).double() / (N * C) if hessian is None else hessian(z)
    v = real(jacobian.shape[1])
    expected = jacobian.T @ (dense @ (jacobian @ v))
    assert (point.curvature(v) - expected).norm() <= 1e-9 * expected.norm()
    gradient = torch.autograd.grad(loss(model(x)), params)
    assert torch.allclose(point.gradient, torch.cat([g.flatten() for g in gradient]))


PENALTIES = {
    "l1": lambda w: (w.abs().sum(), irls_weight(w)),
    "norm": lambda w: (torch.norm(w), irls_weight(w.norm()).expand_as(w)),
    "groups": lambda w: (w.norm(dim=0).sum(), irls_weight(w.norm(dim=0)).expand_as(w)),
    "elastic": lambda w: (w.abs().sum() + 2 * w.square().sum(), irls_weight(w) + 4),
}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_beside_a_recognised_loss_has_its_parabola(name, zero):
    layer, x, y = nn.Linear(4, C).double(), real(N, 4), torch.arange(N) % C
    if zero and name != "l1":  # finite gradients, but no second derivative
        nn.init.zeros_(layer.weight)

    def curvature(closure):
        return linearize(closure, [layer.weight]).curvature(v)

    v = real(C * 4)
    both = curvature(lambda: F.cross_entropy(layer(x), y) + 0.1 * PENALTIES[name](layer.weight)[0])
    alone = curvature(lambda: F.cross_entropy(layer(x), y))
    expected = alone + 0.1 * PENALTIES[name](layer.weight.detach())[1].flatten() * v
    assert (both - expected).norm() <= 1e-9 * expected.norm()


def test_a_rectified_network_is_not_taken_for_a_hinge():
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, C)).double(), real(N, 4), 1
    assert linearize(lambda: model(x).exp().mean() + y, model.parameters()).kind == "hessian"
    point = linearize(lambda: F.mse_loss(model(x), TARGET), model.parameters())
    assert point.kind == "ggn"
    assert point._point.outputs == N * C


def test_the_median_is_found_by_absolute_errors():
    data = torch.cat([real(101), 1e3 + real(20)])
    theta = nn.Parameter(torch.tensor(30.0, dtype=torch.float64))
    optimizer = NaturalCG([theta])
    for _ in range(30):
        optimizer.step(lambda: (data - theta).abs().mean())
    assert abs(theta.item() - data.median().item()) < 0.02


def test_a_norm_at_zero_does_not_stop_the_step():
    """Its gradient is finite, and its second derivative is not."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).double()
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)
    x, y = real(60, 4), torch.arange(60) % C
    optimizer = NaturalCG(model.parameters())

    def closure():
        return F.cross_entropy(model(x), y) + 1e-3 * sum(torch.norm(p) for p in model.parameters())

    first = optimizer.step(closure)
    for _ in range(20):
        optimizer.step(closure)
        assert optimizer.last_step.accepted
    assert optimizer.last_step.loss < 0.6 * first


def soften(r, width):
    """Huber's function, with slope 1 far away."""
    return F.huber_loss(r, torch.zeros_like(r), reduction="none", delta=width) / width


ROUNDED = {
    "abs": (lambda z: (z - TARGET).abs().mean(), lambda z, w: soften(z - TARGET, w).mean()),
    "hinge": (
        lambda z: (1 - SIGNS * z).relu().sum(),
        lambda z, w: (0.5 * (1 - SIGNS * z) + 0.5 * soften(1 - SIGNS * z, w)).sum(),
    ),
    "beside_a_loss": (
        lambda z: F.mse_loss(z, TARGET) + z.abs().sum(),
        lambda z, w: F.mse_loss(z, TARGET) + soften(z, w).sum(),
    ),
    "l1_loss": (lambda z: F.l1_loss(z, TARGET), lambda z, w: soften(z - TARGET, w).mean()),
    "l1_loss_and_its_share": (
        lambda z: 3 * F.l1_loss(z, TARGET) + 0.1 * z.square().sum(),
        lambda z, w: 3 * soften(z - TARGET, w).mean() + 0.1 * z.square().sum(),
    ),
    "huber_loss": (
        lambda z: F.huber_loss(z, TARGET, delta=0.01),
        lambda z, w: 0.01 * soften(z - TARGET, w).mean(),
    ),
    "huber_loss_of_rows": (
        lambda z: F.huber_loss(z, TARGET, reduction="none", delta=0.01).sum(1).mean(),
        lambda z, w: 0.01 * soften(z - TARGET, w).sum(1).mean(),
    ),
    "smooth_l1_loss": (
        lambda z: F.smooth_l1_loss(z, TARGET, reduction="sum", beta=0.01),
        lambda z, w: soften(z - TARGET, w).sum(),
    ),
    "hinge_embedding_loss": (
        lambda z: F.hinge_embedding_loss(z, -torch.ones_like(z), margin=0.3),
        lambda z, w: (0.5 * (0.3 - z) + 0.5 * soften(0.3 - z, w)).mean(),
    ),
    "margin_ranking_loss": (
        lambda z: F.margin_ranking_loss(z, TARGET, SIGNS, margin=0.1),
        lambda z, w: (lambda u: 0.5 * u + 0.5 * soften(u, w))(0.1 - SIGNS * (z - TARGET)).mean(),
    ),
}
# name: what is zero at the kink, and the slope of the absolute value; None for Huber's function
KINK_OF = {
    "abs": (lambda z: z - TARGET, 1 / (N * C)),
    "hinge": (lambda z: 1 - SIGNS * z, 0.5),
    "beside_a_loss": (lambda z: z, 1.0),
    "l1_loss": (lambda z: z - TARGET, 1 / (N * C)),
    "l1_loss_and_its_share": (lambda z: z - TARGET, 3 / (N * C)),
    "huber_loss": (lambda z: z - TARGET, None),
    "huber_loss_of_rows": (lambda z: z - TARGET, None),
    "smooth_l1_loss": (lambda z: z - TARGET, None),
    "hinge_embedding_loss": (lambda z: 0.3 - z, 0.5 / (N * C)),
    "margin_ranking_loss": (lambda z: 0.1 - SIGNS * (z - TARGET), 0.5 / (N * C)),
}


@pytest.mark.parametrize("closures", [1, 2])
@pytest.mark.parametrize("name", ROUNDED)
def test_the_gradient_of_the_model_is_that_of_the_rounded_loss(name, closures):
    loss, rounded = ROUNDED[name]
    z = nn.Parameter(real(N, C))
    parameters = FlatParameters([{"params": [z]}])
    runs = [TracedClosure(lambda: loss(1 * z), parameters) for _ in range(closures)]
    point = linearize_mean(parameters, "auto", "auto", {}, ALONE, runs, smoothing=0.5)
    kink, slope = KINK_OF[name]
    r = kink(z).detach().abs()
    assert (r < 0.5 * r.mean()).any()
    expected = torch.autograd.grad(rounded(z, 0.5 * r.mean().item()), z)[0].flatten()
    true = torch.autograd.grad(loss(z), z)[0].flatten()
    assert torch.allclose(point.model_gradient, expected, rtol=1e-9, atol=1e-12)
    assert torch.allclose(point.gradient, true)
    assert not torch.allclose(expected, true)
    # Σ c (w − |r|)² / (2w), of the kinks that are nearer than w.
    width = 0.5 * r.mean()
    if slope is None:  # Huber's function hides less
        assert point.hidden_by_rounding > 0
    else:
        hidden = slope * (width - r).clamp(min=0).square().sum().item() / (2 * width.item())
        assert point.hidden_by_rounding == pytest.approx(hidden, rel=1e-9)


FLAT = {
    "relu": lambda r: r.relu().sum(),
    "clamp": lambda r: -(-r).clamp(max=0).sum(),
    "maximum": lambda r: torch.maximum(torch.zeros_like(r), r).sum(),
    "minimum": lambda r: -torch.minimum(-r, torch.zeros_like(r)).sum(),
    "hinge_embedding_loss": lambda r: F.hinge_embedding_loss(
        -r, -torch.ones_like(r), margin=0.0, reduction="sum"
    ),
    "both_sides": lambda r: torch.maximum(r, 0 * r).sum(),
}


@pytest.mark.parametrize("name", FLAT)
def test_a_hinge_has_little_curvature_where_it_is_flat(name):
    r = nn.Parameter(torch.tensor([-2.0, -0.4, -0.1, 0.2, 0.9, 2.4], dtype=torch.float64))
    parameters = FlatParameters([{"params": [r]}])
    run = TracedClosure(lambda: FLAT[name](1 * r), parameters)
    point = linearize_mean(parameters, "auto", "auto", {}, ALONE, [run], smoothing=0.5)
    size, width = r.detach().abs(), 0.5 * r.detach().abs().mean()
    expected = 0.5 / size.clamp(min=width)
    if name != "both_sides":
        expected[:1] *= (width / size[:1]) ** 2
    assert size[1] < width < size[0]
    assert torch.allclose(point.product(torch.ones_like(size)), expected, rtol=1e-9)


@pytest.mark.parametrize("distance", [F.pairwise_distance, lambda a, b: (a - b + 1e-6).norm(dim=1)])
@pytest.mark.parametrize("name", ["hinge_embedding_loss", "margin_ranking_loss", "mse_loss"])
def test_a_distance_that_a_loss_with_kinks_grows_with_is_curved(name, distance):
    a, b = nn.Parameter(real(N, C)), real(N, C)
    sign = torch.ones(N, dtype=torch.float64)
    sign[::2] = -1
    loss = {
        "hinge_embedding_loss": lambda d: F.hinge_embedding_loss(d, sign, margin=9.0),
        "margin_ranking_loss": lambda d: F.margin_ranking_loss(d, 0 * d, -sign, margin=9.0),
        "mse_loss": lambda d: F.mse_loss(d, 0 * sign),
    }[name]
    with_distance = linearize(lambda: loss(distance(1 * a, b)), [a])
    z = distance(a, b).detach()
    rows = torch.stack(
        [torch.autograd.grad(d, a, retain_graph=True)[0].flatten() for d in distance(a, b)]
    )
    v = real(N * C)
    leaf = z.clone().requires_grad_()
    expected = rows.T @ linearize(lambda: loss(1 * leaf), [leaf]).curvature(rows @ v)
    slope = torch.autograd.grad(loss(leaf), leaf)[0]
    if name != "mse_loss":  # the parabola of a norm that it falls with
        expected = expected + (irls_weight(z, slope.clamp(min=0))[:, None] * v.view(N, C)).flatten()
    assert (slope > 0).any()
    assert (with_distance.curvature(v) - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("solver", ["cg", "dense", "sample"])
def test_the_lasso_is_solved(solver):
    """Of an orthogonal design: shrinkage by λ, with zeros; by least squares too, which direct solvers are for."""
    target, shrinkage = torch.linspace(-2, 2, 21, dtype=torch.float64), 0.5
    for fit in (
        lambda w: 0.5 * F.mse_loss(w, target, reduction="sum"),
        lambda w: 21 * least_squares(w - target),
    ):
        w = nn.Parameter(torch.ones(21, dtype=torch.float64))
        optimizer = NaturalCG([w], solver=solver)
        for _ in range(60):
            optimizer.step(lambda fit=fit, w=w: fit(w) + shrinkage * w.abs().sum())
        expected = target.sign() * (target.abs() - shrinkage).relu()
        assert (w - expected).abs().max() < 1e-3


@pytest.mark.slow
def test_an_l1_penalty_of_a_network_ends_where_adam_and_lbfgs_do():
    """Not in the next local minimum: on average of some seeds."""
    peers = [0.727, 0.696, 0.781, 0.674]  # best of Adam, two rates, 2,500 steps, and of L-BFGS

    def train(seed):
        torch.manual_seed(seed)
        first, last = (nn.Linear(*sizes, dtype=torch.float64) for sizes in ((4, 6), (6, 3)))
        model = nn.Sequential(first, nn.Tanh(), last)
        x, y = torch.randn(30, 4, dtype=torch.float64), torch.randint(0, 3, (30,))
        optimizer = NaturalCG(model.parameters())

        def closure():
            penalty = sum(p.abs().sum() for p in model.parameters())
            return F.cross_entropy(model(x), y) + 1e-2 * penalty

        for _ in range(300):
            optimizer.step(closure)
        return optimizer.last_step.new_loss

    ratios = [train(seed) / peer for seed, peer in zip(range(4, 8), peers, strict=True)]
    assert sum(ratios) / len(ratios) < 1.05


def test_a_resumed_run_rounds_as_wide():
    def run(steps, resumes):
        w = nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64))
        optimizer = NaturalCG([w])
        for i in range(steps):
            if resumes and i == steps // 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = NaturalCG([w])
                optimizer.load_state_dict(saved)
            optimizer.step(lambda: F.mse_loss(w.sin(), TARGET.flatten()[:8]) + 0.1 * w.abs().sum())
        return w, optimizer.state[w]["smoothing"]

    (w, smoothing), (other, same) = run(20, False), run(20, True)
    assert torch.equal(w, other)
    assert smoothing == same < 1
