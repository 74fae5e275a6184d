"""Estimate Kronecker factors of the curvature by one pull-back of a random draw.

With rows ``l_n`` and ``r_n`` of a draw, the curvature's block for a weight is the covariance of
``Σₙ l_n rₙᵀ``. There are two estimates of ``L ⊗ R`` for it:

- ``L = Σ l lᵀ`` and ``R = Σ r rᵀ / n``, of which those of several uses of a weight are added, each
  factor weighed by the other's trace;
- ``L = Σ (rᵀ R₀⁻¹ r / columns) l lᵀ`` and ``R = Σ (lᵀ L₀⁻¹ l / rows) r rᵀ``, where the factors ``L₀`` and
  ``R₀`` are known: a step of the iteration whose fixed point is nearest to the covariance in KL (Dutilleul
  1999; Lin et al. 2025, KL-Shampoo). It is a plain sum over rows, uses, losses and processes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ngd_optim.curvature import OutputMetric
from ngd_optim.jacobian import Layer, Use
from ngd_optim.kronecker.factors import KroneckerFactors, pack_factor, scale_factor, trace_of
from ngd_optim.kronecker.sampling import draw
from ngd_optim.parameters import FlatParameters
from ngd_optim.real_parts import real_parts, real_size

_MOST_SKIPPED = 4
_LEAST_ROWS = 2
"""Of many rows every fourth counts, as long as there are twice as many as a factor has."""

_LARGEST_WEIGHT = 10
"""Of a row, in units of the mean: outliers are cut to it."""

Pair = tuple[Tensor, Tensor]
"""What belongs to the left and the right factor of a layer."""


@torch.no_grad()
def estimate_factors(
    uses: Sequence[Use],
    metric: OutputMetric,
    parameters: FlatParameters,
    generator: torch.Generator,
    inverses: Mapping[Layer, Pair] | None = None,
) -> KroneckerFactors:
    """Estimate the factors by one pull-back of a random draw from the metric.

    Args:
        uses: of weights, in the graph that leads to the metric's outputs.
        metric: whose outputs are pulled back.
        parameters: what the factors are for.
        generator: draws.
        inverses: of known factors by layer, for the second estimate, on a part of the rows; for
            layers that it has not, those of the identity. None: the first estimate.
    """
    params = parameters.tensors
    by_layer: dict[Layer, list[tuple[Use, Tensor]]] = {use.layer: [] for use in uses}
    inside = {i for layer in by_layer for i in (layer.weight, layer.bias)}
    outside = [i for i in range(len(params)) if i not in inside]
    inputs: Any = [*(GradientEdge(use.node, 0) for use in uses), *(params[i] for i in outside)]
    # E[u uᵀ] = H_z, so the pulled-back gradients have the curvature as covariance.
    pulled = torch.autograd.grad(
        metric.outputs, inputs, draw(metric, generator), retain_graph=True, allow_unused=True
    )
    for use, gradient in zip(uses, pulled, strict=False):
        by_layer[use.layer].append((use, use.zeros() if gradient is None else gradient))
    values: dict[tuple[int, str], Tensor] = {}
    for layer, own in by_layer.items():
        if inverses is None:
            left, right = _by_traces(
                [use.sides(gradient, parameters.dtype) for use, gradient in own]
            )
        else:
            kept = _choose_rows(own, params, generator)
            parts = [use.sides(gradient, parameters.dtype, kept) for use, gradient in own]
            back, into = (_join(rows) for rows in zip(*parts, strict=True))
            by_inverses = _by_inverses if back.is_floating_point() else _of_table
            _, size, _ = layer.shape(params)
            left, right = by_inverses(back, into, inverses.get(layer), size)
        values |= {
            (layer.weight, "left"): pack_factor(left),
            (layer.weight, "right"): pack_factor(right),
        }
    for i, gradient in zip(outside, pulled[len(uses) :], strict=True):
        found = torch.zeros_like(params[i]) if gradient is None else gradient
        values[i, "diagonal"] = real_parts(found).to(parameters.dtype).square()
    return KroneckerFactors(tuple(by_layer), values)


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
    return 2 * sum(sizes.values()) >= sum(map(real_size, params)) and solve <= 2 * product


def _choose_rows(
    own: Sequence[tuple[Use, Tensor]], params: Sequence[Tensor], generator: torch.Generator
) -> slice:
    """All rows of a weight's uses, or every so many of them where there are enough."""
    layer = own[0][0].layer
    n = sum(use.length for use, _ in own)
    largest = max(layer.shape(params)[1:])
    step = max(1, min(_MOST_SKIPPED, n // (_LEAST_ROWS * largest)))
    first = torch.randint(step, (), generator=generator, device=generator.device)
    return slice(int(first), None, step)


def _join(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(rows), 1) if len(rows) > 1 else rows[0]


def _by_traces(uses: Sequence[tuple[Tensor, Tensor]]) -> Pair:
    lefts, rights, traces = [], [], []
    for back, into in uses:
        left, right = _second_moment(back, back), _second_moment(into, into)
        trace_left, trace_right, n = trace_of(left), trace_of(right), max(1, back.shape[1])
        lefts.append(scale_factor(left, trace_right / n))
        rights.append(scale_factor(right, trace_left / n))
        traces.append(trace_left * trace_right / n)
    # L ⊗ R keeps its trace: that of Σ over uses, trace(L) trace(R) ÷ n.
    scale = sum(traces).clamp(min=torch.finfo(traces[0].dtype).tiny).rsqrt()  # pyright: ignore
    return scale_factor(sum(lefts), scale), scale_factor(sum(rights), scale)  # pyright: ignore


def _by_inverses(back: Tensor, into: Tensor, inverses: Pair | None, size: int) -> Pair:
    if inverses is None:
        left_weights, right_weights = into.square().sum(-1), back.square().sum(-1)
    else:
        left_weights = _weights(into, inverses[1])
        right_weights = _weights(back, inverses[0])
    return (
        _second_moment(back, left_weights.unsqueeze(-1) * back),
        _second_moment(into, right_weights.unsqueeze(-1) * into),
    )


def _of_table(indices: Tensor, into: Tensor, inverses: Pair | None, size: int) -> Pair:
    """The same, where each ``l`` is a column of the identity, and ``L`` a diagonal."""
    indices = indices.squeeze(-1)
    if inverses is None:
        left_weights, right_weights = into.square().sum(-1), torch.ones_like(into[..., 0])
    else:
        left_weights = _weights(into, inverses[1])
        right_weights = _cut(inverses[0].gather(1, indices) / size)
    left = into.new_zeros(1, size).scatter_add(1, indices, left_weights)
    return left, _second_moment(into, right_weights.unsqueeze(-1) * into)


def _weights(rows: Tensor, inverse: Tensor) -> Tensor:
    """``xᵀ M⁻¹ x ÷`` the length of ``x``, for each row."""
    images = rows @ inverse if inverse.ndim == 3 else rows * inverse.unsqueeze(-2)
    return _cut((images * rows).mean(-1))


def _cut(weights: Tensor) -> Tensor:
    return weights.minimum(_LARGEST_WEIGHT * weights.mean(-1, keepdim=True))


def _second_moment(rows: Tensor, others: Tensor) -> Tensor:
    return (rows * others).sum(1) if rows.shape[-1] > KroneckerFactors.longest else rows.mT @ others
