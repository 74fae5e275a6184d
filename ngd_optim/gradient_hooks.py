"""Hooks that look at a step's gradients, as code between ``backward()`` and ``step()`` would."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ngd_optim.layout import local_part
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

    def __len__(self) -> int:
        return len(self._hooks)

    def __call__(
        self,
        optimizer: Any,
        run: TracedClosure,
        reached: Sequence[bool],
        parameters: FlatParameters,
        gradients: Sequence[Tensor],
        flat: Tensor | None,
    ) -> None:
        """Show the gradients as one run of the closure leaves them.

        Nothing here takes the other ranks, which may have no hooks.

        Args:
            optimizer: whose hooks they are.
            run: the closure.
            reached: for each parameter, whether it has a gradient.
            parameters: of the step.
            gradients: copies, as the parameters lie.
            flat: the same as a whole vector; None if there is none.

        Raises:
            RuntimeError: a hook changed them.
        """
        before = [p.grad for p in parameters.leaves]
        run.leave_gradients(gradients, reached)
        params, weights = parameters.params, parameters.tensors
        if weights is not params:  # a model's parameters are its whole weights, within the step
            whole = [None] * len(weights) if flat is None else parameters.unflatten(flat)
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
