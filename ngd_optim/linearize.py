"""A closure at one point: its loss, its gradient and its curvature product."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ngd_optim.closure import Closure, Evaluation, ReplayedClosure
from ngd_optim.curvature import Backend, Curvature, kl_of, metric_of, penalty_of
from ngd_optim.parameters import FlatParameters
from ngd_optim.products import Map
from ngd_optim.verify import Experience, refuse_unsupported, verify


@dataclass(frozen=True)
class Linearization:
    """What is known about a closure at the current parameters. All vectors are flat, in the order of the parameters.

    Attributes:
        loss: the loss, detached, 0-dim.
        gradient: its gradient, shape ``(n,)``; zero for parameters that the loss does not use.
        reached: for each parameter, whether the loss depends on it.
        used: for each parameter, whether the loss or the metric does.
        backend: what forms the products: ``"torch.func"`` or ``"double-backward"``.
        product: see :meth:`curvature`.
        kl: the mean KL from the prediction here to that of another evaluation of the closure, 0-dim; it gives None
            where the metric has only its second-order model.
    """

    loss: Tensor
    gradient: Tensor
    reached: list[bool]
    used: list[bool]
    backend: Backend
    product: Callable[[Tensor], Tensor]
    kl: Callable[[Evaluation], Tensor | None]

    def curvature(self, v: Tensor) -> Tensor:
        """The undamped curvature times a vector: ``(n,) → (n,)``.

        The closure runs again in forward mode, so the parameters must still be where they were.

        Raises:
            ValueError: ``v`` has another shape than the gradient.
        """
        if v.shape != self.gradient.shape:
            raise ValueError(f"v must have shape {tuple(self.gradient.shape)}, got {tuple(v.shape)}")
        return self.product(v.to(self.gradient))

    def measure_kl(self, evaluation: Evaluation) -> float | None:
        """The measured KL to another evaluation, in nats per sample; None if the metric cannot tell."""
        kl = self.kl(evaluation)
        return None if kl is None else kl.item()


def linearize(closure: Closure, params: Iterable[Tensor], *, curvature: Curvature = "auto") -> Linearization:
    """Loss, gradient and curvature product of a closure at the current parameters.

    Args:
        closure: as for :meth:`NaturalCG.step <ngd_optim.NaturalCG.step>`: returns a loss, ``(loss, distribution)`` or
            ``(loss, kl)``.
        params: the parameters, in the order in which the flat vectors hold them; frozen ones are left out.
        curvature: ``"fisher"`` for the returned metric's Hessian, ``"ggn"`` for the loss functions' Gauss-Newton
            matrix, ``"hessian"`` for that of the loss, ``"auto"`` for the first of the three that the closure offers.

    Raises:
        TypeError, ValueError: the closure returned something that is not a loss or a metric, or does not offer the
            curvature.
        NotImplementedError: torch knows no KL divergence for the distribution.

    Example:
        >>> point = linearize(lambda: F.mse_loss(model(x), y), model.parameters())
        >>> point.curvature(point.gradient)
    """
    if curvature not in get_args(Curvature):
        raise ValueError(f"curvature must be one of {get_args(Curvature)}, got {curvature!r}")
    parameters = FlatParameters([{"params": list(params)}])
    run = ReplayedClosure(closure, parameters.tensors)
    return linearize_at(run, run(), parameters, curvature, Experience())


@torch.enable_grad()
def linearize_at(
    run: ReplayedClosure, traced: Evaluation, parameters: FlatParameters, curvature: Curvature, experience: Experience
) -> Linearization:
    """As :func:`linearize`, for a closure that has just been run, with what was learnt of it before."""
    if not traced.loss.requires_grad:
        raise ValueError(
            "the loss has no graph to differentiate: it was detached, computed under no_grad, or uses none of the "
            "parameters"
        )
    if not experience.complete:
        refuse_unsupported(traced)
    params = parameters.tensors
    metric = metric_of(traced, curvature)
    gradients = torch.autograd.grad(traced.loss, params, retain_graph=True, allow_unused=True)
    reached = [gradient is not None for gradient in gradients]
    gradient = parameters.flatten(gradients)
    if not experience.complete:
        verify(experience, run, traced, metric, gradient, parameters)
    products = [metric.product(run, params, experience.backend)]
    if experience.penalty:
        products += filter(None, [penalty_of(run, params)])
    return Linearization(
        loss=traced.loss.detach(),
        gradient=gradient,
        reached=reached,
        used=reached if all(reached) else _reached([traced.loss, *metric.outputs], params),
        backend=experience.backend,
        product=_flat(products, parameters),
        kl=kl_of(traced),
    )


def _reached(roots: Sequence[Tensor], params: Sequence[Tensor]) -> list[bool]:
    """For each parameter, whether one of the roots depends on it."""
    zeros = [torch.zeros_like(root) for root in roots]
    gradients = torch.autograd.grad(roots, params, zeros, retain_graph=True, allow_unused=True)
    return [gradient is not None for gradient in gradients]


def _flat(products: Sequence[Map], parameters: FlatParameters) -> Callable[[Tensor], Tensor]:
    """The sum of some products, on flat vectors."""

    def product(v: Tensor) -> Tensor:
        pieces = parameters.unflatten(v)
        first, *rest = (parameters.flatten(part(pieces)) for part in products)
        return sum(rest, first)

    return product
