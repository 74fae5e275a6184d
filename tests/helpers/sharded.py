"""Small models that ``fully_shard`` spreads over ranks unevenly, and what one process makes of the same data."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ngd_optim import NaturalCG, StepReport

# A truncated solve amplifies rounding errors; a full one can be compared.
SOLVED = {"damping": 0.3, "cg_tol": 1e-14, "cg_progress_tol": 0.0}
CLASSES, BATCH = 5, 24  # as many for each of 1, 2 or 3 ranks


class Tied(nn.Module):
    """A transformer whose head is its embedding; dropout would draw other masks on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(x)).mean(1))


def make_mlp() -> nn.Module:
    """Rows that two do not divide, and parameters of which a rank has nothing."""
    torch.manual_seed(0)
    first = [nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)]
    return nn.Sequential(*first, nn.Tanh(), nn.Linear(1, CLASSES)).double()


class Moduli(nn.Module):
    """Complex layers, of which a rank may have nothing, and a real parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.first = nn.Linear(4, 3, dtype=torch.complex128)
        self.last = nn.Linear(3, CLASSES, dtype=torch.complex128)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.scale * self.first(x.to(torch.complex128)).tanh()).abs()


def make_complex() -> nn.Module:
    torch.manual_seed(0)
    return Moduli()


def make_tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied().double()


def data_of(make: Callable[[], nn.Module]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if make is make_tied:
        x = torch.randint(0, 7, (BATCH, 3), generator=generator)
    else:
        x = torch.randn(BATCH, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def shard(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """``fully_shard`` of some inner modules, and of all."""
    mesh = mesh or init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) or (
            type(module) is nn.Linear and not isinstance(model, Tied)
        ):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def with_backward(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    steps: int = 3,
    closure: Any = with_backward,
    **options: Any,
) -> tuple[Tensor, Tensor, list[StepReport]]:
    """The parameters, their gradients, and the reports."""
    optimizer = NaturalCG(model.parameters(), **{**SOLVED, "preconditioner": None, **options})
    run = closure(model, optimizer, x, y)
    reports = []
    for _ in range(steps):
        optimizer.step(run)
        assert optimizer.last_step is not None
        reports.append(optimizer.last_step)
    params = list(model.parameters())
    gradients = [p.grad for p in params if p.grad is not None]
    assert len(gradients) == len(params)
    return join(params), join(gradients), reports


def join(tensors: Sequence[Any]) -> Tensor:
    """All of them, whole and flat."""
    return torch.cat([getattr(t.detach(), "full_tensor", t.detach)().flatten() for t in tensors])
