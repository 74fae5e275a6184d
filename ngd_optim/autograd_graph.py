"""Walk the autograd graph."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ngd_optim.torch_internals import outputs_of, variable_of

Edge = tuple[Node, int]
"""A node and the number of one of its outputs in the forward pass."""


def parents_first(
    roots: Sequence[Tensor], stop: Sequence[Any] = ()
) -> list[tuple[Any, tuple[Edge, ...]]]:
    """The nodes of the graph that leads to some tensors, with their edges to parents.

    Depth first, and not limited in depth; nodes of ``stop`` are left out, with all behind them.
    """
    order: list[tuple[Any, tuple[Edge, ...]]] = []
    seen: set[Any] = {None, *stop}
    pending: list[tuple[Any, tuple[Edge, ...] | None]] = [(root.grad_fn, None) for root in roots]
    while pending:
        node, edges = pending.pop()
        if edges is not None:
            order.append((node, edges))
        elif node not in seen:
            seen.add(node)
            edges = node.next_functions
            pending.append((node, edges))
            pending.extend((parent, None) for parent, _ in reversed(edges))
    return order


def nodes(roots: Sequence[Tensor]) -> Iterator[Node]:
    """Every node of the graph that leads to some tensors, the tensors' own first."""
    return (node for node, _ in reversed(parents_first(roots)))


def dtypes(roots: Sequence[Tensor]) -> set[torch.dtype]:
    """Of all that was computed on the way from leaves to some tensors."""
    metadata = (one for node in nodes(roots) for one in outputs_of(node))
    return {one.dtype for one in metadata if one is not None}


def has_empty_tensors(roots: Sequence[Tensor]) -> bool:
    """Whether something without elements was computed on the way from leaves to some tensors."""
    metadata = (one for node in nodes(roots) for one in outputs_of(node))
    return any(0 in one.shape for one in metadata if one is not None)


def leaves(root: Tensor) -> list[Tensor]:
    """Everything that a plain backward would set ``.grad`` of."""
    return [tensor for node in nodes([root]) if (tensor := variable_of(node)) is not None]


def find_reached(roots: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[bool]:
    """For each input, whether one of the roots depends on it."""
    zeros = [torch.zeros_like(root) for root in roots]
    gradients = torch.autograd.grad(roots, inputs, zeros, retain_graph=True, allow_unused=True)
    return [gradient is not None for gradient in gradients]
