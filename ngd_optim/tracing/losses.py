"""The loss functions of torch that define a Gauss-Newton matrix, and the Hessian that each has at its inputs.

Most are convex in the model's output, and autograd finds their Hessian. Of the others the value and
the gradient are kept, and the Hessian is a positive semidefinite one that stands for theirs:

- of a likelihood (``nll_loss``, ``kl_div``, ``ctc_loss``, ``gaussian_nll_loss``) the Fisher
  information, which is the Gauss-Newton matrix of an exponential family (Martens 2020, section 9);
- of the match of two unit vectors (``cosine_embedding_loss``) that of least squares;
- of absolute values and hinges, which are straight but for their kink, that of the parabola above
  them (:func:`~ngd_optim.tracing.kinks.irls_parabola`). A step's model has these kinks rounded, as
  it has those of losses by hand;
- of the robust losses of ``least_squares`` that of such a parabola, which nothing needs to round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import BoundArguments, Signature, signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ngd_optim.own_losses import (
    RobustLoss,
    least_squares,
    robust_weight,
    sample_shares,
    variational_energy,
    weights_of,
)
from ngd_optim.torch_internals import reduction_of
from ngd_optim.tracing.kinks import irls_parabola


class Call(NamedTuple):
    """A loss function and its arguments."""

    function: Callable[..., Tensor]
    args: Sequence[Any]
    kwargs: dict[str, Any]


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


Metric = Sequence[tuple[Tensor, Tensor, Tensor | float]]
"""Coordinates ``u``, computed from the outputs, weights ``h`` and shifts ``s``: what ``½ Σ h (u − u₀ + s)²`` adds."""


def _replace_hessian(
    loss: Tensor, variables: Sequence[Tensor], metric: Metric, sample_dims: tuple[int, ...] = ()
) -> Tensor:
    """A tensor with the value and the gradient of ``loss``, and the Hessian of ``metric``, which adds its shifts.

    Args:
        loss: scalar, or one value per sample.
        variables: what it is differentiated at, where they require a gradient.
        metric: is added up.
        sample_dims: the dimensions of variables and coordinates that make up one sample's loss.
    """
    variables = [z for z in variables if z.requires_grad]
    gradients = torch.autograd.grad(loss.sum(), variables, retain_graph=True)
    # loss₀ + Σ gᵀ(z − z₀) + ½ Σ h (u − u₀ + s)²: at z₀ and s = 0 its value, its gradient, and the
    # Hessian of the last sum.
    result = loss.detach()
    for z, g in zip(variables, gradients, strict=True):
        # A complex output is two real ones: ∂L/∂Re z · Re Δz + ∂L/∂Im z · Im Δz.
        term = (g.conj() * _change(z)).real if z.is_complex() else g * _change(z)
        result = result + _sum_to(term, loss, sample_dims)
    return _add_hessian(result, metric, sample_dims)


def _add_hessian(loss: Tensor, metric: Metric, sample_dims: tuple[int, ...] = ()) -> Tensor:
    """``loss + ½ Σ h (u − u₀ + s)²``, summed over each sample: without shifts no other value and gradient."""
    for u, h, s in metric:
        loss = loss + _sum_to(0.5 * h.detach() * (_change(u) + s).square(), loss, sample_dims)
    return loss


def _change(z: Tensor) -> Tensor:
    """``z − z₀``, which is zero; also at the −∞ of what is masked, which has no gradient."""
    now = z.detach()
    change = z - now
    # One question here is cheaper than a mask in every product.
    return change if now.isfinite().all() else torch.where(now.isfinite(), change, 0.0)


def _sum_to(term: Tensor, loss: Tensor, sample_dims: tuple[int, ...]) -> Tensor:
    if loss.ndim and sample_dims:
        return term.sum(sample_dims)
    return term.sum_to_size(loss.shape)


def _shares(weights: Tensor, reduction: str) -> Tensor:
    """The weight of each sample or element in the result; 0 where no sample has any."""
    if reduction != "mean":
        return weights
    total = weights.sum()
    return torch.where(total == 0, 0.0, weights / total)


def _nll(
    loss: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    **_: Any,
) -> Tensor:
    # The Fisher information of a categorical in its log-probabilities: diag p (Martens 2020,
    # section 9).
    class_dim = 0 if input.ndim == 1 else 1
    per_sample = F.nll_loss(
        -torch.ones_like(input), target, weight, ignore_index=ignore_index, reduction="none"
    )
    h = _shares(per_sample, reduction).unsqueeze(class_dim) * input.detach().softmax(class_dim)
    return _replace_hessian(loss, [input], [(input, h, 0.0)], (class_dim,))


def _kl_div(
    loss: Tensor, *, input: Tensor, target: Tensor, reduction: str, log_target: bool, **_: Any
) -> Tensor:
    batch = len(input) if reduction == "batchmean" and input.ndim else 1
    if input.shape != target.shape:
        input, target = torch.broadcast_tensors(input, target)
        pointwise = F.kl_div(input, target, reduction="none", log_target=log_target)
        loss = _reduce(pointwise, reduction) / batch
    # That of a categorical, m · diag p, where m is the target mass of its row.
    mass, p = _rows(input.detach(), target.detach().exp() if log_target else target.detach())
    share = 1 / input.numel() if reduction == "mean" else 1 / batch
    return _replace_hessian(loss, [input, target], [(input, share * mass * p, 0.0)])


def _rows(log_probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of ``target``, and the probabilities, over the dimension in which the latter add up to 1."""
    if not log_probs.ndim:
        return target, log_probs.exp()
    dims = range(log_probs.ndim)
    off = torch.stack([log_probs.logsumexp(dim).abs().amax() for dim in dims])
    # Chosen without asking the device for a number. Of equals the last is taken.
    best = off.flip(0).argmin()
    masses = torch.stack([target.sum(dim, keepdim=True).expand_as(target) for dim in dims]).flip(0)
    probs = torch.stack([log_probs.softmax(dim) for dim in dims]).flip(0)
    return masses[best], probs[best]


def _ctc(
    loss: Tensor,
    *,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int,
    reduction: str,
    zero_infinity: bool,
    **_: Any,
) -> Tensor:
    frames = log_probs.shape[0]
    lengths, target_sizes = (
        torch.as_tensor(n, device=log_probs.device).reshape(-1)
        for n in (input_lengths, target_lengths)
    )
    counts = torch.arange(frames, device=log_probs.device).unsqueeze(1) < lengths
    if zero_infinity:  # what has no alignment has no loss
        per_sample = F.ctc_loss(
            log_probs.detach(), targets, input_lengths, target_lengths, blank, reduction="none"
        )
        counts = counts & per_sample.isfinite().reshape(-1)
    targets_per_sample = target_sizes.clamp(min=1).to(log_probs.dtype)
    share = 1 / (len(lengths) * targets_per_sample) if reduction == "mean" else 1.0
    weights = (counts * share).reshape(*log_probs.shape[:-1], 1)
    # The Fisher information of each frame's categorical.
    h = weights * log_probs.detach().softmax(-1)
    return _replace_hessian(loss, [log_probs], [(log_probs, h, 0.0)], (0, log_probs.ndim - 1))


def _gaussian_nll(
    loss: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool,
    eps: float,
    reduction: str,
    **_: Any,
) -> Tensor:
    if not isinstance(var, Tensor):
        return loss
    if var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    mean, target, variance = torch.broadcast_tensors(input, target, var)
    loss = F.gaussian_nll_loss(mean, target, variance, full=full, eps=eps, reduction=reduction)
    share = _shares(torch.ones_like(mean), reduction)
    # Of a normal distribution in mean and variance: 1/σ² and 1/(2σ⁴).
    clamped = variance.detach().clamp(min=eps)
    metric = [
        (mean, share / clamped, 0.0),
        (variance, share / (2 * clamped.square()), 0.0),
    ]
    return _replace_hessian(loss, [mean, target, variance], metric)


def _cosine_embedding(
    loss: Tensor,
    *,
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float,
    reduction: str,
    smoothing: float | None,
    **_: Any,
) -> Tensor:
    input1, input2 = torch.broadcast_tensors(input1, input2)
    per_sample = F.cosine_embedding_loss(input1, input2, target, margin, reduction="none")
    share = _shares(torch.ones_like(per_sample), reduction).unsqueeze(-1)
    matches = (target > 0).unsqueeze(-1)
    a, b = _unit(input1), _unit(input2)
    # A match is least squares: 1 − cos(a, b) = ½ ‖a/|a| − b/|b|‖². A mismatch is a hinge of cos(a, b).
    cosine = (a * b).sum(-1, keepdim=True)
    u = torch.where(matches, 0.0, cosine - margin)
    hinge, shift = irls_parabola(u, 0.5, smoothing)
    metric = [
        (a - b, torch.where(matches, share, 0.0), 0.0),
        (cosine, torch.where(matches, 0.0, share * hinge), shift),
    ]
    return _replace_hessian(_reduce(per_sample, reduction), [input1, input2], metric, (-1,))


def _unit(vectors: Tensor) -> Tensor:
    # As torch does it in cosine_embedding_loss: finite at zero as well.
    return vectors / (vectors.square().sum(-1, keepdim=True) + 1e-12).sqrt()


def _l1(
    loss: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    reduction: str,
    smoothing: float | None,
    weight: Tensor | None = None,
    **_: Any,
) -> Tensor:
    r = input - target
    share = _shares(torch.ones_like(r) if weight is None else weight, reduction)
    return _add_hessian(loss, [_kink(r, share, smoothing)])


def _huber(
    loss: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    reduction: str,
    delta: float,
    smoothing: float | None,
    weight: Tensor | None = None,
    **_: Any,
) -> Tensor:
    r = input - target
    share = _shares(torch.ones_like(r), reduction) * (1 if weight is None else weight)
    weights = {} if weight is None else {"weight": weight}
    loss = F.huber_loss(r, torch.zeros_like(r), reduction=reduction, delta=delta, **weights)
    return _replace_hessian(loss, [r], [_kink(r, share * delta, smoothing, delta)])


def _smooth_l1(
    loss: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    reduction: str,
    beta: float,
    smoothing: float | None,
    **_: Any,
) -> Tensor:
    r = input - target
    share = _shares(torch.ones_like(r), reduction)
    loss = F.smooth_l1_loss(r, torch.zeros_like(r), reduction=reduction, beta=beta)
    return _replace_hessian(loss, [r], [_kink(r, share, smoothing, beta)])


def _kink(
    u: Tensor, slope: Tensor, smoothing: float | None, bound: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | float]:
    """That of ``slope · |u|``; where the slope is 0 the element does not count."""
    counted = torch.where(slope != 0, u, 0.0)
    return u, *irls_parabola(counted, slope, smoothing, bound)


def _margin_ranking(
    loss: Tensor,
    *,
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float,
    reduction: str,
    smoothing: float | None,
    **_: Any,
) -> Tensor:
    u = margin - target * (input1 - input2)
    share = _shares(torch.ones_like(u), reduction)
    return _add_hessian(loss, [_kink(u, 0.5 * share, smoothing)])


def _hinge_embedding(
    loss: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    margin: float,
    reduction: str,
    smoothing: float | None,
    **_: Any,
) -> Tensor:
    x, target = torch.broadcast_tensors(input, target)
    share = _shares(torch.ones_like(x), reduction)
    # A match costs the distance itself, which is its own absolute value.
    near = _kink(x, torch.where(target != -1, share, 0.0), smoothing)
    far = _kink(margin - x, torch.where(target != 1, 0.5 * share, 0.0), smoothing)
    return _add_hessian(loss, [near, far])


def _multi_margin(
    loss: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    p: int,
    margin: float,
    weight: Tensor | None,
    reduction: str,
    smoothing: float | None,
    **_: Any,
) -> Tensor:
    # Torch's kernel has no second derivative: the same loss in plain operations.
    # Σ_{i ≠ y} w_y max(0, margin − z_y + z_i)ᵖ / C.
    target = target.reshape(input.shape[:-1]).unsqueeze(-1)
    u = margin - input.gather(-1, target) + input
    counts = torch.ones_like(input).scatter(-1, target, 0.0) / input.shape[-1]
    if weight is not None:
        counts = counts * weight[target]
    return _sum_of_hinges(u, counts, p, reduction, (-1,), smoothing)


def _multilabel_margin(
    loss: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    reduction: str,
    smoothing: float | None,
    **_: Any,
) -> Tensor:
    # Σ_{j label} Σ_{i no label} max(0, 1 − z_j + z_i) / C. The first −1 ends the list of labels.
    listed = (target >= 0).cumprod(-1)
    longest = int(listed.sum(-1).amax())
    listed, labels = listed[..., :longest], target[..., :longest].clamp(min=0)
    is_label = torch.zeros_like(input).scatter_add(-1, labels, listed.to(input.dtype)) > 0
    u = 1 - input.gather(-1, labels).unsqueeze(-1) + input.unsqueeze(-2)
    counts = (listed.unsqueeze(-1) * ~is_label.unsqueeze(-2)).to(input.dtype) / input.shape[-1]
    return _sum_of_hinges(u, counts, 1, reduction, (-2, -1), smoothing)


def _sum_of_hinges(
    u: Tensor,
    weights: Tensor,
    p: int,
    reduction: str,
    sample_dims: tuple[int, ...],
    smoothing: float | None,
) -> Tensor:
    """``Σ w max(0, u)ᵖ`` of each sample, reduced; squares have their own Hessian."""
    per_sample = (weights * u.relu() ** p).sum(sample_dims)
    if p == 1:
        kink = _kink(u, 0.5 * weights, smoothing)
        per_sample = _add_hessian(per_sample, [kink], sample_dims)
    return _reduce(per_sample, reduction)


def _energy(loss: Tensor, *, log_psi: Tensor, weights: Tensor | None, **_: Any) -> Tensor:
    # 2 Re cov(∂log ψ): of log ψ less its mean, in both its parts.
    share = sample_shares(log_psi, weights)
    u = log_psi - (share * log_psi).sum()
    parts = [u.real, u.imag] if u.is_complex() else [u]
    return _replace_hessian(loss, [log_psi], [(part, 2 * share, 0.0) for part in parts])


def _reduce(per_sample: Tensor, reduction: str) -> Tensor:
    reduced = {"mean": per_sample.mean, "sum": per_sample.sum, "batchmean": per_sample.sum}.get(
        reduction
    )
    return reduced() if reduced else per_sample


def _triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Call:
    if size_average is not None or reduce is not None:
        reduction = reduction_of(size_average, reduce)
    return _triplet_with_distance(
        anchor,
        positive,
        negative,
        distance_function=lambda a, b: F.pairwise_distance(a, b, p, eps),
        margin=margin,
        swap=swap,
        reduction=reduction,
    )


def _triplet_with_distance(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Call:
    """max(0, margin + d₊ − d₋), a ranking of two distances, which it is convex in."""
    if margin <= 0:
        raise ValueError(f"margin must be greater than 0, got {margin}")  # as torch has it
    distance = distance_function or F.pairwise_distance
    near, far = distance(anchor, positive), distance(anchor, negative)
    if swap:
        far = torch.minimum(far, distance(positive, negative))
    return Call(
        F.margin_ranking_loss,
        (far, near, torch.ones_like(near)),
        {"margin": margin, "reduction": reduction},
    )


def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    options: Any = None,
    **others: Any,
) -> Call:
    """``cross_entropy`` of a last layer; the chunks that ``options`` ask for have no second derivative."""
    # Of a weight (C, d₁, …, in) there is one cross entropy for each d₁, ….
    logits = F.linear(
        input,
        linear_weight.flatten(0, -2),
        None if linear_bias is None else linear_bias.flatten(),
    ).unflatten(-1, linear_weight.shape[:-1])
    given = {} if ignore_index is None else {"ignore_index": ignore_index}
    return Call(F.cross_entropy, (logits, target), {**given, **others})


def _least_squares(
    result: Tensor,
    *,
    residuals: Sequence[Tensor],
    weights: Any,
    loss: RobustLoss,
    scale: float | Tensor,
    **_: Any,
) -> Tensor:
    if loss == "linear":
        return result
    metric = [
        (r, w * robust_weight(r, loss, scale) / r.numel(), 0.0)
        for w, r in zip(weights_of(residuals, weights), residuals, strict=True)
    ]
    return _replace_hessian(result, residuals, metric)


LOSSES: dict[Callable[..., Any], Loss] = {
    F.binary_cross_entropy: Loss("input"),
    F.binary_cross_entropy_with_logits: Loss("input"),
    F.cosine_embedding_loss: Loss(
        "input1", "input2", replace_hessian=_cosine_embedding, has_kinks=True
    ),
    F.cross_entropy: Loss("input"),
    F.ctc_loss: Loss("log_probs", replace_hessian=_ctc),
    F.gaussian_nll_loss: Loss("input", "var", replace_hessian=_gaussian_nll),
    F.hinge_embedding_loss: Loss("input", replace_hessian=_hinge_embedding, has_kinks=True),
    F.huber_loss: Loss("input", "target", replace_hessian=_huber, has_kinks=True),
    F.kl_div: Loss("input", replace_hessian=_kl_div),
    F.l1_loss: Loss("input", "target", replace_hessian=_l1, has_kinks=True),
    F.margin_ranking_loss: Loss(
        "input1", "input2", replace_hessian=_margin_ranking, has_kinks=True
    ),
    F.mse_loss: Loss("input", "target"),
    F.multi_margin_loss: Loss("input", replace_hessian=_multi_margin, has_kinks=True),
    F.multilabel_margin_loss: Loss("input", replace_hessian=_multilabel_margin, has_kinks=True),
    F.multilabel_soft_margin_loss: Loss("input"),
    F.nll_loss: Loss("input", replace_hessian=_nll),
    F.poisson_nll_loss: Loss("input"),
    F.smooth_l1_loss: Loss("input", "target", replace_hessian=_smooth_l1, has_kinks=True),
    F.soft_margin_loss: Loss("input"),
    F.triplet_margin_loss: Loss(rewrite=_triplet),
    F.triplet_margin_with_distance_loss: Loss(rewrite=_triplet_with_distance),
    least_squares: Loss("residuals", replace_hessian=_least_squares),
    variational_energy: Loss("log_psi", replace_hessian=_energy, is_estimate=True),
}
"""The recognised loss functions."""

if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
    LOSSES[F.linear_cross_entropy] = Loss(rewrite=_linear_cross_entropy)


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
        :func:`~ngd_optim.tracing.kinks.irls_parabola`.
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
            call.arguments[name] = tuple(_alias(part) for part in z)
            outputs += call.arguments[name]
        elif isinstance(z, Tensor) and z.is_complex():  # its real and imaginary parts
            outputs.append(torch.view_as_real(z.resolve_conj()))
            call.arguments[name] = torch.view_as_complex(outputs[-1])
        elif isinstance(z, Tensor):
            call.arguments[name] = _alias(z)
            outputs.append(call.arguments[name])
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


def _alias(z: Any) -> Any:
    return z.view_as(z) if isinstance(z, Tensor) else z  # the loss function refuses what is none


@cache
def _signature(func: Callable[..., Any]) -> Signature:
    return signature(func)
