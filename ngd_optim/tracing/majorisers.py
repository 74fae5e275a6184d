"""The curvature of what has a kink: that of the parabola which iteratively reweighted least squares puts above it."""

import torch
from torch import Tensor

_FLOOR = 0.1
"""Share of the median residual below which residuals count as no smaller: from 0.03 to 0.3 serve as well."""


def irls_weight(residual: Tensor, slope: Tensor | float = 1.0) -> Tensor:
    """``h = c / max(|r|, floor)``, the second derivative of the parabola above ``c |r|``.

    For any ``r₀ ≠ 0``, ``c |r| ≤ ½ h r² + ½ c |r₀|`` with ``h = φ′(r₀) / r₀ = c / |r₀|``; both
    sides have the same value and the same slope at ``r₀``. So the minimum of the sum of parabolas
    lowers the sum of ``|r|`` too. A hinge is ``max(0, u) = ½ u + ½ |u|``: ``irls_weight(u, 0.5)``.
    ``max(a, b) = ½ (a + b) + ½ |a − b|``: ``irls_weight(a − b, 0.5)``. A Euclidean norm ``‖z‖`` has
    the parabola ``½ h ‖z‖² + …`` of its length: ``irls_weight(‖z‖)``.

    The floor keeps residuals that are near zero from ruling all others. It is a tenth of the median
    ``|r|`` of those that are not zero, and at least the rounding of the largest.

    Sources: Huber & Ronchetti (2009), Robust Statistics, section 7.8; Hunter & Lange (2004), A
    tutorial on MM algorithms, section 3.1.

    Args:
        residual: ``r``, of any shape; zeros, such as elements that do not count, do not move the
            floor.
        slope: ``c ≥ 0``, a number or a tensor that broadcasts with ``r``.

    Returns:
        The weights ``h``, finite and at least 0, without a graph.
    """
    size = residual.detach().abs()
    if not size.numel():
        return size
    rounding = torch.finfo(size.dtype).eps * size.amax()
    median = torch.where(size > 0, size, torch.nan).nanmedian()
    # Without a residual there is no gradient either, and any weight will do.
    floor = torch.where(rounding > 0, torch.maximum(_FLOOR * median, rounding), 1.0)
    return slope / torch.maximum(size, floor)
