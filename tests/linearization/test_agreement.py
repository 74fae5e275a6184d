"""At its first step a closure is compared with its gradient, and its products with what they must be."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import assert_near, real
from torch import nn
from torch.distributions import Categorical, Normal
from torch.nn.utils import parametrizations

from ngd_optim import NaturalCG, linearize

WARNING = "the loss does not move as its gradient says"
DTYPES = [torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def warned(caplog):
    return any(WARNING in record.message for record in caplog.records)


def make_net(dtype, activation=nn.Tanh, *, out=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), activation(), nn.Linear(16, out)).to(dtype)


def data(dtype, n=40, out=3):
    return torch.randn(n, 6).to(dtype), torch.randn(n, out).to(dtype)


# The loss and its gradient.


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return (4 * z).round() / 4

    @staticmethod
    def backward(ctx, g):
        return g


class Reversed(torch.autograd.Function):
    """The gradient reversal of domain adaptation."""

    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


def straight_through(net, x, y):
    return F.mse_loss(Round.apply(net(x)), y)


def straight_through_weights(net, x, y):
    w = Round.apply(net[0].weight)
    return F.mse_loss(net[2](F.linear(x, w, net[0].bias).tanh()), y)


def reversed_gradient(net, x, y):
    return F.mse_loss(net[2](Reversed.apply(net[0](x)).tanh()), y)


def scaled_by_a_hook(net, x, y):
    z = net(x)
    z.register_hook(lambda g: 0.1 * g)
    return F.mse_loss(z, y)


def renormalised_weights(net, x, y):
    """As ``Embedding(max_norm=...)`` does."""
    with torch.no_grad():
        net[0].weight.copy_(F.normalize(net[0].weight, dim=1))
    return F.mse_loss(net(x), y)


def clamped_behind_autograd(net, x, y):
    z = net(x) * 1
    with torch.no_grad():
        z.mul_(0.5)
    return F.mse_loss(z * y, y)


WRONG = [
    straight_through,
    straight_through_weights,
    reversed_gradient,
    scaled_by_a_hook,
    renormalised_weights,
    clamped_behind_autograd,
]


# In float32 a difference is as long as the steps of a straight-through estimator, and follows it.
WRONG_IN_FLOAT32 = [reversed_gradient, scaled_by_a_hook, clamped_behind_autograd]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(
    ("loss", "dtype"),
    [(loss, torch.float64) for loss in WRONG]
    + [(loss, torch.float32) for loss in WRONG_IN_FLOAT32],
)
def test_a_loss_that_does_not_follow_its_gradient_is_told(loss, scale, dtype, caplog):
    net, (x, y) = make_net(dtype), data(dtype)
    if loss is renormalised_weights:
        loss(net, x, y)  # it is projected already
    NaturalCG(net.parameters()).step(lambda: scale * loss(net, x, y))
    assert warned(caplog)


# No false alarms. Each: a model or parameters, and a loss of them.


def classifier(dtype, activation):
    net, (x, _) = make_net(dtype, activation), data(dtype)
    return net, lambda: F.cross_entropy(net(x), torch.arange(40) % 3)


def regression(dtype, loss=F.mse_loss, activation=nn.Tanh):
    net, (x, y) = make_net(dtype, activation), data(dtype)
    return net, lambda: loss(net(x), y)


def deep(dtype):
    torch.manual_seed(1)
    layers = [module for _ in range(8) for module in (nn.Linear(6, 6), nn.ReLU())]
    net, (x, _) = nn.Sequential(*layers, nn.Linear(6, 3)).to(dtype), data(dtype)
    return net, lambda: F.cross_entropy(net(x), torch.arange(40) % 3)


def convolutions(dtype):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(36, 3),
    ).to(dtype)
    x = torch.randn(20, 1, 8, 8).to(dtype)
    return net, lambda: F.cross_entropy(net(x), torch.arange(20) % 3)


def policy(dtype):
    """Advantages with zero mean, so that the loss is zero and all the gradient is in products."""
    net, (x, _) = make_net(dtype), data(dtype)
    with torch.no_grad():
        actions = Categorical(logits=net(x)).sample()
        old = Categorical(logits=net(x)).log_prob(actions)
    advantages = torch.randn(40).to(dtype)
    advantages = (advantages - advantages.mean()) / advantages.std()

    def closure():
        prediction = Categorical(logits=net(x))
        ratio = (prediction.log_prob(actions) - old).exp()
        return -(ratio * advantages).mean(), prediction

    return net, closure


def policy_of_ratios(dtype):
    """The same with the old prediction detached in the closure."""
    net, (x, y) = make_net(dtype), data(dtype)
    advantages = (y[:, 0] - y[:, 0].mean()) / y[:, 0].std()

    def closure():
        log_prob = Normal(net(x), 1.0).log_prob(y).sum(-1)
        return -((log_prob - log_prob.detach()).exp() * advantages).mean()

    return net, closure


def near_a_minimum(dtype):
    net, (x, y) = make_net(dtype), data(dtype)
    y = net(x).detach() + 1e-3 * y
    return net, lambda: F.mse_loss(net(x), y)


def far_from_zero(dtype):
    """A loss with a large constant, which hides how it moves."""
    net, (x, y) = make_net(dtype), data(dtype)
    return net, lambda: F.mse_loss(net(x), y) + 1e6


def absolute_penalty(dtype):
    net, (x, y) = make_net(dtype), data(dtype)
    return net, lambda: F.mse_loss(net(x), y) + 1e-2 * sum(p.abs().sum() for p in net.parameters())


def norm_penalty_at_zero(dtype):
    net, (x, y) = make_net(dtype), data(dtype)
    nn.init.zeros_(net[0].bias)
    return net, lambda: F.mse_loss(net(x), y) + 1e-2 * sum(p.norm() for p in net.parameters())


def temporal_difference(dtype):
    net, (x, y) = make_net(dtype, out=1), data(dtype, out=1)
    return net, lambda: F.mse_loss(net(x), (y + 0.9 * net(x.flip(0))).detach())


def normalised_loss(dtype):
    net, (x, y) = make_net(dtype), data(dtype)

    def closure():
        loss = F.mse_loss(net(x), y)
        return loss / loss.detach()

    return net, closure


def noise(dtype):
    net, (x, y) = make_net(dtype), data(dtype)
    return net, lambda: F.mse_loss(net(x + 0.1 * torch.randn_like(x)), y)


def variational(dtype):
    net, (x, y) = make_net(dtype, out=6), data(dtype)

    def closure():
        mean, log_scale = net(x).chunk(2, 1)
        return F.mse_loss(mean + torch.randn_like(mean) * log_scale.exp(), y) - log_scale.mean()

    return net, closure


def bfloat16_model(dtype):
    return regression(torch.bfloat16, activation=nn.GELU)


def bfloat16_inside(dtype):
    net, (x, y) = make_net(torch.float32), data(torch.float32)

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.mse_loss(net(x).float(), y)

    return net, closure


def recurrent(dtype):
    net = nn.LSTM(6, 5, batch_first=True).to(dtype)
    x, y = torch.randn(4, 7, 6).to(dtype), torch.randn(4, 7, 5).to(dtype)
    return net, lambda: F.mse_loss(net(x)[0], y)


def spectral(dtype):
    net = parametrizations.spectral_norm(nn.Linear(6, 3)).to(dtype)
    x, y = data(dtype)
    return net, lambda: F.mse_loss(net(x), y)


def large_weights(dtype):
    net, closure = regression(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(30)
    return net, closure


def one_number(dtype):
    w = nn.Parameter(torch.tensor(3.0).to(dtype))
    return nn.ParameterList([w]), lambda: (w - 1).square() + 0.1 * w.pow(4)


def prints_its_loss(dtype):
    net, (x, y) = make_net(dtype), data(dtype)

    def closure():
        loss = F.mse_loss(net(x), y)
        f"{loss.item():.3f}"
        return loss

    return net, closure


def pinn(dtype):
    net, x = make_net(dtype, out=1), data(dtype)[0].requires_grad_()

    def closure():
        u = net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope[:, 0] + u.square().squeeze(1) - 1).square().mean()

    return net, closure


CLEAN = {
    "tanh": lambda dtype: classifier(dtype, nn.Tanh),
    "relu": lambda dtype: classifier(dtype, nn.ReLU),
    "hardtanh": lambda dtype: classifier(dtype, nn.Hardtanh),
    "mse": regression,
    "l1": lambda dtype: regression(dtype, F.l1_loss),
    "huber_relu": lambda dtype: regression(dtype, F.huber_loss, nn.ReLU),
} | {
    make.__name__: make
    for make in (
        deep, convolutions, policy, policy_of_ratios, near_a_minimum, far_from_zero,
        absolute_penalty, norm_penalty_at_zero, temporal_difference, normalised_loss, noise,
        variational, bfloat16_model, bfloat16_inside, recurrent, spectral, large_weights,
        one_number, prints_its_loss, pinn,
    )
}  # fmt: skip


@dtypes
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_closure_is_left_in_peace(name, scale, dtype, caplog):
    model, closure = CLEAN[name](dtype)

    def scaled():
        returned = closure()
        return (
            (scale * returned[0], returned[1]) if isinstance(returned, tuple) else scale * returned
        )

    optimizer = NaturalCG(model.parameters())
    for _ in range(2):
        optimizer.step(scaled)
    assert not warned(caplog)


@pytest.mark.parametrize("seed", range(20))
def test_no_seed_of_a_relu_network_in_float32_is_suspected(seed, caplog):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    x, y = torch.randn(30, 6), torch.randint(3, (30,))
    NaturalCG(net.parameters()).step(lambda: F.cross_entropy(net(x), y))
    assert not warned(caplog)


# Where the closure is needed.


@pytest.mark.parametrize("reading", [False, True])
def test_a_loss_made_before_the_closure_is_refused(reading):
    net, (x, y) = make_net(torch.float64), data(torch.float64)
    loss = F.mse_loss(net(x), y)

    def closure():
        if reading:
            loss.item()
        return loss

    with pytest.raises(RuntimeError, match="the loss does not change with the parameters"):
        NaturalCG(net.parameters()).step(closure)


def weighed_by_its_value(net, x, y):
    loss = F.mse_loss(net(x), y)
    return loss * loss.item()  # held fixed: the gradient of half the square


def shown(net, x, y):
    loss = F.mse_loss(net(x), y)
    f"{loss.item()}"
    return loss


@pytest.mark.parametrize("loss", [weighed_by_its_value, shown])
def test_values_that_autograd_holds_fixed_are_held_fixed(loss, caplog):
    net, (x, y) = make_net(torch.float64), data(torch.float64)
    before, runs = F.mse_loss(net(x), y).item(), []

    def closure():
        runs.append(1)
        return loss(net, x, y)

    optimizer = NaturalCG(net.parameters())
    optimizer.step(closure)
    learnt = len(runs)
    for _ in range(3):
        optimizer.step(closure)
    assert len(runs) == learnt + 3
    assert learnt <= 10
    assert F.mse_loss(net(x), y).item() < 0.8 * before
    assert not warned(caplog)


class HiddenSquare(torch.autograd.Function):
    """In numpy, as much of scientific code is."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return torch.from_numpy(np.square(w.detach().numpy()))

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def test_what_goes_through_numpy_is_run_again_at_trial_points(caplog):
    caplog.set_level(logging.INFO, "ngd_optim")
    w, y = nn.Parameter(real(4)), torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    runs = []

    def closure():
        runs.append(1)
        return F.mse_loss(HiddenSquare.apply(w), y)

    optimizer = NaturalCG([w])
    for _ in range(5):
        before = len(runs)
        optimizer.step(closure)
        assert len(runs) - before >= 2
        assert optimizer.last_step.accepted
    assert closure().item() < 1e-2
    assert not warned(caplog)


def test_a_part_through_numpy_is_run_again_too(caplog):
    net, (x, y) = make_net(torch.float64), data(torch.float64)

    def closure():
        return F.mse_loss(net(x), y) + HiddenSquare.apply(net[0].weight).sum()

    optimizer, first = NaturalCG(net.parameters()), closure().item()
    for _ in range(8):
        optimizer.step(closure)
        assert optimizer.last_step.new_loss == pytest.approx(closure().item(), rel=1e-9)
    assert closure().item() < 0.8 * first
    assert not warned(caplog)


def test_a_closure_that_can_neither_be_replayed_nor_repeated_is_refused():
    net, (x, y) = make_net(torch.float64), data(torch.float64)
    generator = np.random.default_rng(0)

    def closure():
        noise = torch.from_numpy(generator.normal(size=(40, 3)))
        return F.mse_loss(F.rrelu(net(x), training=True), y + noise)

    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(
        RuntimeError, match=r"take the batch and all random numbers .* before the step"
    ):
        NaturalCG(net.parameters()).step(closure)
    assert all(map(torch.equal, net.parameters(), before))


def test_a_closure_that_cannot_be_replayed_is_run_again(caplog):
    net, (x, y) = make_net(torch.float64), data(torch.float64)
    optimizer = NaturalCG(net.parameters())
    losses = [
        optimizer.step(lambda: F.mse_loss(F.rrelu(net(x), training=True), y)).item()
        for _ in range(8)
    ]
    assert losses[-1] < 0.9 * losses[0]
    assert optimizer.last_step.accepted
    assert not warned(caplog)


# Products.


class SquareWithAKeptIntermediate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        ctx.twice = 2 * w.detach()
        return w * w

    @staticmethod
    def backward(ctx, g):
        return g * ctx.twice


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w * w

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class FusedSquares(torch.autograd.Function):
    """The sum of squares with its gradient computed in forward, as fused losses do."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(4 * z.pow(3))
        return z.pow(4).sum()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Solve(torch.autograd.Function):
    """The solution of a linear system by numpy, with its adjoint, as of a simulator."""

    @staticmethod
    def forward(ctx, w):
        matrix = np.diag(w.detach().numpy() ** 2 + 1) + 0.1
        ctx.matrix, ctx.solution = matrix, np.linalg.solve(matrix, np.ones(len(w)))
        ctx.save_for_backward(w)
        return torch.from_numpy(ctx.solution)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        adjoint = np.linalg.solve(ctx.matrix.T, g.numpy())
        return torch.from_numpy(-adjoint * ctx.solution) * 2 * ctx.saved_tensors[0]


def solution(w):
    return torch.linalg.solve(torch.diag(w.square() + 1) + 0.1, torch.ones(len(w)).double())


W, Y = real(6), real(6)
BAG, OFFSETS = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([0, 2, 3])


def bag(w):
    return torch.stack(
        [w.view(3, 2)[[0, 1]].mean(0), w.view(3, 2)[2], w.view(3, 2)[[1, 0]].mean(0)]
    )


def distances(w):
    """Of three points from three others, in plain operations."""
    z = w.view(3, 2)
    return (z[:, None] - 2 * z[None].flip(2) - 1).square().sum(-1).sqrt()


# Each: the closure; and the same in plain operations.
HARD = {
    "kept_intermediate": (
        lambda w: (SquareWithAKeptIntermediate.apply(w) - Y).square().sum(),
        lambda w: (w * w - Y).square().sum(),
    ),
    "kept_intermediate_of_outputs": (
        lambda w: F.mse_loss(SquareWithAKeptIntermediate.apply(w), Y),
        lambda w: F.mse_loss(w * w, Y),
    ),
    "once_differentiable": (
        lambda w: F.mse_loss(OnceDifferentiable.apply(w), Y),
        lambda w: F.mse_loss(w * w, Y),
    ),
    "once_differentiable_scalar": (
        lambda w: (OnceDifferentiable.apply(w) - Y).square().sum(),
        lambda w: (w * w - Y).square().sum(),
    ),
    "fused_loss": (
        lambda w: FusedSquares.apply(w.sin() - Y),
        lambda w: (w.sin() - Y).pow(4).sum(),
    ),
    "simulator": (
        lambda w: F.mse_loss(Solve.apply(w), Y),
        lambda w: F.mse_loss(solution(w), Y),
    ),
    "simulator_scalar": (
        lambda w: (Solve.apply(w) - Y).square().sum(),
        lambda w: (solution(w) - Y).square().sum(),
    ),
    "hidden_in_numpy": (
        lambda w: F.mse_loss(HiddenSquare.apply(w), Y),
        lambda w: F.mse_loss(w * w, Y),
    ),
    "embedding_bag": (
        lambda w: F.mse_loss(
            F.embedding_bag(BAG, w.view(3, 2), OFFSETS, mode="mean"), Y.view(3, 2)
        ),
        lambda w: F.mse_loss(bag(w), Y.view(3, 2)),
    ),
    "cdist": (
        lambda w: F.mse_loss(
            torch.cdist(w.view(3, 2), 2 * w.view(3, 2).flip(1) + 1),
            Y.exp().repeat(2)[:9].view(3, 3),
        ),
        lambda w: F.mse_loss(distances(w), Y.exp().repeat(2)[:9].view(3, 3)),
    ),
}


def dense(function, w, curvature):
    """The Hessian of the loss; or the Gauss-Newton matrix of an ``mse_loss``."""
    if curvature == "hessian":
        return torch.autograd.functional.hessian(function, w)
    outputs = []
    original = F.mse_loss
    F.mse_loss = lambda z, y: outputs.append(z) or original(z, y)
    try:
        jacobian = torch.autograd.functional.jacobian(
            lambda w: (outputs.clear(), function(w), outputs[0].flatten())[2], w
        )
    finally:
        F.mse_loss = original
    return 2 / len(jacobian) * jacobian.T @ jacobian


def matrix_of(point, n=6):
    return torch.stack([point.curvature(e) for e in torch.eye(n, dtype=torch.float64)])


@pytest.mark.parametrize("name", HARD)
def test_the_product_is_that_of_plain_operations(name):
    function, plain = HARD[name]
    w = nn.Parameter(W.clone())
    point = linearize(lambda: function(w), [w])
    exact = dense(plain, W, "hessian" if point.kind == "hessian" else "ggn")
    tolerance = 1e-6 if point.backend == "differences" else 1e-10
    assert_near(matrix_of(point), exact, tolerance)
    assert_near(point.gradient, torch.func.grad(plain)(W), 1e-10)


def gauss_newton(w):
    return F.mse_loss(w.sin() * w.roll(1), Y)


def fisher(w):
    prediction = Normal(w.sin() * w.roll(1), 1.3)
    return -prediction.log_prob(Y).mean(), prediction


@pytest.mark.parametrize("kind", ["ggn", "fisher", "hessian"])
def test_differences_are_right_for_every_metric(kind):
    w = nn.Parameter(W.clone())
    closure = {
        "ggn": lambda: gauss_newton(w),
        "fisher": lambda: fisher(w),
        "hessian": lambda: gauss_newton(w).sin(),
    }[kind]
    curvature = kind if kind == "hessian" else "auto"
    exact = linearize(closure, [w], curvature=curvature)
    point = linearize(closure, [w], curvature=curvature, backend="differences")
    assert (point.kind, point.backend) == (exact.kind, "differences")
    assert_near(matrix_of(point), matrix_of(exact), 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_deep_models_in_bfloat16_are_not_accused(seed, caplog):
    """Its rounding asks for walks along which no deep model is linear."""
    torch.manual_seed(seed)
    layers = [(nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh()) for _ in range(8)]
    model = nn.Sequential(*[part for layer in layers for part in layer], nn.Linear(16, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    x, y = torch.randn(32, 16), torch.arange(32) % 3

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x), y)

    NaturalCG(model.parameters()).step(closure)
    assert not warned(caplog)


def test_a_gradient_of_the_other_sign_is_seen_in_bfloat16(caplog):
    net = make_net(torch.float32)
    x, y = data(torch.float32)

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.mse_loss(Reversed.apply(net(x)), y + 3)

    NaturalCG(net.parameters()).step(closure)
    assert warned(caplog)
