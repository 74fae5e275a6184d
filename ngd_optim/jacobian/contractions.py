"""Where the gradients of parameters are summed over samples.

A part of the graph depends on parameters alone: the parameters, their transposes, a normalised or
masked weight. Data meets it at some nodes: in a matrix product, a convolution, or an operation
that broadcasts. There the gradient becomes a sum ``Σₙ lₙ rₙᵀ``, and as a rule each of its terms
belongs to one sample.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from ngd_optim.autograd_graph import Edge, parents_first
from ngd_optim.jacobian.layers import CONVOLUTION, PRODUCTS, Factors, factors_at, source_of
from ngd_optim.torch_internals import outputs_of, saved_by, variable_of


class Contraction(NamedTuple):
    """A node that sums, and whose gradient it sums: that of a tensor from parameters alone."""

    node: Node
    target: Edge
    factors: Factors


def contractions_of(root: Tensor, index: Mapping[int, int]) -> list[Contraction]:
    """All in the graph that leads to a tensor.

    Args:
        root: the tensor.
        index: has the ``id`` of each parameter.
    """
    fixed: dict[Node, bool] = {}
    found = []
    for node, edges in parents_first([root]):
        # Parents come first, so that it is known which of a node's inputs are functions of
        # parameters alone.
        to_fixed = [(i, edge) for i, edge in enumerate(edges) if fixed.get(edge[0])]
        fixed[node] = _is_fixed(node, edges, len(to_fixed), index)
        if to_fixed and not fixed[node]:
            contractions = (_contraction(node, position, edge) for position, edge in to_fixed)
            found.extend(contraction for contraction in contractions if contraction is not None)
    return found


def shape_of(edge: Edge) -> torch.Size:
    """That of an output of a node in the forward pass."""
    node, number = edge
    variable: Any = variable_of(node) if number == 0 else None
    return torch.Size((outputs_of(node)[number] if variable is None else variable).shape)  # pyright: ignore


def _is_fixed(node: Any, edges: Sequence[Edge], to_fixed: int, index: Mapping[int, int]) -> bool:
    """Whether a node depends on parameters alone, as far as one can see.

    Constants do not show in the graph. They are taken for data where they enlarge a shape or are
    factors of a product, and else for a part of the weight, like a mask.
    """
    if not edges:
        return id(variable_of(node)) in index
    parents = [edge for edge in edges if edge[0] is not None]
    if to_fixed < len(parents) or not parents:
        return False
    if len(edges) == 1:  # a view may have several outputs, each a part of its input
        is_larger = shape_of((node, 0)).numel() > shape_of(parents[0]).numel()
        is_view = len(outputs_of(node)) > 1 or node.name() == "ViewAsRealBackward0"
        return is_view or not is_larger
    if len(edges) == len(parents):
        return True
    shape = shape_of((node, 0))
    return node.name() not in PRODUCTS and all(shape == shape_of(edge) for edge in parents)


def _contraction(node: Any, position: int, target: Edge) -> Contraction | None:
    metadata = outputs_of(node)
    if len(metadata) > 1 or metadata[0] is None:
        return None
    factors = factors_at(node, position)
    if factors is None:
        factors = _broadcast_factors(node, position, shape_of(target))
        return None if factors is None else Contraction(node, target, factors)
    source, transposed = source_of(target[0])
    target = target if source is target[0] else (source, 0)
    return Contraction(node, target, factors._replace(transposed=factors.transposed ^ transposed))


def _broadcast_factors(node: Any, position: int, shape: torch.Size) -> Factors | None:
    """Those of an input that broadcasting repeats; None if the node does not broadcast it."""
    name, out = node.name(), shape_of((node, 0))
    is_bias = name == CONVOLUTION and position == 2
    ahead = 1 if is_bias else len(out) - len(shape)
    sizes = (1,) * ahead + tuple(shape) + (1,) * (len(out) - ahead - len(shape))
    repeated = [dim for dim, size in enumerate(sizes) if size != out[dim]] if ahead >= 0 else []
    if not repeated or any(sizes[dim] != 1 for dim in repeated):
        return None
    # The gradient of what is added or expanded is that at the node.
    is_added = position == 0 and saved_by(node, "beta") == 1
    is_copied = is_bias or is_added or name == "ExpandBackward0"
    if not is_copied and (name in PRODUCTS or isinstance(node, BackwardCFunction)):
        return None
    kept = [dim for dim in range(len(out)) if dim not in repeated]
    length = math.prod(out[dim] for dim in repeated)

    def back(gradient: Tensor) -> Tensor:
        # Autograd sums a gradient to its input's shape after the node: a call of it comes before.
        inputs = gradient if is_copied else node(gradient)
        own = inputs[position] if isinstance(inputs, tuple) else inputs
        return own.expand(out).permute(repeated + kept).reshape(1, length, shape.numel())

    return Factors(back, None, transposed=False)
