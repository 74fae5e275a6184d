"""All or nothing: what a step of either optimizer changes is undone if the step does not come to its end."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ngd_optim.kernels import AUTOCAST_KINDS
from ngd_optim.parameters import FlatParameters
from ngd_optim.tracing import TracedClosure


class Transaction:
    """What a step may change, as it was before, and how it is put back.

    That is: the optimizer's state, adapted setting, report and what it remembers; with
    :meth:`cover` the parameters' values, ``requires_grad`` and ``.grad``, and the random numbers
    and buffers that traced closures change.

    Args:
        optimizer: whose step it is.
        attributes: of the optimizer, that the step sets.
        setting: of the groups, that the step adapts.
    """

    def __init__(self, optimizer: Any, attributes: Sequence[str], setting: str) -> None:
        self._optimizer = optimizer
        self._attributes = {name: getattr(optimizer, name) for name in attributes}
        self._adapted = [(group, {setting: group[setting]}) for group in optimizer.param_groups]
        # Steps replace the tensors in the entries, and write into none.
        self._state = {
            p: (entry, dict(entry)) if isinstance(entry, dict) else (entry, None)
            for p, entry in optimizer.state.items()
        }
        self._newest = optimizer.history[-1] if optimizer.history else None
        generator = optimizer.generator
        self._random = None if generator is None else generator.get_state()
        self._is_grad_enabled = torch.is_grad_enabled()
        self._autocast = [(kind, torch.is_autocast_enabled(kind)) for kind in AUTOCAST_KINDS]
        self._undo_covered: Callable[[], None] | None = None
        self._contexts = ExitStack()

    def enter(self, context: AbstractContextManager[Any]) -> None:
        """Have a context last until the step has come to its end, or everything is put back."""
        self._contexts.enter_context(context)

    def close(self) -> None:
        """Leave the contexts."""
        self._contexts.close()

    def cover(
        self,
        parameters: FlatParameters,
        runs: Sequence[TracedClosure] = (),
        theta: Tensor | None = None,
    ) -> None:
        """Have these put back as well.

        Args:
            parameters: of the step.
            runs: its closures that are traced, in the order in which they first run.
            theta: the parameters as they are now, flat, if they were read.
        """
        put_back = parameters.keep(theta)
        gradients = [p.grad for p in parameters.leaves]

        def undo() -> None:
            # The last to run goes first: each had noted the state that the one before it left.
            for run in reversed(runs):
                run.rewind()
            put_back()
            for p, gradient in zip(parameters.leaves, gradients, strict=True):
                p.requires_grad_(True)
                p.grad = gradient

        self._undo_covered = undo

    def undo(self) -> None:
        """Put everything back. That can be begun anew."""
        if self._undo_covered is not None:
            self._undo_covered()
        vars(self._optimizer).update(self._attributes)
        history = self._optimizer.history
        while history and history[-1] is not self._newest:
            history.pop()
        for group, adapted in self._adapted:
            group.update(adapted)
        state = self._optimizer.state
        for p, (entry, before) in self._state.items():
            if before is not None:
                entry.clear()
                entry.update(before)
            state[p] = entry
        for p in state.keys() - self._state.keys():
            del state[p]
        if self._random is not None:
            self._optimizer.generator.set_state(self._random)
        # What sets these may be interrupted as well.
        torch.set_grad_enabled(self._is_grad_enabled)
        for kind, is_enabled in self._autocast:
            torch.set_autocast_enabled(kind, is_enabled)


def all_or_nothing(
    *, attributes: Sequence[str], setting: str, at_end: Callable[[Any], None] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Have everything put back if a step raises, at any of its lines, a KeyboardInterrupt for example.

    The hooks of ``torch.optim`` belong to the step. ``_transaction`` of the optimizer is the
    :class:`Transaction`.

    Args:
        attributes: as for :class:`Transaction`, beside ``last_step``.
        setting: likewise.
        at_end: called with the optimizer after each step, whether it has come to its end or not; it
            can be begun anew.
    """
    attributes = ("last_step", "_transaction", *attributes)
    return partial(_wrap, attributes=attributes, setting=setting, at_end=at_end or (lambda _: None))


def _wrap(
    step: Callable[..., Any],
    *,
    attributes: Sequence[str],
    setting: str,
    at_end: Callable[[Any], None],
) -> Any:
    with_hooks = Optimizer.profile_hook_step(step)

    @wraps(step)
    def whole(self: Any, *args: Any, **kwargs: Any) -> Any:
        transaction: Transaction | None = None

        def undo() -> None:
            if transaction is not None:
                transaction.undo()
            at_end(self)

        try:
            transaction = Transaction(self, attributes, setting)
            outer, self._transaction = self._transaction, transaction
            # Torch has wrapped the step of a subclass, which calls this one, in the hooks.
            run = with_hooks if type(self).step is whole else step
            loss = run(self, *args, **kwargs)
            transaction.close()
            at_end(self)
            self._transaction = outer  # of a step whose closure takes one
            self.remember()
            return loss
        except BaseException:
            _finish(undo)
            if transaction is not None:
                _finish(transaction.close)
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
