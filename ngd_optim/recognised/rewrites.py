"""Losses that are another recognised loss of something that they compute first."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ngd_optim.torch_internals import reduction_of


class Call(NamedTuple):
    """A loss function and its arguments."""

    function: Callable[..., Tensor]
    args: Sequence[Any]
    kwargs: dict[str, Any]


def triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Call:
    """``triplet_margin_loss``, by its distance."""
    if size_average is not None or reduce is not None:
        reduction = reduction_of(size_average, reduce)
    return triplet_with_distance(
        anchor,
        positive,
        negative,
        distance_function=lambda a, b: F.pairwise_distance(a, b, p, eps),
        margin=margin,
        swap=swap,
        reduction=reduction,
    )


def triplet_with_distance(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Call:
    """max(0, margin + d₊ − d₋), a ranking of two distances, which it is convex in."""
    if margin <= 0:
        raise ValueError(f"margin must be greater than 0, got {margin}")  # as torch has it
    distance = distance_function or F.pairwise_distance
    near, far = distance(anchor, positive), distance(anchor, negative)
    if swap:
        far = torch.minimum(far, distance(positive, negative))
    return Call(
        F.margin_ranking_loss,
        (far, near, torch.ones_like(near)),
        {"margin": margin, "reduction": reduction},
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    options: Any = None,
    **others: Any,
) -> Call:
    """``cross_entropy`` of a last layer; the chunks that ``options`` ask for have no second derivative."""
    # Of a weight (C, d₁, …, in) there is one cross entropy for each d₁, ….
    logits = F.linear(
        input,
        linear_weight.flatten(0, -2),
        None if linear_bias is None else linear_bias.flatten(),
    ).unflatten(-1, linear_weight.shape[:-1])
    given = {} if ignore_index is None else {"ignore_index": ignore_index}
    return Call(F.cross_entropy, (logits, target), {**given, **others})
