"""Kronecker factors of the losses that a training loop differentiates."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ngd_optim.curvature import gauss_newton
from ngd_optim.jacobian import uses_of
from ngd_optim.kronecker import KroneckerFactors, estimate_factors
from ngd_optim.parameters import FlatParameters
from ngd_optim.tracing import Evaluation, LossWatch, twice_differentiable


class FactorWatch:
    """Estimates factors while the gradients of recognised losses come back, and adds them up."""

    def __init__(self) -> None:
        self._factors: KroneckerFactors | None = None
        self._losses: list[LossWatch] = []
        self._is_open = False

    @contextmanager
    def watching(self, parameters: FlatParameters, generator: torch.Generator) -> Iterator[None]:
        """See the losses that the block computes, which may be differentiated there or later.

        Args:
            parameters: whose factors they are.
            generator: draws the vectors that are pulled back.
        """
        if self._is_open:
            yield
            return
        losses = LossWatch(partial(self._see, parameters, generator))
        self._losses.append(losses)  # the graph knows it by a weak reference
        self._is_open = True
        try:
            with losses:
                yield
        finally:
            self._is_open = False

    def take(self) -> KroneckerFactors | None:
        """The factors of all that came back since the last call; None where no loss did."""
        factors, self._factors = self._factors, None
        self._losses.clear()
        return factors

    def _see(
        self, parameters: FlatParameters, generator: torch.Generator, call: Any, weight: Tensor
    ) -> None:
        if call.result.dtype == torch.float16:
            raise RuntimeError(
                "the loss is computed in float16, which has too little range for the curvature, "
                "with a GradScaler too; use torch.autocast(..., dtype=torch.bfloat16) without one"
            )
        with torch.enable_grad(), twice_differentiable():
            loss = (weight * call.result).sum()
            metric = gauss_newton(Evaluation(loss, None, (call,)))
            if metric is None:
                return
            uses = uses_of(metric.outputs, parameters.tensors)
            factors = estimate_factors(uses, metric, parameters, generator)
        self._factors = factors if self._factors is None else self._factors.add(factors)


class WatchedModule:
    """A module whose losses are watched, until it is removed. A copy of the module is not watched.

    Args:
        module: in whose forward the loss is computed.
        watch: makes the context in which it runs.
    """

    def __init__(self, module: nn.Module | None, watch: Callable[[], Any] | None) -> None:
        self._watch = watch
        self._stack = ExitStack()
        self._handles: list[Any] = []
        if module is not None:
            self._handles = [
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def remove(self) -> None:
        """End it."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, *_: Any) -> None:
        if self._watch is not None:
            self._stack.enter_context(self._watch())

    def _leave(self, *_: Any) -> None:
        self._stack.close()

    def __reduce__(self) -> Any:
        return WatchedModule, (None, None)
