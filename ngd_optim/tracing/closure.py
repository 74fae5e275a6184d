"""Run a training closure, once a step, and record it."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ngd_optim.distributed import quiet_ddp
from ngd_optim.kernels import AUTOCAST_KINDS
from ngd_optim.layout import is_spread
from ngd_optim.own_losses import least_squares
from ngd_optim.parameters import FlatParameters
from ngd_optim.recognised import LOSSES, LossCall
from ngd_optim.recording import ForwardRecorder
from ngd_optim.torch_internals import keep_versions, version_of
from ngd_optim.tracing.gradients import GradientAccumulation
from ngd_optim.tracing.interface import Closure, split_returned
from ngd_optim.tracing.kinks import Kink, find_last_kinks
from ngd_optim.tracing.mode import Hook, Tracing
from ngd_optim.tracing.side_effects import SideEffects

_ON_OTHER_RANKS = (
    "a part of each operation on weights that lie over ranks (tensor parallel) is done by others"
)


@dataclass(frozen=True)
class Evaluation:
    """What one run of a closure computed, with the graph (or the tangents) that lead to it.

    Attributes:
        loss: what is minimised, a 0-dim tensor: the sum of all that the closure called ``backward``
            on, or what it returned if it called ``backward`` on nothing.
        losses: the calls of recognised loss functions.
        metric: what the closure returned beside the loss: distributions, a scalar tensor, or None.
        kinks: calls of functions with a kink that the loss is a linear function of.
        ends_in_kinks: whether it is a linear function of these, and of squares, alone.
        differentiates: whether the closure called ``torch.autograd.grad``.
        has_hooks: whether it registered hooks on gradients.
        recorder: has noted how all this depends on the parameters; None for a run that is not the
            first.
    """

    loss: Tensor
    metric: Any
    losses: tuple[LossCall, ...] = ()
    kinks: tuple[Kink, ...] = ()
    ends_in_kinks: bool = False
    differentiates: bool = False
    has_hooks: bool = False
    recorder: ForwardRecorder | None = None

    @property
    def outputs(self) -> list[Tensor]:
        """The model's outputs, as the recognised loss functions saw them, in call order."""
        return [z for call in self.losses for z in call.outputs]

    @property
    def is_estimated(self) -> bool:
        """Whether a loss has its gradient only in the mean over samples."""
        return any(call.loss.is_estimate for call in self.losses)

    @property
    def is_least_squares(self) -> bool:
        """Whether they are the residuals of :func:`~ngd_optim.least_squares`, all of them."""
        return bool(self.losses) and all(c.loss is LOSSES[least_squares] for c in self.losses)


_NOT_MADE = "Creating a new Tensor subclass"
_MAKE_OTHERWISE = (
    "the closure makes tensors of a subclass by Tensor.__new__, which torch refuses wherever "
    "operations are recorded; let the subclass's __new__ return x.as_subclass(cls)"
)


class TracedClosure:
    """A closure that runs once a step. Where it must run again, it has the side effects of running once.

    Args:
        function: the user's closure, without arguments.
        parameters: what it is a function of.
        is_alone: whether no other closure of the step can write to the same memory.

    Attributes:
        function: that closure.
        count: forward passes that make the step: the first run, and each trial point, run or
            replayed. Runs for checks and for products are not among them.
        leaves_gradients: whether its first run left gradients of the loss in ``.grad``, as those
            that call ``backward`` do.
        writes_parameters: whether that run changed the parameters: projected, or renormalised them.
        recomputes: whether it uses checkpointing.
        gradient: what that run's calls of ``backward`` gave, flat; None if there were none.
    """

    def __init__(
        self, function: Closure, parameters: FlatParameters, *, is_alone: bool = True
    ) -> None:
        self.function = function
        self._parameters = parameters
        self._is_alone = is_alone
        self._autocast = _find_autocast()
        self._effects = SideEffects([parameters.device], parameters.tensors)
        self._differentiates = self._needs_backward = False
        self._others: list[Tensor] = []
        self._hooks: list[Hook] = []
        self._retained: list[tuple[weakref.ref[Tensor], Tensor | None]] = []
        self._gradients_before: list[Tensor | None] = []
        self.leaves_gradients = False
        self.writes_parameters = False
        self.recomputes = False
        self.gradient: Tensor | None = None
        self.count = 0

    def trace(self) -> Evaluation:
        """Run the closure for the first time, and record it; what it calls ``backward`` on is differentiated.

        Raises:
            ValueError: there is nothing to differentiate.
            RuntimeError: it changes the gradients.
            TypeError, ValueError: the closure returned something that is not a loss or a metric.
            Exception: whatever the closure raises.
        """
        self.count += 1
        recorder = ForwardRecorder(self._parameters.tensors, self._effects.track_generator)
        if any(map(is_spread, self._parameters.tensors)):
            recorder.fail(_ON_OTHER_RANKS)
        accumulation = GradientAccumulation(self._parameters)

        def differentiate(root: Tensor) -> list[Tensor]:
            with recorder.paused():
                return accumulation.add(root)

        mode = Tracing(self._effects, differentiate, recorder)
        self._effects.begin()
        places = self._places()
        with recorder:
            try:
                traced = self._run(mode, accumulation, graph=True, broadcast=True)
            except RuntimeError as error:
                if _NOT_MADE in str(error):
                    raise RuntimeError(_MAKE_OTHERWISE) from error
                raise
        if not self._is_alone:
            self._effects.end()
            for tensor in self._effects.tensors:
                recorder.keep_constants(tensor)
        self.recomputes = mode.recomputes
        self.writes_parameters = self._places() != places
        if self.writes_parameters:
            recorder.note_written_parameters()
        accumulation.adopt(traced.loss)
        self.leaves_gradients = bool(accumulation.roots)
        self._gradients_before = [
            before if p is t or before is None else p.grad
            for p, t, before in zip(
                self._parameters.params,
                self._parameters.tensors,
                accumulation.finish(),
                strict=True,
            )
        ]
        self.gradient = accumulation.total
        self._hooks = mode.hooks
        tensors = [(reference, reference()) for reference in mode.retaining]
        self._retained = [(ref, t.grad) for ref, t in tensors if t is not None]
        self._needs_backward = mode.reads_gradients or mode.calls > len(mode.roots)
        self._others = accumulation.find_others() if self._needs_backward else []
        self._differentiates = mode.differentiates or self._needs_backward
        if not all(p.requires_grad for p in self._parameters.tensors):
            raise RuntimeError(
                "the closure sets requires_grad of a parameter that the step is for to False; "
                "freeze and thaw parameters before the step, not in the closure"
            )
        if not traced.loss.requires_grad:
            raise ValueError(
                "the loss has no graph to differentiate: it was detached, computed under no_grad, "
                "or uses none of the parameters"
            )
        return replace(traced, recorder=recorder)

    def _places(self) -> list[tuple[int, int]]:
        """Where the parameters' values are, and how often they were written."""
        return [(p.data_ptr(), version_of(p)) for p in self._parameters.tensors]

    def run_again(self, *, graph: bool, replaces_first: bool = False) -> Evaluation:
        """Run the closure once more, at the parameters as they are now, with the side effects of the first run.

        Args:
            graph: build the graph that leads to the loss. Without it, only a closure that itself
                uses derivatives builds what it needs.
            replaces_first: the first run's graph was let go.
        """
        accumulation = GradientAccumulation(self._parameters)
        gradients = [(t, t.grad) for t in [*self._parameters.leaves, *self._others]]
        for tensor in self._others:  # torch adds to what is there in place
            tensor.grad = None if tensor.grad is None else tensor.grad.clone()
        self._effects.rewind()
        try:
            # Only for a closure that looks at gradients, or has some that are not of its loss.
            mode = Tracing(
                self._effects,
                accumulation.add if self._needs_backward else None,
                hooks_before=self._hooks,
            )
            # What it writes is put back, so that the first run's graph stays as it is; the one that takes its
            # place has seen these writes.
            written = () if replaces_first else self._effects.tensors
            with keep_versions(written):
                return self._run(
                    mode, accumulation, graph=graph or self._differentiates, broadcast=False
                )
        finally:
            self._effects.settle()
            for tensor, gradient in gradients:
                tensor.grad = gradient

    def _run(
        self, mode: Tracing, accumulation: GradientAccumulation, *, graph: bool, broadcast: bool
    ) -> Evaluation:
        # An autocast around the step keeps casts of weights, of where they were at the last run.
        torch.clear_autocast_cache()
        with torch.set_grad_enabled(graph), quiet_ddp(broadcast=broadcast), ExitStack() as stack:
            for context in self._autocast:
                stack.enter_context(context())
            with mode:
                returned = self.function()
            loss = returned[0] if isinstance(returned, tuple) and returned else returned
            if isinstance(loss, Tensor) and loss.requires_grad and accumulation.was_cleared():
                # Its backward was for something else: norms of gradients, an attack on the inputs.
                accumulation.forget()
                mode.roots = []
            loss, metric = split_returned(returned, mode.roots)
            kinks, is_all = find_last_kinks(loss, mode.kinks, mode.losses)
        return Evaluation(
            loss,
            metric,
            tuple(mode.losses),
            kinks,
            bool(kinks) and is_all,
            mode.differentiates,
            bool(mode.hooks),
        )

    def leave_gradients(self, gradients: Sequence[Tensor], reached: Sequence[bool]) -> None:
        """Set ``.grad`` as one run of the closure leaves it: with the gradients added, if it calls ``backward``."""
        for p, old, new, flag in zip(
            self._parameters.params, self._gradients_before, gradients, reached, strict=True
        ):
            p.grad = (
                old if not (flag and self.leaves_gradients) else new if old is None else old + new
            )

    def settle(self) -> None:
        """Put everything that the closure changes to where one run leaves it."""
        self._effects.settle()
        for reference, gradient in self._retained:  # which products have added to
            if (tensor := reference()) is not None:
                tensor.grad = gradient

    def rewind(self) -> None:
        """Undo what the closure changed."""
        self._effects.rewind()


def _find_autocast() -> list[Callable[[], torch.autocast]]:
    """What makes each kind of device's autocast as it is now."""
    return [
        partial(
            torch.autocast,
            kind,
            dtype=torch.get_autocast_dtype(kind),
            cache_enabled=torch.is_autocast_cache_enabled(),
        )
        for kind in AUTOCAST_KINDS
        if torch.is_autocast_enabled(kind)
    ]
