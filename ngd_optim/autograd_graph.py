"""Walk the autograd graph."""

from collections.abc import Callable, Iterator, Sequence
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
    """Every node of the graph that leads to some tensors, in any order."""
    seen: set[Any] = {None}
    pending: list[Any] = [root.grad_fn for root in roots]
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            yield node
            pending.extend([parent for parent, _ in node.next_functions])


def dtypes(roots: Sequence[Tensor]) -> set[torch.dtype]:
    """Of all that was computed on the way from leaves to some tensors."""
    found = {root.dtype for root in roots}
    for node in nodes(roots):
        for parent, number in node.next_functions:
            # Only what is used: what a derivative does not compute counts as float32.
            metadata = outputs_of(parent) if parent is not None else ()
            if number < len(metadata) and metadata[number] is not None:
                found.add(metadata[number].dtype)
    return found


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


def run_in_backward_of_its_own(work: Callable[[], Any], device: torch.device) -> None:
    """Within a backward pass, run something that reads what nodes have saved, as another pass would.

    A checkpointed part of the graph computes that again for each pass, and gives it once.
    """
    start = torch.zeros((), device=device, requires_grad=True)
    with torch.enable_grad():
        end = start.clone()
    end.register_hook(lambda _: work())
    torch.autograd.grad(end, start)


_LINEAR = {
    "Add",
    "Alias",
    "AsStrided",
    "Cat",
    "Clone",
    "Copy",
    "Cumsum",
    "Diagonal",
    "Expand",
    "Flip",
}
_LINEAR |= {
    "Gather",
    "Index",
    "IndexSelect",
    "MaskedFill",
    "Mean",
    "Neg",
    "Permute",
    "Repeat",
    "Roll",
}
_LINEAR |= {
    "ReshapeAlias",
    "Rsub",
    "Select",
    "Slice",
    "Split",
    "SplitWithSizes",
    "Squeeze",
    "Stack",
}
_LINEAR |= {
    "Sub",
    "Sum",
    "T",
    "ToCopy",
    "Transpose",
    "Unbind",
    "UnsafeView",
    "Unsqueeze",
    "View",
    "Where",
}
_LINEAR_IN_EACH = {"Addmm", "Addmv", "Baddbmm", "Bmm", "Div", "Dot", "Mm", "Mul", "Mv"}
"""Linear in what has a graph, if that is one argument."""


def find_linear_ends(root: Tensor, stop: set[Any]) -> list[Any]:
    """The nodes that ``root`` is a linear function of: the first ones of ``stop`` or that are not linear.

    Leaves are left out.
    """
    ends: list[Any] = []
    seen: set[Any] = {None}
    pending: list[Any] = [root.grad_fn]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        name = node.name().removesuffix("0").removesuffix("1").removesuffix("2")
        name = name.removesuffix("Backward")
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        is_linear = name in _LINEAR or (
            name in _LINEAR_IN_EACH
            and len(parents) == 1
            and not (name == "Div" and node.next_functions[0][0] is None)
        )
        if node in stop or not (is_linear or variable_of(node) is not None):
            ends.append(node)
        else:
            pending += parents
    return ends
