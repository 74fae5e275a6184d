"""Kronecker factors as the preconditioner of a step, and when they are renewed.

The optimizer's state has for each parameter ``left`` and ``right``, its Kronecker factors, and
``diagonal``, which may be empty; ``layer_groups``, ``layer_flipped`` and ``layer_bias``, what is
known of its layer; for the first parameter also ``products``, how many iterations these factors have
served, and ``draws``, how often random vectors were drawn.

``left`` has the factor of a weight's rows and ``right`` that of its columns, as vectors that are long
enough for all layers that the weight may be in, and for its diagonal if it is in none. Those of some
grouped convolutions are longer, and have names of their own (``grouped_left``, ``grouped_right``).
``layer_groups`` is 0 where a parameter is the weight of no layer, and -1 where nobody knows.
"""

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ngd_optim.curvature import OutputMetric, ScalarMetric
from ngd_optim.distributed import Ranks
from ngd_optim.jacobian import Layer, uses_of
from ngd_optim.kronecker import (
    LARGEST_FACTOR,
    KroneckerFactors,
    KroneckerInverse,
    estimate_factors,
    is_worthwhile,
)
from ngd_optim.layout import is_spread, spread_like, whole
from ngd_optim.linearization import Point
from ngd_optim.parameters import FlatParameters, forget
from ngd_optim.preconditioners.base import Preconditioning, Solve
from ngd_optim.real_parts import from_real_parts, real_parts
from ngd_optim.solvers import QuadraticModel

logger = logging.getLogger("ngd_optim")

SHARE_OF_OLDER = 0.5
"""Of the older factors in renewed ones."""

RENEWED_AFTER = 10
"""Iterations that factors serve before they are renewed.

That takes a pull-back, and the products of what went in and what comes back with themselves:
together about as much as two products of linear layers, and several of convolutions.
"""

_NAMES = ("left", "right", "diagonal")
_GROUPED = ("grouped_left", "grouped_right")
_SWAPPED = {"left": "right", "right": "left"}
_LAYER = ("layer_groups", "layer_flipped", "layer_bias")


class Kronecker(Preconditioning):
    """From Kronecker factors, which are estimated while the closures are linearised.

    The state has each parameter's factors, and for the first how many iterations they have served and
    how often they were drawn.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        state: MutableMapping[Tensor, dict[str, Any]],
        generator: torch.Generator | None,
        *,
        must: bool,
    ) -> None:
        self._must = must
        self._parameters = parameters
        self._state = state
        own = [_gathered(state.get(p, {})) for p in parameters.params]
        self._served, self._draws = own[0].get("products", 0), own[0].get("draws", 0)
        self.layers, self._values = (
            load_factors(own, parameters.params) if self._draws else (None, {})
        )
        self._known, self._is_new = self.layers, False
        self._is_due = self._served >= RENEWED_AFTER
        self._generator = generator or torch.Generator(device="cpu").manual_seed(self._draws)
        self._estimates: list[KroneckerFactors | None] = []

    def observe(self, metric: OutputMetric | ScalarMetric) -> None:
        """See what the graph tells of the layers, and estimate their factors if they are due.

        Raises:
            ValueError: factors are asked for where there is no metric at outputs of the model.
        """
        if not (self._is_due or self.layers is None):
            return
        if isinstance(metric, ScalarMetric):
            if self._must:
                raise ValueError(
                    "preconditioner='kfac' needs a metric at the model's outputs: a recognised "
                    "loss function or a returned distribution, and not the Hessian of a scalar; "
                    "use preconditioner='auto'"
                )
            self._estimates.append(None)
            return
        if any(map(is_spread, self._parameters.tensors)):
            if self._must:
                raise ValueError(
                    "preconditioner='kfac' needs weights that are whole in a layer, and these lie over "
                    "ranks (tensor parallel); use preconditioner='auto', 'diagonal' or Nystrom()"
                )
            self._estimates.append(None)
            return
        uses = uses_of(metric.outputs, self._parameters.tensors)
        layers = tuple(dict.fromkeys(use.layer for use in uses))
        if not uses or not (self._must or is_worthwhile(uses, self._parameters.tensors)):
            self._estimates.append(None)
        elif self._is_due or not KroneckerFactors(layers, self._values).fits(
            self._parameters.tensors
        ):
            self._estimates.append(
                estimate_factors(uses, metric, self._parameters, self._generator)
            )
        else:
            self.layers = layers

    def build(self, point: Point, model: QuadraticModel, ranks: Ranks) -> Solve | None:
        """From the factors, renewed if they were due."""
        if ranks.any([bool(self._estimates)])[0]:  # a rank with a graph of its own may be alone
            self._renew(ranks)
        if not self.layers:
            return None
        values = {key: value.to(self._parameters.dtype) for key, value in self._values.items()}
        shifts = self._parameters.views(model.shift)
        means = [part.sum() / max(1, part.numel()) for part in shifts]
        factors = KroneckerFactors(self.layers, values)
        try:
            solve = KroneckerInverse(factors, self._parameters, means)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            return None  # their numbers are at the end of the range; so are the products
        self.name = "kfac"
        return solve

    def keep(self, iterations: int) -> None:
        """The factors, and how many iterations they have served."""
        if self._estimates:
            self.layers = ()  # a direct solver had no use for them
        first = self._parameters.params[0]
        self._state[first] |= {"products": self._served + iterations, "draws": self._draws}
        if not self._is_new and self.layers == self._known:
            return
        forget(self._state, (*_NAMES, *_GROUPED, *_LAYER))
        layers = {layer.weight: layer for layer in self.layers or ()}
        for i, p in enumerate(self._parameters.params):
            layer = layers.get(i)
            unknown = {"layer_groups": -1 if self.layers is None else 0}
            self._state[p] |= unknown if layer is None else _describe(layer)
            dtype = torch.promote_types(p.dtype, torch.float32)
            for name in _NAMES:
                if (i, name) in self._values:
                    kept = _to_saved(name, self._values[i, name], layer, p)
                    self._state[p] |= {
                        saved: spread_like(p, value.to(dtype))
                        if saved == "diagonal"
                        else value.to(dtype)
                        for saved, value in kept.items()
                    }

    def _renew(self, ranks: Ranks) -> None:
        """Mix the estimates of all closures and ranks with what was known."""
        # Each renewal draws other vectors, and the same ones when a run is resumed.
        self._is_new = True
        self._served, self._draws = 0, self._draws + 1
        mean = KroneckerFactors.average(self._estimates, ranks)
        self._estimates.clear()  # as large as what they become
        if mean is None:
            self.layers, self._values = (), {}
        elif mean.is_finite:  # else the step will be refused
            self.layers, self._values = mean.layers, mean.mix(self._values, SHARE_OF_OLDER)


def _gathered(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the diagonal whole, which lies over ranks as its parameter does."""
    return {**entry, "diagonal": whole(entry["diagonal"])} if "diagonal" in entry else entry


def find_sizes_of_factors(p: Tensor) -> dict[str, tuple[int, ...]]:
    """The shapes of what a parameter's state has of Kronecker factors and diagonals."""
    if p.ndim < 2 or not p.numel() or p.is_complex():  # never a layer's weight
        return {"diagonal": tuple(p.shape)}
    # One row more, for a bias; a matrix for each row of a weight that may be of a depthwise convolution.
    matrices = len(p) if p.ndim > 2 and p.shape[1] == 1 else 1
    rows, columns = len(p), p.numel() // len(p)
    left = max(_length(rows), _length(rows + 1))
    right = max(_length(columns), _length(columns + 1)) * matrices
    sizes: dict[str, tuple[int, ...]] = {"left": (left,), "right": (right,)}
    # Its diagonal goes there as well, unless these themselves are diagonals.
    return sizes if left + right >= p.numel() else sizes | {"diagonal": tuple(p.shape)}


def _length(order: int) -> int:
    return order * (order + 1) // 2 if order <= LARGEST_FACTOR else order


def _describe(layer: Layer) -> dict[str, int]:
    bias = -1 if layer.bias is None else layer.bias
    return dict(zip(_LAYER, (layer.groups, int(layer.flipped), bias), strict=True))


def _to_saved(name: str, value: Tensor, layer: Layer | None, p: Tensor) -> dict[str, Tensor]:
    """A factor or a diagonal by the names, and in the forms, in which it is kept."""
    sizes, flat = find_sizes_of_factors(p), value.flatten()
    if layer is None or name == "diagonal":
        if "diagonal" in sizes:
            return {"diagonal": from_real_parts(p, value)}
        left, right = sizes["left"][0], sizes["right"][0]
        both = F.pad(flat, (0, left + right - len(flat)))
        return {"left": both[:left].clone(), "right": both[left:].clone()}
    saved = _SWAPPED[name] if layer.flipped else name
    rest = sizes[saved][0] - len(flat)
    return {saved: F.pad(flat, (0, rest))} if rest >= 0 else {f"grouped_{saved}": flat}


def _diagonal(entry: Mapping[str, Any], p: Tensor) -> Tensor | None:
    sizes = find_sizes_of_factors(p)
    if "diagonal" in sizes or "diagonal" in entry:
        kept = entry.get("diagonal")
        return None if kept is None else real_parts(kept)
    parts = [entry.get(name) for name in ("left", "right")]
    if any(part is None or part.shape != sizes[n] for n, part in zip(sizes, parts, strict=True)):
        return None
    return torch.cat(parts)[: p.numel()].view(p.shape)  # pyright: ignore[reportArgumentType]


def _from_saved(
    name: str, entry: Mapping[str, Any], layer: Layer, params: Sequence[Tensor]
) -> Tensor | None:
    """The factor; None if the state does not have it."""
    groups, rows, columns = layer.shape(params)
    order = rows if name == "left" else columns
    packed = (order,) if order > LARGEST_FACTOR else (order + 1 - order % 2, (order + 1) // 2)
    saved, length = _SWAPPED[name] if layer.flipped else name, groups * _length(order)
    value = entry.get(f"grouped_{saved}", entry.get(saved))
    if value is None or value.ndim != 1 or len(value) < length:
        return None
    return value[:length].view(groups, *packed)


def load_factors(
    own: Sequence[Mapping[str, Any]], params: Sequence[Tensor]
) -> tuple[tuple[Layer, ...] | None, dict[tuple[int, str], Tensor]]:
    """The layers, None if they are not known, and the values that the state has."""
    values: dict[tuple[int, str], Tensor] = {}
    layers: list[Layer] = []
    for i, entry in enumerate(own):
        groups, flipped, bias = (entry.get(name, -1) for name in _LAYER)
        if "layer_groups" not in entry:  # as version 0.1.0 kept them
            values |= {
                (i, name): entry[name]
                for name in _NAMES
                if name in entry and (name == "diagonal" or entry[name].ndim > 1)
            }
        elif groups > 0:
            layers.append(Layer(i, bias if bias >= 0 else None, flipped == 1, groups))
    if not all(_is_possible(layer, params) for layer in layers):
        return None, values
    for layer in layers:
        for name in ("left", "right"):
            value = _from_saved(name, own[layer.weight], layer, params)
            values |= {} if value is None else {(layer.weight, name): value}
    inside = {i for layer in layers for i in (layer.weight, layer.bias)}
    outside = [i for i, entry in enumerate(own) if entry.get("layer_groups") == 0]
    for i in outside if layers else ():
        diagonal = None if i in inside else _diagonal(own[i], params[i])
        values |= {} if diagonal is None else {(i, "diagonal"): diagonal}
    is_known = all(entry.get("layer_groups", -1) >= 0 for entry in own)
    if is_known and layers and not KroneckerFactors(tuple(layers), values).fits(params):
        logger.info("Kronecker factors that the state does not have are estimated anew")
        return None, values
    return (tuple(layers) if is_known else None), values


def _is_possible(layer: Layer, params: Sequence[Tensor]) -> bool:
    """Whether the parameters can be in such a layer: they may be others than when it was found."""
    weight = params[layer.weight]
    if weight.ndim < 2 or not weight.numel() or len(weight) % layer.groups:
        return False
    if layer.bias is None:
        return True
    groups, rows, _ = layer.shape(params)
    return layer.bias < len(params) and params[layer.bias].shape == (groups * rows,)
