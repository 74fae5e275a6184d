"""Situations from public reports on second-order methods and derivatives: right, told, or refused.

Each has the thread that reported it. Those with a Hessian are compared with central differences of
gradients, at parameters in float64; where torch's own derivatives are wrong, of the same function in
plain operations.
"""

import logging

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import real
from torch import nn

from ngd_optim import NaturalCG, linearize

PYTORCH = "https://github.com/pytorch/pytorch/issues/"


def gradient(closure, params):
    parts = torch.autograd.grad(closure(), params, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def hessian_by_differences(closure, params, h=1e-5):
    rows = []
    for p in params:
        flat = p.data.view(-1)
        for i, value in enumerate(flat.tolist()):
            flat[i] = value + h
            ahead = gradient(closure, params)
            flat[i] = value - h
            rows.append((ahead - gradient(closure, params)) / (2 * h))
            flat[i] = value
    return torch.stack(rows)


def parameter(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def product_with_two_zeros():
    p = parameter(2, 3, 0, 0)
    return [p], lambda: p.prod() + p.square().sum(), None


def cumulative_product_with_zeros():
    p, w = parameter(2, 0, 3, 0, 1.5), real(5)
    return [p], lambda: (p.cumprod(0) * w).sum(), None


def determinant_of_equal_singular_values():
    p, w = nn.Parameter(torch.eye(3, dtype=torch.float64)), real(3, 3)
    return [p], lambda: torch.linalg.det(p) + (p * w).square().sum(), None


def log_determinant_and_solution():
    p, b = nn.Parameter(torch.tensor([[1.3, 0.4], [-0.7, 0.9]]).double()), real(2, 3)
    return (
        [p],
        lambda: torch.linalg.slogdet(p)[1] + torch.linalg.solve(p, b).square().sum(),
        None,
    )


def cholesky_solution_and_inverse():
    p, b = nn.Parameter(real(3, 3)), real(3, 2)

    def closure():
        factor = torch.linalg.cholesky(p @ p.T + torch.eye(3, dtype=torch.float64))
        trace = (b.T @ torch.cholesky_solve(b, factor)).trace()
        return trace + torch.cholesky_inverse(factor).square().sum()

    return [p], closure, None


def householder_product():
    p, w = nn.Parameter(real(4, 2)), torch.arange(8.0, dtype=torch.float64).view(4, 2)

    def closure():
        tau = 2 / (1 + p.tril(-1).square().sum(0))
        return (torch.linalg.householder_product(p, tau) * w).square().sum()

    return [p], closure, None


def log_sigmoid_in_its_tail():
    p = parameter(40, -40, 3)
    return [p], lambda: -F.logsigmoid(p).sum(), None


class Product(torch.autograd.Function):
    """Saves its result for backward."""

    @staticmethod
    def forward(ctx, x):
        y = x.prod(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return (g * y)[:, None] / x


def function_that_saves_its_result():
    p = nn.Parameter(real(2, 4))
    return [p], lambda: Product.apply(p).square().sum(), None


class TwiceSquared(torch.autograd.Function):
    """Keeps what it computes on the way as an attribute."""

    @staticmethod
    def forward(ctx, x):
        ctx.double = 2 * x
        return 3 * x * ctx.double

    @staticmethod
    def backward(ctx, g):
        return 6 * g * ctx.double


def function_that_keeps_an_attribute():
    p = nn.Parameter(real(4))
    return [p], lambda: TwiceSquared.apply(p).square().sum(), None


class Square(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx, t):
        return 2 * ctx.saved_tensors[0] * t


def function_with_its_own_forward_mode():
    p = nn.Parameter(real(3))
    return [p], lambda: Square.apply(Square.apply(p)).sum(), None


class PlainNorm(nn.Module):
    """``LayerNorm`` or ``BatchNorm1d`` in operations whose derivatives of all orders are right."""

    def __init__(self, norm, dim):
        super().__init__()
        self.norm, self.dim = norm, dim

    def forward(self, z):
        c = z - z.mean(self.dim, keepdim=True)
        scale = (c.square().mean(self.dim, keepdim=True) + self.norm.eps).sqrt()
        return c / scale * self.norm.weight + self.norm.bias


def penalty_of_gradients_through(norm, dim):
    """Its Hessian takes third derivatives of the norm."""
    first, last = nn.Linear(2, 3).double(), nn.Linear(3, 1).double()
    x, w = real(6, 2).requires_grad_(), real(6, 1)

    def closure(norm):
        y = last(norm(first(x)).tanh())
        (g,) = torch.autograd.grad((w * y).sum(), x, create_graph=True)
        return g.square().sum()

    params = [*first.parameters(), *norm.parameters(), *last.parameters()]
    return params, lambda: closure(norm), lambda: closure(PlainNorm(norm, dim))


def layer_norm_in_a_gradient_penalty():
    return penalty_of_gradients_through(nn.LayerNorm(3).double(), -1)


def batch_norm_in_a_gradient_penalty():
    return penalty_of_gradients_through(nn.BatchNorm1d(3).double(), 0)


def rectifier_in_place_after_instance_norm():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.InstanceNorm2d(2, affine=True),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, 2),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).double()
    x, y = real(4, 1, 6, 6), torch.arange(4) % 3
    return list(model.parameters()), lambda: F.cross_entropy(model(x), y), None


def compiled_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    compiled, x, y = torch.compile(model, backend="aot_eager"), real(5, 3), real(5, 1)
    plain = lambda: F.mse_loss(model(x), y)  # noqa: E731
    return list(model.parameters()), lambda: F.mse_loss(compiled(x), y), plain


HESSIANS = [
    (product_with_two_zeros, PYTORCH + "106789"),
    (cumulative_product_with_zeros, PYTORCH + "196701"),
    (determinant_of_equal_singular_values, PYTORCH + "192521"),
    (log_determinant_and_solution, PYTORCH + "192540"),
    (cholesky_solution_and_inverse, PYTORCH + "198017"),
    (householder_product, PYTORCH + "196698"),
    (log_sigmoid_in_its_tail, PYTORCH + "195530"),
    (function_that_saves_its_result, PYTORCH + "18619"),
    (function_that_keeps_an_attribute, PYTORCH + "76185"),
    (function_with_its_own_forward_mode, PYTORCH + "197867"),
    (layer_norm_in_a_gradient_penalty, PYTORCH + "175754"),
    (batch_norm_in_a_gradient_penalty, PYTORCH + "186256"),
    (rectifier_in_place_after_instance_norm, "facebookresearch/higher/issues/3"),
    (compiled_model, PYTORCH + "181581"),
]


REFUSED = {
    (determinant_of_equal_singular_values, "torch.func"),
    (cholesky_solution_and_inverse, "torch.func"),
    (function_that_keeps_an_attribute, "double-backward"),
    (layer_norm_in_a_gradient_penalty, "double-backward"),
    (layer_norm_in_a_gradient_penalty, "torch.func"),
    (batch_norm_in_a_gradient_penalty, "double-backward"),
    (batch_norm_in_a_gradient_penalty, "torch.func"),
}
"""Where torch's own derivatives are wrong: with ``backend="auto"`` another way is taken."""


@pytest.mark.parametrize("backend", ["auto", "double-backward", "torch.func"])
@pytest.mark.parametrize("situation", [row[0] for row in HESSIANS], ids=lambda f: f.__name__)
def test_hessian_is_right_or_refused(situation, backend):
    torch.manual_seed(0)
    params, closure, plain = situation()
    matrix = hessian_by_differences(plain or closure, params)
    if (situation, backend) in REFUSED:
        with pytest.raises(RuntimeError, match="use backend='auto'"):
            linearize(closure, params, curvature="hessian", backend=backend)
        return
    point = linearize(closure, params, curvature="hessian", backend=backend)
    v = real(len(matrix))
    assert (point.curvature(v) - matrix @ v).norm() <= 1e-6 * (matrix @ v).norm()


def kernel_of_points_with_themselves():
    """A norm at zero inside of an exponential: a gradient of 0, and no second derivative."""
    x, scale = nn.Parameter(real(4, 2)), parameter(0.7)
    distance = lambda: (x[:, None] - x).norm(dim=-1)  # noqa: E731
    return [x, scale], lambda: torch.exp(-distance() / scale).sum() + scale.square().sum(), 4.001


def actor_whose_loss_is_a_critic():
    actor = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2), nn.Tanh()).double()
    critic = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    seen = real(30, 3)
    closure = lambda: -critic(torch.cat([seen, actor(seen)], 1)).mean()  # noqa: E731
    return list(actor.parameters()), closure, 0.11


def attention_that_uses_a_weight_without_its_module():
    model, x = nn.MultiheadAttention(8, 2, batch_first=True).double(), real(4, 3, 8)
    closure = lambda: F.mse_loss(model(x, x, x, need_weights=False)[0], x)  # noqa: E731
    return list(model.parameters()), closure, 1e-6


def gradients_taken_in_a_loop():
    model = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    x, along, y = real(2, 2), real(2, 2), torch.tensor([7.0, -12.0]).double()

    def closure():
        q = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(q).sum(), q, create_graph=True)
        return (torch.stack([torch.dot(slope[i], along[i]) for i in range(2)]) - y).square().sum()

    return list(model.parameters()), closure, 1e-6


def data_that_require_a_gradient():
    model, x, y = nn.Linear(3, 2).double(), real(5, 3).requires_grad_(), torch.arange(5) % 2
    penalised = lambda: F.cross_entropy(model(x), y) + model.weight.square().sum()  # noqa: E731
    return list(model.parameters()), penalised, 0.7


TRAINED = [
    (kernel_of_points_with_themselves, "pytorch/functorch/issues/1097"),
    (actor_whose_loss_is_a_critic, "ltatzel/PyTorchHessianFree/issues/5"),
    (attention_that_uses_a_weight_without_its_module, "gpauloski/kfac-pytorch/issues/267"),
    (gradients_taken_in_a_loop, PYTORCH + "47870"),
    (data_that_require_a_gradient, "pytorch/botorch/issues/2253"),
]


@pytest.mark.parametrize("situation", [row[0] for row in TRAINED], ids=lambda f: f.__name__)
def test_it_trains(situation):
    torch.manual_seed(0)
    params, closure, reached = situation()
    optimizer = NaturalCG(params)
    for _ in range(30):
        optimizer.step(closure)
    assert closure().item() < reached
    assert optimizer.last_step.new_loss == pytest.approx(closure().item(), rel=1e-12, abs=1e-15)


def test_a_kink_that_is_met_later_costs_one_step(caplog):
    p, q = parameter(1, -2), parameter(3)
    closure = lambda: q.square().sum() - torch.exp(-p.norm()) * q.cos().sum()  # noqa: E731
    optimizer = NaturalCG([p, q])
    optimizer.step(closure)
    with torch.no_grad():
        p.zero_()
    optimizer.step(closure)
    assert optimizer.last_step.reason == "rejected: a curvature product is not finite"
    optimizer.step(closure)
    assert optimizer.last_step.accepted
    assert "are formed by differences" in caplog.text


RETURNED = {
    "https://github.com/janEbert/PyTorch-VeLO/issues/2": (
        lambda loss, model: (loss, model.state_dict()),
        TypeError,
        "return the loss alone",
    ),
    "https://github.com/davda54/sam/issues/90": (
        lambda loss, model: object(),
        TypeError,
        "must return the loss as a tensor, got object",
    ),
    "https://github.com/ltatzel/PyTorchHessianFree/issues/5": (
        lambda loss, model: (loss, model.weight),
        ValueError,
        "must be a scalar KL",
    ),
}


@pytest.mark.parametrize("thread", RETURNED)
def test_what_is_returned_beside_or_in_place_of_the_loss(thread):
    returned, kind, message = RETURNED[thread]
    model, x, y = nn.Linear(3, 2).double(), real(5, 3), torch.arange(5) % 2
    with pytest.raises(kind, match=message):
        NaturalCG(model.parameters()).step(
            lambda: returned(F.cross_entropy(model(x), y), model),
        )


def test_a_step_without_gradients_around_it():
    """https://github.com/nikhilvyas/SOAP/pull/21: under ``torch.no_grad``."""
    model, x, y = nn.Linear(3, 2).double(), real(50, 3), torch.arange(50) % 2
    optimizer = NaturalCG(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with torch.no_grad():
        first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first


def a_model_of_gradients_with_a_layer_norm():
    """Its loss's gradient takes third derivatives of ``layer_norm``, which torch has wrong."""
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 1)).double()
    x, y = real(5, 2).requires_grad_(), real(5, 2)

    def closure():
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad((slope * y).sum(), x, create_graph=True)
        return F.mse_loss(bend, y)

    return list(model.parameters()), closure


def a_tied_embedding_with_padding():
    table, y = nn.Embedding(7, 4, padding_idx=0).double(), torch.tensor([2, 4, 1])
    with torch.no_grad():
        table.weight[0] = 1.0
    words = torch.tensor([[1, 2, 0], [3, 0, 0], [5, 6, 1]])
    return [table.weight], lambda: F.cross_entropy(table(words).sum(1) @ table.weight.T, y)


@pytest.mark.parametrize(
    ("situation", "cause"),
    [
        (a_model_of_gradients_with_a_layer_norm, "third derivatives of layer_norm"),
        (a_tied_embedding_with_padding, "padding_idx"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_gradient_that_is_not_the_losss_is_told(situation, cause, caplog):
    """pytorch/pytorch/issues/175754 and 3506."""
    torch.manual_seed(0)
    params, closure = situation()
    with caplog.at_level(logging.WARNING, logger="ngd_optim"):
        NaturalCG(params).step(closure)
    assert "the loss does not move as its gradient says" in caplog.text
    assert cause in caplog.text
