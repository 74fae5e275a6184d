"""What is compared at the first step with a closure: the loss with its gradient, and products with what they must be.

All witnesses are independent of what they judge: differences of the loss, of the outputs and of the
gradient; the plain pull-back, whose adjoint ``v ↦ J v`` is; the symmetry of the curvature.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ngd_optim.curvature import Graph, OutputMetric, pull_back
from ngd_optim.layout import whole
from ngd_optim.linearization.backend import Product, Way, explain_failure, reraise_own_kinds
from ngd_optim.names import Backend
from ngd_optim.parameters import FlatParameters
from ngd_optim.real_parts import real_parts
from ngd_optim.recording import record

logger = logging.getLogger("ngd_optim")

_LONG, _SMALL = 400, 2**18
"""Operations, and bytes that each computes on average.

To note so many small operations pays after some forty products only: autograd's engine, which
pushes through a graph that is there, is almost as fast as a replay.
"""

_SLOPE_TOLERANCE = 1e-3
"""A slope agrees with the gradient, and a replay with a run, to this part."""

_COARSE_EPS = 1e-4
"""Between float32's and those of float16 and bfloat16."""

_COARSE = 0.05
"""Products by differences are as exact as this, in float32 and along kinks."""


class Motion(NamedTuple):
    """How a closure's loss is found at other parameters, and whether it moves there as its gradient says.

    Attributes:
        replays: by what was recorded of the closure; else by running it.
        is_repeatable: whether the closure is known to compute the same each time that it runs.
        problem: in what way the loss does not follow its gradient; None if it does, or if rounding
            hides it.
    """

    replays: bool
    is_repeatable: bool
    problem: str | None


def find_motion(graph: Graph, gradient: Tensor, parameters: FlatParameters, eps: float) -> Motion:
    """Choose how the loss is found at trial points, and compare it with the gradient along a random direction.

    Raises:
        RuntimeError: it can be found in no way, or it does not depend on the parameters.
    """
    traced, _ = graph.get()
    recorder = graph.recorder
    if not gradient.any():  # nothing can be seen
        return Motion(recorder.problem is None, False, None)
    loss = traced.loss.item()
    walk = _Walk(graph, gradient, parameters, eps)
    problem_by_replay = None if recorder.problem else walk.compare(by_replay=True)
    if recorder.problem is None and problem_by_replay is None and not recorder.reads_values:
        # A condition that changes at a trial point sends that point to the closure itself.
        return Motion(True, recorder.has_conditions and _is_repeatable(graph, loss), None)
    is_repeatable = _is_repeatable(graph, loss)
    if recorder.problem and not is_repeatable:
        raise RuntimeError(
            f"trial points must run the closure again, because {recorder.problem}, and it does not "
            "compute the same loss again; take the batch and all random numbers that are not "
            "torch's before the step, not in the closure"
        )
    if recorder.reads_values and not is_repeatable:
        logger.warning(
            "the closure ran twice at this first step, because it reads numbers that depend on the "
            "parameters (item(), say), and did not compute the same loss again: whatever it does "
            "beside (taking a batch, keeping an average) was done twice; from now on it runs once a "
            "step. Do that before the step, or read no numbers in the closure (detach() what is to "
            "be shown, and read it after the step), for it to run once at all steps"
        )
    # What it read may not have been for the loss.
    agree = is_repeatable and not recorder.problem and walk.agree()
    problem_by_run = (
        walk.compare(by_replay=False) if is_repeatable and not agree else problem_by_replay
    )
    if problem_by_run == _CONSTANT and not recorder.depends(traced.loss):
        raise RuntimeError(
            "the loss does not change with the parameters: it was computed before the closure ran; "
            "compute it in the closure, from the parameters as they are then"
        )
    if agree:
        return Motion(True, True, problem_by_replay)
    # What is read from the parameters is held fixed by autograd; a closure that goes its own way by
    # it is judged by what it does.
    replays = not recorder.problem and (problem_by_run is not None or not is_repeatable)
    if not replays:
        logger.info(
            "trial points run the closure again, because %s",
            recorder.problem or "it reads numbers that depend on the parameters",
        )
    return Motion(replays, is_repeatable, problem_by_replay if replays else problem_by_run)


_CONSTANT = "it does not change at all"


class _Walk:
    """A closure's loss along one direction, in which its slope is known."""

    def __init__(
        self, graph: Graph, gradient: Tensor, parameters: FlatParameters, eps: float
    ) -> None:
        self._graph = graph
        self._parameters = parameters
        self._theta = parameters.read()
        generator = torch.Generator(device="cpu").manual_seed(0)
        # Mostly along the gradient, where there is something to see, each part of it by its own
        # weight; and a little into all directions.
        direction = torch.randn(gradient.shape, generator=generator, device="cpu").to(gradient)
        direction.add_(1).mul_(gradient).div_(gradient.norm())
        other = torch.randn(gradient.shape, generator=generator, device="cpu").to(gradient)
        direction.add_(other.div_(other.norm()))
        self._direction = direction.div_(direction.norm())
        self._slope = torch.dot(gradient, self._direction).item()
        self._length = max(eps ** (1 / 3) * self._theta.norm().item(), eps**0.5)
        # Rounding falls with the length, and what is not linear grows: a difference that stays the
        # same is neither. In bfloat16 the first length is a fifth of the parameters, where no deep
        # model is linear any more.
        self._factors = (1, 4, 16) if eps < _COARSE_EPS else (1 / 64, 1 / 16, 1 / 4, 1, 4, 16)

    def compare(self, *, by_replay: bool) -> str | None:
        """How the slope of the loss differs from that of the gradient; None if it does not, or nobody can tell."""
        slopes: list[float] = []
        for factor in self._factors:
            ahead, behind = (self._loss(side * factor, by_replay=by_replay) for side in (1, -1))
            if not math.isfinite(ahead - behind):
                return None
            slopes.append((ahead - behind) / (2 * factor * self._length))
            if abs(slopes[-1] - self._slope) <= _SLOPE_TOLERANCE * abs(self._slope):
                return None
        if not any(slopes):
            return _CONSTANT
        closest = min(abs(slope - self._slope) for slope in slopes)
        if closest <= 3 * (max(slopes) - min(slopes)):
            return None
        return (
            f"its slope is {slopes[len(slopes) // 2]:.3g} where its gradient says {self._slope:.3g}"
        )

    def agree(self) -> bool:
        """Whether replaying and running give the same loss beside the parameters as they are."""
        here = self._graph.get()[0].loss.item()
        replayed, run = (self._loss(4, by_replay=by_replay) for by_replay in (True, False))
        if not math.isfinite(replayed - run):
            return not math.isfinite(replayed) and not math.isfinite(run)
        return abs(replayed - run) <= _SLOPE_TOLERANCE * abs(replayed - here)

    def _loss(self, factor: float, *, by_replay: bool) -> float:
        with self._parameters.displaced(self._theta, self._direction, factor * self._length):
            there = self._graph.evaluate(by_replay=by_replay)
        return math.inf if there is None else there.loss.item()


def _is_repeatable(graph: Graph, loss: float) -> bool:
    """Whether the closure gives the same loss when it runs again, at the same parameters."""
    again = graph.evaluate(by_replay=False)
    return again is not None and math.isclose(again.loss.item(), loss, rel_tol=1e-6)


class Verdict(NamedTuple):
    """On the products of a backend.

    Attributes:
        product: that with the vector of the test, flat; None if it cannot be formed.
        error: by how much it misses what an independent witness says, relative.
        is_right: whether that is rounding.
        problem: what is wrong otherwise.
    """

    product: Tensor | None
    error: float
    is_right: bool
    problem: str

    @property
    def is_finite(self) -> bool:
        """Whether there is a product, and it is."""
        return self.product is not None and bool(self.product.isfinite().all())


def judge_backend(
    backend: Backend, graph: Graph, v: Tensor, parameters: FlatParameters, eps: float
) -> Verdict:
    """Compare the product of a backend with an independent witness."""
    _, metric = graph.get()
    judge = _judge_push if isinstance(metric, OutputMetric) else _judge_hessian
    try:
        return judge(backend, graph, v, parameters, eps)
    except RuntimeError as error:
        reraise_own_kinds(error)
        return Verdict(None, math.inf, False, explain_failure(error, Way(backend, recorded=False)))


def _judge_push(
    backend: Backend, graph: Graph, v: Tensor, parameters: FlatParameters, eps: float
) -> Verdict:
    _, metric = graph.get()
    generator = torch.Generator(device="cpu").manual_seed(1)
    u = [torch.randn(z.shape, generator=generator, device="cpu").to(z) for z in metric.outputs]
    pieces, pull = parameters.unflatten(v), pull_back(metric.outputs, parameters.tensors)
    pushed = graph.push(backend)(pieces)
    # ⟨u, J v⟩ = ⟨Jᵀu, v⟩ for random u and v, with the pull-back that autograd has.
    at_outputs, size_there = _inner_product(u, pushed)
    at_parameters, size_here = _inner_product(pull(u), pieces)
    difference = abs(at_outputs - at_parameters)
    error = difference / (size_there + size_here) if difference else 0.0
    is_right = error <= min(100 * eps, eps**0.5)
    if backend == "differences":
        is_right |= error <= _COARSE
    problem = f"{backend} misses a dependence on parameters that autograd sees"
    return Verdict(torch.cat([t.flatten() for t in pushed]), error, is_right, problem)


def _judge_hessian(
    backend: Backend, graph: Graph, v: Tensor, parameters: FlatParameters, eps: float
) -> Verdict:
    pieces = parameters.unflatten(v)
    product = parameters.flatten(graph.product(backend)(pieces))
    if backend == "differences":
        return Verdict(product, 0.0, True, "")
    problem = f"{backend} does not give the derivatives of the gradient"
    try:
        witness = parameters.flatten(graph.product("differences")(pieces))
    except RuntimeError as error:  # nobody can tell
        reraise_own_kinds(error)
        return Verdict(product, 0.0, True, problem)
    # A gradient is known to ε, its differences to ε^⅔.
    noise = eps ** (2 / 3) * v.norm() / (1e-3 + parameters.read().norm())
    floor = 10 * (noise * graph.compute_gradient().norm()).item()
    difference = (product - witness).norm().item() - floor
    if not math.isfinite(difference):
        # A norm at zero has a gradient of 0 and no second derivative; differences step over that. A
        # KL without one bounds no step.
        is_right = graph.get()[1].kind == "fisher" or not witness.isfinite().all()
        return Verdict(product, 0.0 if is_right else math.inf, is_right, problem)
    error = difference / witness.norm().item() if difference > 0 else 0.0
    return Verdict(product, error, error <= eps**0.25, problem)


def _inner_product(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[float, float]:
    """``⟨a, b⟩``, and how large it is for vectors of these norms that know nothing of each other."""
    x, y = (
        torch.cat([real_parts(whole(t.detach())).double().flatten() for t in tensors])
        for tensors in (a, b)
    )
    return torch.dot(x, y).item(), (x.norm() * y.norm() / max(1, len(x)) ** 0.5).item()


def find_problem_of_recording(
    direct: Product, v: Tensor, eps: float, backend: Backend
) -> str | None:
    """None where a recording agrees with the product that it records, and saves time."""
    if backend == "differences":
        return "differences move the parameters"
    try:
        image, recording = record(direct, v)
        is_small = recording.plan.bytes < _SMALL * recording.plan.length
        if backend == "double-backward" and recording.plan.length > _LONG and is_small:
            return f"to record their {recording.plan.length} small operations takes longer than it saves"
        other = v.flip(0)
        there = torch.dot(other, image)
        noise = eps**0.5 * (image.norm() * other.norm() / len(v) ** 0.5)
        del image
        replayed = recording(other)
        # ⟨F w, v⟩ = ⟨w, F v⟩; hooks may make a product that is not symmetric.
        is_symmetric = (torch.dot(replayed, v) - there).abs() <= noise
        agrees = bool(is_symmetric) or are_close(replayed, direct(other), eps**0.5, eps)
    except RuntimeError as error:
        reraise_own_kinds(error)
        return f"they cannot be recorded: {error}".splitlines()[0]
    return None if agrees else "what is recorded disagrees with them"


def coarsest_eps(dtypes: Iterable[torch.dtype]) -> float:
    """The largest rounding error of some dtypes; 0 if all are of integers."""
    inexact = [dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
    return max((torch.finfo(dtype).eps for dtype in inexact), default=0.0)


def are_close(a: Tensor, b: Tensor, tolerance: float, floor: float | Tensor) -> bool:
    """``‖a − b‖ ≤ tolerance · ‖b‖ + floor``."""
    return bool((a - b).norm() <= tolerance * b.norm() + floor)
