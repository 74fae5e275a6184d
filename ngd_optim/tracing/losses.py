"""The loss functions of torch that define a Gauss-Newton matrix, and the Hessian that each has at its inputs.

Most are convex in the model's output, and autograd finds their Hessian. Of the others the value and
the gradient are kept, and the Hessian is replaced by the positive semidefinite one of the
likelihood (or least squares) that they stand for: the Fisher information, which is the Gauss-Newton
matrix of an exponential family (Martens 2020, section 9).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import BoundArguments, Signature, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ngd_optim.torch_internals import reduction_of
from ngd_optim.tracing.least_squares import least_squares


class Loss:
    """How a loss function is differentiated twice.

    Attributes:
        outputs: names of the arguments that are outputs of the model, or tuples of them.
        replace_hessian: ``(result, *arguments) ↦ result`` with another Hessian; None for convex
            losses.
    """

    def __init__(self, *outputs: str, replace_hessian: Callable[..., Tensor] | None = None) -> None:
        self.outputs = outputs
        self.replace_hessian = replace_hessian


def _replace_hessian(
    loss: Tensor,
    outputs: Sequence[Tensor],
    metric: Sequence[tuple[Tensor, Tensor]],
    sample_dims: tuple[int, ...],
) -> Tensor:
    """A tensor with the value and the gradient of ``loss``, and the Hessian of ``½ Σ h (u − u₀)²``.

    Args:
        loss: scalar, or one value per sample.
        outputs: what it is differentiated at, where they require a gradient.
        metric: pairs of coordinates ``u``, computed from the outputs, and their weights ``h``.
        sample_dims: the dimensions of outputs and coordinates that make up one sample's loss.
    """
    outputs = [z for z in outputs if z.requires_grad]
    gradients = torch.autograd.grad(loss.sum(), outputs, retain_graph=True)
    # loss₀ + Σ gᵀ(z − z₀) + ½ Σ h (u − u₀)²: at z₀ its value, its gradient, and the Hessian of the
    # last sum.
    result = loss.detach()
    terms = [g * (z - z.detach()) for z, g in zip(outputs, gradients, strict=True)]
    terms += [0.5 * h.detach() * (u - u.detach()).square() for u, h in metric]
    for term in terms:
        result = result + (
            term.sum(sample_dims) if loss.ndim and sample_dims else term.sum_to_size(loss.shape)
        )
    return result


def _sample_weights(per_sample: Tensor, reduction: str) -> Tensor:
    """The weight of each sample in the result."""
    return per_sample / per_sample.sum() if reduction == "mean" else per_sample


def _nll(
    loss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: object = None,
    ignore_index: int = -100,
    reduce: object = None,
    reduction: str = "mean",
) -> Tensor:
    # The Fisher information of a categorical in its log-probabilities: diag p (Martens 2020,
    # section 9).
    class_dim = 0 if input.ndim == 1 else 1
    per_sample = F.nll_loss(
        -torch.ones_like(input), target, weight, ignore_index=ignore_index, reduction="none"
    )
    weight_of_sample = _sample_weights(per_sample, reduction).unsqueeze(class_dim)
    return _replace_hessian(loss, [input], [(input, weight_of_sample * input.exp())], (class_dim,))


def _kl_div(
    loss: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: object = None,
    reduce: object = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    weight_of_sample = {"mean": 1 / input.numel(), "batchmean": 1 / input.shape[0]}.get(
        reduction, 1.0
    )
    return _replace_hessian(loss, [input], [(input, weight_of_sample * input.exp())], ())


def _ctc(
    loss: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    frames = log_probs.shape[0]
    lengths, target_lengths = (
        torch.as_tensor(n, device=log_probs.device).reshape(-1)
        for n in (input_lengths, target_lengths)
    )
    seen = torch.arange(frames, device=log_probs.device).unsqueeze(1) < lengths
    targets_per_sample = target_lengths.clamp(min=1).to(log_probs.dtype)
    weight_of_sample = (
        1 / (len(lengths) * targets_per_sample) if reduction == "mean" else torch.ones_like(lengths)
    )
    weights = (seen * weight_of_sample).reshape(*log_probs.shape[:-1], 1)
    return _replace_hessian(
        loss, [log_probs], [(log_probs, weights * log_probs.exp())], (0, log_probs.ndim - 1)
    )


def _gaussian_nll(
    loss: Tensor,
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    if not isinstance(var, Tensor):
        return loss
    if var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    mean, target, variance = torch.broadcast_tensors(input, target, var)
    loss = F.gaussian_nll_loss(mean, target, variance, full=full, eps=eps, reduction=reduction)
    weight_of_sample = _sample_weights(torch.ones_like(mean), reduction)
    # Of a normal distribution in mean and variance: 1/σ² and 1/(2σ⁴).
    clamped = variance.detach().clamp(min=eps)
    return _replace_hessian(
        loss,
        [mean, variance],
        [(mean, weight_of_sample / clamped), (variance, weight_of_sample / (2 * clamped.square()))],
        (),
    )


def _cosine_embedding(
    loss: Tensor,
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0.0,
    size_average: object = None,
    reduce: object = None,
    reduction: str = "mean",
) -> Tensor:
    # 1 − cos(a, b) = ½ ‖a/|a| − b/|b|‖²: least squares.
    # Its weights are those of the samples that count: all matches, and mismatches within the
    # margin.
    per_sample = F.cosine_embedding_loss(input1, input2, target, margin, reduction="none")
    weight_of_sample = _sample_weights(torch.ones_like(per_sample), reduction)
    weights = torch.where((target > 0) | (per_sample > 0), weight_of_sample, 0.0).unsqueeze(-1)
    difference = F.normalize(input1, dim=-1) - F.normalize(input2, dim=-1)
    return _replace_hessian(loss, [input1, input2], [(difference, weights)], (-1,))


LOSSES: dict[Callable[..., Any], Loss] = {
    F.binary_cross_entropy: Loss("input"),
    F.binary_cross_entropy_with_logits: Loss("input"),
    F.cosine_embedding_loss: Loss("input1", "input2", replace_hessian=_cosine_embedding),
    F.cross_entropy: Loss("input"),
    F.ctc_loss: Loss("log_probs", replace_hessian=_ctc),
    F.gaussian_nll_loss: Loss("input", "var", replace_hessian=_gaussian_nll),
    F.huber_loss: Loss("input", "target"),
    F.kl_div: Loss("input", replace_hessian=_kl_div),
    F.mse_loss: Loss("input", "target"),
    F.multilabel_soft_margin_loss: Loss("input"),
    F.nll_loss: Loss("input", replace_hessian=_nll),
    F.poisson_nll_loss: Loss("input"),
    F.smooth_l1_loss: Loss("input", "target"),
    F.soft_margin_loss: Loss("input"),
    least_squares: Loss("residuals"),
}
"""The recognised loss functions."""


@dataclass(frozen=True)
class LossCall:
    """A call of a recognised loss function.

    Attributes:
        loss: how it is differentiated twice.
        arguments: what it was given, with an alias of each output of the model: differentiating at
            the alias leaves out the output's other uses.
        outputs: these aliases.
        result: what it gave.
    """

    loss: Loss
    arguments: BoundArguments
    outputs: tuple[Tensor, ...]
    result: Tensor

    @property
    def replaces_hessian(self) -> bool:
        """Whether another Hessian than autograd's is the loss's."""
        return self.loss.replace_hessian is not None and any(z.requires_grad for z in self.outputs)

    def with_own_hessian(self) -> Tensor:
        """The result, with a graph from the outputs whose second derivative is the loss's own Hessian."""
        if self.loss.replace_hessian is None or not self.replaces_hessian:
            return self.result
        arguments = dict(self.arguments.arguments)
        if arguments.get("size_average") is not None or arguments.get("reduce") is not None:
            flags = arguments.pop("size_average", None), arguments.pop("reduce", None)
            arguments["reduction"] = reduction_of(*flags)
        call = BoundArguments(self.arguments.signature, OrderedDict(arguments))
        return self.loss.replace_hessian(self.result, *call.args, **call.kwargs)


def call_loss(func: Callable[..., Any], args: Any, kwargs: Any) -> LossCall:
    """Call a recognised loss function."""
    loss = LOSSES[func]
    call = _signature(func).bind(*args, **kwargs)
    outputs: list[Tensor] = []
    for name in loss.outputs:
        z = call.arguments.get(name)
        if isinstance(z, tuple):
            call.arguments[name] = tuple(_alias(part) for part in z)
            outputs += call.arguments[name]
        elif isinstance(z, Tensor):
            call.arguments[name] = _alias(z)
            outputs.append(call.arguments[name])
    return LossCall(loss, call, tuple(outputs), func(*call.args, **call.kwargs))


def _alias(z: Any) -> Any:
    if not isinstance(z, Tensor):
        return z  # the loss function refuses it
    return z.view_as(z)


@cache
def _signature(func: Callable[..., Any]) -> Signature:
    return signature(func)
