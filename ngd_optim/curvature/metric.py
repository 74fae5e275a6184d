"""What the curvature is: a metric at the model's outputs, or the Hessian of a scalar; and how far a KL has gone."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.distributions import Distribution

from ngd_optim.autograd_graph import parents_first
from ngd_optim.curvature.kl import (
    USE_FORM_C,
    distributions_in,
    local_divergence,
    mean_kl,
    parameters_of,
    rebuild,
)
from ngd_optim.curvature.kl_checks import (
    Check,
    check_heads,
    check_nothing,
    check_returned_kl,
    largest_kl_at_start,
)
from ngd_optim.curvature.roots import powers_of_hessian
from ngd_optim.curvature.vector_products import Map, hessian, pull_back
from ngd_optim.names import Curvature, Kind
from ngd_optim.recognised import flat_share
from ngd_optim.tracing import Evaluation

Tensors = Sequence[Tensor]

logger = logging.getLogger("ngd_optim")


@dataclass(frozen=True)
class OutputMetric:
    """A metric that lives at the model's outputs: the curvature is ``Jᵀ H_z J`` with ``J = ∂z/∂θ``.

    Attributes:
        outputs: the outputs ``z``, tensors of any shapes, with their graph.
        make_hessian: gives ``u ↦ H_z u`` for tangents shaped like the outputs, made anew from these.
        select: finds the same outputs in another evaluation of the closure.
        kind: ``"fisher"`` or ``"ggn"``. To a Gauss-Newton metric the loss's dependence on the
            parameters around the outputs counts as well.
        check: at the first step with a closure, whether what serves as a KL is one.
        inputs: what the loss takes of the outputs: it depends on parameters around these.
        bends: outputs at which the slope of the model that rounds kinks is another than the loss's,
            and what it has more there; empty: no kink is rounded.
        hidden: how much higher the rounded kinks are than the loss's, in all; None: no kink is
            rounded.
    """

    outputs: Tensors
    make_hessian: Callable[[], Map]
    select: Callable[[Evaluation], Tensors]
    kind: Kind
    check: Check = check_nothing
    inputs: Tensors = ()
    bends: Sequence[tuple[Tensor, Tensor]] = ()
    hidden: Tensor | None = None

    @cached_property
    def apply_hessian(self) -> Map:
        """``u ↦ H_z u``."""
        return self.make_hessian()

    def bend(self, params: Tensors) -> Tensors | None:
        """What the model's gradient has more than the loss's, one tensor per parameter; None: nothing."""
        if not self.bends:
            return None
        outputs, slopes = zip(*self.bends, strict=True)
        return pull_back(outputs, params)(slopes)

    def powers(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]] | None:
        """See :func:`powers_of_hessian`."""
        return powers_of_hessian(self.apply_hessian, self.outputs, dtype)


@dataclass(frozen=True)
class ScalarMetric:
    """The Hessian of a scalar in the parameters: a KL that the closure returned, or the loss itself.

    Attributes:
        scalar: 0-dim, with its graph.
        select: finds the same scalar in another evaluation of the closure.
        kind: ``"fisher"`` for a KL, ``"hessian"`` for the loss.
        check: at the first step with a closure, whether what serves as a KL is one.
    """

    scalar: Tensor
    select: Callable[[Evaluation], Tensor]
    kind: Kind
    check: Check = check_nothing

    @property
    def outputs(self) -> Tensors:
        """What depends on the parameters."""
        return [self.scalar]


def metric_of(
    evaluation: Evaluation, curvature: Curvature, smoothing: float | None
) -> OutputMetric | ScalarMetric:
    """The metric that the closure offers and ``curvature`` asks for; ``smoothing`` is for :func:`gauss_newton`.

    Raises:
        ValueError: the closure does not offer it, or what it returned has no graph.
        NotImplementedError: torch has no closed-form KL for a distribution; the message names the
            way out.
    """
    if curvature == "fisher" and evaluation.metric is None:
        raise ValueError(
            "curvature='fisher' needs a closure that returns (loss, distribution) or (loss, kl); "
            "return one of them, or use curvature='auto'"
        )
    # What the closure returns beside the loss comes first: it says what distance is.
    if curvature in ("auto", "fisher") and evaluation.metric is not None:
        return (
            _hessian_of_kl(evaluation)
            if isinstance(evaluation.metric, Tensor)
            else fisher(evaluation)
        )
    if curvature in ("auto", "ggn"):
        metric = gauss_newton(evaluation, smoothing)
        if metric is not None:
            return metric
        if curvature == "ggn":
            raise ValueError(
                "curvature='ggn' needs a loss that comes from a recognised loss function of "
                "torch.nn.functional, such as cross_entropy or mse_loss, called in the closure on "
                "the model's output"
            )
    return ScalarMetric(evaluation.loss, lambda other: other.loss, "hessian")


def build_kl(evaluation: Evaluation) -> Callable[[Evaluation], Tensor | None]:
    """``other ↦`` mean KL from the prediction here to another evaluation's, in nats per sample; None if unknown.

    What is negative by rounding is 0. The function raises NotImplementedError where a distribution's
    transforms have changed.
    """
    metric = evaluation.metric
    if metric is None:
        return lambda other: None
    if isinstance(metric, Tensor):
        return _returned_kl
    try:
        old = [_freeze(head) for head in distributions_in(metric)]
        for head in old:
            mean_kl(head, head)
    except NotImplementedError:
        return lambda other: None

    def kl(other: Evaluation) -> Tensor:
        pairs = zip(old, distributions_in(other.metric), strict=True)
        # Torch's KL of an exponential family differentiates.
        with torch.enable_grad():
            total = add_scalars(mean_kl(before, after) for before, after in pairs)
        return _without_rounding(total.detach())

    return kl


def fisher(evaluation: Evaluation) -> OutputMetric:
    """The Fisher information of the returned distributions: the Hessian of the mean KL(old ‖ new), summed over heads.

    Source: Amari (1998); Schulman et al. (2015), appendix C.

    Raises:
        ValueError: a distribution does not depend on anything that requires a gradient.
        NotImplementedError: torch has no closed-form KL for it; the message names the way out.
    """
    heads = list(distributions_in(evaluation.metric))
    if not heads:
        raise TypeError(
            "the metric that the closure returns holds no distribution; return "
            "(loss, distribution), or the loss alone"
        )
    values = [parameters_of(head) for head in heads]
    for head, of_head in zip(heads, values, strict=True):
        if not any(value.requires_grad for value in of_head.values()):
            raise ValueError(
                f"the parameters of the returned {type(head).__name__} are detached from the "
                "graph; return the distribution as the model computed it, not under no_grad"
            )
    learned = [
        (i, name)
        for i, of_head in enumerate(values)
        for name, value in of_head.items()
        if value.requires_grad
    ]

    def select(other: Evaluation) -> Tensors:
        others = [parameters_of(head) for head in distributions_in(other.metric)]
        return [others[i][name] for i, name in learned]

    outputs = [values[i][name] for i, name in learned]

    def rebuilt() -> tuple[list[Tensor], list[Distribution]]:
        """The outputs without their graph, and the heads as functions of these."""
        moving = [{name: value.detach() for name, value in of_head.items()} for of_head in values]
        for i, name in learned:
            moving[i][name] = moving[i][name].clone().requires_grad_()
        with torch.enable_grad():
            new = [rebuild(head, of_head) for head, of_head in zip(heads, moving, strict=True)]
        return [moving[i][name] for i, name in learned], new

    def make_hessian() -> Map:
        # KL(old ‖ new) as a function of new's parameters alone: a graph of a few operations, whose
        # Hessian at new = old is H_z.
        variables, new = rebuilt()
        with torch.enable_grad():
            divergence = add_scalars(
                local_divergence(_freeze(head), other)
                for head, other in zip(heads, new, strict=True)
            )
        if not divergence.requires_grad:
            names = ", ".join(dict.fromkeys(type(head).__name__ for head in heads))
            raise NotImplementedError(
                f"the KL divergence that torch knows of {names} does not depend on the parameters; "
                f"{USE_FORM_C}"
            )
        return hessian(divergence, variables)

    return OutputMetric(
        outputs,
        make_hessian,
        select,
        kind="fisher",
        check=check_heads(heads, learned, outputs, rebuilt, make_hessian),
    )


def gauss_newton(evaluation: Evaluation, smoothing: float | None) -> OutputMetric | None:
    """The generalised Gauss-Newton metric: the Hessian of all that the loss does after the model's outputs.

    Weights, reductions, label smoothing and sums of several losses are followed by autograd
    (Schraudolph 2002). What the loss has a kink in is an output as well, with the curvature of a
    parabola, and rounded by ``smoothing``, a share of their mean size; None: they are not. The metric
    is None if the loss depends on no recognised loss function's input and not on kinks alone, or on
    derivatives of a loss function.
    """
    calls = [call for call in evaluation.losses if call.result.requires_grad]
    # How the loss depends on what the loss functions gave: w of a mean, a sum, a weighted sum.
    weights = _slopes(evaluation.loss, [call.result for call in calls])
    used = [
        (call, weight) for call, weight in zip(calls, weights, strict=True) if weight is not None
    ]
    outputs = [z for call, _ in used for z in call.outputs if z.requires_grad]
    results = [call.result for call, _ in used]
    if _depends_on_derivatives(evaluation, results, outputs):
        return None
    if not used and not evaluation.ends_in_kinks:
        return None
    own = [call.with_own_hessian(smoothing) for call, _ in used]
    loss = evaluation.loss
    if any(result is not call.result for result, (call, _) in zip(own, used, strict=True)):
        loss = add_scalars(
            (weight * result).sum() for result, (_, weight) in zip(own, used, strict=True)
        )
    indices = [
        i for i, z in enumerate(evaluation.outputs) if any(z is output for output in outputs)
    ]
    # Beside a recognised loss, squares are a penalty: derivatives see their curvature.
    kinks = [kink for kink in evaluation.kinks if not (used and kink.is_smooth)]
    edges = [GradientEdge(kink.node, 0) for kink in kinks]
    slopes = torch.autograd.grad(evaluation.loss, edges, retain_graph=True) if edges else ()
    forms = [kink.form() for kink in kinks]
    parabolas = [
        weigh(slope, smoothing).detach() for (_, weigh), slope in zip(forms, slopes, strict=True)
    ]
    bends, hidden = [], []
    if smoothing is not None:
        # Without the width, h z would be the loss's own slope.
        for kink, (z, weigh), slope, h in zip(kinks, forms, slopes, parabolas, strict=True):
            if not kink.is_within:
                slope_more = z.detach() * (h - weigh(slope, 0.0)).detach()
                bends.append((z, slope_more))
                hidden.append(_gap(slope_more, h))
        parabolas = [
            h * flat_share(kink.flat * z, smoothing) if kink.flat else h
            for kink, (z, _), h in zip(kinks, forms, parabolas, strict=True)
        ]
        if any(call.loss.has_kinks for call, _ in used):
            true = add_scalars((weight * call.result).sum() for call, weight in used)
            bends += _bends_of_losses(loss, true, used)
            hidden.append((loss - true).detach())

    def make_hessian() -> Map:
        at_outputs = hessian(loss, outputs) if outputs else None

        def apply_hessian(u: Tensors) -> Tensors:
            first, rest = u[: len(outputs)], u[len(outputs) :]
            bent = [h * t for h, t in zip(parabolas, rest, strict=True)]
            return bent if at_outputs is None else [*at_outputs(first), *bent]

        return apply_hessian

    def select(other: Evaluation) -> Tensors:
        found = [kink.form()[0] for kink in other.kinks if not (used and kink.is_smooth)]
        if len(other.outputs) != len(evaluation.outputs) or len(found) != len(kinks):
            raise RuntimeError(
                f"the closure saw {len(evaluation.outputs) + len(kinks)} model outputs at loss "
                f"functions in one run and {len(other.outputs) + len(found)} in the next; it must "
                "compute the same thing each time that it runs"
            )
        return [*(other.outputs[i] for i in indices), *found]

    return OutputMetric(
        [*outputs, *(z for z, _ in forms)],
        make_hessian,
        select,
        "ggn",
        inputs=[*outputs, *(t for kink in kinks for t in kink.inputs)],
        bends=bends,
        hidden=add_scalars(hidden) if hidden else None,
    )


def _gap(bend: Tensor, h: Tensor) -> Tensor:
    """How much higher than ``Σ c |z|`` the parabolas are that touch it at the width ``w``.

    Nearer to the kink, where ``h = c / w``, one is higher by ``½ h (w − |z|)²``, and its slope is
    less steep by ``b = h (w − |z|)``: that is ``½ b² / h``.
    """
    return 0.5 * torch.where(h > 0, bend.square() / h, 0.0).sum()


def _bends_of_losses(
    rounded: Tensor, true: Tensor, used: Sequence[tuple[Any, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """:attr:`OutputMetric.bends` at the outputs of recognised losses that have kinks."""
    kinked = [call for call, _ in used if call.loss.has_kinks]
    outputs = [z for call in kinked for z in call.outputs if z.requires_grad]
    if not outputs:
        return []
    slopes = [torch.autograd.grad(loss, outputs, retain_graph=True) for loss in (rounded, true)]
    return [(z, a - b) for z, a, b in zip(outputs, *slopes, strict=True)]


def _slopes(loss: Tensor, variables: Sequence[Any]) -> Sequence[Tensor | None]:
    """``∂loss/∂variable`` for each, None where it does not depend on it."""
    if not variables:
        return []
    return torch.autograd.grad(loss, variables, retain_graph=True, allow_unused=True)


def _depends_on_derivatives(evaluation: Evaluation, results: Tensors, outputs: Tensors) -> bool:
    """Whether the loss depends on the outputs by more than the results of loss functions: by their gradients."""
    if not evaluation.differentiates:
        return False
    beside = parents_first([evaluation.loss], stop=[result.grad_fn for result in results])
    found = {node for node, _ in beside}
    return any(z.grad_fn in found for z in outputs)


def add_scalars(scalars: Iterable[Tensor]) -> Tensor:
    """The sum of some one-element tensors, 0-dim."""
    return torch.stack([scalar.reshape(()) for scalar in scalars]).sum()


def _freeze(head: Distribution) -> Distribution:
    return rebuild(head, {k: v.detach() for k, v in parameters_of(head).items()})


def _without_rounding(kl: Tensor) -> Tensor:
    """Zero in place of a negative number that is rounding."""
    return torch.where(kl > -(torch.finfo(kl.dtype).eps ** 0.5), kl.clamp(min=0), kl)


def _returned_kl(other: Evaluation) -> Tensor | None:
    kl = other.metric.detach()
    # A prediction that is compared with itself gives zero everywhere, and bounds nothing.
    if kl != 0:
        return _without_rounding(kl)
    logger.warning(
        "the returned kl is exactly zero after the step as well: the closure compares the "
        "prediction with itself, so max_kl bounds only the KL's quadratic model; measure it from "
        "a prediction that was kept before the step"
    )
    return None


def _hessian_of_kl(evaluation: Evaluation) -> ScalarMetric:
    kl = evaluation.metric
    if not kl.requires_grad:
        raise ValueError(
            "the returned kl has no graph to differentiate: it was detached or computed under "
            "no_grad; return it as computed from the model's prediction in the closure"
        )
    # A KL has its minimum, zero, at the current parameters; only then is its Hessian the metric.
    if abs(kl.item()) > largest_kl_at_start(kl):
        raise ValueError(
            f"the returned kl must be zero at the current parameters, got {kl.item():.3g}; "
            "measure it from a detached copy of the current prediction, made anew before each step"
        )
    return ScalarMetric(kl, lambda other: other.metric, "fisher", check=check_returned_kl(kl))
