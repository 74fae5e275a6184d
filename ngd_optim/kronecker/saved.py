"""Kronecker factors as the optimizer's state has them.

For each parameter there are ``left`` and ``right``, its Kronecker factors, and ``diagonal``, which may
be empty; and ``layer_groups``, ``layer_flipped`` and ``layer_bias``, what is known of its layer.

``left`` has the factor of a weight's rows and ``right`` that of its columns, as vectors that are long
enough for all layers that the weight may be in, and for its diagonal if it is in none. Those of some
grouped convolutions are longer, and have names of their own (``grouped_left``, ``grouped_right``).
A table has the diagonal of its rows alone, as ``table``, and ``layer_table`` is 1. ``layer_groups`` is 0
where a parameter is the weight of no layer, and -1 where nobody knows.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ngd_optim.jacobian import Layer
from ngd_optim.kronecker.factors import KroneckerFactors
from ngd_optim.real_parts import from_real_parts, real_parts

logger = logging.getLogger("ngd_optim")

NAMES = ("left", "right", "diagonal")
TENSORS = (*NAMES, "grouped_left", "grouped_right", "table")
LAYER = ("layer_groups", "layer_flipped", "layer_bias")
_SWAPPED = {"left": "right", "right": "left"}


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
    return order * (order + 1) // 2 if order <= KroneckerFactors.longest else order


def describe(layer: Layer) -> dict[str, int]:
    """What is known of a layer, as it is kept."""
    bias = -1 if layer.bias is None else layer.bias
    return dict(zip(LAYER, (layer.groups, int(layer.flipped), bias), strict=True))


def to_saved(name: str, value: Tensor, layer: Layer | None, p: Tensor) -> dict[str, Tensor]:
    """A factor or a diagonal by the names, and in the forms, in which it is kept."""
    sizes, flat = find_sizes_of_factors(p), value.flatten()
    if layer is None or name == "diagonal":
        if "diagonal" in sizes:
            return {"diagonal": from_real_parts(p, value)}
        left, right = sizes["left"][0], sizes["right"][0]
        both = F.pad(flat, (0, left + right - len(flat)))
        return {"left": both[:left].clone(), "right": both[left:].clone()}
    if name == "left" and value.ndim == 2 and value.shape[1] <= KroneckerFactors.longest:
        return {"table": flat}
    saved = _SWAPPED[name] if layer.flipped else name
    rest = sizes[saved][0] - len(flat)
    return {saved: F.pad(flat, (0, rest))} if rest >= 0 else {f"grouped_{saved}": flat}


def diagonal_of(entry: Mapping[str, Any], p: Tensor) -> Tensor | None:
    """That of a parameter in no layer; None if the state does not have it."""
    sizes = find_sizes_of_factors(p)
    if "diagonal" in sizes or "diagonal" in entry:
        kept = entry.get("diagonal")
        return None if kept is None else real_parts(kept)
    parts = [entry.get(name) for name in ("left", "right")]
    if any(part is None or part.shape != sizes[n] for n, part in zip(sizes, parts, strict=True)):
        return None
    return torch.cat(parts)[: p.numel()].view(p.shape)  # pyright: ignore[reportArgumentType]


def factor_of(
    name: str, entry: Mapping[str, Any], layer: Layer, params: Sequence[Tensor]
) -> Tensor | None:
    """The factor; None if the state does not have it."""
    groups, rows, columns = layer.shape(params)
    order = rows if name == "left" else columns
    packed = (
        (order,) if order > KroneckerFactors.longest else (order + 1 - order % 2, (order + 1) // 2)
    )
    saved, length = _SWAPPED[name] if layer.flipped else name, groups * _length(order)
    value = entry.get(f"grouped_{saved}", entry.get(saved))
    if name == "left" and entry.get("layer_table"):
        value, packed, length = entry.get("table"), (order,), order
    if value is not None and value.ndim > 1:
        return value  # as the first versions of KFAC kept them
    if value is None or len(value) < length:
        return None
    return value[:length].view(groups, *packed)


def names_in_use(
    layers: Sequence[Layer], own: Sequence[Mapping[str, Any]], params: Sequence[Tensor]
) -> dict[int, list[str]]:
    """Which entries of the state :func:`load_factors` reads: the others are empty."""
    inside = {i for layer in layers for i in (layer.weight, layer.bias)}
    found: dict[int, list[str]] = {}
    for i, p in enumerate(params):
        is_whole = "diagonal" in find_sizes_of_factors(p) or "diagonal" in own[i]
        names = ["diagonal"] if is_whole else ["left", "right"]
        found[i] = [] if i in inside else [name for name in names if name in own[i]]
    for layer in layers:
        entry = own[layer.weight]
        sides = [_SWAPPED[name] if layer.flipped else name for name in ("left", "right")]
        found[layer.weight] = [f"grouped_{n}" if f"grouped_{n}" in entry else n for n in sides]
        if entry.get("layer_table"):
            found[layer.weight][0] = "table"
    return found


def load_factors(
    own: Sequence[Mapping[str, Any]], params: Sequence[Tensor]
) -> tuple[tuple[Layer, ...] | None, dict[tuple[int, str], Tensor]]:
    """The layers, None if they are not known, and the values that the state has."""
    values: dict[tuple[int, str], Tensor] = {}
    layers: list[Layer] = []
    for i, entry in enumerate(own):
        groups, flipped, bias = (entry.get(name, -1) for name in LAYER)
        if "layer_groups" not in entry:  # as version 0.1.0 kept them
            values |= {
                (i, name): entry[name]
                for name in NAMES
                if name in entry and (name == "diagonal" or entry[name].ndim > 1)
            }
        elif groups > 0:
            layers.append(Layer(i, bias if bias >= 0 else None, flipped == 1, groups))
    if not all(_is_possible(layer, params) for layer in layers):
        return None, values
    for layer in layers:
        for name in ("left", "right"):
            value = factor_of(name, own[layer.weight], layer, params)
            values |= {} if value is None else {(layer.weight, name): value}
    inside = {i for layer in layers for i in (layer.weight, layer.bias)}
    outside = [i for i, entry in enumerate(own) if entry.get("layer_groups") == 0]
    for i in outside:
        diagonal = None if i in inside else diagonal_of(own[i], params[i])
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
