"""A closure at the parameters as they are: what it computed there, and what it computes elsewhere."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ngd_optim.autograd_graph import find_reached, has_empty_tensors
from ngd_optim.curvature.kl import refuse_moving_transforms, tensors_of, with_tensors
from ngd_optim.curvature.metric import OutputMetric, ScalarMetric, metric_of
from ngd_optim.curvature.vector_products import (
    Map,
    difference_along,
    hessian,
    hessian_by_forward_mode,
    pull_back,
    push_by_double_backward,
    push_forward,
)
from ngd_optim.names import Backend, Curvature
from ngd_optim.parameters import FlatParameters
from ngd_optim.program import CannotReplayError
from ngd_optim.recording import ForwardProgram, ForwardRecorder
from ngd_optim.torch_internals import hooks_of
from ngd_optim.tracing import Evaluation, TracedClosure

logger = logging.getLogger("ngd_optim")

Tensors = Sequence[Tensor]


class Graph:
    """A closure's evaluation and its metric, with the graph that leads to both, and with what was recorded.

    The graph is kept until :meth:`release`. A later :meth:`get` runs the closure again. So the
    order in which a point is asked for things does not matter.

    Args:
        run: the closure.
        parameters: what it is a function of.
        curvature: the setting of that name.
        smoothing: how wide kinks are rounded; see :func:`~ngd_optim.recognised.parabolas.irls_weight`.
            None: they are not.

    Attributes:
        replays: whether trial points replay what was recorded; else they run the closure.
        is_repeatable: whether the closure is known to compute the same each time that it runs.
    """

    def __init__(
        self,
        run: TracedClosure,
        parameters: FlatParameters,
        curvature: Curvature,
        smoothing: float | None = None,
    ) -> None:
        self.run = run
        self.replays = True
        self.is_repeatable = False
        self._parameters = parameters
        self._curvature: Curvature = curvature
        self._smoothing = smoothing
        self._kept: tuple[Evaluation, OutputMetric | ScalarMetric] | None = None
        self._recorder: ForwardRecorder | None = None
        self._trial: ForwardProgram | None = None
        self._outputs: ForwardProgram | None = None
        self._around: ForwardProgram | None = None
        self._returned: object = None
        self._was_empty = False

    def get(self) -> tuple[Evaluation, OutputMetric | ScalarMetric]:
        """The evaluation and the metric."""
        if self._kept is None:
            with torch.enable_grad():
                if self._recorder is None:
                    traced = self.run.trace()
                    self._recorder, self._returned = traced.recorder, traced.metric
                    assert self._recorder is not None
                    with self._recorder:  # distributions compute some parameters when asked
                        tensors_of(self._returned)
                    if self._curvature in ("auto", "fisher"):
                        refuse_moving_transforms(self._returned, self._recorder.has_seen)
                else:
                    traced = self.run.run_again(graph=True, replaces_first=True)
                self._kept = traced, metric_of(traced, self._curvature, self._smoothing)
        return self._kept

    def release(self, *, for_good: bool = True) -> None:
        """Free the memory of the graph, ``for_good`` if nobody will ask for outputs or products again."""
        self._build_trial()
        if not for_good:
            self._program_of_outputs()
            self._program_around()
            self._was_empty = self.is_empty()
        self._kept = None

    def is_empty(self) -> bool:
        """Whether tensors without elements went into the loss; to be asked before a release for good."""
        kept = self._kept
        return self._was_empty if kept is None else has_empty_tensors([kept[0].loss])

    # What was recorded, as functions. They are made of the first run's tensors, and kept.

    def _build_trial(self) -> None:
        if self._trial is not None or not self._is_at_hand:
            return
        (traced, _), returned = self.get(), tensors_of(self._returned)
        # The loss holds fixed what autograd does. A prediction is what it is.
        self._trial = (
            self.recorder.program([traced.loss, *returned], conditions=True)
            if isinstance(self._returned, Tensor)
            else self.recorder.program([traced.loss], predicted=returned, conditions=True)
        )

    def _program_of_outputs(self) -> ForwardProgram | None:
        """The metric's outputs; None if they are not recorded, or no longer."""
        if self._outputs is None and self._is_at_hand:
            _, metric = self.get()
            self._outputs = self.recorder.program(metric.outputs)
        return self._outputs

    def _program_around(self) -> ForwardProgram | None:
        """The loss, with the metric's outputs fixed."""
        if self._around is None and self._is_at_hand:
            traced, metric = self.get()
            inputs = metric.inputs if isinstance(metric, OutputMetric) else ()
            self._around = self.recorder.program([traced.loss], fixed=inputs)
        return self._around

    @property
    def _is_at_hand(self) -> bool:
        """Whether programs can be made: the first run's graph is there."""
        return self._kept is not None and self._kept[0].recorder is not None and not self.problem

    def describe(self) -> Any:
        """What tells, beside the operations that were recorded, which product this is; None if that is not all.

        It is not where derivatives are others than those of the operations (hooks, Functions,
        checkpoints), or where kinks are rounded, by another width at each step.
        """
        traced, metric = self.get()
        if not self._is_at_hand:
            return None
        has_hooks = traced.has_hooks or any(hooks_of(p) for p in self._parameters.tensors)
        is_hidden = has_hooks or self.recorder.calls_functions or self.run.recomputes
        if is_hidden or (isinstance(metric, OutputMetric) and metric.bends):
            return None
        calls = [(call.name, call.arguments.arguments, call.result) for call in traced.losses]
        return traced.loss, calls, traced.metric, list(metric.outputs)

    @property
    def recorder(self) -> ForwardRecorder:
        """What has noted the first run."""
        if self._recorder is None:
            self.get()
        assert self._recorder is not None
        return self._recorder

    @property
    def problem(self) -> str | None:
        """Why trial points cannot replay what was recorded; None if they can."""
        return self.recorder.problem

    # Elsewhere.

    def evaluate_trial(self) -> Evaluation | None:
        """The closure at the parameters as they are now, without a graph; None outside of its domain."""
        self.run.count += 1
        return self.evaluate(by_replay=self.replays)

    @torch.no_grad()
    def evaluate(self, *, by_replay: bool) -> Evaluation | None:
        """The same, in one of two ways."""
        try:
            if by_replay:
                return self._replay()
            return self.run.run_again(graph=False)
        except torch.OutOfMemoryError:
            raise
        except CannotReplayError as error:
            if self.is_repeatable:
                return self.evaluate(by_replay=False)
            logger.warning(
                "a trial point is turned down, because the closure takes another branch there than at "
                "the parameters as they are (%s), and running it again is of no use: it is not known "
                "to compute the same each time; take the batch and all random numbers that are not "
                "torch's before the step, not in the closure",
                error,
            )
        except Exception as error:
            logger.warning(
                "the loss is not defined at a trial point, which is turned down: %s: %s",
                type(error).__name__,
                error,
            )
        return None

    def _replay(self) -> Evaluation:
        self._build_trial()
        if self._trial is None:
            raise CannotReplayError(self.problem)
        loss, *tensors = self._trial(self._parameters.tensors)
        return Evaluation(loss, with_tensors(self._returned, tensors))

    @torch.no_grad()
    def evaluate_outputs(self) -> Tensors | None:
        """The metric's outputs at the parameters as they are now; None where there are none."""
        _, metric = self.get()
        assert isinstance(metric, OutputMetric)
        program = self._program_of_outputs() if self.replays else None
        if program is not None:
            return program(self._parameters.tensors)
        there = self.evaluate(by_replay=False)
        return None if there is None else metric.select(there)

    def compute_gradient(self) -> Tensor:
        """That of a scalar metric at the parameters as they are now, flat."""
        _, metric = self.get()
        assert isinstance(metric, ScalarMetric)
        params = self._parameters.tensors
        with torch.enable_grad():
            program = self._program_of_outputs() if self.replays else None
            # A Function's operations have other derivatives than its own backward.
            if program is not None and not program.has_functions:
                (scalar,) = program(params)
            else:
                scalar = metric.select(self.run.run_again(graph=True))
            gradients = torch.autograd.grad(scalar, params, allow_unused=True)
        return self._parameters.flatten(gradients)

    # Products.

    def push(self, backend: Backend) -> Map:
        """``v ↦ J v`` for the outputs of an :class:`OutputMetric`."""
        _, metric = self.get()
        params = self._parameters.tensors
        match backend:
            case "torch.func":
                program = self._require_outputs_program()
                return push_forward(lambda *tensors: tuple(program(tensors)), params)
            case "double-backward":
                return push_by_double_backward(metric.outputs, params)
            case "differences":
                return self._differentiate(self._require_outputs)

    def product(self, backend: Backend) -> Map:
        """``v ↦ F v``, one tensor per parameter."""
        _, metric = self.get()
        params = self._parameters.tensors
        if isinstance(metric, OutputMetric):
            # Its own: what makes it is a part of the product that is recorded.
            apply_hessian = metric.make_hessian()
            push, pull = self.push(backend), pull_back(metric.outputs, params)
            return lambda v: pull(apply_hessian(push(v)))
        match backend:
            case "torch.func":
                program = self._require_outputs_program()
                return hessian_by_forward_mode(lambda *tensors: program(tensors)[0], params)
            case "double-backward":
                return hessian(metric.scalar, params)
            case "differences":
                return self._differentiate(
                    lambda: self._parameters.unflatten(self.compute_gradient())
                )

    def penalty(self) -> Map | None:
        """The Hessian of what the loss takes from parameters around the outputs, such as a weight penalty, if any."""
        program = self._program_around()
        if program is None:
            logger.info(
                "the curvature around the outputs is left out, because %s", self._why_no_program()
            )
            return None
        params = self._parameters.tensors
        if (
            program.has_functions
        ):  # whose operations may depend on parameters that it is constant in
            return None
        with torch.enable_grad():
            (loss,) = program(params)
            if not loss.requires_grad:
                return None
            return hessian(loss, params) if any(find_reached([loss], params)) else None

    def _require_outputs_program(self) -> ForwardProgram:
        program = self._program_of_outputs()
        if program is None:
            raise CannotReplayError(self._why_no_program())
        return program

    def _why_no_program(self) -> str:
        return self.problem or "the closure's first run is no longer at hand"

    def _require_outputs(self) -> Tensors:
        outputs = self.evaluate_outputs()
        if outputs is None:
            raise RuntimeError("the closure is not defined beside the parameters as they are")
        return outputs

    def _differentiate(self, function: Callable[[], Tensors]) -> Map:
        """``v ↦`` the derivative of a function of the parameters along ``v``, by differences."""
        theta = self._parameters.read()
        scale = theta.norm().item()

        def displaced(d: Tensor) -> Tensors:
            with self._parameters.displaced(theta, d, 1.0):
                return [t.detach() for t in function()]

        return lambda v: difference_along(displaced, self._parameters.flatten(v), scale)
