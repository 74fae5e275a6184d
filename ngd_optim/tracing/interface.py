"""What a user gives as a closure, and what it returns."""

from collections.abc import Callable
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ngd_optim.shown import show
from ngd_optim.torch_internals import plain

Closure = Callable[[], Any]


def list_closures(closure: Any) -> list[Closure]:
    """A closure, or each of a list of them.

    Raises:
        TypeError: there is something that is no function.
        ValueError: the list is empty.
    """
    closures = list(closure) if isinstance(closure, list | tuple) else [closure]
    if not closures:
        raise ValueError("step() needs at least one closure, got an empty list")
    for function in closures:
        if not callable(function):
            raise TypeError(
                "step() needs a closure that computes the loss, or a list of them, such as "
                f"optimizer.step(lambda: F.mse_loss(model(x), y)), got {show(function)}"
            )
    return closures


def split_returned(returned: Any, roots: list[Tensor]) -> tuple[Tensor, Any]:
    """The loss, a 0-dim tensor, and the metric; what ``backward`` was called on, ``roots``, add up to the loss.

    Raises:
        TypeError, ValueError: it is not a loss, or (loss, metric).
    """
    loss, metric = returned, None
    if isinstance(returned, tuple):
        if len(returned) != 2:
            raise TypeError(
                f"the closure must return a loss or (loss, metric), got a tuple of {len(returned)}"
            )
        loss, metric = returned
    if isinstance(metric, Tensor):
        if metric.numel() != 1:
            raise ValueError(
                "a tensor returned as the metric must be a scalar KL, got shape "
                f"{tuple(metric.shape)}; of logits return the distribution, "
                "torch.distributions.Categorical(logits=...)"
            )
        metric = metric.reshape(())
    if roots and isinstance(loss, Tensor | Number):
        return plain(torch.stack([root.reshape(()) for root in roots]).sum()), metric
    if isinstance(loss, Distribution):
        raise TypeError(
            "the closure must return the loss first, then the distribution: (loss, distribution)"
        )
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the closure must return the loss as a tensor, got {type(loss).__name__}{_what_to_return(loss)}"
        )
    require_real_scalar(loss)
    # The gradients of a subclass of tensors would be of that class.
    return plain(loss.reshape(())), metric


def require_real_scalar(loss: Tensor) -> None:
    """Refuse what is not a loss.

    Raises:
        TypeError, ValueError: it is complex, or has several elements.
    """
    if loss.is_complex():
        raise TypeError(
            f"the closure must return a real loss, got one of dtype {loss.dtype}; return its real part, or "
            "the mean of abs().square()"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"the closure must return a scalar loss, got shape {tuple(loss.shape)}; reduce it by "
            "mean()"
        )


def _what_to_return(returned: Any) -> str:
    """What was probably meant, as the end of a sentence."""
    if returned is None:
        return "; add `return loss` at its end"
    if isinstance(returned, Number):
        return "; return the tensor itself, not its item()"
    if isinstance(returned, list):
        return "; of a list of residuals return ngd_optim.least_squares(*residuals)"
    # As the outputs of models of transformers, which are dicts with attributes.
    if isinstance(getattr(returned, "loss", None), Tensor):
        return "; return its loss, outputs.loss"
    if isinstance(returned, dict) and "loss" in returned:
        return "; return its loss, outputs['loss']"
    return ""
