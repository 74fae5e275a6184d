"""Least squares as a loss that the optimizer recognises."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ngd_optim.real_parts import squared_modulus
from ngd_optim.shown import show

RobustLoss = Literal["linear", "soft_l1", "huber", "cauchy", "arctan"]
"""``ρ``, by scipy's names."""


def least_squares(
    *residuals: Tensor,
    weights: Tensor | Sequence[float | Tensor] | None = None,
    loss: RobustLoss = "linear",
    scale: float | Tensor = 1.0,
) -> Tensor:
    """``½ Σᵢ mean(wᵢ c² ρ((rᵢ / c)²))``, a 0-dim tensor, whose Gauss-Newton metric is recognised.

    By default it is ``½ Σᵢ wᵢ mean(|rᵢ|²)``, with the metric ``Σᵢ wᵢ JᵢᵀJᵢ / numel(rᵢ)``. It is used
    in a closure like any loss of ``torch.nn.functional``: alone or in a sum, with or without
    ``backward``. The residuals may hold derivatives of a network: by ``torch.func``, or by
    ``torch.autograd.grad`` with ``create_graph=True``.

    A robust loss keeps outliers from ruling the fit. It is as in ``scipy.optimize.least_squares``,
    with ``scale`` for ``f_scale``: residuals that are much less than the scale ``c`` count as
    squares, and larger ones less and less. Where some residuals are to be robust and others are
    not, add two calls.

    Args:
        residuals: real or complex tensors of any shapes, one for each equation, boundary or data
            set.
        weights: for each residual tensor a number, or a tensor that broadcasts to its shape, at
            least 0; None: 1 for each. To one residual tensor its weights may be given alone.
        loss: ``ρ(z)``. ``"linear"``: ``z``, ordinary least squares. ``"soft_l1"``:
            ``2 (√(1 + z) − 1)``. ``"huber"``: ``z`` up to 1, ``2 √z − 1`` beyond. ``"cauchy"``:
            ``ln(1 + z)``. ``"arctan"``: ``arctan(z)``, for which an outlier costs the same however
            far it is.
        scale: ``c``, above 0, in the residuals' unit: some two or three times the size of those that
            are no outliers.

    Raises:
        TypeError: a residual is no tensor, or one of integers.
        ValueError: there is no residual, one is empty, or the weights, the loss or the scale do not
            fit.

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
        return handle_torch_function(
            least_squares, residuals, *residuals, weights=weights, loss=loss, scale=scale
        )
    _check(residuals, weights, loss, scale)
    if loss == "linear":
        costs = [squared_modulus(r) for r in residuals]
    else:
        rho = _ROBUST[loss].value
        costs = [scale**2 * rho(squared_modulus(r / scale)) for r in residuals]
    terms = [
        0.5 * ((w * cost).mean() if isinstance(w, Tensor) and w.numel() > 1 else w * cost.mean())
        for w, cost in zip(weights_of(residuals, weights), costs, strict=True)
    ]
    return torch.stack([term.reshape(()) for term in terms]).sum()


def weights_of(
    residuals: Sequence[Tensor], weights: Tensor | Sequence[float | Tensor] | None
) -> Sequence[float | Tensor]:
    """One weight, or tensor of weights, for each residual tensor."""
    if weights is None:
        return [1.0] * len(residuals)
    if len(residuals) == 1 and isinstance(weights, Tensor):
        return [weights]
    return list(weights)


def robust_weight(r: Tensor, loss: RobustLoss, scale: float | Tensor) -> Tensor:
    """``ρ′((r / c)²)``, the second derivative of the parabola above ``½ c² ρ((r / c)²)``; at most 1.

    All ``ρ`` are concave, so a parabola with the same value and slope at ``r`` lies above them:
    iteratively reweighted least squares (Huber & Ronchetti 2009, section 7.8). It is never
    negative. Triggs' correction ``ρ′ + 2 z ρ″``, which scipy makes, vanishes where the loss is
    concave: on NIST's problems with outliers it takes 1.3 to 5 times as many steps.
    """
    return _ROBUST[loss].slope(squared_modulus(r.detach() / scale))


class _Rho(NamedTuple):
    """``ρ`` and ``ρ′`` as functions of ``z = (r / c)²``."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


_ROBUST: dict[str, _Rho] = {
    # 2 (√(1 + z) − 1), without its cancellation.
    "soft_l1": _Rho(lambda z: 2 * z / (1 + (1 + z).sqrt()), lambda z: (1 + z).rsqrt()),
    "huber": _Rho(
        lambda z: torch.where(z <= 1, z, 2 * z.clamp(min=1).sqrt() - 1),
        lambda z: z.clamp(min=1).rsqrt(),
    ),
    "cauchy": _Rho(torch.log1p, lambda z: 1 / (1 + z)),
    "arctan": _Rho(torch.atan, lambda z: 1 / (1 + z.square())),
}


def _check(
    residuals: Sequence[Tensor],
    weights: Tensor | Sequence[float | Tensor] | None,
    loss: str,
    scale: float | Tensor,
) -> None:
    if not residuals:
        raise ValueError("least_squares() needs at least one tensor of residuals")
    for r in residuals:
        if not isinstance(r, Tensor) or not (r.is_floating_point() or r.is_complex()):
            kind = r.dtype if isinstance(r, Tensor) else type(r).__name__
            raise TypeError(f"residuals must be floating-point or complex tensors, got {kind}")
        if not r.numel():
            raise ValueError(f"residuals must not be empty, got one of shape {tuple(r.shape)}")
    if not isinstance(loss, str) or loss not in get_args(RobustLoss):
        raise ValueError(f"loss must be one of {get_args(RobustLoss)}, got {show(loss)}")
    if not (_is_number(scale) and (isinstance(scale, Tensor) or 0 < scale < math.inf)):
        raise ValueError(
            f"scale must be a finite number above 0, or a tensor of one element, got {show(scale)}"
        )
    is_list = isinstance(weights, Tensor) and (weights.ndim > 0 or len(residuals) == 1)
    if not (weights is None or is_list or isinstance(weights, list | tuple)):
        raise ValueError(f"weights must be a sequence, one for each residual, got {show(weights)}")
    factors = weights_of(residuals, weights)
    if len(factors) != len(residuals):
        raise ValueError(
            f"there must be one weight for each residual tensor, got {len(factors)} for {len(residuals)}"
        )
    for w, r in zip(factors, residuals, strict=True):
        if isinstance(w, Tensor):
            if w.is_complex():
                raise ValueError(f"weights must be real, got a tensor of dtype {w.dtype}")
            if not _broadcasts(w, r):
                raise ValueError(
                    "a tensor of weights must have one element, or broadcast to the shape of its residuals, "
                    f"{tuple(r.shape)}, got shape {tuple(w.shape)}"
                )
        elif not (isinstance(w, Real) and 0 <= float(w) < math.inf):
            raise ValueError(
                f"weights must be finite numbers, at least 0, or tensors, got {show(w)}"
            )


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)


def _broadcasts(weight: Tensor, residual: Tensor) -> bool:
    if weight.numel() == 1:
        return True
    try:
        return torch.broadcast_shapes(weight.shape, residual.shape) == residual.shape
    except RuntimeError:
        return False
