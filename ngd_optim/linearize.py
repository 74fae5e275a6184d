"""A closure at one point: its loss, its gradient and its curvature product."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ngd_optim.closure import Closure, Evaluation, ReplayedClosure
from ngd_optim.curvature import Curvature, OutputMetric, fisher, gauss_newton, hessian_product
from ngd_optim.parameters import FlatParameters

_NOT_ZERO = 1e-3


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
        kl: the mean KL from the prediction here to that of another evaluation of the closure, 0-dim; None where the
            metric has only its second-order model.
    """

    loss: Tensor
    gradient: Tensor
    reached: list[bool]
    used: list[bool]
    backend: str
    product: Callable[[Tensor], Tensor]
    kl: Callable[[Evaluation], Tensor] | None

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
        return None if self.kl is None else self.kl(evaluation).item()


def linearize(closure: Closure, params: Iterable[Tensor], *, curvature: Curvature = "auto") -> Linearization:
    """Loss, gradient and curvature product of a closure at the current parameters.

    Args:
        closure: as for :meth:`NaturalCG.step <ngd_optim.NaturalCG.step>`: returns a loss that comes from a recognised
            loss function, ``(loss, distribution)`` or ``(loss, kl)``.
        params: the parameters, in the order in which the flat vectors hold them; frozen ones are left out.
        curvature: ``"fisher"`` for the returned metric's Hessian, ``"ggn"`` for the loss functions' Gauss-Newton
            matrix, ``"auto"`` for the first of the two that the closure offers.

    Raises:
        TypeError, ValueError: the closure returned something that is not a loss or a metric.
        NotImplementedError: torch knows no KL divergence for the distribution.
    """
    if curvature not in get_args(Curvature):
        raise ValueError(f"curvature must be one of {get_args(Curvature)}, got {curvature!r}")
    parameters = FlatParameters([{"params": list(params)}])
    replayed = ReplayedClosure(closure, parameters.tensors)
    return linearize_at(replayed, replayed(), parameters, curvature)


def linearize_at(
    closure: ReplayedClosure, traced: Evaluation, parameters: FlatParameters, curvature: Curvature
) -> Linearization:
    """As :func:`linearize`, for a closure that has just been run."""
    if not traced.loss.requires_grad:
        raise ValueError(
            "the loss has no graph to differentiate: it was detached, computed under no_grad, or uses none of the "
            "parameters"
        )
    metric = _metric(traced, curvature)
    params = parameters.tensors
    gradients = torch.autograd.grad(traced.loss, params, retain_graph=True, allow_unused=True)
    if isinstance(metric, OutputMetric):
        backend, roots, product, kl = (
            "torch.func",
            metric.outputs,
            _output_product(closure, metric, parameters),
            metric.kl,
        )
    else:
        backend, roots, product, kl = "double-backward", [metric], _hessian_of_kl(metric, parameters), _returned_kl
    reached = [gradient is not None for gradient in gradients]
    return Linearization(
        loss=traced.loss.detach(),
        gradient=parameters.flatten(gradients),
        reached=reached,
        used=reached if all(reached) else _reached([traced.loss, *roots], params),
        backend=backend,
        product=product,
        kl=kl,
    )


def _reached(roots: Sequence[Tensor], params: Sequence[Tensor]) -> list[bool]:
    """For each parameter, whether one of the roots depends on it."""
    zeros = [torch.zeros_like(root) for root in roots]
    gradients = torch.autograd.grad(roots, params, zeros, retain_graph=True, allow_unused=True)
    return [gradient is not None for gradient in gradients]


def _metric(traced: Evaluation, curvature: Curvature) -> OutputMetric | Tensor:
    """The metric that the closure offers and ``curvature`` asks for; a scalar KL is a tensor."""
    if curvature == "ggn" or (curvature == "auto" and traced.metric is None):
        return gauss_newton(traced)
    if traced.metric is None:
        raise ValueError("curvature='fisher' needs a closure that returns (loss, distribution) or (loss, kl)")
    if not isinstance(traced.metric, Tensor):
        return fisher(traced)
    kl = traced.metric.reshape(())
    if not kl.requires_grad:
        raise ValueError("the returned kl has no graph to differentiate: it was detached or computed under no_grad")
    if abs(kl.item()) > _NOT_ZERO:
        raise ValueError(
            f"the returned kl must be zero at the current parameters, got {kl.item():.3g}; measure it from a detached "
            "copy of the current prediction"
        )
    return kl


def _output_product(
    closure: ReplayedClosure, metric: OutputMetric, parameters: FlatParameters
) -> Callable[[Tensor], Tensor]:
    params = parameters.tensors
    primals = tuple(p.detach() for p in params)

    def outputs(*stand_ins: Tensor) -> tuple[Tensor, ...]:
        return tuple(metric.select(closure(stand_ins)))

    def product(v: Tensor) -> Tensor:
        pushed = torch.func.jvp(outputs, primals, tuple(parameters.unflatten(v)))[1]
        weighted = metric.hessian([t.detach() for t in pushed])
        pulled = torch.autograd.grad(metric.outputs, params, weighted, retain_graph=True, allow_unused=True)
        return parameters.flatten(pulled)

    return product


def _hessian_of_kl(kl: Tensor, parameters: FlatParameters) -> Callable[[Tensor], Tensor]:
    hessian = hessian_product(kl, parameters.tensors)
    return lambda v: parameters.flatten(hessian(parameters.unflatten(v)))


def _returned_kl(evaluation: Evaluation) -> Tensor:
    return evaluation.metric.detach().reshape(())
