"""A closure at one point: its loss, its gradient and its curvature product."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import get_args

import torch
from torch import Tensor

from ngd_optim.closure import Closure, Evaluation, ReplayedClosure
from ngd_optim.curvature import Backend, Curvature, OutputMetric, ScalarMetric, kl_of, metric_of, penalty_of
from ngd_optim.parameters import FlatParameters
from ngd_optim.products import flat_product
from ngd_optim.recording import CannotReplayError, Recording
from ngd_optim.verify import Experience, cannot_follow, refuse_unsupported, verify


@dataclass(frozen=True)
class Linearization:
    """What is known about a closure at the current parameters. All vectors are flat, in the order of the parameters.

    Attributes:
        loss: the loss, detached, 0-dim.
        gradient: its gradient, shape ``(n,)``; zero for parameters that the loss does not use.
        reached: for each parameter, whether the loss depends on it.
        used: for each parameter, whether the loss or the metric does.
        has_kl: whether the closure returned a distribution or a KL, so that the KL can be measured.
        experience: what is known of how to form the products.
        product: see :meth:`curvature`.
        measure: runs the closure at the parameters as they are then, and gives the loss and the KL from the prediction
            here, in nats per sample; None where the metric has only its second-order model.
    """

    loss: Tensor
    gradient: Tensor
    reached: list[bool]
    used: list[bool]
    has_kl: bool
    experience: Experience
    product: Callable[[Tensor], Tensor]
    measure: Callable[[], tuple[float, float | None]]

    def curvature(self, v: Tensor) -> Tensor:
        """The undamped curvature times a vector: ``(n,) → (n,)``.

        The closure runs again, so the parameters must still be where they were.

        Raises:
            ValueError: ``v`` has another shape than the gradient.
        """
        if v.shape != self.gradient.shape:
            raise ValueError(f"v must have shape {tuple(self.gradient.shape)}, got {tuple(v.shape)}")
        return self.product(v.to(self.gradient))

    @property
    def backend(self) -> Backend:
        """What forms the products: ``"torch.func"`` or ``"double-backward"``."""
        return self.experience.backend

    def with_curvature_of(self, other: "Linearization") -> "Linearization":
        """The same loss and gradient, with another closure's curvature."""
        used = [a or b for a, b in zip(self.used, other.used, strict=True)]
        return replace(self, used=used, experience=other.experience, product=other.product)


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
    return linearize_closure(ReplayedClosure(closure, parameters.tensors), parameters, curvature, Experience())


@torch.enable_grad()
def linearize_closure(
    run: ReplayedClosure, parameters: FlatParameters, curvature: Curvature, experience: Experience
) -> Linearization:
    """As :func:`linearize`, with what was learnt of the closure at earlier points."""
    params = parameters.tensors
    traced = _traced(run, experience)
    metric = metric_of(traced, curvature)
    gradients = torch.autograd.grad(traced.loss, params, retain_graph=True, allow_unused=True)
    reached = [gradient is not None for gradient in gradients]
    gradient = parameters.flatten(gradients)
    del gradients
    if not experience.complete:
        count = run.count
        verify(experience, run, traced, metric, gradient, parameters)
        run.count = count
    kl = kl_of(traced)

    def measure() -> tuple[float, float | None]:
        there = run(graph=False)
        divergence = kl(there)
        return there.loss.item(), None if divergence is None else divergence.item()

    return Linearization(
        loss=traced.loss.detach(),
        gradient=gradient,
        reached=reached,
        used=reached if all(reached) else _reached([traced.loss, *metric.outputs], params),
        has_kl=traced.metric is not None,
        experience=experience,
        product=_Product(run, metric, parameters, experience),
        measure=measure,
    )


@torch.enable_grad()
def linearize_mean(
    runs: Sequence[ReplayedClosure], parameters: FlatParameters, curvature: Curvature, experiences: Sequence[Experience]
) -> Linearization:
    """The mean of some closures, with the graph of one at a time: each product traces each of them anew."""
    if len(runs) == 1:
        return linearize_closure(runs[0], parameters, curvature, experiences[0])
    parts = [
        replace(
            linearize_closure(run, parameters, curvature, experience),
            product=_retracing_product(run, parameters, curvature, experience),
        )
        for run, experience in zip(runs, experiences, strict=True)
    ]

    def measure() -> tuple[float, float | None]:
        losses, kls = zip(*(part.measure() for part in parts), strict=True)
        return fmean(losses), None if None in kls else fmean(kls)

    return Linearization(
        loss=torch.stack([part.loss for part in parts]).mean(),
        gradient=_mean((part.gradient for part in parts), len(parts)),
        reached=[any(flags) for flags in zip(*(part.reached for part in parts), strict=True)],
        used=[any(flags) for flags in zip(*(part.used for part in parts), strict=True)],
        has_kl=all(part.has_kl for part in parts),
        experience=parts[0].experience,
        product=lambda v: _mean((part.product(v) for part in parts), len(parts)),
        measure=measure,
    )


def _traced(run: ReplayedClosure, experience: Experience) -> Evaluation:
    traced = run()
    if not traced.loss.requires_grad:
        raise ValueError(
            "the loss has no graph to differentiate: it was detached, computed under no_grad, or uses none of the "
            "parameters"
        )
    if not experience.complete:
        refuse_unsupported(traced)
    return traced


def _reached(roots: Sequence[Tensor], params: Sequence[Tensor]) -> list[bool]:
    """For each parameter, whether one of the roots depends on it."""
    zeros = [torch.zeros_like(root) for root in roots]
    gradients = torch.autograd.grad(roots, params, zeros, retain_graph=True, allow_unused=True)
    return [gradient is not None for gradient in gradients]


class _Product:
    """The product of a traced closure on flat vectors: recorded when first used, where that works, then replayed."""

    def __init__(
        self,
        run: ReplayedClosure,
        metric: OutputMetric | ScalarMetric,
        parameters: FlatParameters,
        experience: Experience,
    ) -> None:
        self._run = run
        self._metric: OutputMetric | ScalarMetric | None = metric
        self._parameters = parameters
        self._experience = experience
        self._formed: Recording | Callable[[Tensor], Tensor] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        if self._formed is None:
            return self._first(v)
        return self._formed(v)

    def _first(self, v: Tensor) -> Tensor:
        experience = self._experience
        try:
            direct = self._direct()
            if not experience.replays:
                result, self._formed = direct(v), direct
                return result
            self._formed = Recording(direct, v)
            self._metric = None  # and with it the graph: the recording holds what it needs of that
            return self._formed.result
        except CannotReplayError as error:
            experience.form_directly(str(error))
        except RuntimeError as error:  # the closure now does what forward mode cannot follow
            if experience.backend == "double-backward":
                raise
            experience.fall_back(cannot_follow(error))
        return self._first(v)

    def _direct(self) -> Callable[[Tensor], Tensor]:
        assert self._metric is not None
        params = self._parameters.tensors
        penalty = penalty_of(self._run, params) if self._experience.penalty else None
        products = [self._metric.product(self._run, params, self._experience.backend)]
        return flat_product(products if penalty is None else [*products, penalty], self._parameters)


def _retracing_product(
    run: ReplayedClosure, parameters: FlatParameters, curvature: Curvature, experience: Experience
) -> Callable[[Tensor], Tensor]:
    @torch.enable_grad()
    def product(v: Tensor) -> Tensor:
        traced = _traced(run, experience)
        return _Product(run, metric_of(traced, curvature), parameters, replace(experience, replays=False))(v)

    return product


def _mean(vectors: Iterator[Tensor], count: int) -> Tensor:
    total = next(vectors).clone()
    for vector in vectors:
        total += vector
    return total / count
