"""All or nothing: what a step changes is undone if the step does not come to its end."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ngd_optim.parameters import FlatParameters
from ngd_optim.tracing import TracedClosure

_WRITTEN = (
    "last_step",
    "process_group",
    "_has_met",
    "_advice",
    "_transaction",
)
"""Attributes of the optimizer that a step sets."""


class Transaction:
    """What a step may change, as it was before, and how it is put back.

    That is: the optimizer's state, damping, report and what it remembers; with :meth:`cover` the
    parameters' values, ``requires_grad`` and ``.grad``, and the random numbers and buffers that
    closures change.

    Args:
        optimizer: whose step it is.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._attributes = {name: getattr(optimizer, name) for name in _WRITTEN}
        self._damping = [(group, group["damping"]) for group in optimizer.param_groups]
        # Steps replace the tensors in the entries, and write into none.
        self._state = {
            p: (entry, dict(entry)) if isinstance(entry, dict) else (entry, None)
            for p, entry in optimizer.state.items()
        }
        generator = optimizer.generator
        self._random = None if generator is None else generator.get_state()
        self._is_grad_enabled = torch.is_grad_enabled()
        self._undo_covered: Callable[[], None] | None = None

    def cover(self, parameters: FlatParameters, runs: Sequence[TracedClosure]) -> Tensor:
        """Have these put back as well.

        Args:
            parameters: of the step.
            runs: its closures, in the order in which they first run.

        Returns:
            The flat parameters, as they are now.
        """
        theta = parameters.read()
        gradients = [p.grad for p in parameters.tensors]

        def undo() -> None:
            # The last to run goes first: each had noted the state that the one before it left.
            for run in reversed(runs):
                run.rewind()
            parameters.write(theta)
            for p, gradient in zip(parameters.tensors, gradients, strict=True):
                p.requires_grad_(True)
                p.grad = gradient

        self._undo_covered = undo
        return theta

    def undo(self) -> None:
        """Put everything back. That can be begun anew."""
        if self._undo_covered is not None:
            self._undo_covered()
        vars(self._optimizer).update(self._attributes)
        for group, value in self._damping:
            group["damping"] = value
        state = self._optimizer.state
        for entry, before in self._state.values():
            if before is not None:
                entry.clear()
                entry.update(before)
        for p in state.keys() - self._state.keys():
            del state[p]
        if self._random is not None:
            self._optimizer.generator.set_state(self._random)
        torch.set_grad_enabled(self._is_grad_enabled)  # `no_grad` may be interrupted as well


def all_or_nothing(step: Callable[..., Tensor]) -> Any:
    """Have everything put back if ``step`` raises, at any of its lines, a KeyboardInterrupt for example.

    The hooks of ``torch.optim`` belong to the step. ``_transaction`` of the optimizer is the
    :class:`Transaction`.
    """
    with_hooks = Optimizer.profile_hook_step(step)

    @wraps(step)
    def whole(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Torch has wrapped the step of a subclass, which calls this one, in the hooks.
        run = with_hooks if type(self).step is whole else step
        transaction = Transaction(self)
        try:
            outer, self._transaction = self._transaction, transaction
            loss = run(self, *args, **kwargs)
            self._transaction = outer  # of a step whose closure takes one
            return loss
        except BaseException:
            _finish(transaction.undo)
            raise

    vars(whole)["hooked"] = True  # for torch, which would wrap it once more
    return whole


def _finish(action: Callable[[], None]) -> None:
    """Come to the end of what can be begun anew; an interrupt that comes meanwhile is raised after it."""
    try:
        action()
    except BaseException:
        action()
        raise
