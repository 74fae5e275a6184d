"""Where the gradients of parameters are summed over samples.

A part of the graph depends on parameters alone: the parameters, their transposes, a normalised or
masked weight. Data meets it at some nodes: in a matrix product, a convolution, an embedding, or an
operation that broadcasts. There the gradient becomes a sum ``Σₙ lₙ rₙᵀ``, and as a rule each of its
terms belongs to one sample.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from ngd_optim.autograd_graph import leaf
from ngd_optim.jacobian.layers import convolution_factors, product_factors, source_of

Edge = tuple[Node, int]
"""A node and the number of one of its outputs in the forward pass."""

_LOOKUPS = {"EmbeddingBackward0", "IndexBackward0", "IndexSelectBackward0", "GatherBackward0"}
_PRODUCTS = {"MvBackward0", "DotBackward0", "ConvolutionBackward0", "NativeLayerNormBackward0"}
_PRODUCTS |= {"MmBackward0", "AddmmBackward0", "BmmBackward0", "BaddbmmBackward0"}


class Contraction(NamedTuple):
    """A node at which the gradient of its input ``target`` is ``Σₙ lₙ rₙᵀ``, or its transpose.

    Attributes:
        node: its gradient function.
        target: a parameter, or what is computed from parameters alone.
        length: how many terms the sum has.
        back: makes ``l`` of the gradient at the node, (groups, length, rows).
        into: gives ``r``, (groups, length, columns); None for ones, with one column.
        transposed: whether the sum is the transpose of the target's gradient, for each group.
    """

    node: Node
    target: Edge
    length: int
    back: Callable[[Tensor], Tensor]
    into: Callable[[], Tensor] | None
    transposed: bool


def contractions_of(root: Tensor, index: Mapping[int, int]) -> list[Contraction]:
    """All in the graph that leads to a tensor.

    Args:
        root: the tensor.
        index: has the ``id`` of each parameter.
    """
    fixed: dict[Node, bool] = {}
    found = []
    for node, edges in _parents_first(root):
        edges_to_fixed = [(i, edge) for i, edge in enumerate(edges) if fixed.get(edge[0])]
        fixed[node] = _is_fixed(node, edges, len(edges_to_fixed), index)
        if edges_to_fixed and not fixed[node]:
            contractions = (_contraction(node, position, edge) for position, edge in edges_to_fixed)
            found.extend(contraction for contraction in contractions if contraction is not None)
    return found


def shape_of(edge: Edge) -> torch.Size:
    """That of an output of a node in the forward pass."""
    node, number = edge
    variable = leaf(node)
    metadata: Any = None if variable is not None else node._input_metadata[number]  # pyright: ignore
    return torch.Size(metadata.shape) if variable is None else variable.shape


def _parents_first(root: Tensor) -> list[tuple[Any, tuple[Edge, ...]]]:
    """The nodes of a graph with their edges to parents; depth first, and not limited in depth."""
    order = []
    seen = {None}
    pending: list[tuple[Any, tuple[Edge, ...] | None]] = [(root.grad_fn, None)]
    while pending:
        node, edges = pending.pop()
        if edges is not None:
            order.append((node, edges))
        elif node not in seen:
            seen.add(node)
            edges = node.next_functions
            pending.append((node, edges))
            pending.extend((parent, None) for parent, _ in edges)
    return order


def _is_fixed(node: Any, edges: Sequence[Edge], to_fixed: int, index: Mapping[int, int]) -> bool:
    """Whether a node depends on parameters alone, as far as one can see.

    Constants do not show in the graph. They are taken for data where they enlarge a shape or are
    factors of a product, and else for a part of the weight, like a mask.
    """
    if not edges:
        return id(leaf(node)) in index
    parents = [edge for edge in edges if edge[0] is not None]
    if to_fixed < len(parents) or not parents:
        return False
    name = node.name()
    if name in _LOOKUPS:
        return False
    if len(edges) == 1:
        is_larger = shape_of((node, 0)).numel() > shape_of(parents[0]).numel()
        return len(node._input_metadata) > 1 or not is_larger
    if len(edges) == len(parents):
        return True
    shape = shape_of((node, 0))
    return name not in _PRODUCTS and all(shape == shape_of(edge) for edge in parents)


def _contraction(node: Any, position: int, target: Edge) -> Contraction | None:
    metadata = node._input_metadata[0]
    if metadata is None or metadata.dtype.is_complex:
        return None
    name, out, shape = node.name(), shape_of((node, 0)), shape_of(target)
    factors = product_factors(node, position)
    if factors is not None:
        source, transposed = source_of(target[0])
        length = out[-2] if factors.transposed else out[-1]
        target = target if source is target[0] else (source, 0)
        transposed ^= factors.transposed
        return Contraction(node, target, length, factors.back, factors.into, transposed)
    if name == "ConvolutionBackward0":
        return _of_convolution(node, position, target)
    if name == "MvBackward0" and position == 1:
        return Contraction(node, target, out[0], _column, lambda: node._saved_self[None], True)
    if name == "NativeLayerNormBackward0":
        return _of_layer_norm(node, position, target)
    if name == "EmbeddingBackward0":
        return _of_embedding(node, target)
    if name == "ExpandBackward0" or (position == 0 and getattr(node, "_saved_beta", 0) == 1):
        spread = _spread(out, shape)  # of what addmm adds, the gradient is that at the node
        return None if spread is None else Contraction(node, target, *spread, None, False)
    if len(node._input_metadata) > 1 or out == shape or name in _PRODUCTS | _LOOKUPS:
        return None
    return None if isinstance(node, BackwardCFunction) else _of_broadcast(node, position, target)


def _of_convolution(node: Any, position: int, target: Edge) -> Contraction | None:
    out, shape = shape_of((node, 0)), shape_of(target)
    length = out.numel() // max(1, out[1])
    if position == 2:
        return Contraction(node, target, length, _channels_last, None, transposed=False)
    if position == 0 or node._saved_transposed:
        return None
    return Contraction(node, target, length, *convolution_factors(node, shape))


def _channels_last(gradient: Tensor) -> Tensor:
    return gradient.movedim(1, -1).reshape(1, -1, gradient.shape[1])


def _of_layer_norm(node: Any, position: int, target: Edge) -> Contraction | None:
    if position == 0:
        return None
    out, numel = shape_of((node, 0)), shape_of(target).numel()

    def back(gradient: Tensor) -> Tensor:
        if position == 1:
            gradient = gradient * (node._saved_input - node._saved_result1) * node._saved_result2
        return gradient.reshape(1, -1, numel)

    return Contraction(node, target, out.numel() // numel, back, None, False)


def _of_embedding(node: Any, target: Edge) -> Contraction:
    count, width = shape_of(target)

    def back(gradient: Tensor) -> Tensor:
        rows = gradient.reshape(1, -1, width)
        if node._saved_padding_idx < 0 or node._saved_padding_idx >= count:
            return rows
        return rows * (node._saved_indices.reshape(-1, 1) != node._saved_padding_idx)

    def into() -> Tensor:
        return F.one_hot(node._saved_indices.reshape(1, -1), count)

    return Contraction(node, target, shape_of((node, 0)).numel() // width, back, into, True)


def _of_broadcast(node: Any, position: int, target: Edge) -> Contraction | None:
    """Autograd sums a gradient to its input's shape after the node: calling the node comes before."""
    spread = _spread(shape_of((node, 0)), shape_of(target))
    if spread is None:
        return None
    length, rows_of = spread

    def back(gradient: Tensor) -> Tensor:
        inputs = node(gradient)
        return rows_of(inputs[position] if isinstance(inputs, tuple) else inputs)

    return Contraction(node, target, length, back, None, False)


def _spread(shape: torch.Size, target: torch.Size) -> tuple[int, Callable[[Tensor], Tensor]] | None:
    """How often broadcasting repeats a target, and what makes (1, times, elements) of the result.

    None if the target does not broadcast to the shape.
    """
    sizes = (1,) * (len(shape) - len(target)) + tuple(target)
    if len(sizes) > len(shape) or any(b not in (1, a) for a, b in zip(shape, sizes, strict=True)):
        return None
    repeated = [dim for dim, size in enumerate(sizes) if size != shape[dim]]
    kept = [dim for dim in range(len(shape)) if dim not in repeated]
    length = math.prod(shape[dim] for dim in repeated)

    def rows_of(gradient: Tensor) -> Tensor:
        return gradient.expand(shape).permute(repeated + kept).reshape(1, length, -1)

    return length, rows_of


def _column(gradient: Tensor) -> Tensor:
    return gradient.view(1, -1, 1)
