"""Walk the autograd graph."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ngd_optim.torch_internals import outputs_of, variable_of


def nodes(roots: Sequence[Tensor]) -> Iterator[Node]:
    """Every node of the graph that leads to some tensors."""
    pending = [root.grad_fn for root in roots]
    seen = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending.extend(parent for parent, _ in node.next_functions)


def dtypes(roots: Sequence[Tensor]) -> set[torch.dtype]:
    """Of all that was computed on the way from leaves to some tensors."""
    metadata = (one for node in nodes(roots) for one in outputs_of(node))
    return {one.dtype for one in metadata if one is not None}


def leaf(node: Node | None) -> Tensor | None:
    """The tensor whose ``.grad`` a node would add to, None if it is no such node."""
    return variable_of(node)


def leaves(root: Tensor) -> list[Tensor]:
    """Everything that a plain backward would set ``.grad`` of."""
    return [tensor for node in nodes([root]) if (tensor := leaf(node)) is not None]
