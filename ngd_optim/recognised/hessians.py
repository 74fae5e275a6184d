"""A loss with its own value and gradient, and the Hessian of another function.

That is built of the loss's own outputs, so that products and replays go through it as through any loss.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ngd_optim.real_parts import squared_modulus

Metric = Sequence[tuple[Tensor, Tensor, Tensor | float]]
"""Coordinates ``u``, computed from the outputs, weights ``h`` and shifts ``s``: what ``½ Σ h |u − u₀ + s|²`` adds."""


def replace_hessian(
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
    return add_hessian(result, metric, sample_dims)


def add_hessian(loss: Tensor, metric: Metric, sample_dims: tuple[int, ...] = ()) -> Tensor:
    """``loss + ½ Σ h |u − u₀ + s|²``, summed over each sample: without shifts no other value and gradient."""
    for u, h, s in metric:
        term = 0.5 * h.detach() * squared_modulus(_change(u) + s)
        loss = loss + _sum_to(term, loss, sample_dims)
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


def shares_of(weights: Tensor, reduction: str) -> Tensor:
    """The weight of each sample or element in the result; 0 where no sample has any."""
    if reduction != "mean":
        return weights
    total = weights.sum()
    return torch.where(total == 0, 0.0, weights / total)


def reduce(per_sample: Tensor, reduction: str) -> Tensor:
    """The sum or mean of the samples' losses, or each of them."""
    reduced = {"mean": per_sample.mean, "sum": per_sample.sum, "batchmean": per_sample.sum}.get(
        reduction
    )
    return reduced() if reduced else per_sample
