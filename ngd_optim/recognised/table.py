"""The loss functions that define a Gauss-Newton matrix, and how each is differentiated twice.

Most are convex in the model's output, and autograd finds their Hessian. Of the others the value and
the gradient are kept, and the Hessian is a positive semidefinite one that stands for theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import BoundArguments, Signature, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ngd_optim.own_losses import least_squares, variational_energy
from ngd_optim.real_parts import real_parts
from ngd_optim.recognised.likelihoods import ctc, energy, gaussian_nll, kl_div, nll
from ngd_optim.recognised.margins import (
    cosine_embedding,
    hinge_embedding,
    huber,
    l1,
    margin_ranking,
    multi_margin,
    multilabel_margin,
    robust_least_squares,
    smooth_l1,
)
from ngd_optim.recognised.rewrites import (
    Call,
    linear_cross_entropy,
    triplet,
    triplet_with_distance,
)
from ngd_optim.torch_internals import plain, reduction_of


class Loss:
    """How a loss function is differentiated twice.

    Attributes:
        outputs: names of the arguments that are outputs of the model, or tuples of them.
        replace_hessian: ``(result, **arguments, smoothing=…) ↦ result`` with another Hessian, and
            rounded where it has kinks; None for convex losses.
        has_kinks: whether it has.
        rewrite: ``(*args, **kwargs) ↦`` the call of another recognised loss that is the same, with
            the outputs that this one computes from its arguments.
        is_estimate: whether its gradient is that of its mean over samples, and trial points need
            the closure's recording, which knows where the samples were drawn.
    """

    def __init__(
        self,
        *outputs: str,
        replace_hessian: Callable[..., Tensor] | None = None,
        has_kinks: bool = False,
        rewrite: Callable[..., Call] | None = None,
        is_estimate: bool = False,
    ) -> None:
        self.outputs = outputs
        self.is_estimate = is_estimate
        self.replace_hessian = replace_hessian
        self.has_kinks = has_kinks
        self.rewrite = rewrite


LOSSES: dict[Callable[..., Any], Loss] = {
    F.binary_cross_entropy: Loss("input"),
    F.binary_cross_entropy_with_logits: Loss("input"),
    F.cosine_embedding_loss: Loss(
        "input1", "input2", replace_hessian=cosine_embedding, has_kinks=True
    ),
    F.cross_entropy: Loss("input"),
    F.ctc_loss: Loss("log_probs", replace_hessian=ctc),
    F.gaussian_nll_loss: Loss("input", "var", replace_hessian=gaussian_nll),
    F.hinge_embedding_loss: Loss("input", replace_hessian=hinge_embedding, has_kinks=True),
    F.huber_loss: Loss("input", "target", replace_hessian=huber, has_kinks=True),
    F.kl_div: Loss("input", replace_hessian=kl_div),
    F.l1_loss: Loss("input", "target", replace_hessian=l1, has_kinks=True),
    F.margin_ranking_loss: Loss("input1", "input2", replace_hessian=margin_ranking, has_kinks=True),
    F.mse_loss: Loss("input", "target"),
    F.multi_margin_loss: Loss("input", replace_hessian=multi_margin, has_kinks=True),
    F.multilabel_margin_loss: Loss("input", replace_hessian=multilabel_margin, has_kinks=True),
    F.multilabel_soft_margin_loss: Loss("input"),
    F.nll_loss: Loss("input", replace_hessian=nll),
    F.poisson_nll_loss: Loss("input"),
    F.smooth_l1_loss: Loss("input", "target", replace_hessian=smooth_l1, has_kinks=True),
    F.soft_margin_loss: Loss("input"),
    F.triplet_margin_loss: Loss(rewrite=triplet),
    F.triplet_margin_with_distance_loss: Loss(rewrite=triplet_with_distance),
    least_squares: Loss("residuals", replace_hessian=robust_least_squares),
    variational_energy: Loss("log_psi", replace_hessian=energy, is_estimate=True),
}
"""The recognised loss functions."""

if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
    LOSSES[F.linear_cross_entropy] = Loss(rewrite=linear_cross_entropy)


@dataclass(frozen=True)
class LossCall:
    """A call of a recognised loss function.

    Attributes:
        loss: how it is differentiated twice.
        arguments: what it was given, with an alias of each output of the model: differentiating at
            the alias leaves out the output's other uses.
        outputs: these aliases.
        result: what it gave.
        name: of the function.
    """

    loss: Loss
    arguments: BoundArguments
    outputs: tuple[Tensor, ...]
    result: Tensor
    name: str

    def with_own_hessian(self, smoothing: float | None) -> Tensor:
        """The result, with a graph from the outputs whose second derivative is the loss's own Hessian.

        Its kinks are rounded in value and slope as well if there is a ``smoothing``; see
        :func:`~ngd_optim.recognised.parabolas.irls_parabola`.
        """
        replace_hessian = self.loss.replace_hessian
        if replace_hessian is None or not any(z.requires_grad for z in self.outputs):
            return self.result
        return replace_hessian(self.result, **_arguments(self.arguments), smoothing=smoothing)


def call_loss(func: Callable[..., Any], args: Any, kwargs: Any) -> LossCall:
    """Call a recognised loss function."""
    loss = LOSSES[func]
    if loss.rewrite is not None:
        return call_loss(*loss.rewrite(*args, **kwargs))
    call = _signature(func).bind(*args, **kwargs)
    outputs: list[Tensor] = []
    for name in loss.outputs:
        z = call.arguments.get(name)
        if isinstance(z, tuple):
            call.arguments[name] = tuple(_alias(part, outputs) for part in z)
        elif name in call.arguments:
            call.arguments[name] = _alias(z, outputs)
    result = func(*call.args, **call.kwargs)
    return LossCall(loss, call, tuple(outputs), result, func.__name__)


def _arguments(call: BoundArguments) -> dict[str, Any]:
    """All arguments by name, with defaults, and the two old flags as the reduction that they mean."""
    call = BoundArguments(call.signature, call.arguments.copy())
    call.apply_defaults()
    flags = [call.arguments.pop(name, None) for name in ("size_average", "reduce")]
    if flags != [None, None]:
        call.arguments["reduction"] = reduction_of(*flags)
    return dict(call.arguments)


def _alias(z: Any, outputs: list[Tensor]) -> Any:
    """What the loss function is given for an output of the model, which is added to the outputs: real ones."""
    if not isinstance(z, Tensor):
        return z  # the loss function refuses it
    view = real_parts(z) if z.is_complex() else z.view_as(z)
    # Gradients at a subclass of tensors would be of that class, without what its own code sets.
    outputs.append(plain(view))
    return torch.view_as_complex(outputs[-1]) if z.is_complex() else outputs[-1]


@cache
def _signature(func: Callable[..., Any]) -> Signature:
    return signature(func)
