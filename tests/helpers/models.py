"""A table of models of every kind, and problems made of them with dense truths."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from helpers.problems import jacobian_by_rows

BATCH, FEATURES, CLASSES, STEPS = 4, 6, 3, 5


class Square(torch.autograd.Function):
    """A custom function that knows only its first derivative's formula."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Apply(nn.Module):
    """Modules and a function that uses them."""

    def __init__(
        self, function: Callable[..., Tensor], **modules: nn.Module | nn.Parameter
    ) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def attention(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(BATCH, STEPS, 3, 2, 3).permute(2, 0, 3, 1, 4)
    return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


def physics(m: nn.Module, x: Tensor) -> Tensor:
    """A derivative of the network in its input, as in a physics-informed network."""
    x = x.clone().requires_grad_()
    u = m.net(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return u + du[:, :CLASSES]


def physics_by_func(m: nn.Module, x: Tensor) -> Tensor:
    def u(row: Tensor) -> Tensor:
        return m.net(row)

    return m.net(x) + torch.func.vmap(torch.func.jacrev(u))(x)[:, :, 0]


def recurrent(kind: type[nn.RNNBase]) -> Callable[[], nn.Module]:
    return lambda: Apply(
        lambda m, x: m.head(m.core(x)[0][:, -1]),
        core=kind(FEATURES, 4, batch_first=True),
        head=nn.Linear(4, CLASSES),
    )


def mlp(features: int = FEATURES, hidden: int = 5, outputs: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


def lora() -> nn.Module:
    return Apply(
        lambda m, x: m.base(x) + x @ m.down @ m.up,
        base=nn.Linear(FEATURES, CLASSES).requires_grad_(False),
        down=nn.Parameter(torch.randn(FEATURES, 2)),
        up=nn.Parameter(torch.randn(2, CLASSES)),
    )


def tied() -> nn.Module:
    model = Apply(
        lambda m, x: m.head(m.second(m.first(x).tanh()).tanh()), first=nn.Linear(FEATURES, FEATURES)
    )
    model.second = nn.Linear(FEATURES, FEATURES)
    model.second.weight = model.first.weight
    model.head = nn.Linear(FEATURES, CLASSES)
    return model


def vector() -> Tensor:
    return torch.randn(BATCH, FEATURES)


def sequence() -> Tensor:
    return torch.randn(BATCH, STEPS, FEATURES)


def image() -> Tensor:
    return torch.randn(BATCH, 1, 6, 6)


def tokens() -> Tensor:
    return torch.randint(0, 7, (BATCH, STEPS))


@dataclass(frozen=True)
class Case:
    label: str
    make: Callable[[], nn.Module]
    data: Callable[[], Tensor] = vector
    backend: str = "torch.func"


CASES = {
    "mlp": Case("Linear layers, activations", mlp),
    "conv": Case(
        "Convolutions, pooling",
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, CLASSES)
        ),
        image,
    ),
    "norms": Case(
        "LayerNorm, GroupNorm",
        lambda: nn.Sequential(
            nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.Linear(8, CLASSES)
        ),
    ),
    "dropout": Case(
        "Dropout",
        lambda: nn.Sequential(
            nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, CLASSES)
        ),
    ),
    "batch_norm": Case(
        "BatchNorm in train mode",
        lambda: nn.Sequential(
            nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES)
        ),
    ),
    "batch_norm_eval": Case(
        "BatchNorm in eval mode",
        lambda: nn.Sequential(
            nn.Linear(FEATURES, 5), nn.BatchNorm1d(5).eval(), nn.Tanh(), nn.Linear(5, CLASSES)
        ),
    ),
    "embedding": Case(
        "Embedding",
        lambda: Apply(
            lambda m, x: m.head(m.table(x).mean(1)),
            table=nn.Embedding(7, 4),
            head=nn.Linear(4, CLASSES),
        ),
        tokens,
    ),
    "sdpa": Case(
        "scaled_dot_product_attention",
        lambda: Apply(attention, qkv=nn.Linear(FEATURES, 18), out=nn.Linear(6, CLASSES)),
        sequence,
    ),
    "mha": Case(
        "MultiheadAttention",
        lambda: Apply(
            lambda m, x: m.head(m.core(x, x, x)[0].mean(1)),
            core=nn.MultiheadAttention(FEATURES, 2, batch_first=True),
            head=nn.Linear(FEATURES, CLASSES),
        ),
        sequence,
    ),
    "transformer": Case(
        "TransformerEncoderLayer",
        lambda: Apply(
            lambda m, x: m.head(m.core(x).mean(1)),
            core=nn.TransformerEncoderLayer(FEATURES, 2, 8, dropout=0.1, batch_first=True),
            head=nn.Linear(FEATURES, CLASSES),
        ),
        sequence,
    ),
    "lstm": Case("LSTM", recurrent(nn.LSTM), sequence),
    "gru": Case("GRU", recurrent(nn.GRU), sequence),
    "rnn": Case("RNN", recurrent(nn.RNN), sequence),
    "tied": Case("Tied weights", tied),
    "frozen": Case("Frozen layers", frozen),
    "lora": Case("LoRA", lora),
    "parametrised": Case(
        "Parametrisations (orthogonal)",
        lambda: nn.Sequential(
            parametrizations.orthogonal(nn.Linear(FEATURES, FEATURES)),
            nn.Tanh(),
            nn.Linear(FEATURES, CLASSES),
        ),
    ),
    "weight_norm": Case(
        "weight_norm",
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(FEATURES, CLASSES))),
        backend="double-backward",
    ),
    "spectral_norm": Case(
        "spectral_norm",
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(FEATURES, CLASSES))),
    ),
    "custom_function": Case(
        "autograd.Function without jvp",
        lambda: Apply(lambda m, x: Square.apply(m.layer(x)), layer=nn.Linear(FEATURES, CLASSES)),
    ),
    "checkpoint": Case(
        "Non-reentrant checkpointing",
        lambda: Apply(lambda m, x: checkpoint(m.net, x, use_reentrant=False), net=mlp()),
    ),
    "checkpoint_transformer": Case(
        "Non-reentrant checkpointing of a TransformerEncoderLayer",
        lambda: Apply(
            lambda m, x: m.head(
                checkpoint(m.layer, x.unflatten(0, (2, -1)), use_reentrant=False).flatten(0, 1)
            ),
            layer=nn.TransformerEncoderLayer(FEATURES, 2, 8, batch_first=True),
            head=nn.Linear(FEATURES, CLASSES),
        ),
    ),
    "checkpoint_lstm": Case(
        "Non-reentrant checkpointing of an LSTM",
        lambda: Apply(
            lambda m, x: m.head(checkpoint(lambda x: m.core(x)[0], x, use_reentrant=False).mean(1)),
            core=nn.LSTM(FEATURES, 6, batch_first=True),
            head=nn.Linear(6, CLASSES),
        ),
        sequence,
    ),
    "compiled": Case("torch.compile", lambda: torch.compile(mlp(), backend="eager")),
    "scripted": Case("TorchScript", lambda: torch.jit.script(mlp())),
    "autograd_inside": Case(
        "torch.autograd.grad inside the closure",
        lambda: Apply(physics, net=mlp()),
    ),
    "func_inside": Case(
        "torch.func derivatives inside the closure", lambda: Apply(physics_by_func, net=mlp())
    ),
}

LOSSES = {
    "cross_entropy": (
        lambda z, y: F.cross_entropy(z, y),
        lambda: torch.randint(0, CLASSES, (BATCH,)),
    ),
    "mse_loss": (lambda z, y: F.mse_loss(z, y), lambda: torch.randn(BATCH, CLASSES)),
}


class Problem:
    """A model in some dtype, its data and a closure."""

    def __init__(self, case: Case, loss: str, dtype: torch.dtype) -> None:
        loss_function, make_target = LOSSES[loss]
        self.model = case.make().to(dtype)
        x, y = case.data(), make_target()
        self.x, y = (t.to(dtype) if t.is_floating_point() else t for t in (x, y))
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.loss = lambda z: loss_function(z, y)
        self.closure = lambda: self.loss(self.model(self.x))

    def dense(self) -> tuple[Tensor, Tensor]:
        """The gradient and the Gauss-Newton matrix, row by row in plain autograd, where the random numbers now are."""
        state, buffers = torch.get_rng_state(), copy.deepcopy(dict(self.model.named_buffers()))
        z = self.model(self.x)
        jacobian, z = jacobian_by_rows(z, self.params), z.detach()
        torch.set_rng_state(state)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        hessian = torch.func.hessian(lambda flat: self.loss(flat.view_as(z)))(z.flatten())
        gradient = torch.func.grad(lambda flat: self.loss(flat.view_as(z)))(z.flatten())
        return jacobian.T @ gradient, jacobian.T @ hessian @ jacobian


def as_problem(model: nn.Module, x: Tensor, y: Tensor) -> Problem:
    problem = Problem.__new__(Problem)
    problem.model, problem.x, problem.params = model, x, list(model.parameters())
    problem.loss = lambda z: F.cross_entropy(z, y)
    return problem
