"""The inverse of blocks that are products of damped Kronecker factors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ngd_optim.jacobian import Layer
from ngd_optim.kronecker.factors import KroneckerFactors, Values, trace_of, unpack_factor
from ngd_optim.parameters import FlatParameters
from ngd_optim.reading import read

_ROUNDING = 10
"""Factors are singular up to this multiple of their rounding errors."""


class KroneckerInverse:
    """``r ↦ M⁻¹ r`` for the blocks ``(L + √λ/π I) ⊗ (R + π √λ I)``, and ``diagonal + λ`` for the rest.

    Factored Tikhonov damping, with ``π`` so that both factors get the same share (Martens & Grosse
    2015, section 6.3).

    Args:
        factors: of the curvature.
        parameters: whose flat vectors ``r`` is one of.
        shift: for each parameter the ``λ`` that the system adds to the curvature, 0-dim.

    Attributes:
        pairs: the inverses of both damped factors of each layer, or their diagonals.
    """

    def __init__(
        self,
        factors: KroneckerFactors,
        parameters: FlatParameters,
        shift: Mapping[int, Tensor],
    ) -> None:
        damped = [
            pair
            for layer in factors.layers
            for pair in _dampings(layer, factors.values, shift[layer.weight])
        ]
        inverses = iter(_invert_damped(damped))
        self.pairs = {layer: (next(inverses), next(inverses)) for layer in factors.layers}
        self._parameters = parameters
        self._diagonals = {
            i: _make_invertible(value + shift[i])
            for (i, name), value in factors.values.items()
            if name == "diagonal"
        }

    def __call__(self, r: Tensor) -> Tensor:
        """The solution, flat."""
        result = torch.empty_like(r)
        sources, targets = (dict(enumerate(self._parameters.views(v))) for v in (r, result))
        self.solve(sources, targets)
        return result

    def pairs_on_all_ranks(self) -> dict[Layer, tuple[Tensor, Tensor]]:
        """These, as each rank has them."""
        return self.pairs

    def solve(self, sources: Mapping[int, Tensor], targets: Mapping[int, Tensor]) -> None:
        """Write the solutions for the parameters in the blocks, each by its index."""
        for layer, (left, right) in self.pairs.items():
            _solve(layer, left, right, sources, targets)
        for i, diagonal in self._diagonals.items():
            torch.div(sources[i], diagonal, out=targets[i])


def mean_shift(shift: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """For each parameter the mean of what is added to its diagonal."""
    return {i: part.sum() / max(1, part.numel()) for i, part in shift.items()}


def relative_shift(factors: KroneckerFactors, damping: float) -> dict[int, Tensor]:
    """For each parameter the shift that gives each factor, or diagonal, ``√damping`` times its mean eigenvalue."""
    shifts: dict[int, Tensor] = {}
    for layer in factors.layers:
        sides = [unpack_factor(factors.values[layer.weight, name]) for name in ("left", "right")]
        means = [trace_of(side).mean() / side.shape[1] for side in sides]
        shifts[layer.weight] = damping * means[0] * means[1]
        if layer.bias is not None:
            shifts[layer.bias] = shifts[layer.weight]
    for (i, name), value in factors.values.items():
        if name == "diagonal":
            shifts[i] = damping**0.5 * value.mean()
    return shifts


def _solve(
    layer: Layer,
    left: Tensor,
    right: Tensor,
    sources: Mapping[int, Tensor],
    targets: Mapping[int, Tensor],
) -> None:
    """Write the solution for a layer's parameters."""
    matrix = layer.join(sources[layer.weight], None if layer.bias is None else sources[layer.bias])
    # (L ⊗ R)⁻¹ vec(X) = L⁻¹ X R⁻¹.
    matrix = left @ matrix if left.ndim == 3 else left.unsqueeze(-1) * matrix
    matrix = matrix @ right if right.ndim == 3 else matrix * right.unsqueeze(-2)
    weight, bias = layer.split(matrix)
    targets[layer.weight].copy_(weight.reshape(targets[layer.weight].shape))
    if layer.bias is not None and bias is not None:
        targets[layer.bias].copy_(bias.reshape(-1))


def _dampings(layer: Layer, values: Values, shift: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both factors of a block as they are kept, each with what is added to its diagonals, (groups,)."""
    kept = [values[layer.weight, side] for side in ("left", "right")]
    left, right = (unpack_factor(factor) for factor in kept)
    # π² = (trace R ÷ columns) ÷ (trace L ÷ rows): equal shares of the damping (Martens & Grosse
    # 2015, section 6.3).
    pi = (trace_of(right) / right.shape[1] / (trace_of(left) / left.shape[1])).sqrt()
    pi = torch.where(pi.isfinite() & (pi > 0), pi, 1)
    dampings = (
        # Rounding errors may be as large.
        torch.maximum(share, _ROUNDING * torch.finfo(factor.dtype).eps * trace_of(factor))
        for share, factor in ((shift**0.5 / pi, left), (shift**0.5 * pi, right))
    )
    return list(zip(kept, map(_make_invertible, dampings), strict=True))


def _invert_damped(factors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The inverses of ``factor + damping I``, with more of it where rounding made that indefinite.

    The host waits once for all of them, unless some are.
    """
    inverses: dict[int, Tensor] = {}
    pending = dict(enumerate(factors))
    while pending:
        tried = {i: _factorise(factor, damping) for i, (factor, damping) in pending.items()}
        failed = dict(zip(tried, read(*(fails for _, fails in tried.values())), strict=True))
        for i in list(tried):
            root, _ = tried.pop(i)
            factor, damping = pending.pop(i)
            if failed[i]:
                pending[i] = factor, 10 * damping  # the solution stays the exact system's
            else:
                inverses[i] = torch.cholesky_inverse(root) if factor.ndim == 3 else 1 / root
    return [inverses[i] for i in range(len(factors))]


def _factorise(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of ``factor + damping I``, and whether it has none; of diagonals the sum."""
    damped = unpack_factor(factor)
    if damped.ndim == 2:
        return damped + damping[:, None], damping.new_zeros(()).bool()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
    root, info = torch.linalg.cholesky_ex(damped)
    return root, info.any() & damping.isfinite().all()


def _make_invertible(diagonal: Tensor) -> Tensor:
    """With 1 in place of zeros."""
    return torch.where(diagonal < torch.finfo(diagonal.dtype).tiny, 1, diagonal)
