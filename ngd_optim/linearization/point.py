"""A closure at one point: its loss, its gradient and its curvature product."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from ngd_optim.curvature import OutputMetric, ScalarMetric, kl_of, metric_of
from ngd_optim.distributed import ALONE, Ranks
from ngd_optim.jacobian import SqrtGGN
from ngd_optim.linearization.checks import Experience, Signature, refuse_unsupported, signature, verify
from ngd_optim.linearization.product import TracedProduct
from ngd_optim.names import Backend, Curvature, Kind
from ngd_optim.parameters import FlatParameters
from ngd_optim.recording import Memory
from ngd_optim.tracing import Closure, Evaluation, ReplayedClosure, twice_differentiable

Known = Callable[[ReplayedClosure, Signature], Experience]
"""Finds what earlier steps learnt of a closure whose trace has that signature."""

Observer = Callable[[OutputMetric | ScalarMetric], None]
"""Is shown a closure's metric while its graph is at hand."""


def unseen(metric: OutputMetric | ScalarMetric) -> None:
    """The observer that looks away."""


@dataclass(frozen=True)
class Linearization:
    """What is known about a closure at the current parameters. All vectors are flat, in the order of the parameters.

    Attributes:
        loss: the loss, detached, 0-dim.
        gradient: its gradient, shape ``(n,)``; zero for parameters that the loss does not use.
        reached: for each parameter, whether the loss depends on it.
        used: for each parameter, whether the loss or the metric does.
        root_shape: that of :meth:`square_root`: how many elements the model's outputs have, and how many
            parameters there are. The first is 0 where there is no root: the curvature is not made at the
            outputs alone (a Hessian, a scalar KL, a penalty beside them), or they are spread over
            closures or processes.
        is_least_squares: whether all that the metric comes from is :func:`~ngd_optim.least_squares`.
        kind: what the curvature is: ``"fisher"``, ``"ggn"`` or ``"hessian"``.
        has_kl: whether the closure returned a distribution or a KL, so that the KL can be measured.
        experience: what is known of how to form the products.
        product: see :meth:`curvature`.
        measure: runs the closure at the parameters as they are then, and gives the loss (infinite where the closure
            raises a ``ValueError`` or ``LinAlgError``: outside its domain) and the KL from the prediction here, in nats
            per sample; None where the metric has only its second-order model.

    Examples:
        >>> import torch
        >>> from ngd_optim import linearize
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> point = linearize(lambda: (x**3).sum(), [x])
        >>> point.loss, point.gradient
        (tensor(9.), tensor([ 3., 12.]))
    """

    loss: Tensor
    gradient: Tensor
    reached: list[bool]
    used: list[bool]
    root_shape: tuple[int, int]
    is_least_squares: bool
    kind: Kind
    has_kl: bool
    experience: Experience
    product: Callable[[Tensor], Tensor]
    measure: Callable[[], tuple[float, float | None]]

    def curvature(self, v: Tensor) -> Tensor:
        """The undamped curvature times a vector: ``(n,) → (n,)``.

        Valid only while the parameters are where they were: it reads them, and does not check.

        Raises:
            ValueError: ``v`` has another shape than the gradient.
        """
        if v.shape != self.gradient.shape:
            raise ValueError(f"v must have shape {tuple(self.gradient.shape)}, got {tuple(v.shape)}")
        return self.product(v.to(self.gradient))

    def square_root(self) -> SqrtGGN | None:
        """The matrix ``A`` with ``F = AᵀA``; None if ``F`` is indefinite. To be asked before any product.

        Raises:
            ValueError: the curvature is not made at the outputs of one closure alone.
        """
        if not (self.root_shape[0] and isinstance(self.product, TracedProduct)):
            raise ValueError("the curvature has no root: it is not made at the outputs of one closure alone")
        return self.product.square_root()

    def compute_cheap_diagonal(self) -> Tensor | None:
        """The diagonal of ``F``, where it takes as little as some products; else None. To be asked before any."""
        return (
            self.product.compute_cheap_diagonal()
            if self.root_shape[0] and isinstance(self.product, TracedProduct)
            else None
        )

    @property
    def rounding(self) -> float:
        """Differences of the loss below this are noise."""
        return 10 * torch.finfo(self.loss.dtype).eps * abs(self.loss.item())

    @property
    def backend(self) -> Backend:
        """What forms the products: ``"torch.func"`` or ``"double-backward"``."""
        return self.experience.backend

    def averaged(self, ranks: Ranks) -> "Linearization":
        """The mean over several processes. What it measures and multiplies by is then global as well."""
        if ranks.group is None:
            return self
        n = len(self.used)
        flags = ranks.any([*self.reached, *self.used])

        def measure() -> tuple[float, float | None]:
            loss, kl = ranks.together(self.measure)
            values = torch.tensor([loss, kl or 0.0], dtype=torch.float64, device=self.gradient.device)
            loss, mean_kl = ranks.average(values).tolist()
            return loss, mean_kl if ranks.any([kl is not None])[0] else None

        return replace(
            self,
            loss=ranks.average(self.loss),
            gradient=ranks.average(self.gradient),
            reached=flags[:n],
            used=flags[n:],
            root_shape=(0, self.root_shape[1]),
            product=lambda v: ranks.mean_deferring_errors(lambda: self.product(v), v),
            measure=measure,
        )

    def with_curvature_of(self, other: "Linearization") -> "Linearization":
        """The same loss and gradient, with another closure's curvature."""
        used = [a or b for a, b in zip(self.used, other.used, strict=True)]
        return replace(
            self,
            used=used,
            root_shape=other.root_shape,
            is_least_squares=other.is_least_squares,
            kind=other.kind,
            experience=other.experience,
            product=other.product,
        )


def linearize(closure: Closure, params: Iterable[Tensor], *, curvature: Curvature = "auto") -> Linearization:
    """Loss, gradient and curvature product of a closure at the current parameters.

    Args:
        closure: as for :meth:`NaturalCG.step <ngd_optim.NaturalCG.step>`: returns a loss, ``(loss, distribution)`` or
            ``(loss, kl)``.
        params: the parameters, in the order in which the flat vectors hold them; frozen ones are left out.
        curvature: ``"fisher"`` for the returned metric's Hessian, ``"ggn"`` for the loss functions' Gauss-Newton
            matrix, ``"hessian"`` for that of the loss, ``"auto"`` for the first of the three that the closure offers.

    Each call checks the derivatives against plain autograd, which takes some further gradients and products; an
    optimizer does that only at its first step with a closure.

    Raises:
        TypeError, ValueError: the closure returned something that is not a loss or a metric, or does not offer the
            curvature.
        NotImplementedError: torch knows no KL divergence for the distribution.
        RuntimeError: the closure holds something that cannot work, and the message says what to do instead.
        Exception: whatever the closure raises.

    Examples:
        >>> import torch
        >>> from ngd_optim import linearize
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> point = linearize(lambda: (x**3).sum(), [x])  # its Hessian is diag(6 x)
        >>> point.curvature(torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """
    if curvature not in get_args(Curvature):
        raise ValueError(f"curvature must be one of {get_args(Curvature)}, got {curvature!r}")
    parameters = FlatParameters([{"params": list(params)}])
    experience = Experience()
    run = ReplayedClosure(closure, parameters.tensors)
    with twice_differentiable():
        return linearize_closure(run, parameters, curvature, lambda *_: experience)


@torch.enable_grad()
def linearize_closure(
    run: ReplayedClosure,
    parameters: FlatParameters,
    curvature: Curvature,
    known: Known,
    ranks: Ranks = ALONE,
    observe: Observer = unseen,
) -> Linearization:
    """As :func:`linearize`, with what was learnt of the closure at earlier points.

    What is learnt is common to all ranks; what is returned is this rank's.
    """
    params = parameters.tensors
    memory = Memory()

    def differentiated() -> tuple[Evaluation, Signature, Experience, OutputMetric | ScalarMetric, list[bool], Tensor]:
        with memory:
            traced = run.traced()
        metric = metric_of(traced, curvature)
        seen = signature(traced, metric, memory, parameters)
        experience = known(run, seen)
        if not experience.complete:
            refuse_unsupported(traced)
        try:
            gradients = torch.autograd.grad(traced.loss, params, retain_graph=True, allow_unused=True)
        except CheckpointError as error:
            raise RuntimeError(
                "a checkpointed part of the closure was not the same when it ran again; "
                "with an LSTM in it, set torch.backends.mkldnn.enabled = False"
            ) from error
        reached = [gradient is not None for gradient in gradients]
        return traced, seen, experience, metric, reached, parameters.flatten(gradients)

    traced, seen, experience, metric, reached, gradient = ranks.together(differentiated)
    if not ranks.all(experience.complete):
        count = run.count
        verify(experience, run, traced, metric, gradient, parameters, memory, ranks, is_quick=seen.is_quick)
        run.count = count
    ranks.together(lambda: observe(metric))
    kl = kl_of(traced)

    def measure() -> tuple[float, float | None]:
        there = run.tried()
        if there is None:
            return math.inf, None
        divergence = kl(there)
        return there.loss.item(), None if divergence is None else divergence.item()

    return Linearization(
        loss=traced.loss.detach(),
        gradient=gradient,
        reached=reached,
        used=reached if all(reached) else _reached([traced.loss, *metric.outputs], params),
        root_shape=(_outputs_with_root(metric, experience), len(gradient)),
        is_least_squares=traced.is_least_squares and isinstance(metric, OutputMetric),
        kind=metric.kind,
        has_kl=traced.metric is not None,
        experience=experience,
        product=TracedProduct(run, metric, parameters, experience, memory, ranks, loss=traced.loss),
        measure=measure,
    )


@torch.enable_grad()
def linearize_mean(
    runs: Sequence[ReplayedClosure],
    parameters: FlatParameters,
    curvature: Curvature,
    known: Known,
    ranks: Ranks = ALONE,
    observe: Observer = unseen,
) -> Linearization:
    """The mean of some closures, with the graph of one at a time: each product traces each of them anew."""
    if len(runs) == 1:
        return linearize_closure(runs[0], parameters, curvature, known, ranks, observe)
    parts = []
    for run in runs:
        part = linearize_closure(run, parameters, curvature, known, ranks, observe)
        part = replace(part, product=_retracing_product(run, parameters, curvature, part.experience, ranks))
        parts.append(part)
    ranks.together(lambda: _require_one_kind(parts))

    def measure() -> tuple[float, float | None]:
        losses, kls = zip(*(part.measure() for part in parts), strict=True)
        return fmean(losses), None if None in kls else fmean(kls)

    return Linearization(
        loss=torch.stack([part.loss for part in parts]).mean(),
        gradient=_mean((part.gradient for part in parts), len(parts)),
        reached=[any(flags) for flags in zip(*(part.reached for part in parts), strict=True)],
        used=[any(flags) for flags in zip(*(part.used for part in parts), strict=True)],
        root_shape=(0, parts[0].root_shape[1]),
        is_least_squares=all(part.is_least_squares for part in parts),
        kind=parts[0].kind,
        has_kl=parts[0].has_kl,
        experience=parts[0].experience,
        product=lambda v: _mean((part.product(v) for part in parts), len(parts)),
        measure=measure,
    )


def _require_one_kind(parts: Sequence[Linearization]) -> None:
    kinds = dict.fromkeys((part.kind, part.has_kl) for part in parts)
    if len(kinds) > 1:
        shown = ", ".join(f"{kind!r} {'with' if has_kl else 'without'} a KL" for kind, has_kl in kinds)
        raise ValueError(
            f"the closures of a list must all return the same, a loss, (loss, distribution) or (loss, kl), and losses "
            f"of one kind; got curvatures {shown}"
        )


def _reached(roots: Sequence[Tensor], params: Sequence[Tensor]) -> list[bool]:
    """For each parameter, whether one of the roots depends on it."""
    zeros = [torch.zeros_like(root) for root in roots]
    gradients = torch.autograd.grad(roots, params, zeros, retain_graph=True, allow_unused=True)
    return [gradient is not None for gradient in gradients]


def _outputs_with_root(metric: OutputMetric | ScalarMetric, experience: Experience) -> int:
    if isinstance(metric, ScalarMetric) or experience.penalty:
        return 0
    return sum(z.numel() for z in metric.outputs)


def _retracing_product(
    run: ReplayedClosure, parameters: FlatParameters, curvature: Curvature, experience: Experience, ranks: Ranks
) -> Callable[[Tensor], Tensor]:
    @torch.enable_grad()
    def product(v: Tensor) -> Tensor:
        with Memory() as memory:
            traced = ranks.together(lambda: run.traced())
        metric = ranks.together(lambda: metric_of(traced, curvature))
        return TracedProduct(run, metric, parameters, experience, memory, ranks, record=False)(v)

    return product


def _mean(vectors: Iterator[Tensor], count: int) -> Tensor:
    total = next(vectors).clone()
    for vector in vectors:
        total += vector
    return total / count
