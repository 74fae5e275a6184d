"""A closure that was recorded is replayed as it would run, but for what autograd holds fixed."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import assert_near, real
from torch import nn
from torch.distributions import Beta, Gamma, Normal
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ngd_optim.kernels import twice_differentiable
from ngd_optim.parameters import FlatParameters
from ngd_optim.program import CannotReplayError
from ngd_optim.tracing import TracedClosure

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*sparse.*")


def record(params, closure):
    """What one run of a closure computed; its recorder is an attribute."""
    with twice_differentiable():
        return TracedClosure(closure, FlatParameters([{"params": params}])).trace()


def beside(params):
    return [p.detach() + 0.01 * torch.randn_like(p) for p in params]


@torch.no_grad()
def put(params, values):
    for p, value in zip(params, values, strict=True):
        p.copy_(value)


def flat_gradient(loss, params):
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, **options)])


# Replayed as it would run.

REPLAYED = {}
WITHOUT_FORWARD_MODE = {"cdist", "embedding_bag", "margins", "sparse", "weight_norm"}
WITH_ANOTHER_GRADIENT = {
    "function",
    "function_into_empty_memory",
    "function_in_place",
    "in_place_without_gradient",
}
"""Whose gradient is not that of their operations."""


def replayed(make):
    REPLAYED[make.__name__] = make
    return make


def of_layer(name, loss):
    """A loss of a layer's outputs ``z`` of shape (9, 6), and of its inputs."""

    def make():
        layer, x = nn.Linear(6, 6).double(), real(9, 6)
        return [layer], lambda: loss(layer(x), x)

    REPLAYED[name] = make


def of_module(name, make_module, make_input, forward=lambda module, x: module(x).square().mean()):
    def make():
        module, x = make_module().double(), make_input()
        return [module], lambda: forward(module, x)

    REPLAYED[name] = make


def numbers(*shape):
    return lambda: real(*shape)


of_module("mlp", lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), numbers(9, 6))
of_module(
    "conv",
    lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    numbers(2, 2, 8, 8),
)
of_module(
    "batch_norm",
    lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()),
    numbers(9, 6),
)
of_module(
    "instance_norm",
    lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, track_running_stats=True)),
    numbers(4, 2, 5),
    lambda module, x: module(x).pow(3).mean(),
)
of_module(
    "dropout", lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh()), numbers(9, 6)
)
of_module(
    "lstm", lambda: nn.LSTM(5, 4, batch_first=True), numbers(3, 6, 5), lambda m, x: m(x)[0].sum()
)
of_module(
    "attention",
    lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    numbers(3, 5, 8),
    lambda m, x: m(x, x, x, need_weights=False)[0].square().mean(),
)
of_module(
    "transformer_with_dropout",
    lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True),
    numbers(3, 5, 8),
)
of_module(
    "checkpointed",
    lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True),
    numbers(3, 5, 8),
    lambda m, x: checkpoint(m, x, use_reentrant=False).square().mean(),
)
of_module(
    "embedding",
    lambda: nn.Embedding(20, 6),
    lambda: torch.randint(0, 20, (9, 3)),
    lambda m, i: m(i).sum(1).tanh().sum(),
)
of_module(
    "embedding_bag",
    lambda: nn.EmbeddingBag(7, 4),
    lambda: torch.randint(0, 7, (4, 3)),
)
of_module("weight_norm", lambda: parametrizations.weight_norm(nn.Linear(6, 6)), numbers(9, 6))
of_module("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(6, 6)), numbers(9, 6))
of_module(
    "spectral_norm_evaluated",
    lambda: parametrizations.spectral_norm(nn.Linear(6, 6)).eval(),
    numbers(9, 6),
)
of_module(
    "scripted",
    lambda: torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh())),
    numbers(9, 6),
)

of_layer("native_dropout", lambda z, x: torch.native_dropout(z, 0.5, True)[0].square().mean())
of_layer("alpha_dropout", lambda z, x: F.alpha_dropout(z, 0.5, True).square().mean())
of_layer("dropout_in_place", lambda z, x: F.dropout(z * x, 0.5, True, inplace=True).sum())
of_layer("gumbel_softmax", lambda z, x: (F.gumbel_softmax(z) * x).sum())
of_layer("variational", lambda z, x: (z + torch.randn_like(z) * z.exp()).square().mean())
of_layer("reparametrised", lambda z, x: Normal(z, z.exp()).rsample().square().mean())
of_layer("noise_of_its_own", lambda z, x: (z * torch.empty_like(z).uniform_()).square().mean())
of_layer("validated_normal", lambda z, x: Normal(z, z.exp(), True).log_prob(x).mean())
of_layer("squeezed_in_place", lambda z, x: (z * 1).unsqueeze_(0).squeeze_(0).square().mean())
of_layer("relu_by_a_mask", lambda z, x: ((z > 0).to(z) * z).sum())
of_layer("indexed_by_a_mask", lambda z, x: z[x > 0].exp().sum())
of_layer("sorted", lambda z, x: (z.sort(0).values * x).sum())
of_layer("largest", lambda z, x: (z.topk(3).values * x[:, :3]).sum())
of_layer("gathered", lambda z, x: (z.gather(1, z.argsort(1)) * x).sum())
of_layer("maximum_pooled", lambda z, x: F.max_pool1d(z, 2).sum())
of_layer("cdist", lambda z, x: torch.cdist(z, 2 * z + 1).sum())
of_layer("margins", lambda z, x: F.multi_margin_loss(z, torch.arange(9) % 6))
of_layer("fourier", lambda z, x: torch.fft.rfft(z).abs().square().mean())
of_layer("sparse", lambda z, x: (torch.eye(9).double().to_sparse() @ z).tanh().sum())
of_layer("einsum", lambda z, x: torch.einsum("ij,kj->ik", z, x).tanh().sum())
of_layer("foreach", lambda z, x: sum(t.sum() for t in torch._foreach_mul([z, z * z], 2.0)))
of_layer(
    "gaussian_process",
    lambda z, x: (
        torch.logdet(z @ z.T + torch.eye(9))
        + torch.linalg.solve(z @ z.T + torch.eye(9), x).sum()
        + torch.linalg.cholesky(z @ z.T + torch.eye(9)).sum()
    ),
)
of_layer(
    "accumulated",
    lambda z, x: torch.zeros(3, 6).double().index_add_(0, torch.arange(9) % 3, z).tanh().sum(),
)


@replayed
def bfloat16():
    layer, x = nn.Linear(6, 6), torch.randn(9, 6)

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.mse_loss(layer(x).float(), x)

    return [layer], closure


@replayed
def unrolled():
    cell, head, xs = nn.GRUCell(4, 5).double(), nn.Linear(5, 4).double(), real(6, 3, 4)

    def closure():
        h, loss = torch.zeros(3, 5).double(), 0.0
        for x in xs:
            h = cell(x, h)
            loss = loss + F.mse_loss(head(h), x)
        return loss

    return [cell, head], closure


@replayed
def changed_in_place():
    layer, x = nn.Linear(6, 6).double(), real(9, 6)

    def closure():
        z = layer(x)
        z[:, 0] = 1.0
        z.mul_(2.0).masked_fill_(x > 1, 0.5)
        z[:, 2:4] += z[:, 4:6] * 3
        z.t()[1].sin_()
        return z.relu_().square().mean()

    return [layer], closure


@replayed
def slices_of_a_fresh_buffer():
    layer, x = nn.Linear(6, 6).double(), real(9, 6)

    def closure():
        out = torch.zeros(9, 6, dtype=torch.float64)
        for i in range(3):
            out[i::3] = layer(x[i::3] + out[:3])
        return out.tanh().sum()

    return [layer], closure


@replayed
def buffer_overwritten_between_uses():
    layer, x, buffer = nn.Linear(6, 6).double(), real(9, 6), torch.zeros(9, 6).double()

    def closure():
        total = torch.zeros((), dtype=torch.float64)
        for i in range(3):
            buffer.fill_(i + 1.0)
            total = total + (layer(x) + buffer).tanh().sum()
        return total

    return [layer], closure, [buffer]


@replayed
def results_kept_in_a_buffer_of_the_user():
    layer, x, kept = nn.Linear(6, 6).double(), real(9, 6), torch.zeros(6).double()

    def closure():
        z = layer(x)
        with torch.no_grad():
            kept.mul_(0.9).add_(0.1 * z.mean(0))
        return z.square().mean()

    return [layer], closure, [kept]


@replayed
def in_place_without_gradient():
    layer, x = nn.Linear(6, 6).double(), real(9, 6)

    def closure():
        h = layer(x) * 1
        with torch.no_grad():
            h.clamp_(0, 1)
        return (h * x).sum()

    return [layer], closure


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w * w

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class SquareIntoEmptyMemory(Square):
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        out = torch.empty_like(w)
        out[:2] = w[:2] * w[:2]
        torch.mul(w[2:], w[2:], out=out[2:])
        return out


class SquareInPlace(Square):
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w.clone())
        ctx.mark_dirty(w)
        return w.mul_(w)


of_layer("function", lambda z, x: Square.apply(z).sum())
of_layer("function_into_empty_memory", lambda z, x: SquareIntoEmptyMemory.apply(z).sum())
of_layer("function_in_place", lambda z, x: SquareInPlace.apply(z * 1).sum())


def make_field():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double(), torch.rand(
        20, 2, dtype=torch.float64
    )


@replayed
def hessian_inside():
    net, points = make_field()
    laplacian = torch.func.vmap(
        lambda p: torch.func.hessian(lambda q: net(q).squeeze(-1))(p).diagonal().sum()
    )
    return [net], lambda: (laplacian(points) + 1).square().mean()


@replayed
def forward_mode_inside():
    net, points = make_field()
    ones = torch.ones_like(points)
    return [net], lambda: torch.func.jvp(net, (points,), (ones,))[1].square().mean()


@replayed
def differential_equation():
    net, points = make_field()

    def closure():
        q = points.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(q).sum(), q, create_graph=True)
        second = torch.autograd.grad(slope[:, 0].sum(), q, create_graph=True)[0][:, 0]
        return (second + slope[:, 1] + 1).square().mean()

    return [net], closure


@replayed
def gradient_penalty():
    net, points = make_field()

    def closure():
        loss = net(points).square().mean()
        grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        return loss + 0.1 * sum(g.square().sum() for g in grads)

    return [net], closure


@replayed
def inner_loop():
    """An unrolled step of gradient descent, as in MAML."""
    net, points = make_field()

    def closure():
        weights = dict(net.named_parameters())
        loss = torch.func.functional_call(net, weights, (points,)).square().mean()
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        moved = {key: w - 0.1 * g for (key, w), g in zip(weights.items(), grads, strict=True)}
        return torch.func.functional_call(net, moved, (points + 1,)).square().mean()

    return [net], closure


def build(name):
    torch.manual_seed(0)
    modules, closure, *state = REPLAYED[name]()
    params = [p for module in modules for p in module.parameters()]
    buffers = [b for module in modules for b in module.buffers()]
    return params, closure, [*buffers, *(state[0] if state else ())]


@pytest.mark.parametrize("name", REPLAYED)
def test_a_replay_is_a_run(name):
    params, closure, state = build(name)
    before, generator = [t.clone() for t in state], torch.get_rng_state()
    traced = record(params, closure)
    program = traced.recorder.program([traced.loss], conditions=True)
    moved, things = beside(params), [*params, *state]
    after, generator_after = [t.detach().clone() for t in things], torch.get_rng_state()
    with torch.no_grad():
        (here,), (there,) = program(params), program(moved)
    assert all(map(torch.equal, things, after))
    assert torch.equal(torch.get_rng_state(), generator_after)
    assert torch.equal(here, traced.loss)

    put([*params, *state], [*moved, *before])
    torch.set_rng_state(generator)
    assert torch.equal(there, record(params, closure).loss)
    put([*params, *state], [*moved, *before])
    torch.set_rng_state(generator)
    with twice_differentiable():
        assert_near(there, closure().detach(), 1e-12 if there.dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", REPLAYED)
def test_a_replay_has_the_gradient_of_the_closure(name):
    params, closure, _ = build(name)
    traced = record(params, closure)
    program = traced.recorder.program([traced.loss])
    tolerance = 1e-10 if traced.loss.dtype == torch.float64 else 3e-2
    gradient = flat_gradient(traced.loss, params)
    assert program.has_functions == (name in WITH_ANOTHER_GRADIENT)
    if name in WITH_ANOTHER_GRADIENT:
        return
    assert_near(flat_gradient(program(params)[0], params), gradient, tolerance)
    if name not in WITHOUT_FORWARD_MODE:
        v = [p.detach() + torch.randn_like(p) for p in params]
        point = tuple(p.detach() for p in params)
        _, pushed = torch.func.jvp(lambda *q: program(q)[0], point, tuple(v))
        slope = torch.dot(gradient, torch.cat([t.flatten() for t in v]))
        assert_near(pushed, slope, tolerance)


# What autograd holds fixed.


def leaf_of_its_own(w):
    h = w.exp().detach().requires_grad_()
    (slope,) = torch.autograd.grad(h.square().sum(), h, create_graph=True)
    return (w * slope).sum()


def held_in_a_buffer(w):
    buffer = torch.zeros_like(w)
    buffer.copy_(w.detach())
    return (w * buffer).sum()


def moving_average(w):
    average = torch.ones(5, dtype=torch.float64)
    with torch.no_grad():
        average.mul_(0.9).add_(w, alpha=0.1)
    return (w * average).sum()


def function_of_a_leaf(w, make_leaf):
    h = make_leaf(w)
    (slope,) = torch.autograd.grad(Square.apply(h).sum(), h)
    return (w * slope).sum() + (Square.apply(h) * w).sum()


@torch.no_grad()
def leaf_without_gradient(w):
    return w.exp().requires_grad_()


def adversarial(w):
    """Inputs moved along the gradient at inputs that follow the parameters, twice."""
    x = X
    for _ in range(2):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad((w * x.sin()).sum(), x)
        x = x + 0.1 * slope
    return (w * x.detach()).sum()


def moved_inputs(c):
    x = X
    for _ in range(2):
        x = x + 0.1 * c * x.cos()
    return x


@torch.no_grad()
def target(w):
    return w.exp() + w.sum()


def penalised_by_its_own_gradient(w):
    (slope,) = torch.autograd.grad(w.pow(3).sum(), w)  # without create_graph
    return (w * slope).sum()


X = torch.randn(5, generator=torch.Generator().manual_seed(3)).double()
FIXED = {
    "detach": (lambda w: (w * w.detach()).sum(), lambda w, c: (w * c).sum()),
    "data": (lambda w: (w * w.data).sum(), lambda w, c: (w * c).sum()),
    "no_grad": (lambda w: (w * target(w)).sum(), lambda w, c: (w * (c.exp() + c.sum())).sum()),
    "item": (
        lambda w: w.square().sum() * w[0].item(),
        lambda w, c: w.square().sum() * c[0],
    ),
    "list": (lambda w: (w * torch.tensor(w.tolist())).sum(), lambda w, c: (w * c.float()).sum()),
    "numpy": (
        lambda w: (w * torch.from_numpy(w.detach().numpy().copy())).sum(),
        lambda w, c: (w * c).sum(),
    ),
    "normalised_by_itself": (
        lambda w: w.exp().sum() / w.exp().sum().detach(),
        lambda w, c: w.exp().sum() / c.exp().sum(),
    ),
    "importance_ratio": (
        lambda w: ((w - w.detach()).exp() * X).sum(),
        lambda w, c: ((w - c).exp() * X).sum(),
    ),
    "advantage": (
        lambda w: ((w - w.detach().mean()).detach() * w).sum(),
        lambda w, c: ((c - c.mean()) * w).sum(),
    ),
    "temporal_difference": (
        lambda w: F.mse_loss(w, 0.9 * w.roll(1).detach() + X),
        lambda w, c: F.mse_loss(w, 0.9 * c.roll(1) + X),
    ),
    "straight_through": (
        lambda w: ((w + (w.round() - w).detach()) * X).sum(),
        lambda w, c: ((w + c.round() - c) * X).sum(),
    ),
    "leaf_of_its_own": (leaf_of_its_own, lambda w, c: (w * 2 * c.exp()).sum()),
    "function_of_a_leaf": (
        lambda w: function_of_a_leaf(w, lambda w: w.exp().detach().requires_grad_()),
        lambda w, c: (w * (2 * c.exp() + (2 * c).exp())).sum(),
    ),
    "function_of_a_leaf_made_without_gradient": (
        lambda w: function_of_a_leaf(w, leaf_without_gradient),
        lambda w, c: (w * (2 * c.exp() + (2 * c).exp())).sum(),
    ),
    "detached_in_place": (
        lambda w: (w * w.exp().detach_()).sum(),
        lambda w, c: (w * c.exp()).sum(),
    ),
    "adversarial": (adversarial, lambda w, c: (w * moved_inputs(c)).sum()),
    "held_in_a_buffer": (held_in_a_buffer, lambda w, c: (w * c).sum()),
    "moving_average": (moving_average, lambda w, c: (w * (0.9 + 0.1 * c)).sum()),
    "gradient_without_a_graph": (
        penalised_by_its_own_gradient,
        lambda w, c: (w * 3 * c.square()).sum(),
    ),
    "straight_through_mask": (
        lambda w: torch.where(w.detach() > X, w, 2 * w).sum(),
        lambda w, c: torch.where(c > X, w, 2 * w).sum(),
    ),
    "largest_when_detached": (
        lambda w: (w * F.one_hot(w.detach().argmax(), 5)).sum(),
        lambda w, c: w[c.argmax()],
    ),
    "set_in_an_activation": (
        lambda w: (w * 1).index_fill(0, torch.tensor([2]), w[0].item()).exp().sum(),
        lambda w, c: w.exp().sum() - w[2].exp() + c[0].exp(),
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_autograd_holds_fixed_is_a_constant(name):
    function, truth = FIXED[name]
    w = nn.Parameter(real(5))
    here, moved = w.detach().clone(), w.detach() + 0.1 * real(5)
    traced = record([w], lambda: function(w))
    program = traced.recorder.program([traced.loss])
    assert_near(program([w])[0], traced.loss, 1e-14)
    assert_near(program([moved])[0], truth(moved, here), 1e-12)
    q = moved.clone().requires_grad_()
    (slope,) = torch.autograd.grad(program([q])[0], q)
    assert_near(slope, torch.func.grad(lambda w: truth(w, here))(moved), 1e-12)


FOLLOWED_ALL = [
    "detach",
    "data",
    "no_grad",
    "normalised_by_itself",
    "importance_ratio",
    "temporal_difference",
    "straight_through",
    "straight_through_mask",
    "held_in_a_buffer",
    "moving_average",
]


@pytest.mark.parametrize("name", FOLLOWED_ALL)
def test_it_can_be_followed_as_well(name):
    function, _ = FIXED[name]
    w = nn.Parameter(real(5))
    moved = w.detach() + 0.1 * real(5)
    traced = record([w], lambda: function(w))
    held, there = traced.recorder.program([traced.loss], predicted=[traced.loss])([moved])
    assert torch.equal(held, traced.recorder.program([traced.loss])([moved])[0])
    with torch.no_grad():
        w.copy_(moved)
    assert torch.equal(there, function(w))


def test_what_holds_nothing_is_computed_once_for_both():
    w, moved, calls = nn.Parameter(real(5)), real(5), Counter()

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls[str(func).split(".")[1]] += 1
            return func(*args, **(kwargs or {}))

    traced = record([w], lambda: (w.exp().tanh() * w.sin().detach()).cos().sum())
    program = traced.recorder.program([traced.loss], predicted=[traced.loss])
    with Counted():
        program([moved])
    del calls["view"]  # to a scalar
    assert calls == {"exp": 1, "tanh": 1, "sin": 1, "mul": 2, "cos": 2, "sum": 2}


def test_the_directions_of_spectral_norm_are_constants():
    torch.manual_seed(0)
    layer, x = parametrizations.spectral_norm(nn.Linear(6, 6)).double(), real(9, 6)
    params = list(layer.parameters())
    traced = record(params, lambda: layer(x).square().mean())
    u, v = (b.clone() for b in layer.buffers())
    moved = beside(params)
    bias, weight = moved
    truth = F.linear(x, weight / (u @ weight @ v), bias).square().mean()
    assert_near(traced.recorder.program([traced.loss])(moved)[0], truth, 1e-12)
    assert all(map(torch.equal, layer.buffers(), (u, v)))


def test_outputs_can_be_fixed():
    w = nn.Parameter(real(5))
    kept = []

    def closure():
        z = w.exp()
        kept[:] = [z, z.detach()]
        return F.mse_loss(kept[0], X) + 0.5 * w.square().sum()

    traced = record([w], closure)
    recorder, (z, detached) = traced.recorder, kept
    moved = real(5)
    (there,) = recorder.program([traced.loss], fixed=[z])([moved])
    assert_near(there, F.mse_loss(detached, X) + 0.5 * moved.square().sum(), 1e-12)
    loss, outputs = recorder.program([traced.loss, z])([moved])
    assert_near(outputs, moved.exp(), 1e-14)
    assert_near(loss, F.mse_loss(moved.exp(), X) + 0.5 * moved.square().sum(), 1e-12)
    assert recorder.depends(z)
    assert not recorder.depends(detached)
    assert recorder.has_seen(detached)
    assert not recorder.has_seen(X)


# Questions and readings.

QUESTIONS = {
    "if": lambda w: w.exp().sum() if w.sum() > 0 else w.sum(),
    "any": lambda w: w.exp().sum() if (w > 0).any() else w.sum(),
    "allclose": lambda w: w.sum() if torch.allclose(w, torch.zeros_like(w)) else w.exp().sum(),
    "equal": lambda w: w.sum() if torch.equal(w, torch.zeros_like(w)) else w.exp().sum(),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_replay_fails_where_the_closure_goes_another_way(name):
    function = QUESTIONS[name]
    w = nn.Parameter(torch.ones(5).double())
    traced = record([w], lambda: function(w))
    assert traced.recorder.has_conditions
    assert not traced.recorder.reads_values
    guarded = traced.recorder.program([traced.loss], conditions=True)
    free = traced.recorder.program([traced.loss])
    same, other = (
        2 * w.detach(),
        torch.full((5,), 0.0 if name in {"equal", "allclose"} else -1.0).double(),
    )
    assert torch.equal(guarded([same])[0], same.exp().sum())
    assert torch.equal(free([other])[0], other.exp().sum())
    with pytest.raises(
        CannotReplayError, match=r"gives (True|False) here, and gave (True|False) in the first run"
    ):
        guarded([other])
    assert torch.equal(guarded([same])[0], same.exp().sum())  # nothing is left of the failure


READINGS = {
    "item": (lambda w: w.sum().item(), True),
    "tolist": (lambda w: w.tolist(), True),
    "tolist_of_result": (lambda w: w.exp().detach().tolist(), True),
    "numpy": (lambda w: w.detach().numpy(), True),
    "numpy_by_force": (lambda w: w.numpy(force=True), True),
    "asarray": (lambda w: np.asarray(w.detach()), True),
    "from_dlpack": (lambda w: np.from_dlpack(w.detach()), True),
    "tolist_of_another_tensor": (lambda w: X.tolist(), False),
    "numpy_of_another_tensor": (lambda w: X.numpy(), False),
    "float": (lambda w: float(w.sum()), True),
    "int": (lambda w: int(w.sum()), True),
    "print": (lambda w: repr(w), False),
    "index": (lambda w: [1, 2, 3, 4, 5][w.argmax()], True),
    "another_tensor": (lambda w: X.sum().item(), False),
    "shape": (lambda w: w.sum().shape, False),
    "is_floating_point": (lambda w: w.is_floating_point(), False),
    "nothing": (lambda w: None, False),
}


@pytest.mark.parametrize("name", READINGS)
def test_reading_numbers_is_noted(name):
    read, is_reading = READINGS[name]
    w = nn.Parameter(real(5))

    def closure():
        read(w)
        return w.exp().sum()

    recorder = record([w], closure).recorder
    assert recorder.reads_values == is_reading
    assert recorder.problem is None


# What cannot be replayed.


def write_to_parameters(w):
    with torch.no_grad():
        w.clamp_(-1, 1)
    return w.exp().sum()


def write_by_data(w):
    w.data.mul_(0.5)
    return w.exp().sum()


def write_to_a_view(w):
    w.detach()[1:3].zero_()
    return w.exp().sum()


UNREPLAYABLE = {
    "writes": (write_to_parameters, "writes to its parameters"),
    "writes_by_data": (write_by_data, "writes to its parameters"),
    "writes_to_a_view": (write_to_a_view, "writes to its parameters"),
    "rrelu": (lambda w: F.rrelu(w, training=True).sum(), "random"),
    "gamma": (lambda w: Gamma(w.exp(), 1.0).rsample().mean(), "random numbers"),
    "beta": (lambda w: Beta(w.exp(), w.exp()).rsample().mean(), "random numbers"),
    "randomised_in_place": (lambda w: (w * 1).bernoulli_(0.5).mul(w).sum(), "at random"),
}


@pytest.mark.parametrize("name", UNREPLAYABLE)
def test_what_cannot_be_replayed_says_why(name):
    function, reason = UNREPLAYABLE[name]
    w = nn.Parameter(real(5).abs())
    traced = record([w], lambda: function(w))
    with pytest.raises(CannotReplayError, match=reason):
        traced.recorder.program([traced.loss])
    assert reason in traced.recorder.problem


@pytest.mark.parametrize("view", [lambda w: w.view(5), lambda w: w[1:], lambda w: w.t()])
def test_a_view_of_a_parameter_that_was_made_before_is_no_constant(view):
    w = nn.Parameter(real(5))
    before = view(w)
    traced = record([w], lambda: before.exp().sum())
    with pytest.raises(CannotReplayError, match="computed from the parameters before"):
        traced.recorder.program([traced.loss])


@pytest.mark.parametrize("n", [5, 100, 1000])
def test_memory_that_was_freed_is_not_taken_for_what_was_in_it(n):
    w = nn.Parameter(real(n))

    def closure():
        scratch = torch.zeros(n, dtype=w.dtype)
        with torch.no_grad():
            scratch.add_(w)
        del scratch
        sums = [torch.ones(n, dtype=w.dtype) for _ in range(8)]
        return sum(one.add_(w).sum() for one in sums)

    traced = record([w], closure)
    moved = real(n)
    (there,) = traced.recorder.program([traced.loss])([moved])
    assert_near(there, 8 * (n + moved.sum()), 1e-12)


def test_another_recording_of_the_same_tensors_is_another():
    """Marks of an earlier run say nothing of this one."""
    w, kept = nn.Parameter(real(5)), []

    def closure():
        h = w.exp()
        loss = (h * (kept[0].detach() if kept else 1.0)).sum()
        kept[:] = [h]
        return loss

    record([w], closure)
    before = kept[0].detach().clone()
    traced = record([w], closure)
    moved = real(5)
    (there,) = traced.recorder.program([traced.loss])([moved])
    assert_near(there, (moved.exp() * before).sum(), 1e-12)
