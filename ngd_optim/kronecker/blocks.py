"""The inverse of blocks that are products of damped Kronecker factors."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngd_optim.jacobian import Layer
from ngd_optim.kronecker.factors import KroneckerFactors, trace_of, unpack_factor
from ngd_optim.parameters import FlatParameters
from ngd_optim.reading import read

_ROUNDING = 10
"""Factors are singular up to this multiple of their rounding errors."""

_SMALL = 10_000
"""Layers whose factors have no more numbers are solved together, where the calls would cost more than the work."""


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
        self._stacks = _stack(factors)
        damped = [pair for stack in self._stacks for pair in stack.dampings(shift)]
        inverses = iter(_invert_damped(damped))
        self._inverses = [(next(inverses), next(inverses)) for _ in self._stacks]
        self.pairs = {
            layer: pair
            for stack, (left, right) in zip(self._stacks, self._inverses, strict=True)
            for layer, pair in zip(
                stack.layers, zip(stack.split(left), stack.split(right), strict=True), strict=True
            )
        }
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
        for stack, (left, right) in zip(self._stacks, self._inverses, strict=True):
            _solve(stack, left, right, sources, targets)
        for i, diagonal in self._diagonals.items():
            torch.div(sources[i], diagonal, out=targets[i])


class _Stack(NamedTuple):
    """Factors of layers whose matrices have the same shape, one after the other: (layers × groups, …)."""

    layers: Sequence[Layer]
    left: Tensor
    right: Tensor

    def split(self, stacked: Tensor) -> Sequence[Tensor]:
        """That of each layer."""
        return stacked.split(len(stacked) // len(self.layers))

    def dampings(self, shift: Mapping[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Both factors as they are kept, each with what is added to its diagonals, (layers × groups,)."""
        left, right = (unpack_factor(factor) for factor in (self.left, self.right))
        # π² = (trace R ÷ columns) ÷ (trace L ÷ rows): equal shares of the damping (Martens & Grosse
        # 2015, section 6.3).
        pi = (trace_of(right) / right.shape[1] / (trace_of(left) / left.shape[1])).sqrt()
        pi = torch.where(pi.isfinite() & (pi > 0), pi, 1)
        own = torch.stack([shift[layer.weight] for layer in self.layers]).sqrt()
        own = own.repeat_interleave(len(left) // len(self.layers))
        dampings = (
            # Rounding errors may be as large.
            torch.maximum(share, _ROUNDING * torch.finfo(factor.dtype).eps * trace_of(factor))
            for share, factor in ((own / pi, left), (own * pi, right))
        )
        return list(zip((self.left, self.right), map(_make_invertible, dampings), strict=True))


def _stack(factors: KroneckerFactors) -> list[_Stack]:
    """All layers; small ones of the same shape in one stack."""
    stacks: dict[Any, list[Layer]] = {}
    for layer in factors.layers:
        left, right = (factors.values[layer.weight, side] for side in ("left", "right"))
        is_small = left.numel() + right.numel() <= _SMALL
        key = (left.shape, right.shape, left.dtype, layer.bias is None) if is_small else layer
        stacks.setdefault(key, []).append(layer)
    return [
        _Stack(
            layers,
            *(
                _join([factors.values[layer.weight, side] for layer in layers])
                for side in ("left", "right")
            ),
        )
        for layers in stacks.values()
    ]


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def mean_shift(shift: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """For each parameter the mean of what is added to its diagonal."""
    return {i: part.sum() / max(1, part.numel()) for i, part in shift.items()}


def relative_shift(factors: KroneckerFactors, damping: float) -> dict[int, Tensor]:
    """For each parameter the shift that gives each factor, or diagonal, ``√damping`` times its mean eigenvalue."""
    shifts: dict[int, Tensor] = {}
    for stack in _stack(factors):
        means = [
            trace_of(side).view(len(stack.layers), -1).mean(1) / side.shape[1]
            for side in map(unpack_factor, (stack.left, stack.right))
        ]
        for layer, shift in zip(stack.layers, damping * means[0] * means[1], strict=True):
            shifts |= {i: shift for i in (layer.weight, layer.bias) if i is not None}
    for (i, name), value in factors.values.items():
        if name == "diagonal":
            shifts[i] = damping**0.5 * value.mean()
    return shifts


def _solve(
    stack: _Stack,
    left: Tensor,
    right: Tensor,
    sources: Mapping[int, Tensor],
    targets: Mapping[int, Tensor],
) -> None:
    """Write the solution for the layers' parameters."""
    matrix = _join(
        [
            layer.join(sources[layer.weight], None if layer.bias is None else sources[layer.bias])
            for layer in stack.layers
        ]
    )
    # (L ⊗ R)⁻¹ vec(X) = L⁻¹ X R⁻¹.
    matrix = left @ matrix if left.ndim == 3 else left.unsqueeze(-1) * matrix
    matrix = matrix @ right if right.ndim == 3 else matrix * right.unsqueeze(-2)
    for layer, own in zip(stack.layers, stack.split(matrix), strict=True):
        weight, bias = layer.split(own)
        targets[layer.weight].copy_(weight.reshape(targets[layer.weight].shape))
        if layer.bias is not None and bias is not None:
            targets[layer.bias].copy_(bias.reshape(-1))


def _invert_damped(factors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The inverses of ``factor + damping I``, with more of it where rounding made that indefinite.

    The host waits once for all of them, unless some are.
    """
    inverses: dict[int, Tensor] = {}
    pending = dict(enumerate(factors))
    while pending:
        tried = {i: _factorise(factor, damping) for i, (factor, damping) in pending.items()}
        failed = dict(zip(tried, read(*(fails.any() for _, fails in tried.values())), strict=True))
        for i in list(tried):
            root, fails = tried.pop(i)
            factor, damping = pending.pop(i)
            if failed[i]:  # the solution stays the exact system's
                pending[i] = factor, torch.where(fails, 10 * damping, damping)
            else:
                inverses[i] = torch.cholesky_inverse(root) if factor.ndim == 3 else 1 / root
    return [inverses[i] for i in range(len(factors))]


def _factorise(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of each ``factor + damping I``, and whether it has none; of diagonals the sum."""
    damped = unpack_factor(factor)
    if damped.ndim == 2:
        return damped + damping[:, None], torch.zeros_like(damping, dtype=torch.bool)
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
    root, info = torch.linalg.cholesky_ex(damped)
    return root, (info > 0) & damping.isfinite()


def _make_invertible(diagonal: Tensor) -> Tensor:
    """With 1 in place of zeros."""
    return torch.where(diagonal < torch.finfo(diagonal.dtype).tiny, 1, diagonal)
