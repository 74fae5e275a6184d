"""One Lightning step as a closure that may run many times.

Lightning hands ``optimizer.step`` a closure that runs ``training_step``, ``zero_grad``,
``backward`` and all hooks around them. NaturalCG evaluates its closure at several points; here the
first evaluation does all of that, and the others compute the loss and nothing else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.plugins import Precision
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric, MetricCollection

from ngd_lightning.checks import check_trainer
from ngd_optim import NaturalCG

DISTRIBUTION = "distribution"
"""The key under which ``training_step`` returns its predictive distribution (or a scalar KL), beside ``"loss"``."""


class LightningStep:
    """What one call of ``optimizer.step`` is to evaluate.

    Args:
        model: the LightningModule.
        optimizer: the optimizer that steps.
        closure: Lightning's closure under automatic optimization, the user's under manual
            optimization.
    """

    def __init__(
        self, model: pl.LightningModule, optimizer: NaturalCG, closure: Callable[[], Any]
    ) -> None:
        self._model = model
        self._optimizer: Any = optimizer
        self._closure = closure
        self.__wrapped__ = closure  # what NaturalCG remembers the closure by
        self._metrics = [m for m in model.modules() if isinstance(m, Metric | MetricCollection)]
        self._loss: Tensor | None = None
        self._ran = False

    def __call__(self) -> Any:
        """The loss, and the distribution where ``training_step`` returned one."""
        first, self._ran = not self._ran, True
        backward = partial(self._backward, first=first)
        with (
            _own_states(self._metrics, keep=first),
            _replaced(self._model, "manual_backward", backward),
        ):
            if first:
                return self._evaluate(first)
            with _without_logging(self._model):
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
        self._backward(loss, first=first)
        return loss if DISTRIBUTION not in result.extra else (loss, result.extra[DISTRIBUTION])

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
        precision.backward(loss, self._model, optimizer, *args, **kwargs)


def attach(optimizer: NaturalCG) -> list[Any]:
    """Let an optimizer understand Lightning's closures; the handles undo it."""
    current: list[LightningStep] = []

    def before(
        _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        current.clear()
        closure = kwargs.get("closure")
        if not (
            isinstance(closure, partial)
            and isinstance(getattr(closure.func, "__self__", None), Precision)
        ):
            return None
        model, _, inner = closure.args
        check_trainer(model.trainer)
        if inner is do_nothing_closure:
            raise TypeError(
                "NaturalCG needs a closure that computes the loss: optimizer.step(closure), with "
                "manual_backward(loss) in the closure, or return loss"
            )
        ddp = model.trainer.strategy.model
        if optimizer.process_group is None and isinstance(ddp, DistributedDataParallel):
            optimizer.process_group = ddp.process_group
        current.append(LightningStep(model, optimizer, inner))
        return args, {**kwargs, "closure": current[0]}

    def at_the_gradient(_: Any) -> None:
        for step in current:
            step.after_backward()

    def after(*_: Any) -> None:
        current.clear()  # and with it the batch

    return [
        optimizer.register_step_pre_hook(before),
        optimizer.register_gradient_hook(at_the_gradient),
        optimizer.register_step_post_hook(after),
    ]


def _detached(result: ClosureResult) -> ClosureResult:
    """The result that Lightning passes on to hooks, its loss without the graph."""
    return ClosureResult(
        None if result.closure_loss is None else result.closure_loss.detach(), extra=result.extra
    )


@contextmanager
def _own_states(metrics: Sequence[Metric | MetricCollection], *, keep: bool) -> Iterator[None]:
    """Let torchmetrics update copies of their states, and put the old ones back unless they are to be kept.

    A copy made inside the traced closure is no buffer of the model: forward mode can follow the
    closure.
    """
    saved = [dict(vars(metric)) for metric in metrics]
    copies: dict[int, Tensor] = {}
    for metric in metrics:
        for name, value in metric.metric_state.items() if isinstance(metric, Metric) else ():
            # Metrics of one collection may share a tensor.
            copy = (
                copies.setdefault(id(value), value.clone())
                if isinstance(value, Tensor)
                else list(value)
            )
            setattr(metric, name, copy)
    try:
        yield
    finally:
        if not keep:
            for metric, attributes in zip(metrics, saved, strict=True):
                vars(metric).clear()
                vars(metric).update(attributes)


@contextmanager
def _without_logging(model: pl.LightningModule) -> Iterator[None]:
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, pl.LightningModule):
                stack.enter_context(_replaced(module, "log", lambda *_, **__: None))
        yield


@contextmanager
def _replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object an attribute of its own for a while."""
    missing = object()
    before = vars(thing).get(name, missing)
    vars(thing)[name] = value
    try:
        yield
    finally:
        if before is missing:
            del vars(thing)[name]
        else:
            vars(thing)[name] = before
