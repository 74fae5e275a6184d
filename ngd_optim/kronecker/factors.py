"""Kronecker factors of the curvature: estimated, added, averaged and mixed.

Where a weight's gradient is ``Σₙ lₙ rₙᵀ`` (see :mod:`~ngd_optim.jacobian.layers`), the curvature's
block for it is nearly ``(Σ l lᵀ) ⊗ (Σ r rᵀ) / n`` (Martens & Grosse 2015; convolutions: Grosse &
Martens 2016; weights that are used several times, "expand": Eschenhagen et al. 2023).
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ngd_optim.curvature import OutputMetric
from ngd_optim.distributed import Ranks
from ngd_optim.jacobian import Layer, Use
from ngd_optim.kronecker.sampling import draw
from ngd_optim.linalg import order_of, pack, unpack
from ngd_optim.parameters import FlatParameters
from ngd_optim.reading import read

LARGEST_FACTOR = 4096
"""A longer side of a weight has only the diagonal of its factor."""

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
    values: dict[tuple[int, str], Tensor]

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are."""
        return all(read(*(value.isfinite().all() for value in self.values.values())))

    def add(self, other: "KroneckerFactors") -> "KroneckerFactors":
        """The sum of two losses' factors, weighed so that ``L ⊗ R`` has the sum of their traces.

        A layer that only one of them uses has its own.
        """
        layers = {layer.weight: layer for layer in (*other.layers, *self.layers)}
        inside = {i for layer in layers.values() for i in (layer.weight, layer.bias)}
        values: dict[tuple[int, str], Tensor] = {}
        for layer in layers.values():
            own = [factors for factors in (self, other) if layer in factors.layers]
            values |= _add_pairs(layer, [factors.values for factors in own])
        for key in {**self.values, **other.values}:
            if key[1] == "diagonal" and key[0] not in inside:
                values[key] = sum(f.values[key] for f in (self, other) if key in f.values)  # pyright: ignore
        return KroneckerFactors(tuple(layers.values()), values)

    def with_layers_of(self, older: "KroneckerFactors") -> "KroneckerFactors":
        """With the layers that only older ones have, whose weights were not used this time."""
        missing = {layer.weight for layer in older.layers} - {layer.weight for layer in self.layers}
        if not missing:
            return self
        kept = tuple(layer for layer in older.layers if layer.weight in missing)
        values = {key: older.values[key] for key in older.values if key[0] in missing}
        return KroneckerFactors(kept, values).add(self)

    def mean_curvatures(self) -> dict[int, Tensor]:
        """The mean eigenvalue of each parameter's block, 0-dim; a bias has its layer's."""
        means: dict[int, Tensor] = {}
        for layer in self.layers:
            sides = [unpack_factor(self.values[layer.weight, name]) for name in ("left", "right")]
            mean = math.prod(trace_of(side).mean() / side.shape[1] for side in sides)
            means[layer.weight] = mean
            if layer.bias is not None:
                means[layer.bias] = mean
        for (i, name), value in self.values.items():
            if name == "diagonal":
                means[i] = value.mean()
        return means

    def scale(self, factor: float) -> "KroneckerFactors":
        """Those of a multiple of the curvature."""
        root = math.sqrt(factor)
        values = {
            key: (factor if key[1] == "diagonal" else root) * value
            for key, value in self.values.items()
        }
        return KroneckerFactors(self.layers, values)

    def mix(self, older: Values, share: float) -> dict[tuple[int, str], Tensor]:
        """The values, with a share of older ones where these have the same shape; they are taken out one by one."""
        values = self.values
        return {key: _mix(values.pop(key), older.get(key), share) for key in list(values)}


def _mix(value: Tensor, older: Tensor | None, share: float) -> Tensor:
    fits = older is not None and older.shape == value.shape
    return value.lerp(older.to(value), share) if fits else value


def _add_pairs(layer: Layer, pairs: Sequence[Values]) -> dict[tuple[int, str], Tensor]:
    """A layer's factors of several losses; the two of an estimate have equal traces."""
    keys = (layer.weight, "left"), (layer.weight, "right")
    if len(pairs) == 1:
        return {key: pairs[0][key] for key in keys}
    traces = [trace_of(unpack_factor(values[keys[0]])) for values in pairs]
    scale = _inverse_root(sum(trace.square() for trace in traces))  # pyright: ignore
    parts = list(zip(pairs, traces, strict=True))
    return {key: sum(_scale(v[key], scale * trace) for v, trace in parts) for key in keys}  # pyright: ignore


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


def average_factors(
    estimates: Sequence[KroneckerFactors | None], ranks: Ranks
) -> KroneckerFactors | None:
    """The mean over closures and ranks; None if they do not use the parameters in the same way."""
    total, *others = estimates or (None,)
    for other in others:
        agree = total is not None and other is not None and total.layers == other.layers
        total = total.add(other) if agree else None  # pyright: ignore
    layers = None if total is None else (total.layers, sorted(total.values))
    # Ranks whose graphs differ must not average factors of different layers.
    if not ranks.agree(zlib.crc32(repr(layers).encode())) or total is None:
        return None
    total = total.scale(1 / len(estimates)) if others else total
    return total if ranks.group is None else _average_over_ranks(total, ranks)


def _average_over_ranks(factors: KroneckerFactors, ranks: Ranks) -> KroneckerFactors:
    values = {
        key: ranks.average(value) for key, value in factors.values.items() if key[1] == "diagonal"
    }
    for layer in factors.layers:  # as in add
        keys = (layer.weight, "left"), (layer.weight, "right")
        trace = trace_of(unpack_factor(factors.values[keys[0]]))
        scale = _inverse_root(ranks.average(trace.square()))
        for key in keys:
            values[key] = _scale(ranks.average(_scale(factors.values[key], trace)), scale)
    return KroneckerFactors(factors.layers, values)


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
        trace_left, trace_right, n = trace_of(left), trace_of(right), max(1, back.shape[1])
        lefts.append(_scale(left, trace_right / n))
        rights.append(_scale(right, trace_left / n))
        traces.append(trace_left * trace_right / n)
    # L ⊗ R keeps its trace: that of Σ over uses, trace(L) trace(R) ÷ n.
    scale = _inverse_root(sum(traces))  # pyright: ignore
    return _scale(sum(lefts), scale), _scale(sum(rights), scale)  # pyright: ignore


def _second_moment(rows: Tensor) -> Tensor:
    return rows.square().sum(1) if rows.shape[-1] > LARGEST_FACTOR else rows.mT @ rows


def trace_of(factor: Tensor) -> Tensor:
    """That of each matrix, or of the diagonals."""
    return factor.sum(-1) if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1).sum(-1)


def _inverse_root(value: Tensor) -> Tensor:
    return value.clamp(min=torch.finfo(value.dtype).tiny).rsqrt()


def _scale(factor: Tensor, scale: Tensor) -> Tensor:
    return factor * scale.view(-1, *[1] * (factor.ndim - 1))
