"""The inverse of blocks that are products of damped Kronecker factors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ngd_optim.jacobian import Layer
from ngd_optim.kronecker.factors import KroneckerFactors, Values, trace_of, unpack_factor
from ngd_optim.parameters import FlatParameters

_ROUNDING = 10
"""Factors are singular up to this multiple of their rounding errors."""


def build_kronecker_preconditioner(
    factors: KroneckerFactors, parameters: FlatParameters, shift: Sequence[float]
) -> Callable[[Tensor], Tensor]:
    """``r ↦ M⁻¹ r`` for the blocks ``(L + √λ/π I) ⊗ (R + π √λ I)``, and ``diagonal + λ`` for the rest.

    Factored Tikhonov damping, with ``π`` so that both factors get the same share (Martens & Grosse
    2015, section 6.3).

    Args:
        factors: of the curvature.
        parameters: whose flat vectors ``r`` is one of.
        shift: for each parameter the ``λ`` that the system adds to the curvature.
    """
    blocks = [_Block(layer, factors.values, shift[layer.weight]) for layer in factors.layers]
    diagonals = {
        i: _make_invertible(value + shift[i])
        for (i, name), value in factors.values.items()
        if name == "diagonal"
    }

    def precondition(r: Tensor) -> Tensor:
        result = torch.empty_like(r)
        sources, targets = parameters.views(r), parameters.views(result)
        for block in blocks:
            block.solve(sources, targets)
        for i, diagonal in diagonals.items():
            torch.div(sources[i], diagonal, out=targets[i])
        return result

    return precondition


class _Block:
    """The inverse of one weight's block."""

    def __init__(self, layer: Layer, values: Values, shift: float) -> None:
        self._layer = layer
        left, right = (unpack_factor(values[layer.weight, side]) for side in ("left", "right"))
        # π² = (trace R ÷ columns) ÷ (trace L ÷ rows): equal shares of the damping (Martens & Grosse
        # 2015, section 6.3).
        pi = (trace_of(right) / right.shape[1] / (trace_of(left) / left.shape[1])).sqrt()
        pi = torch.where(pi.isfinite() & (pi > 0), pi, 1)
        self._left = _inverse(left, shift**0.5 / pi)
        self._right = _inverse(right, shift**0.5 * pi)

    def solve(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Write the solution for the layer's parameters."""
        layer = self._layer
        matrix = layer.join(
            sources[layer.weight], None if layer.bias is None else sources[layer.bias]
        )
        # (L ⊗ R)⁻¹ vec(X) = L⁻¹ X R⁻¹.
        matrix = self._left @ matrix if self._left.ndim == 3 else self._left.unsqueeze(-1) * matrix
        matrix = (
            matrix @ self._right if self._right.ndim == 3 else matrix * self._right.unsqueeze(-2)
        )
        weight, bias = layer.split(matrix)
        targets[layer.weight].copy_(weight.reshape(targets[layer.weight].shape))
        if layer.bias is not None and bias is not None:
            targets[layer.bias].copy_(bias.reshape(-1))


def _inverse(factor: Tensor, shift: Tensor) -> Tensor:
    """The inverse of ``factor + shift I``, with a larger shift where rounding errors are as large."""
    shift = torch.maximum(shift, _ROUNDING * torch.finfo(factor.dtype).eps * trace_of(factor))
    shift = _make_invertible(shift)
    if factor.ndim == 2:
        return 1 / (factor + shift[:, None])
    while True:
        damped = factor.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
        cholesky, info = torch.linalg.cholesky_ex(damped)
        if not (info.any() and shift.isfinite().all()):
            return torch.cholesky_inverse(cholesky)
        # Rounding made it indefinite; the solution stays the exact system's.
        shift = 10 * shift


def _make_invertible(diagonal: Tensor) -> Tensor:
    """With 1 in place of zeros."""
    return torch.where(diagonal < torch.finfo(diagonal.dtype).tiny, 1, diagonal)
