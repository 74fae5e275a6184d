"""Losses with kinks, or with tails that are straight: absolute values, hinges, margins and robust losses.

Where they are straight their Hessian is that of the parabola above them, of iteratively reweighted
least squares. A step's model has the kinks rounded, as it has those of losses by hand. The match of
two unit vectors, in ``cosine_embedding_loss``, is least squares.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ngd_optim.own_losses import RobustLoss, robust_weight, weights_of
from ngd_optim.recognised.hessians import add_hessian, reduce, replace_hessian, shares_of
from ngd_optim.recognised.parabolas import irls_parabola


def cosine_embedding(
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
    """``cosine_embedding_loss``: least squares of unit vectors, or a hinge of their cosine."""
    input1, input2 = torch.broadcast_tensors(input1, input2)
    per_sample = F.cosine_embedding_loss(input1, input2, target, margin, reduction="none")
    share = shares_of(torch.ones_like(per_sample), reduction).unsqueeze(-1)
    matches = (target > 0).unsqueeze(-1)
    a, b = _unit(input1), _unit(input2)
    # A match is least squares: 1 − cos(a, b) = ½ ‖a/|a| − b/|b|‖². A mismatch is a hinge of cos(a, b).
    cosine = (a * b).sum(-1, keepdim=True)
    u = torch.where(matches, 0.0, cosine - margin)
    hinge, shift = irls_parabola(u, 0.5, smoothing, is_hinge=True)
    metric = [
        (a - b, torch.where(matches, share, 0.0), 0.0),
        (cosine, torch.where(matches, 0.0, share * hinge), shift),
    ]
    return replace_hessian(reduce(per_sample, reduction), [input1, input2], metric, (-1,))


def _unit(vectors: Tensor) -> Tensor:
    # As torch does it in cosine_embedding_loss: finite at zero as well.
    return vectors / (vectors.square().sum(-1, keepdim=True) + 1e-12).sqrt()


def l1(
    loss: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    reduction: str,
    smoothing: float | None,
    weight: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """``l1_loss``; of complex numbers the modulus, whose own curvature goes."""
    r = input - target
    ones = torch.ones_like(r, dtype=r.dtype.to_real())
    share = shares_of(ones if weight is None else weight, reduction)
    metric = [_kink(r, share, smoothing)]
    if not r.is_complex():
        return add_hessian(loss, metric)
    loss = F.l1_loss(r, torch.zeros_like(r), reduction=reduction)
    return replace_hessian(loss, [r], metric)


def huber(
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
    """``huber_loss``: its own within ``delta``."""
    r = input - target
    share = shares_of(torch.ones_like(r), reduction) * (1 if weight is None else weight)
    weights = {} if weight is None else {"weight": weight}
    loss = F.huber_loss(r, torch.zeros_like(r), reduction=reduction, delta=delta, **weights)
    return replace_hessian(loss, [r], [_kink(r, share * delta, smoothing, delta)])


def smooth_l1(
    loss: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    reduction: str,
    beta: float,
    smoothing: float | None,
    **_: Any,
) -> Tensor:
    """``smooth_l1_loss``: its own within ``beta``."""
    r = input - target
    share = shares_of(torch.ones_like(r), reduction)
    loss = F.smooth_l1_loss(r, torch.zeros_like(r), reduction=reduction, beta=beta)
    return replace_hessian(loss, [r], [_kink(r, share, smoothing, beta)])


def _hinge(
    u: Tensor, slope: Tensor, smoothing: float | None
) -> tuple[Tensor, Tensor, Tensor | float]:
    """That of ``slope · max(0, u)``, likewise."""
    counted = torch.where(slope != 0, u, 0.0)
    return u, *irls_parabola(counted, 0.5 * slope, smoothing, is_hinge=True)


def _kink(
    u: Tensor, slope: Tensor, smoothing: float | None, bound: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | float]:
    """That of ``slope · |u|``; where the slope is 0 the element does not count."""
    counted = torch.where(slope != 0, u, 0.0)
    return u, *irls_parabola(counted, slope, smoothing, bound)


def margin_ranking(
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
    """``margin_ranking_loss``: a hinge of the difference."""
    u = margin - target * (input1 - input2)
    share = shares_of(torch.ones_like(u), reduction)
    return add_hessian(loss, [_hinge(u, share, smoothing)])


def hinge_embedding(
    loss: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    margin: float,
    reduction: str,
    smoothing: float | None,
    **_: Any,
) -> Tensor:
    """``hinge_embedding_loss``: a distance, or a hinge of it."""
    x, target = torch.broadcast_tensors(input, target)
    share = shares_of(torch.ones_like(x), reduction)
    # A match costs the distance itself, which is its own absolute value.
    near = _kink(x, torch.where(target != -1, share, 0.0), smoothing)
    far = _hinge(margin - x, torch.where(target != 1, share, 0.0), smoothing)
    return add_hessian(loss, [near, far])


def multi_margin(
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
    """``multi_margin_loss``, in plain operations: a hinge for each other class."""
    # Torch's kernel has no second derivative: the same loss in plain operations.
    # Σ_{i ≠ y} w_y max(0, margin − z_y + z_i)ᵖ / C.
    target = target.reshape(input.shape[:-1]).unsqueeze(-1)
    u = margin - input.gather(-1, target) + input
    counts = torch.ones_like(input).scatter(-1, target, 0.0) / input.shape[-1]
    if weight is not None:
        counts = counts * weight[target]
    return _sum_of_hinges(u, counts, p, reduction, (-1,), smoothing)


def multilabel_margin(
    loss: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    reduction: str,
    smoothing: float | None,
    **_: Any,
) -> Tensor:
    """``multilabel_margin_loss``, in plain operations: a hinge for each pair."""
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
        kink = _hinge(u, weights, smoothing)
        per_sample = add_hessian(per_sample, [kink], sample_dims)
    return reduce(per_sample, reduction)


def robust_least_squares(
    result: Tensor,
    *,
    residuals: Sequence[Tensor],
    weights: Any,
    loss: RobustLoss,
    scale: float | Tensor,
    **_: Any,
) -> Tensor:
    """``least_squares(loss=…)``: ``ρ′`` as the weight of each residual."""
    if loss == "linear":
        return result
    metric = [
        (r, w * robust_weight(r, loss, scale) / r.numel(), 0.0)
        for w, r in zip(weights_of(residuals, weights), residuals, strict=True)
    ]
    return replace_hessian(result, residuals, metric)
