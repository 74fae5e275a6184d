"""Hooks that look at a step's gradients, as code between ``backward()`` and ``step()`` would."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ngd_optim.distributed import ParametersInParts
from ngd_optim.layout import local_part
from ngd_optim.linearization import Point
from ngd_optim.parameters import FlatParameters
from ngd_optim.tracing import TracedClosure


class GradientHooks:
    """Functions that are called with the optimizer, in the order in which they were registered."""

    def __init__(self) -> None:
        self._hooks: OrderedDict[int, Callable[[Any], None]] = OrderedDict()

    def register(self, hook: Callable[[Any], None]) -> RemovableHandle:
        """Add one; ``handle.remove()`` takes it away."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def __call__(
        self,
        optimizer: Any,
        run: TracedClosure,
        point: Point,
        parameters: FlatParameters,
        own: FlatParameters | ParametersInParts,
    ) -> None:
        """Show the gradients as one run of the closure leaves them; ``own`` has the step's own vectors.

        Nothing here takes the other ranks, which may have no hooks.

        Raises:
            RuntimeError: a hook changed them.
        """
        if not self._hooks:
            return
        before = [p.grad for p in parameters.leaves]
        gradient = point.gradient.clone()
        gradients = own.lay_out(gradient)
        run.leave_gradients(gradients, point.reached)
        params, weights = parameters.params, parameters.tensors
        if weights is not params:  # a model's parameters are its whole weights, within the step
            whole = parameters.unflatten(gradient) if own is parameters else [None] * len(weights)
            for p, weight, mine, all_of_it in zip(params, weights, gradients, whole, strict=True):
                weight.grad = all_of_it if p.grad is mine else None
        shown = [p.grad for p in parameters.leaves]
        values = [None if g is None else local_part(g).clone() for g in shown]
        for hook in list(self._hooks.values()):
            hook(optimizer)
        # A hook may replace `.grad` or write into it; both would be lost without a word.
        same = all(p.grad is old for p, old in zip(parameters.leaves, shown, strict=True))
        if not same or not all(
            g is None
            or v is None
            or torch.allclose(v, local_part(g), rtol=0, atol=0, equal_nan=True)
            for v, g in zip(values, shown, strict=True)
        ):
            raise RuntimeError(
                "a hook changed the gradients, which NaturalCG does not use again; to limit the "
                "step set max_kl, the trust region, in place of gradient clipping"
            )
        for p, old in zip(parameters.leaves, before, strict=True):
            p.grad = old
