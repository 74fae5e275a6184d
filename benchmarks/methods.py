"""The methods that the training benchmarks compare: NaturalCG and its peers.

Each takes a model and a stream of losses, one for each step (the same again and again for full-batch training), and
yields the loss that it found.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from time import process_time
from typing import NamedTuple

import torch
import torchmin
from pytorch_optimizer import SOAP, ScalableShampoo
from singd.optim.optimizer import SINGD
from torch import Tensor, nn

from ngd_optim import KFAC, NaturalCG

Loss = Callable[[Callable[[Tensor], Tensor]], Tensor]
Optimizers = list[torch.optim.Optimizer]


class FirstOrder(NamedTuple):
    """A method of one gradient per step, with the learning rates to choose from."""

    make: Callable[[nn.Module, float], Optimizers]
    rates: tuple[float, ...]


def muon(model: nn.Module, lr: float) -> Optimizers:
    """Muon for the matrices, Adam for the rest."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0), torch.optim.Adam(rest, lr=3e-3)]


def soap(model: nn.Module, lr: float) -> Optimizers:
    """SOAP for whatever is no vector, Adam for the vectors, as in its paper."""
    vectors = [p for p in model.parameters() if p.ndim < 2]
    rest = [p for p in model.parameters() if p.ndim >= 2]
    return [SOAP(rest, lr=lr, weight_decay=0.0), torch.optim.Adam(vectors, lr=lr)]


def shampoo(model: nn.Module, lr: float) -> Optimizers:
    """The scalable Shampoo, its roots renewed every 20 steps, grafted onto AdaGrad's step length."""
    return [
        ScalableShampoo(model.parameters(), lr=lr, preconditioning_compute_steps=20, graft_type=2)
    ]


def kfac(model: nn.Module, lr: float) -> Optimizers:
    """The defaults."""
    return [KFAC(model.parameters())]


def singd(model: nn.Module, lr: float) -> Optimizers:
    """K-FAC without inverses (IKFAC; Lin et al. 2023) for linear layers and convolutions, Adam for the rest."""
    layers = [m for m in model.modules() if isinstance(m, SINGD.SUPPORTED_MODULES)]
    known = [p for layer in layers for p in layer.parameters()]
    rest = [p for p in model.parameters() if not any(p is q for q in known)]
    average = (
        "batch+sequence" if any(isinstance(m, nn.Embedding) for m in model.modules()) else "batch"
    )
    own = SINGD(
        model,
        known,
        lr=lr,
        loss_average=average,
        kfac_like=True,
        normalize_lr_cov=True,
        warn_unsupported=False,
    )
    return [own, torch.optim.Adam(rest, lr=3e-3)] if rest else [own]


def by_first_order(
    method: FirstOrder, lr: float, seconds: float, model: nn.Module, losses: Iterable[Loss]
) -> Iterator[float]:
    """Cosine decay of the learning rate over the CPU time, whose clock ticks while a step is taken."""
    optimizers = method.make(model, lr)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    spent = 0.0
    for loss in losses:
        start, share = process_time(), min(1.0, spent / seconds)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * share))
            optimizer.zero_grad()
        with ExitStack() as watching:
            for optimizer in optimizers:
                if isinstance(optimizer, KFAC):
                    watching.enter_context(optimizer.watch())
            value = loss(model)
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
        spent += process_time() - start
        yield value.item()


def by_natural_cg(model: nn.Module, losses: Iterable[Loss]) -> Iterator[float]:
    """The defaults."""
    optimizer = NaturalCG(model.parameters())
    for loss in losses:
        optimizer.step(partial(loss, model))
        assert optimizer.last_step is not None
        yield optimizer.last_step.new_loss


def by_natural_cg_on_four(model: nn.Module, losses: Iterable[Loss]) -> Iterator[float]:
    """The defaults; the gradient of four losses at a time, the curvature of the first."""
    optimizer, stream = NaturalCG(model.parameters()), iter(losses)
    while some := list(islice(stream, 4)):
        parts = [partial(loss, model) for loss in some]
        optimizer.step(parts, curvature_closure=parts[0])
        assert optimizer.last_step is not None
        yield optimizer.last_step.new_loss


def by_lbfgs(model: nn.Module, losses: Iterable[Loss]) -> Iterator[float]:
    """Strong Wolfe line search, 20 iterations a call."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), line_search_fn="strong_wolfe", history_size=20
    )
    seen: list[float] = []

    def closure(loss: Loss) -> Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        seen.append(value.item())
        return value

    for loss in losses:
        seen.clear()
        optimizer.step(partial(closure, loss))  # pyright: ignore[reportArgumentType]
        yield min(seen)


def by_newton_cg(model: nn.Module, losses: Iterable[Loss]) -> Iterator[float]:
    """pytorch-minimize, one outer iteration a call."""
    names = [name for name, _ in model.named_parameters()]
    params = list(model.parameters())
    sizes = [p.numel() for p in params]
    x = torch.cat([p.detach().flatten() for p in params])

    def function(loss: Loss, flat: Tensor) -> Tensor:
        pieces = [piece.view_as(p) for piece, p in zip(flat.split(sizes), params, strict=True)]
        return loss(
            lambda z: torch.func.functional_call(model, dict(zip(names, pieces, strict=True)), (z,))
        )

    for loss in losses:
        result = torchmin.minimize(partial(function, loss), x, method="newton-cg", max_iter=1)
        x = result.x
        yield float(result.fun)


_ADAM_RATES = (1e-3, 3e-3, 1e-2)
METHODS: dict[str, FirstOrder | Callable[[nn.Module, Iterable[Loss]], Iterator[float]]] = {
    "Adam": FirstOrder(lambda m, lr: [torch.optim.Adam(m.parameters(), lr=lr)], _ADAM_RATES),
    "AdamW": FirstOrder(lambda m, lr: [torch.optim.AdamW(m.parameters(), lr=lr)], _ADAM_RATES),
    "Muon": FirstOrder(muon, (5e-3, 2e-2, 5e-2)),
    "SOAP": FirstOrder(soap, _ADAM_RATES),
    "Shampoo": FirstOrder(shampoo, (1e-3, 1e-2, 1e-1)),
    "SINGD (K-FAC)": FirstOrder(singd, (1e-3, 1e-2, 1e-1)),
    "KFAC": FirstOrder(kfac, ()),
    "L-BFGS": by_lbfgs,
    "pytorch-minimize Newton-CG": by_newton_cg,
    "NaturalCG": by_natural_cg,
    "NaturalCG, 4 batches": by_natural_cg_on_four,
}
"""By name: a loop, or what makes a method of first order."""


def steps_of(
    method: str, lr: float, seconds: float, model: nn.Module, losses: Iterable[Loss]
) -> Iterator[float]:
    """What a method finds, step by step; ``lr`` and ``seconds`` are for those of first order."""
    way = METHODS[method]
    return (
        by_first_order(way, lr, seconds, model, losses)
        if isinstance(way, FirstOrder)
        else way(model, losses)
    )


def rates_of(method: str) -> tuple[float, ...]:
    """The learning rates to choose from; empty where there is none."""
    way = METHODS[method]
    return way.rates if isinstance(way, FirstOrder) else ()
