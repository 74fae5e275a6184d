"""Hooks that look at a step's gradients, as code between ``backward()`` and ``step()`` would."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ngd_optim.distributed import ParametersInParts
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
        parameters: FlatParameters | ParametersInParts,
    ) -> None:
        """Show the gradients as one run of the closure leaves them.

        Raises:
            RuntimeError: a hook changed them.
        """
        if not self._hooks:
            return
        before = [p.grad for p in parameters.params]
        run.leave_gradients(parameters.lay_out(point.gradient.clone()), point.reached)
        shown = [p.grad for p in parameters.params]
        values = parameters.flatten(shown)
        for hook in list(self._hooks.values()):
            hook(optimizer)
        # A hook may replace `.grad` or write into it; both would be lost without a word.
        same = all(p.grad is old for p, old in zip(parameters.params, shown, strict=True))
        if not same or not torch.allclose(
            values, parameters.flatten(shown), rtol=0, atol=0, equal_nan=True
        ):
            raise RuntimeError(
                "a hook changed the gradients, which NaturalCG does not use again; to limit the "
                "step set max_kl, the trust region, in place of gradient clipping"
            )
        for p, old in zip(parameters.params, before, strict=True):
            p.grad = old
