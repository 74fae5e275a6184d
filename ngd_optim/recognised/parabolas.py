"""The parabola above an absolute value, of iteratively reweighted least squares."""

import torch
from torch import Tensor

_FLOOR = 0.1
"""Share of the median residual below which residuals count as no smaller: from 0.03 to 0.3 serve as well."""


def irls_weight(
    residual: Tensor, slope: Tensor | float = 1.0, smoothing: float | None = None
) -> Tensor:
    """``h = c / max(|r|, floor)``, the second derivative of the parabola above ``c |r|``.

    For any ``r₀ ≠ 0``, ``c |r| ≤ ½ h r² + ½ c |r₀|`` with ``h = φ′(r₀) / r₀ = c / |r₀|``; both
    sides have the same value and the same slope at ``r₀``. So the minimum of the sum of parabolas
    lowers the sum of ``|r|`` too. A hinge is ``max(0, u) = ½ u + ½ |u|``: ``irls_weight(u, 0.5)``.
    ``max(a, b) = ½ (a + b) + ½ |a − b|``: ``irls_weight(a − b, 0.5)``. A Euclidean norm ``‖z‖`` has
    the parabola ``½ h ‖z‖² + …`` of its length: ``irls_weight(‖z‖)``.

    The floor keeps residuals that are near zero from ruling all others. It is a tenth of the median
    ``|r|`` of those that are not zero, and at least a hundredth of the mean: where most of them
    vanish, as weights under an L1 penalty do, the median says nothing.

    Sources: Huber & Ronchetti (2009), Robust Statistics, section 7.8; Hunter & Lange (2004), A
    tutorial on MM algorithms, section 3.1.

    Args:
        residual: ``r``, of any shape; zeros, such as elements that do not count, do not move the
            floor.
        slope: ``c ≥ 0``, a number or a tensor that broadcasts with ``r``.
        smoothing: share of the mean ``|r|`` of those that are not zero, which is the floor in place
            of that; at least that mean's rounding.

    Returns:
        The weights ``h``, finite and at least 0, without a graph.
    """
    return slope / _floored(residual.detach().abs(), smoothing)


def irls_parabola(
    residual: Tensor,
    slope: Tensor | float,
    smoothing: float | None,
    bound: float = 0.0,
    *,
    is_hinge: bool = False,
) -> tuple[Tensor, Tensor | float]:
    """``(h, s)``: near the residual ``r₀``, ``c |r|`` rounded is that at ``r₀`` and ``½ h (r − r₀ + s)²`` added.

    Rounded by a width ``w`` it is the parabola that touches ``c |r|`` at ``±w``, in value, slope
    and curvature ``h = c / w``, where it is nearer to zero than that: ``s = −sign(r₀) (w − |r₀|)``.
    Without a smoothing no kink is rounded, and ``s`` is 0.

    Args:
        residual: as for :func:`irls_weight`, as are the slope and the smoothing.
        slope: the same.
        smoothing: the same; None: there is no width.
        bound: ``δ``, where Huber's function begins to be straight: that has the slope
            ``c min(|r|, δ) / δ``, and no weight above ``c / δ``.
        is_hinge: whether a slope of ``c`` is added, so that it is flat where the residual is
            negative; see :func:`flat_share`.
    """
    r = residual.detach()
    size = r.abs()
    # Huber's function has a curvature of its own; and no width is needed where there is no kink.
    least = size if bound and smoothing is None else _floored(size, smoothing)
    least = least.clamp(min=bound)
    if smoothing is None:
        return slope / least, 0.0
    share = (size / bound).clamp(max=1.0) if bound else 1.0
    weight = slope / least * (flat_share(r, smoothing) if is_hinge else 1.0)
    return weight, r - r.sgn() * share * least


def flat_share(residual: Tensor, smoothing: float | None) -> Tensor | float:
    """``(w / |r|)²`` where a hinge ``max(0, r)`` is flat beyond its width ``w``: what is left there of its weight.

    The parabola above a hinge holds negative residuals back as it does positive ones. In the end
    most samples are where the hinge is zero, and there is nothing to hold back. Of a rounded one,
    ``½ (r + √(r² + w²))``, the second derivative falls as ``w² / |r|³``.

    Args:
        residual: as for :func:`irls_weight`.
        smoothing: the same; None: there is no width, and the parabola is kept.
    """
    r = residual.detach()
    if smoothing is None or not r.numel():
        return 1.0
    width = _floor(r.abs(), smoothing)
    return torch.where(r < -width, (width / r).square(), 1.0)


def _floored(size: Tensor, smoothing: float | None) -> Tensor:
    """``max(|r|, floor)``."""
    return torch.maximum(size, _floor(size, smoothing)) if size.numel() else size


def _floor(size: Tensor, smoothing: float | None) -> Tensor:
    mean = size.mean()
    if smoothing is None:
        median = torch.where(size > 0, size, torch.nan).nanmedian()
        floor = torch.maximum(_FLOOR * median, 0.01 * mean)
    else:
        share = max(smoothing, torch.finfo(size.dtype).eps)
        floor = share * size.sum() / (size > 0).sum().clamp(min=1)
    # Without a residual there is no gradient either, and any weight will do.
    return torch.where(mean > 0, floor, 1.0)
