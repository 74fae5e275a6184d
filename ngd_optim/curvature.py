"""What the curvature is: the Hessian ``H_z`` at the model's outputs ``z``."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ngd_optim import distributions
from ngd_optim.closure import Evaluation

Tensors = Sequence[Tensor]
Curvature = Literal["auto", "fisher", "ggn"]


@dataclass(frozen=True)
class OutputMetric:
    """A metric that lives at the model's outputs: the curvature is ``Jᵀ H_z J`` with ``J = ∂z/∂θ``.

    Attributes:
        outputs: the outputs ``z``, tensors of any shapes, with their graph.
        hessian: ``u ↦ H_z u`` for tangents shaped like the outputs.
        select: finds the same outputs in another evaluation of the closure.
        kl: mean KL from the traced prediction to another evaluation's, in nats per sample; None where the metric has
            only its second-order model.
    """

    outputs: Tensors
    hessian: Callable[[Tensors], Tensors]
    select: Callable[[Evaluation], Tensors]
    kl: Callable[[Evaluation], Tensor] | None


def fisher(evaluation: Evaluation) -> OutputMetric:
    """The Fisher information of the returned distributions: the Hessian of the mean KL(old ‖ new), summed over heads.

    Source: Amari (1998); Schulman et al. (2015), appendix C.

    Raises:
        ValueError: a distribution does not depend on anything that requires a gradient.
        NotImplementedError: torch has no closed-form KL for it; the message names the way out.
    """
    heads = list(distributions.heads(evaluation.metric))
    values = [distributions.parameters(head) for head in heads]
    constants = [{name: value.detach() for name, value in of_head.items()} for of_head in values]
    old = [distributions.rebuild(head, of_head) for head, of_head in zip(heads, constants, strict=True)]

    def kl(other: Evaluation) -> Tensor:
        pairs = zip(old, distributions.heads(other.metric), strict=True)
        return sum_of(distributions.mean_kl(before, after) for before, after in pairs)

    kl(evaluation)  # torch may know no KL: better said here than at the first trial point
    for head, of_head in zip(heads, values, strict=True):
        if not any(value.requires_grad for value in of_head.values()):
            raise ValueError(
                f"the parameters of the returned {type(head).__name__} are detached from the graph; return the "
                "distribution as the model computed it, not under no_grad"
            )
    learned = [(i, name) for i, of_head in enumerate(values) for name, value in of_head.items() if value.requires_grad]

    def select(other: Evaluation) -> Tensors:
        others = [distributions.parameters(head) for head in distributions.heads(other.metric)]
        return [others[i][name] for i, name in learned]

    variables = [constants[i][name].clone().requires_grad_() for i, name in learned]
    moving = [dict(of_head) for of_head in constants]
    for (i, name), variable in zip(learned, variables, strict=True):
        moving[i][name] = variable
    with torch.enable_grad():
        new = [distributions.rebuild(head, of_head) for head, of_head in zip(heads, moving, strict=True)]
        divergence = sum_of(distributions.local_divergence(a, b) for a, b in zip(old, new, strict=True))
    return OutputMetric([values[i][name] for i, name in learned], hessian_product(divergence, variables), select, kl)


def gauss_newton(evaluation: Evaluation) -> OutputMetric:
    """The generalised Gauss-Newton metric: the Hessian of all that the loss does after the model's outputs.

    Weights, reductions, label smoothing and sums of several losses are followed by autograd (Schraudolph 2002).

    Raises:
        ValueError: the loss depends on no recognised loss function's input.
    """
    candidates = [i for i, z in enumerate(evaluation.outputs) if z.requires_grad]
    reached = torch.autograd.grad(
        [evaluation.loss] if candidates else [],
        [evaluation.outputs[i] for i in candidates],
        retain_graph=True,
        allow_unused=True,
    )
    used = [i for i, gradient in zip(candidates, reached, strict=True) if gradient is not None]
    if not used:
        raise ValueError(
            "the closure returned a loss and no metric, and the loss comes from no recognised loss function "
            "(cross_entropy, mse_loss, binary_cross_entropy_with_logits); call one of them on the model's output, or "
            "return (loss, distribution) or (loss, kl)"
        )

    def select(other: Evaluation) -> Tensors:
        if len(other.outputs) != len(evaluation.outputs):
            raise RuntimeError(
                f"the closure saw {len(evaluation.outputs)} model outputs at loss functions in one run and "
                f"{len(other.outputs)} in the next; it must compute the same thing each time that it runs"
            )
        return [other.outputs[i] for i in used]

    outputs = select(evaluation)
    return OutputMetric(outputs, hessian_product(evaluation.loss, outputs), select, None)


def hessian_product(scalar: Tensor, variables: Tensors) -> Callable[[Tensors], Tensors]:
    """``u ↦ (∂² scalar / ∂ variables²) u``, by differentiating the gradient once more (Pearlmutter 1994)."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(scalar, variables, create_graph=True, materialize_grads=True)
    curved = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]

    def product(tangents: Tensors) -> Tensors:
        if not curved:
            return [torch.zeros_like(variable) for variable in variables]
        return torch.autograd.grad(
            [gradients[i] for i in curved],
            variables,
            [tangents[i] for i in curved],
            retain_graph=True,
            materialize_grads=True,
        )

    return product


def sum_of(scalars: Iterable[Tensor]) -> Tensor:
    """The sum of some one-element tensors, 0-dim."""
    return torch.stack([scalar.reshape(()) for scalar in scalars]).sum()
