"""Losses whose Hessian is the Fisher information: likelihoods, and the energy of a wave function.

For an exponential family that is the Gauss-Newton matrix (Martens 2020, section 9).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ngd_optim.own_losses import sample_shares
from ngd_optim.recognised.hessians import reduce, replace_hessian, shares_of


def nll(
    loss: Tensor,
    *,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    **_: Any,
) -> Tensor:
    """``nll_loss``: ``diag p`` in the log-probabilities."""
    # The Fisher information of a categorical in its log-probabilities: diag p (Martens 2020,
    # section 9).
    class_dim = 0 if input.ndim == 1 else 1
    per_sample = F.nll_loss(
        -torch.ones_like(input), target, weight, ignore_index=ignore_index, reduction="none"
    )
    h = shares_of(per_sample, reduction).unsqueeze(class_dim) * input.detach().softmax(class_dim)
    return replace_hessian(loss, [input], [(input, h, 0.0)], (class_dim,))


def kl_div(
    loss: Tensor, *, input: Tensor, target: Tensor, reduction: str, log_target: bool, **_: Any
) -> Tensor:
    """``kl_div``: ``m diag p``, where ``m`` is the target mass of a row."""
    batch = len(input) if reduction == "batchmean" and input.ndim else 1
    if input.shape != target.shape:
        input, target = torch.broadcast_tensors(input, target)
        pointwise = F.kl_div(input, target, reduction="none", log_target=log_target)
        loss = reduce(pointwise, reduction) / batch
    # That of a categorical, m · diag p, where m is the target mass of its row.
    mass, p = _rows(input.detach(), target.detach().exp() if log_target else target.detach())
    share = 1 / input.numel() if reduction == "mean" else 1 / batch
    return replace_hessian(loss, [input, target], [(input, share * mass * p, 0.0)])


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


def ctc(
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
    """``ctc_loss``: that of each frame's categorical."""
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
    return replace_hessian(loss, [log_probs], [(log_probs, h, 0.0)], (0, log_probs.ndim - 1))


def gaussian_nll(
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
    """``gaussian_nll_loss``: ``1/σ²`` in the mean, ``1/(2σ⁴)`` in the variance."""
    if not isinstance(var, Tensor):
        return loss
    if var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    mean, target, variance = torch.broadcast_tensors(input, target, var)
    loss = F.gaussian_nll_loss(mean, target, variance, full=full, eps=eps, reduction=reduction)
    share = shares_of(torch.ones_like(mean), reduction)
    # Of a normal distribution in mean and variance: 1/σ² and 1/(2σ⁴).
    clamped = variance.detach().clamp(min=eps)
    metric = [
        (mean, share / clamped, 0.0),
        (variance, share / (2 * clamped.square()), 0.0),
    ]
    return replace_hessian(loss, [mean, target, variance], metric)


def energy(loss: Tensor, *, log_psi: Tensor, weights: Tensor | None, **_: Any) -> Tensor:
    """``variational_energy``: twice the covariance of ``log ψ``."""
    # 2 Re cov(∂log ψ): of log ψ less its mean, in both its parts.
    share = sample_shares(log_psi, weights)
    u = log_psi - (share * log_psi).sum()
    parts = [u.real, u.imag] if u.is_complex() else [u]
    return replace_hessian(loss, [log_psi], [(part, 2 * share, 0.0) for part in parts])
