"""Kronecker factors of the curvature, and the preconditioner that they make.

Where a weight's gradient is ``Σₙ lₙ rₙᵀ`` (see :mod:`~ngd_optim.jacobian.layers`), the curvature's
block for it is nearly ``(Σ l lᵀ) ⊗ (Σ r rᵀ) / n`` (Martens & Grosse 2015; convolutions: Grosse &
Martens 2016; weights that are used several times, "expand": Eschenhagen et al. 2023).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ngd_optim.curvature import OutputMetric
from ngd_optim.jacobian import Layer, Use
from ngd_optim.linalg import order_of, pack, unpack
from ngd_optim.parameters import FlatParameters
from ngd_optim.preconditioners.sampling import draw
from ngd_optim.reading import read

LARGEST_FACTOR = 4096
"""A longer side of a weight has only the diagonal of its factor."""

_ROUNDING = 10
"""Factors are singular up to this multiple of their rounding errors."""

Values = Mapping[tuple[int, str], Tensor]
"""By index of a parameter and name.

For the weight of a layer ``"left"``, a packed matrix with as many rows and columns as the weight
has rows, for each group, and ``"right"``, likewise for its columns; their diagonals, (groups, rows)
or (groups, columns), where they are too large. For what is in no layer ``"diagonal"``, shaped like
the parameter.
"""


@dataclass(frozen=True)
class KroneckerFactors:
    """Factors of the blocks of weights, and diagonals for all other parameters."""

    layers: tuple[Layer, ...]
    values: Values


@torch.no_grad()
def estimate_factors(
    uses: Sequence[Use],
    metric: OutputMetric,
    parameters: FlatParameters,
    generator: torch.Generator,
) -> KroneckerFactors:
    """Estimate the factors by one pull-back of a random draw from the metric."""
    params = parameters.tensors
    by_layer: dict[Layer, list[tuple[Use, Tensor]]] = {use.layer: [] for use in uses}
    inside = {i for layer in by_layer for i in (layer.weight, layer.bias)}
    outside = [i for i in range(len(params)) if i not in inside]
    inputs: Any = [*(GradientEdge(use.node, 0) for use in uses), *(params[i] for i in outside)]
    empty = [*(use.zeros() for use in uses), *(torch.zeros_like(params[i]) for i in outside)]
    # E[u uᵀ] = H_z, so the pulled-back gradients have the curvature as covariance.
    pulled = torch.autograd.grad(
        metric.outputs, inputs, draw(metric, generator), retain_graph=True, allow_unused=True
    )
    gradients = [
        zeros if gradient is None else gradient
        for gradient, zeros in zip(pulled, empty, strict=True)
    ]
    for use, gradient in zip(uses, gradients, strict=False):
        by_layer[use.layer].append((use, gradient))
    values: dict[tuple[int, str], Tensor] = {}
    for layer, own in by_layer.items():
        left, right = _factors(layer, own, parameters.dtype)
        values |= {
            (layer.weight, "left"): pack_factor(left),
            (layer.weight, "right"): pack_factor(right),
        }
    for i, gradient in zip(outside, gradients[len(uses) :], strict=True):
        values[i, "diagonal"] = gradient.to(parameters.dtype).square()
    return KroneckerFactors(tuple(by_layer), values)


def fits(values: Values, layers: Sequence[Layer], params: Sequence[Tensor]) -> bool:
    """Whether values are those of these layers, and of all parameters that are in none of them."""
    shapes: dict[tuple[int, str], tuple[int, ...]] = {}
    for layer in layers:
        groups, rows, columns = layer.shape(params)
        shapes |= {
            (layer.weight, "left"): (groups, rows),
            (layer.weight, "right"): (groups, columns),
        }
    inside = {i for layer in layers for i in (layer.weight, layer.bias)}
    shapes |= {(i, "diagonal"): p.shape for i, p in enumerate(params) if i not in inside}
    return shapes.keys() == values.keys() and all(
        _shape(key[1], values[key]) == shapes[key] for key in shapes
    )


def _shape(name: str, value: Tensor) -> tuple[int, ...]:
    return (
        tuple(value.shape)
        if name == "diagonal" or value.ndim == 2
        else (len(value), order_of(value))
    )


def pack_factor(factor: Tensor) -> Tensor:
    """A ``"left"`` or ``"right"`` as it is kept."""
    return pack(factor) if factor.ndim == 3 else factor


def unpack_factor(factor: Tensor) -> Tensor:
    """The matrices of a ``"left"`` or ``"right"``; the diagonals, where it has these alone."""
    return unpack(factor) if factor.ndim == 3 else factor


def average_factors(estimates: Sequence[KroneckerFactors]) -> KroneckerFactors | None:
    """The mean over several closures; None if they do not use the parameters in the same way."""
    if not estimates or any(other.layers != estimates[0].layers for other in estimates):
        return None
    if len(estimates) == 1:
        return estimates[0]
    values = {
        key: sum(other.values[key] for other in estimates) / len(estimates)
        for key in estimates[0].values
    }
    return KroneckerFactors(estimates[0].layers, values)  # pyright: ignore[reportArgumentType]


def is_worthwhile(uses: Sequence[Use], params: Sequence[Tensor]) -> bool:
    """Whether factors stand for half of the parameters, and a solve with them costs at most two products.

    Both costs are counted in multiplications: four by the weight for each use in a product, and one
    by each factor.
    """
    shapes = {use.layer: use.layer.shape(params) for use in uses}
    sizes = {layer: math.prod(shape) for layer, shape in shapes.items()}
    # Two multiplications forward and two back for each element of a weight and each row.
    product = sum(4 * use.length * sizes[use.layer] for use in uses)
    solve = sum(sizes[layer] * (rows + columns) for layer, (_, rows, columns) in shapes.items())
    return 2 * sum(sizes.values()) >= sum(p.numel() for p in params) and solve <= 2 * product


def _factors(
    layer: Layer, own: list[tuple[Use, Tensor]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One pair for all uses of a weight: the sum of their products, each factor weighed by the other's trace."""
    lefts, rights, traces = [], [], []
    for use, gradient in own:
        back, into = (rows.to(dtype) for rows in use.rows(gradient))
        if layer.flipped:
            back, into = into, back
        if layer.bias is not None:
            into = torch.cat([into, into.new_full((*into.shape[:-1], 1), float(use.adds_bias))], -1)
        left, right = _second_moment(back), _second_moment(into)
        trace_left, trace_right, n = _trace(left), _trace(right), max(1, back.shape[1])
        lefts.append(_scale(left, trace_right / n))
        rights.append(_scale(right, trace_left / n))
        traces.append(trace_left * trace_right / n)
    # L ⊗ R keeps its trace: that of Σ over uses, trace(L) trace(R) ÷ n.
    scale = sum(traces).clamp(min=torch.finfo(traces[0].dtype).tiny).rsqrt()  # pyright: ignore
    return _scale(sum(lefts), scale), _scale(sum(rights), scale)  # pyright: ignore


def _second_moment(rows: Tensor) -> Tensor:
    return rows.square().sum(1) if rows.shape[-1] > LARGEST_FACTOR else rows.mT @ rows


def _trace(factor: Tensor) -> Tensor:
    return factor.sum(-1) if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1).sum(-1)


def _scale(factor: Tensor, scale: Tensor) -> Tensor:
    return factor * scale.view(-1, *[1] * (factor.ndim - 1))


def build_kronecker_preconditioner(
    factors: KroneckerFactors, parameters: FlatParameters, shift: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    """``r ↦ M⁻¹ r`` for the blocks ``(L + √λ/π I) ⊗ (R + π √λ I)``, and ``diagonal + λ`` for the rest.

    Factored Tikhonov damping, with ``π`` so that both factors get the same share (Martens & Grosse
    2015, section 6.3).

    Args:
        factors: of the curvature.
        parameters: whose flat vectors ``r`` is one of.
        shift: for each parameter the ``λ`` that the system adds to the curvature, 0-dim.
    """
    damped = [
        pair
        for layer in factors.layers
        for pair in _dampings(layer, factors.values, shift[layer.weight])
    ]
    inverses = iter(_invert_damped(damped))
    blocks = [_Block(layer, next(inverses), next(inverses)) for layer in factors.layers]
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

    def __init__(self, layer: Layer, left: Tensor, right: Tensor) -> None:
        self._layer, self._left, self._right = layer, left, right

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


def _dampings(layer: Layer, values: Values, shift: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both factors of a block as they are kept, each with what is added to its diagonals, (groups,)."""
    kept = [values[layer.weight, side] for side in ("left", "right")]
    left, right = (unpack_factor(factor) for factor in kept)
    # π² = (trace R ÷ columns) ÷ (trace L ÷ rows): equal shares of the damping (Martens & Grosse
    # 2015, section 6.3).
    pi = (_trace(right) / right.shape[1] / (_trace(left) / left.shape[1])).sqrt()
    pi = torch.where(pi.isfinite() & (pi > 0), pi, 1)
    dampings = (
        # Rounding errors may be as large.
        torch.maximum(share, _ROUNDING * torch.finfo(factor.dtype).eps * _trace(factor))
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
