"""Short trainings through every solver, preconditioner, curvature and layer; as a script, it prints their losses."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from ngd_optim import Diagonal, NaturalCG, Nystrom, least_squares, linearize

CPU = torch.device("cpu")
X = torch.linspace(-1, 1, 160, device=CPU).sin().view(32, 5)
LABELS = torch.arange(32, device=CPU) % 3
IMAGES = torch.linspace(-1, 1, 512, device=CPU).cos().view(8, 1, 8, 8)
SEQUENCES = torch.linspace(-1, 1, 120, device=CPU).cos().view(4, 6, 5)
LENGTHS = torch.full((4,), 8, device=CPU), torch.full((4,), 2, device=CPU)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    convolutions = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2)
    )
    return nn.Sequential(convolutions, nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 3))


def cross_entropy(m: nn.Module) -> Tensor:
    return F.cross_entropy(m(X), LABELS)


def residuals(m: nn.Module) -> Tensor:
    return least_squares(m(X) - 1, m(X[:3]), weights=(1.0, 10.0))


def policy(m: nn.Module) -> Any:
    z = m(X)
    return cross_entropy(m), [Categorical(logits=z), Independent(Normal(z, z.exp()), 1)]


def scalar_kl(m: nn.Module) -> Any:
    z = m(X)
    return z.square().mean(), kl_divergence(
        Categorical(logits=z.detach()), Categorical(logits=z)
    ).mean()


def equation(m: nn.Module) -> Tensor:
    t = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(m(t).sum(), t, create_graph=True)
    return least_squares(slope, m(X))


def ctc(m: nn.Module) -> Tensor:
    targets = torch.ones(4, 2, dtype=torch.long, device=CPU)
    return F.ctc_loss(m(X).view(8, 4, 3).log_softmax(2), targets, *LENGTHS)


def penalised(m: nn.Module) -> Tensor:
    return cross_entropy(m) + 0.1 * sum(p.square().sum() for p in m.parameters())


HESSIAN = {"curvature": "hessian"}
WAYS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], dict[str, Any]]] = {
    "kfac": (mlp, cross_entropy, {"preconditioner": "kfac"}),
    "diagonal": (mlp, cross_entropy, {"preconditioner": "diagonal"}),
    "probed diagonal": (mlp, scalar_kl, {"preconditioner": Diagonal(probes=2)}),
    "nystrom": (mlp, cross_entropy, {"preconditioner": Nystrom(rank=3)}),
    "dense": (mlp, cross_entropy, {"solver": "dense"}),
    "sample": (mlp, cross_entropy, {"solver": "sample", "momentum": 0.9}),
    "Marquardt": (mlp, cross_entropy, {"damping_scale": "diagonal"}),
    "decay": (mlp, cross_entropy, {"weight_decay": 0.1, "backend": "torch.func"}),
    "Hessian": (mlp, cross_entropy, HESSIAN),
    "dense Hessian": (mlp, cross_entropy, {**HESSIAN, "solver": "dense"}),
    "Fisher": (mlp, policy, {}),
    "Fisher, dense": (mlp, policy, {"solver": "dense"}),
    "Fisher, sample": (mlp, policy, {"solver": "sample"}),
    "Fisher, kfac": (mlp, policy, {"preconditioner": "kfac", "trust_region": "boundary"}),
    "residuals": (mlp, residuals, {}),
    "residuals, cg": (mlp, residuals, {"solver": "cg", "preconditioner": "kfac"}),
    "residuals, sample": (mlp, lambda m: least_squares(m(X[:4])), {}),
    "equation": (mlp, equation, {}),
    "penalty": (mlp, penalised, {}),
    "ctc": (mlp, ctc, {}),
    "cnn": (cnn, lambda m: F.cross_entropy(m(IMAGES), LABELS[:8]), {}),
    "cnn, kfac": (
        cnn,
        lambda m: F.cross_entropy(m(IMAGES), LABELS[:8]),
        {"preconditioner": "kfac"},
    ),
    "lstm": (Recurrent, lambda m: F.mse_loss(m(SEQUENCES), SEQUENCES[..., :3]), {}),
    "transformer": (transformer, lambda m: F.mse_loss(m(SEQUENCES), SEQUENCES[..., :3]), {}),
}


def train(name: str) -> list[float]:
    """The losses of three steps, of the parameters that a seed gives, and a product of ``linearize``."""
    build, loss, settings = WAYS[name]
    with torch.device(CPU):
        torch.manual_seed(0)
        model = build()
    optimizer = NaturalCG(model.parameters(), **settings)
    losses = [optimizer.step(lambda: loss(model)).item() for _ in range(3)]
    point = linearize(lambda: loss(model), model.parameters())
    return [*losses, point.curvature(point.gradient).norm().item()]


if __name__ == "__main__":
    warnings.simplefilter("error")
    for way in sys.argv[1:] or WAYS:
        print(way, train(way))
