"""Least squares as a loss that the optimizer recognises."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ngd_optim.shown import show


def least_squares(*residuals: Tensor, weights: Sequence[float | Tensor] | None = None) -> Tensor:
    """``½ Σᵢ wᵢ mean(rᵢ²)``, a 0-dim tensor, whose Gauss-Newton metric ``Σᵢ wᵢ JᵢᵀJᵢ / numel(rᵢ)`` is recognised.

    It is used in a closure like any loss of ``torch.nn.functional``: alone or in a sum, with or
    without ``backward``. The residuals may hold derivatives of a network: by ``torch.func``, or by
    ``torch.autograd.grad`` with ``create_graph=True``.

    Args:
        residuals: real tensors of any shapes, one for each equation, boundary or data set.
        weights: one number, or tensor of one element, for each residual tensor, at least 0; None: 1
            for each.

    Raises:
        TypeError: a residual is not a real floating-point tensor.
        ValueError: there is no residual, one is empty, or the weights do not fit.

    Examples:
        >>> import torch
        >>> from ngd_optim import NaturalCG, least_squares
        >>> t = torch.linspace(0, 2, 20, dtype=torch.float64)
        >>> rate = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        >>> optimizer = NaturalCG([rate])
        >>> for _ in range(5):  # fits exp(−rate · t) to data, and holds the rate near 0.6
        ...     loss = optimizer.step(
        ...         lambda: least_squares((-rate * t).exp() - (-0.5 * t).exp(), rate - 0.6, weights=(1.0, 1e-6))
        ...     )
        >>> round(rate.item(), 4)
        0.5
    """
    # The trace sees it as a torch function, like the losses of torch.nn.functional.
    if has_torch_function(residuals):
        return handle_torch_function(least_squares, residuals, *residuals, weights=weights)
    _check(residuals, weights)
    factors = [1.0] * len(residuals) if weights is None else weights
    terms = [0.5 * w * r.square().mean() for r, w in zip(residuals, factors, strict=True)]
    return torch.stack([term.reshape(()) for term in terms]).sum()


def _check(residuals: Sequence[Tensor], weights: Sequence[float | Tensor] | None) -> None:
    if not residuals:
        raise ValueError("least_squares() needs at least one tensor of residuals")
    for r in residuals:
        if not isinstance(r, Tensor) or not r.is_floating_point():
            kind = r.dtype if isinstance(r, Tensor) else type(r).__name__
            raise TypeError(f"residuals must be real floating-point tensors, got {kind}")
        if not r.numel():
            raise ValueError(f"residuals must not be empty, got one of shape {tuple(r.shape)}")
    if weights is not None and len(weights) != len(residuals):
        raise ValueError(
            f"there must be one weight for each residual, got {len(weights)} for {len(residuals)}"
        )
    for w in weights or ():
        if w.numel() != 1 if isinstance(w, Tensor) else not (isinstance(w, Real) and w >= 0):
            raise ValueError(
                f"weights must be numbers, at least 0, or tensors of one element, got {show(w)}"
            )
