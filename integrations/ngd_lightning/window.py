"""The batches of a step, and ``training_step`` of each, which may run many times.

Under ``accumulate_grad_batches`` Lightning runs ``training_step`` and ``backward`` of each batch
when it comes, and hands the optimizer the closure of the last one. A step needs the loss and the
curvature of all of them, so the others are noted here, and are closures of the step as well.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.utilities import rank_zero_warn

from ngd_lightning.once import (
    Start,
    Taken,
    fresh,
    metrics_of,
    replaced,
    unnoticed,
    without_broadcasts,
)

Arguments = OrderedDict[str, Any]
StepFunction = Callable[[], ClosureResult]

_SAME_LOSS = 0.05
"""Other kernels, whose derivatives can be differentiated, and bfloat16 round a loss by less than this part."""


class Window:
    """The batches whose gradients Lightning has added up since the last step.

    Attributes:
        batches: those of which ``training_step`` returned a loss. Their data, buffers and random
            numbers are held, no graph.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.batches: list[EarlierBatch] = []
        self._trainer = trainer
        self._epoch = trainer.fit_loop.epoch_loop
        self._loop = self._epoch.automatic_optimization
        self._make_step_fn = self._loop._make_step_fn
        self._optimizer_step = self._loop._optimizer_step

    @contextmanager
    def open(self) -> Iterator[None]:
        """Note batches from now on."""
        with (
            replaced(self._loop, "_make_step_fn", self._make_repeatable),
            replaced(self._loop, "_optimizer_step", self._step_unless_skipped),
        ):
            yield

    def take(self) -> "list[EarlierBatch]":
        """The batches of the step that begins now, but for its last."""
        batches, self.batches = self.batches, []
        return batches

    def _make_repeatable(self, kwargs: Arguments) -> StepFunction:
        if self._epoch.batch_idx % self._trainer.accumulate_grad_batches == 0:
            self.batches = []  # as Lightning clears the gradients
        if self._loop._skip_backward:
            return self._make_step_fn(kwargs)
        model = self._trainer.lightning_module
        if self._epoch._should_accumulate():
            return EarlierBatch(model, self._make_step_fn, kwargs, self.batches.append)
        return Repeatable(model, self._make_step_fn, kwargs)

    def _step_unless_skipped(self, batch_idx: int, closure: Closure) -> None:
        """StochasticWeightAveraging goes through the data once more, for BatchNorm: nothing is to move."""
        if closure._backward_fn is not None:
            self._optimizer_step(batch_idx, closure)
            return
        progress = self._loop.optim_progress.optimizer.step
        progress.increment_ready()
        closure()
        progress.increment_completed()


class Repeatable:
    """``training_step`` of one batch, which finds data and random numbers as it was when it ran first.

    Args:
        model: the LightningModule.
        make: a function that runs it, from the arguments of ``training_step``.
        kwargs: those arguments.
    """

    keeps_copies = False
    """Whether its tensors and buffers are copies, as nobody undoes what the first run does to them."""

    def __init__(
        self,
        model: pl.LightningModule,
        make: Callable[[Arguments], StepFunction],
        kwargs: Arguments,
    ) -> None:
        self._model = model
        self._make = make
        self._first: Arguments | None = kwargs
        self._kwargs: Arguments = OrderedDict()
        self._taken: dict[str, Taken] = {}
        self._start: Start | None = None

    def __call__(self) -> ClosureResult:
        """As Lightning has it; from the second time on, :meth:`again`."""
        if self._first is None:
            return self.again()
        kwargs, self._first = self._first, None
        for name, value in kwargs.items():
            if isinstance(value, Iterator):  # training_step(self, dataloader_iter)
                self._taken[name] = kwargs[name] = Taken(value, clones=self.keeps_copies)
            else:
                self._kwargs[name] = fresh(value, clones=self.keeps_copies)
        self._start = Start(self._model, clones=self.keeps_copies)
        try:
            return self._make(kwargs)()
        finally:
            self._start.note_changes()

    def again(self) -> ClosureResult:
        """The same at the parameters as they are now."""
        assert self._start is not None
        kwargs = OrderedDict((name, fresh(v, clones=True)) for name, v in self._kwargs.items())
        for name, taken in self._taken.items():
            kwargs[name] = iter([fresh(item, clones=True) for item in taken.items])
        with self._start.again():
            try:
                return self._make(kwargs)()
            except StopIteration as error:
                raise RuntimeError(
                    "training_step took fewer batches from its iterator when it ran first"
                ) from error


class EarlierBatch(Repeatable):
    """A batch that has run before the step, and runs again in the step for its loss alone.

    Args:
        model, make, kwargs: as for :class:`Repeatable`.
        note: is given this object once it has run, if there is a loss.
    """

    keeps_copies = True

    def __init__(
        self,
        model: pl.LightningModule,
        make: Callable[[Arguments], StepFunction],
        kwargs: Arguments,
        note: "Callable[[EarlierBatch], None]",
    ) -> None:
        super().__init__(model, make, kwargs)
        self._note = note
        self._losses: list[torch.Tensor | None] = []

    def __call__(self) -> ClosureResult:
        """As Lightning has it."""
        result = super().__call__()
        if result.closure_loss is not None:
            self._losses = [result.loss]
            self._note(self)
        return result

    def again(self) -> ClosureResult:
        """The same loss at the parameters as they are now, and nothing else."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(unnoticed(self._model, metrics_of(self._model)))
            stack.enter_context(without_broadcasts(self._model.trainer.strategy.model))
            result = super().again()
        if result.closure_loss is None:
            raise ValueError(
                "training_step returned a loss when a batch came, and None when it ran again in the "
                "step; accumulate_grad_batches needs the same each time that it runs"
            )
        if len(self._losses) == 1:  # the parameters are where they were
            self._losses.append(result.loss)
        return result

    def warn_of_another_loss(self) -> None:
        """After the step: whether its first run of ``training_step`` gave the loss that Lightning saw."""
        then, now = (math.nan if loss is None else loss.item() for loss in self._losses)
        if math.isfinite(then - now) and not math.isclose(then, now, rel_tol=_SAME_LOSS):
            rank_zero_warn(
                f"training_step gave a loss of {then:g} when a batch came and {now:g} when it ran "
                "again in the step, as accumulate_grad_batches needs; the step is made for the "
                "latter; keep what it remembers between batches (hidden states, counters) out of "
                "training_step, or use a larger batch_size in place of accumulate_grad_batches"
            )
