"""One Lightning step as a closure that may run many times.

Lightning hands ``optimizer.step`` a closure that runs ``training_step``, ``zero_grad``,
``backward`` and all hooks around them. NaturalCG evaluates its closure at several points; here the
first evaluation does all of that, and the others compute the loss and nothing else.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.plugins import Precision
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ngd_lightning.checks import check_trainer
from ngd_lightning.once import metrics_of, own_states, replaced, unnoticed
from ngd_lightning.window import EarlierBatch, Window
from ngd_optim import NaturalCG

DISTRIBUTION = "distribution"
"""The key under which ``training_step`` returns its predictive distribution (or a scalar KL), beside ``"loss"``."""

_NO_CLOSURE = (
    "NaturalCG computes the loss at several points, so step() needs a closure: write "
    "def closure(): loss = ...; self.manual_backward(loss); return loss, and "
    "optimizer.step(closure), in place of self.manual_backward(loss) and optimizer.step()"
)


class LightningStep:
    """What one call of ``optimizer.step`` is to evaluate.

    Args:
        model: the LightningModule.
        optimizer: the optimizer that steps.
        closure: Lightning's closure under automatic optimization, the user's under manual
            optimization.
        clears: let go of the gradients that are there, to which those of earlier batches were
            added.
    """

    def __init__(
        self,
        model: pl.LightningModule,
        optimizer: NaturalCG,
        closure: Callable[[], Any],
        *,
        clears: bool = False,
    ) -> None:
        self._model = model
        self._optimizer: Any = optimizer
        self._closure = closure
        self._clears = clears
        self._metrics = metrics_of(model)
        self._loss: Tensor | None = None
        self._ran = False

    def __call__(self) -> Any:
        """The loss, and the distribution where ``training_step`` returned one."""
        first, self._ran = not self._ran, True
        backward = partial(self._backward, first=first)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())  # which training_step counts on
            stack.enter_context(
                own_states(self._metrics, keep=True)
                if first
                else unnoticed(self._model, self._metrics)
            )
            stack.enter_context(replaced(self._model, "manual_backward", backward))
            return self._evaluate(first)

    def after_backward(self) -> None:
        """The hooks that look at gradients."""
        precision = self._model.trainer.precision_plugin
        with torch.enable_grad():
            if self._loss is not None:
                precision.post_backward(self._loss, self._model)
            precision._after_closure(self._model, self._optimizer)

    def _evaluate(self, first: bool) -> Any:
        if not isinstance(self._closure, Closure):
            return self._evaluate_manually()
        result = self._closure._step_fn()
        loss = result.closure_loss
        if loss is None:
            raise ValueError(
                "training_step returned None to skip a batch, but NaturalCG needs a loss in every "
                "step; leave such batches out of the data, or use manual optimization and do not "
                "call step for them"
            )
        if first:
            self._closure._result = _detached(result)
            if self._closure._zero_grad_fn is not None:
                self._closure._zero_grad_fn()
            if self._clears:
                self._optimizer.zero_grad()
        self._backward(loss, first=first)
        return _returned(result, self._model)

    def _evaluate_manually(self) -> Any:
        returned = self._closure()
        if isinstance(returned, Mapping):
            return (
                (returned["loss"], returned[DISTRIBUTION])
                if DISTRIBUTION in returned
                else returned["loss"]
            )
        # The closures in Lightning's documentation return nothing. What counts is what backward was
        # called on.
        return 0.0 if returned is None else returned

    def _backward(self, loss: Tensor, *args: Any, first: bool, **kwargs: Any) -> None:
        precision = self._model.trainer.precision_plugin
        optimizer = self._optimizer if self._model.automatic_optimization else None
        if first:
            self._loss = loss.detach()
            loss = precision.pre_backward(loss, self._model)
        if self._model.automatic_optimization:
            loss = _undivided(loss, self._model)
        precision.backward(loss, self._model, optimizer, *args, **kwargs)


def attach(optimizer: NaturalCG, window: Window) -> list[Any]:
    """Let an optimizer understand Lightning's closures; the handles undo it."""
    current: list[LightningStep] = []
    earlier: list[EarlierBatch] = []

    def before(
        _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        current.clear()
        earlier.clear()
        closure = kwargs.get("closure")
        if not (
            isinstance(closure, partial)
            and isinstance(getattr(closure.func, "__self__", None), Precision)
        ):
            return None
        model, _, inner = closure.args
        check_trainer(model.trainer)
        if inner is do_nothing_closure:
            raise TypeError(_NO_CLOSURE)
        ddp = model.trainer.strategy.model
        if optimizer.process_group is None and isinstance(ddp, DistributedDataParallel):
            optimizer.process_group = ddp.process_group
        if isinstance(inner, Closure):
            earlier.extend(window.take())
        current.append(LightningStep(model, optimizer, inner, clears=bool(earlier)))
        # The last batch goes first: .grad is left as by the first closure of a list.
        closures = [current[0], *(partial(_evaluate_earlier, model, batch) for batch in earlier)]
        return args, {**kwargs, "closure": closures if earlier else current[0]}

    def at_the_gradient(_: Any) -> None:
        for step in current:
            step.after_backward()

    def after(*_: Any) -> None:
        for batch in earlier:
            batch.warn_of_another_loss()
        current.clear()  # and with it the batch
        earlier.clear()

    return [
        optimizer.register_step_pre_hook(before),
        optimizer.register_gradient_hook(at_the_gradient),
        optimizer.register_step_post_hook(after),
    ]


def _evaluate_earlier(model: pl.LightningModule, batch: EarlierBatch) -> Any:
    return _returned(batch.again(), model)


def _returned(result: ClosureResult, model: pl.LightningModule) -> Any:
    """What NaturalCG takes: the loss, and the distribution where there is one."""
    assert result.closure_loss is not None
    loss = _undivided(result.closure_loss, model)
    return loss if DISTRIBUTION not in result.extra else (loss, result.extra[DISTRIBUTION])


def _undivided(loss: Tensor, model: pl.LightningModule) -> Tensor:
    """The loss of one batch: Lightning divides it by ``accumulate_grad_batches``, and a step takes the mean."""
    batches = model.trainer.accumulate_grad_batches
    return loss if batches == 1 else loss * batches


def _detached(result: ClosureResult) -> ClosureResult:
    """The result that Lightning passes on to hooks, its loss without the graph."""
    return ClosureResult(
        None if result.closure_loss is None else result.closure_loss.detach(), extra=result.extra
    )
