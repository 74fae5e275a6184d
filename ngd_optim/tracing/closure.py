"""Run a training closure again and again, as if it ran once."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.attention import SDPBackend, sdpa_kernel

from ngd_optim.distributed import quiet_ddp
from ngd_optim.shown import show
from ngd_optim.tracing.least_squares import least_squares
from ngd_optim.tracing.mode import Tracing
from ngd_optim.tracing.side_effects import SideEffects

logger = logging.getLogger("ngd_optim")

Closure = Callable[[], Any]


@dataclass(frozen=True)
class Evaluation:
    """What one run of a closure computed, with the graph (or the tangents) that lead to it.

    Attributes:
        loss: what is minimised, a 0-dim tensor: the sum of all that the closure called ``backward``
            on, or what it returned if it called ``backward`` on nothing.
        outputs: the model's outputs, as the recognised loss functions saw them, in call order.
        is_least_squares: whether they are the residuals of :func:`~ngd_optim.least_squares`, all of
            them.
        metric: what the closure returned beside the loss: distributions, a scalar tensor, or None.
        has_hooks: whether it registered hooks on gradients.
    """

    loss: Tensor
    outputs: tuple[Tensor, ...]
    is_least_squares: bool
    metric: Any
    has_hooks: bool


class ReplayedClosure:
    """A closure that can run many times, with the side effects of running once.

    Args:
        function: the user's closure, without arguments.
        params: the parameters that it is a function of.

    Attributes:
        function: that closure.
        count: how often it ran.
        called_backward: whether its last run called ``backward``, which is noted and not carried
            out.
        substituted: the ``id`` of each parameter that its last run took a stand-in for.
    """

    def __init__(self, function: Closure, params: Sequence[Tensor]) -> None:
        self.function = function
        self._params = params
        self._effects = SideEffects(p.device for p in params)
        self._differentiates = False
        self._left_gradients: list[Tensor | None] | None = None
        self.called_backward = False
        self.substituted: set[int] = set()
        self.count = 0

    @property
    def code(self) -> Any:
        """The same for closures that are written at the same place of the user's program."""
        function: Any = self.function
        while isinstance(function, partial) or hasattr(function, "__wrapped__"):
            function = function.func if isinstance(function, partial) else function.__wrapped__
        return getattr(function, "__code__", type(function))

    def __call__(
        self, stand_ins: Sequence[Tensor] | None = None, *, graph: bool = True, cut: bool = False
    ) -> Evaluation:
        """Run the closure.

        Args:
            stand_ins: used wherever a torch function is given one of the parameters.
            graph: build the graph that leads to the loss. Without it, only a closure that itself
                differentiates builds what it needs.
            cut: let the loss depend on the model's outputs as on constants, and on parameters only
                around them.

        Raises:
            TypeError, ValueError: the closure returned something that is not a loss or a metric.
            Exception: whatever the closure raises.
        """
        replaced = (
            {}
            if stand_ins is None
            else {id(p): t for p, t in zip(self._params, stand_ins, strict=True)}
        )
        mode = Tracing(replaced, self._effects, cut=cut)
        self.count += 1
        in_place = stand_ins is None
        # torch.func runs on stand-ins: a write to a real buffer there fails, or would happen twice.
        if not in_place and self._effects.changes_buffers:
            raise RuntimeError("it changes buffers in place, such as running statistics")
        # Every run finds the random numbers and buffers of the first one.
        self._effects.rewind(tensors=in_place)
        # An autocast around the step keeps casts of weights, of where they were at the last run.
        torch.clear_autocast_cache()
        try:
            with (
                torch.set_grad_enabled(graph or self._differentiates),
                quiet_ddp(broadcast=not self._effects.is_known),
            ):
                with twice_differentiable(), mode:
                    returned = self.function()
                loss, metric = _split_returned(mode.substitute(returned), mode.roots)
        finally:
            self._effects.settle(tensors=in_place)
        self._differentiates |= mode.differentiates
        self.called_backward = bool(mode.roots)
        self.substituted = mode.substituted
        # The first run may have set them to zero or None: that is what a step leaves behind.
        if self._left_gradients is None:
            self._left_gradients = [p.grad for p in self._params]
        return Evaluation(
            loss, tuple(mode.outputs), mode.losses == {least_squares}, metric, mode.has_hooks
        )

    def trace(self) -> Evaluation:
        """Run the closure, with a graph that leads to its loss.

        Raises:
            ValueError: there is none.
        """
        # All that comes later, products and square roots, hangs on this graph.
        traced = self()
        if not traced.loss.requires_grad:
            raise ValueError(
                "the loss has no graph to differentiate: it was detached, computed under no_grad, "
                "or uses none of the parameters"
            )
        return traced

    def evaluate_trial(self) -> Evaluation | None:
        """Run the closure without a graph, at the parameters as they are now; None outside of its domain."""
        try:
            return self(graph=False)
        except (ValueError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
            logger.warning(
                "the loss is not defined at a trial point, which is turned down: %s", error
            )
            return None

    def compute_plain_gradients(self, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The gradients that the closure gives when nothing is traced; ``.grad`` of all leaves is left alone."""
        before = [
            (leaf, leaf.grad) for leaf in {id(t): t for t in [*self._params, *leaves]}.values()
        ]
        self.count += 1
        self._effects.rewind()
        try:
            # So that what backward leaves is this run's gradient, and not added to an older one.
            for leaf, _ in before:
                leaf.grad = None
            with torch.enable_grad():
                with quiet_ddp(broadcast=False):
                    returned = self.function()
                # Backward may be called in it, or left to the optimizer.
                gradients = [p.grad for p in self._params]
                if all(gradient is None for gradient in gradients):  # it called no backward
                    loss, _ = _split_returned(returned, [])
                    gradients = torch.autograd.grad(loss, self._params, allow_unused=True)
            return gradients
        finally:
            self._effects.settle()
            for leaf, gradient in before:
                leaf.grad = gradient

    def leave_gradients(self, gradients: Sequence[Tensor], reached: Sequence[bool]) -> None:
        """Set ``.grad`` as one run of the closure leaves it: with the gradients added, if it calls ``backward``."""
        assert self._left_gradients is not None
        for p, old, new, flag in zip(
            self._params, self._left_gradients, gradients, reached, strict=True
        ):
            p.grad = (
                old if not (flag and self.called_backward) else new if old is None else old + new
            )

    def settle(self) -> None:
        """Put everything that the closure changes to where one run leaves it."""
        self._effects.settle()

    def rewind(self) -> None:
        """Undo what the closure changed."""
        self._effects.rewind()


def wrap_closures(closure: Any, params: Sequence[Tensor]) -> list[ReplayedClosure]:
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
                "step() needs a closure that computes the loss, or a list of them, got "
                f"{show(function)}"
            )
    return [ReplayedClosure(function, params) for function in closures]


@contextmanager
def undo_on_error(runs: Sequence[ReplayedClosure]) -> Iterator[None]:
    """Undo the side effects of closures, which first ran in this order, if the block raises."""
    try:
        yield
    except BaseException:
        # The last to run goes first: each had noted the state that the one before it left.
        for run in reversed(runs):
            run.rewind()
        raise


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Choose kernels that have second derivatives and forward mode, and modules that torch functions can be seen in.

    Where the closure uses checkpointing, derivatives run parts of it again, and must find the same
    kernels.
    """
    with ExitStack() as stack:
        # Fused attention has no second derivative and no forward mode (torch 2.13, CPU and CUDA).
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Compiled graphs hide their operations. Nobody has compiled anything if it is not imported,
        # which takes a second.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _split_returned(returned: Any, roots: list[Tensor]) -> tuple[Tensor, Any]:
    loss, metric = returned, None
    if isinstance(returned, tuple):
        if len(returned) != 2:
            raise TypeError(
                f"the closure must return a loss or (loss, metric), got a tuple of {len(returned)}"
            )
        loss, metric = returned
    if isinstance(metric, Tensor) and metric.numel() != 1:
        raise ValueError(
            f"a tensor returned as the metric must be a scalar KL, got shape {tuple(metric.shape)}"
        )
    if roots and isinstance(loss, Tensor | Number):
        return torch.stack([root.reshape(()) for root in roots]).sum(), metric
    if isinstance(loss, Distribution):
        raise TypeError(
            "the closure must return the loss first, then the distribution: (loss, distribution)"
        )
    if not isinstance(loss, Tensor):
        raise TypeError(f"the closure must return the loss as a tensor, got {type(loss).__name__}")
    if loss.is_complex():
        raise TypeError(f"the closure must return a real loss, got one of dtype {loss.dtype}")
    if loss.numel() != 1:
        raise ValueError(
            f"the closure must return a scalar loss, got shape {tuple(loss.shape)}; reduce it by "
            "mean()"
        )
    return loss.reshape(()), metric
