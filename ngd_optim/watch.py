"""Kronecker factors of the losses that a training loop differentiates."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ngd_optim.autograd_graph import find_reached, run_in_backward_of_its_own
from ngd_optim.curvature import OutputMetric, gauss_newton
from ngd_optim.jacobian import Layer, uses_of
from ngd_optim.kernels import twice_differentiable
from ngd_optim.kronecker import KroneckerFactors, estimate_factors
from ngd_optim.parameters import FlatParameters
from ngd_optim.tracing import Evaluation, LossWatch


class FactorWatch:
    """Estimates factors while the gradients of recognised losses come back, and adds them up."""

    def __init__(self) -> None:
        self._factors: KroneckerFactors | None = None
        self._losses: list[LossWatch] = []
        self._is_open = False

    @contextmanager
    def watching(
        self,
        parameters: FlatParameters,
        generator: torch.Generator,
        inverses: Mapping[Layer, tuple[Tensor, Tensor]],
    ) -> Iterator[None]:
        """See the losses that the block computes, which may be differentiated there or later.

        Args:
            parameters: whose factors they are.
            generator: draws the vectors that are pulled back.
            inverses: of the factors that are known.
        """
        if self._is_open:
            yield
            return

        def estimate(call: Any, weight: Tensor) -> None:
            with torch.enable_grad(), twice_differentiable():
                metric = _metric_of(call, weight)
                if metric is not None:
                    uses = uses_of(metric.outputs, parameters.tensors, tables=True)
                    if uses or any(find_reached(metric.outputs, parameters.tensors)):
                        self._add(estimate_factors(uses, metric, parameters, generator, inverses))

        def see(call: Any, weight: Tensor) -> None:
            run_in_backward_of_its_own(lambda: estimate(call, weight), weight.device)

        losses = LossWatch(see)
        self._losses.append(losses)  # the graph knows it by a weak reference
        try:
            self._is_open = True
            with losses:
                yield
        finally:
            losses.leave()
            self._is_open = False

    def take(self) -> KroneckerFactors | None:
        """The factors of all that came back since the last call; None where no loss did."""
        factors, self._factors = self._factors, None
        self._losses.clear()
        return factors

    def _add(self, factors: KroneckerFactors) -> None:
        self._factors = factors if self._factors is None else self._factors.add(factors)


def _metric_of(call: Any, weight: Tensor) -> OutputMetric | None:
    """Of what counts ``weight`` times the result of a recognised loss function."""
    if call.result.dtype == torch.float16:
        raise RuntimeError(
            "the loss is computed in float16, which has too little range for the curvature, with a "
            "GradScaler too; use torch.autocast(..., dtype=torch.bfloat16) without one"
        )
    return gauss_newton(Evaluation((weight * call.result).sum(), None, (call,)), smoothing=None)


class WatchedModule:
    """A module whose losses are watched, until it is removed. A copy of the module is not watched.

    Args:
        module: in whose forward the loss is computed.
        watch: makes the context in which it runs.
    """

    def __init__(self, module: nn.Module | None, watch: Callable[[], Any] | None) -> None:
        self._watch = watch
        self._running: list[ExitStack] = []
        self._handles: list[Any] = []
        if module is not None:
            self._handles = [
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def remove(self) -> None:
        """End it; where the module is running, when that ends."""
        self._watch = None
        if not self._running:
            for handle in self._handles:
                handle.remove()

    def _enter(self, *_: Any) -> None:
        # A hook within a compiled module would be compiled as well.
        if not torch.compiler.is_compiling():
            self._running.append(ExitStack())  # a module may call itself
            if self._watch is not None:
                self._running[-1].enter_context(self._watch())

    def _leave(self, *_: Any) -> None:
        if self._running and not torch.compiler.is_compiling():
            self._running.pop().close()
            if self._watch is None:
                self.remove()

    def __reduce__(self) -> Any:
        return WatchedModule, (None, None)
