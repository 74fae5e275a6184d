"""What is checked at the first step with a closure, and remembered.

Tracing sees torch functions. What a closure hides from it (TorchScript, extensions, gradients changed after backward)
would give silently wrong steps, so the first step compares with plain autograd.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ngd_optim.autograd_graph import dtypes, leaves, nodes
from ngd_optim.curvature import OutputMetric, ScalarMetric, flat_product, penalty_of, pull_back
from ngd_optim.distributed import Ranks
from ngd_optim.linalg import conjugate_gradient
from ngd_optim.names import Backend
from ngd_optim.parameters import FlatParameters
from ngd_optim.recording import Memory, Recording
from ngd_optim.tracing import Evaluation, ReplayedClosure

logger = logging.getLogger("ngd_optim")

ON_ANOTHER_RANK = "another rank needs it"

_SMALL = 2**18
"""In bytes. Where the mean result of an operation is smaller, calls take as long as the work that they do."""

_CALL = 2**15
"""Bytes that are computed in the time of a call."""

_LONG = 400
"""Operations. To note so many small ones pays after some forty products only: where autograd's engine pushes through a
graph that is there, it is almost as fast as a replay.
"""

_REFUSED = {
    "CheckpointFunctionBackward": "reentrant checkpointing cannot be differentiated twice; "
    "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
    "GatherBackward": "torch.nn.DataParallel runs the model in threads that cannot be traced; "
    "use torch.nn.parallel.DistributedDataParallel",
}


@dataclass
class Experience:
    """What is known of a closure from its first step.

    Attributes:
        complete: whether there was one.
        backend: what forms the products.
        spare: whether forward mode is right as well, where that is double-backward.
        penalty: whether the loss depends on parameters around the outputs by a positive semidefinite Hessian.
        replays: whether products are recorded: where a recorded one agrees with a direct one, and takes less time.
    """

    complete: bool = False
    backend: Backend = "torch.func"
    spare: bool = False
    penalty: bool = False
    replays: bool = False

    def fall_back(self, reason: str) -> None:
        """Form the products by the other backend from now on, whose recordings have not been compared with anything."""
        self.backend, self.spare = "torch.func" if self.spare else "double-backward", False
        self.replays = False
        logger.info("products by %s, because %s", self.backend, reason)

    def form_directly(self, reason: str) -> None:
        """Do not record products from now on."""
        logger.info("products are formed directly at each iteration, because %s", reason)
        self.replays = False


class Signature(NamedTuple):
    """What must be the same for what was learnt of a closure to hold.

    Attributes:
        operations: of its graph.
        differentiable: which of the outputs are.
        metric: of what type it returned one.
        is_quick: whether its tensors are so small that its Python code takes as long as its arithmetic. Double-backward
            pushes through the graph that is there, where forward mode would run that code once more. Not so if hooks on
            gradients are seen: they would be given gradients with a graph of their own, and may keep them.
    """

    operations: tuple[str, ...]
    differentiable: tuple[bool, ...]
    metric: type
    is_quick: bool


def signature(
    traced: Evaluation, metric: OutputMetric | ScalarMetric, memory: Memory, parameters: FlatParameters
) -> Signature:
    """That of a closure that was traced within a memory."""
    operations = tuple(node.name() for node in nodes([traced.loss]))
    has_hooks = traced.has_hooks or any(p._backward_hooks for p in parameters.tensors)
    has_hooks = has_hooks or "BackwardHookFunctionBackward" in operations
    is_small = isinstance(metric, OutputMetric) and memory.bytes < _SMALL * memory.operations
    differentiable = tuple(z.requires_grad for z in traced.outputs)
    return Signature(operations, differentiable, type(traced.metric), is_small and not has_hooks)


def refuse_unsupported(traced: Evaluation) -> None:
    """Refuse what cannot work.

    Raises:
        RuntimeError: one sentence that says what to do instead.
    """
    for node in nodes([traced.loss]):
        if node.name() in _REFUSED:
            raise RuntimeError(_REFUSED[node.name()])
    if any(z.dtype == torch.float16 for z in (traced.loss, *traced.outputs)):
        raise RuntimeError(
            "float16 has too little range for curvature products, and a GradScaler cannot scale them; "
            "use torch.autocast(..., dtype=torch.bfloat16), or float32"
        )


def verify(
    experience: Experience,
    run: ReplayedClosure,
    traced: Evaluation,
    metric: OutputMetric | ScalarMetric,
    gradient: Tensor,
    parameters: FlatParameters,
    memory: Memory,
    ranks: Ranks,
    *,
    is_quick: bool,
) -> None:
    """Learn what the products of a closure need, and check them and the gradient.

    Nothing is learnt where the loss or the gradient is not finite. ``is_quick`` is the signature's.

    Raises:
        RuntimeError: the gradient is not what the closure gives without tracing, or no product can be formed.
        ValueError: the parameters differ between ranks.
    """
    ends = [traced.loss, *traced.outputs, *parameters.tensors]
    noise = _coarsest({t.dtype for t in ends})
    eps = max(noise, _coarsest(dtypes([traced.loss, *metric.outputs])))
    ranks.require_equal(parameters.theta)
    if not ranks.all(bool(traced.loss.isfinite() and gradient.isfinite().all())):
        return
    plain = ranks.average(ranks.together(lambda: parameters.flatten(run.plain_gradients(leaves(traced.loss)))))
    floor = 100 * noise * (1 + ranks.average(traced.loss.detach().abs()).item())
    _check_gradient(ranks.average(gradient), plain, eps, floor)
    v = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).to(gradient)

    ranks.together(lambda: _refuse_nonlinear_hooks(metric, parameters, eps))
    experience.backend, experience.spare = "torch.func", False
    problem, both = ranks.together(lambda: _problem_of_forward_mode(run, metric, v, parameters, eps))
    if not ranks.all(problem is None):
        experience.fall_back(problem or ON_ANOTHER_RANK)
    elif ranks.all(both) and is_quick:
        costs = {b: _cost(b, run, metric, v, parameters, memory) for b in get_args(Backend)}
        # Its products are almost as cheap, but for long sequences of plain recurrent cells.
        if costs["double-backward"] <= 2 * costs["torch.func"]:
            experience.backend, experience.spare = "double-backward", True
    if metric.kind == "ggn":
        experience.penalty = ranks.all(ranks.together(lambda: _has_semidefinite_penalty(run, v, parameters)))

    def problem_of_replay() -> str | None:
        direct = flat_product([metric.product(run, parameters.tensors, experience.backend)], parameters)
        other = v.flip(0)
        try:
            recording = Recording(direct, v, known_to(experience.backend, memory))
            if experience.spare and recording.length > _LONG:
                return f"to record their {recording.length} small operations takes longer than it saves"
            agrees = _close(recording(other), direct(other), eps, eps)
        except RuntimeError as error:
            return f"they cannot be recorded: {error}".splitlines()[0]
        return None if agrees else "what is recorded disagrees with them"

    problem = ranks.together(problem_of_replay)
    experience.replays = ranks.all(problem is None)
    if not experience.replays:
        experience.form_directly(problem or ON_ANOTHER_RANK)
    experience.complete = True


def _coarsest(dtypes: Iterable[torch.dtype]) -> float:
    return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)


def _check_gradient(gradient: Tensor, plain: Tensor, eps: float, floor: float) -> None:
    if not _close(gradient, plain, eps, floor):
        difference = ((gradient - plain).norm() / plain.norm()).item()
        raise RuntimeError(
            f"the gradient of the traced closure differs from plain autograd's by {difference:.2g} (relative): the "
            "closure changes gradients after backward (clipping, scaling, hooks), does not compute the same thing each "
            "time that it runs (draw the batch before the step, not in the closure), or hides operations from torch "
            "functions; return the loss that is to be minimised"
        )


def _problem_of_forward_mode(
    run: ReplayedClosure,
    metric: OutputMetric | ScalarMetric,
    flat: Tensor,
    parameters: FlatParameters,
    eps: float,
) -> tuple[str | None, bool]:
    """None where forward mode can follow the closure, else what is wrong with it; and whether double-backward agrees.

    The two are independent. Where they differ, or only one of them works, autograd's plain pull-back decides, whose
    adjoint they must be.

    Raises:
        RuntimeError: double-backward cannot follow the closure either.
    """
    v = parameters.unflatten(flat)
    products: dict[Backend, Tensor] = {}
    problems: dict[Backend, str] = {}
    for backend in get_args(Backend):
        try:
            products[backend] = parameters.flatten(metric.product(run, parameters.tensors, backend)(v))
        except RuntimeError as error:
            problems[backend] = why_not(error, backend)
    if len(products) == 2 and _close(products["torch.func"], products["double-backward"], eps, eps):
        return None, True
    errors: dict[Backend, float] = {b: _adjoint_error(b, products, run, metric, v, parameters) for b in products}
    best = min(errors.values(), default=math.inf)
    for backend, error in errors.items():
        if not error <= min(50 * eps**0.5, 10 * max(best, eps)):
            problems[backend] = f"{backend} misses a dependence on parameters that autograd sees"
    finite = all(product.isfinite().all() for product in products.values())
    if "torch.func" not in problems or ("double-backward" in problems and not finite):
        return None, False
    if "double-backward" not in problems:
        return problems["torch.func"], False
    raise RuntimeError(f"no curvature product can be formed: {'; '.join(problems.values())}")


def _cost(
    backend: Backend,
    run: ReplayedClosure,
    metric: OutputMetric | ScalarMetric,
    v: Tensor,
    parameters: FlatParameters,
    memory: Memory,
) -> float:
    """Of replaying a product, in bytes; infinite where it cannot be recorded."""
    direct = flat_product([metric.product(run, parameters.tensors, backend)], parameters)
    try:
        recording = Recording(direct, v, known_to(backend, memory))
    except RuntimeError:
        return math.inf
    return _CALL * recording.length + recording.bytes


def known_to(backend: Backend, memory: Memory) -> Memory:
    """What a product may recall of the traced run, where it runs the closure again, from the first random number on.

    Double-backward runs no more than the checkpoints in it, and these begin at another random number.
    """
    return memory if backend == "torch.func" else Memory()


def _adjoint_error(
    backend: Backend,
    products: Mapping[Backend, Tensor],
    run: ReplayedClosure,
    metric: OutputMetric | ScalarMetric,
    v: Sequence[Tensor],
    parameters: FlatParameters,
) -> float:
    """By how much ``⟨u, J v⟩ ≠ ⟨Jᵀu, v⟩``; a Hessian is believed to double-backward, which sees what autograd sees."""
    if isinstance(metric, ScalarMetric):
        return 0.0 if backend == "double-backward" or "double-backward" not in products else math.inf
    generator = torch.Generator().manual_seed(1)
    u = [torch.randn(z.shape, generator=generator).to(z) for z in metric.outputs]
    pushed = metric.push(run, parameters.tensors, backend)(v)
    pulled = pull_back(metric.outputs, parameters.tensors)(u)
    (at_outputs, size_there), (at_parameters, size_here) = _inner_product(u, pushed), _inner_product(pulled, v)
    error = abs(at_outputs - at_parameters)
    return error / (size_there + size_here) if error else 0.0


def _inner_product(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[float, float]:
    """``⟨a, b⟩``, and how large it is for vectors of these norms that know nothing of each other."""
    x, y = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (a, b))
    return torch.dot(x, y).item(), (x.norm() * y.norm() / max(1, len(x)) ** 0.5).item()


def _refuse_nonlinear_hooks(metric: OutputMetric | ScalarMetric, parameters: FlatParameters, eps: float) -> None:
    """Hooks on parameters run in the pull-back of every product, which must stay linear."""
    if not any(p._backward_hooks for p in parameters.tensors):
        return
    pull = pull_back(metric.outputs, parameters.tensors)
    once, *scaled = (
        parameters.flatten(pull([torch.full_like(z, scale) for z in metric.outputs])) / scale for scale in (1, 1e4, 1e8)
    )
    if not all(_close(pulled, once, eps, eps) for pulled in scaled):
        raise RuntimeError(
            "a hook on a parameter changes gradients by a function that is not linear, such as clipping or "
            "normalising, and no curvature product survives that; remove it, the trust region takes its place"
        )


def _has_semidefinite_penalty(run: ReplayedClosure, v: Tensor, parameters: FlatParameters) -> bool:
    penalty = penalty_of(run, parameters.tensors)
    if penalty is None:
        return False

    product = flat_product([penalty], parameters)
    image = product(v)
    if not image.any():
        return True  # now: a weight of zero, or a penalty without curvature
    shift = 1e-5 * image.norm() / v.norm()
    result = conjugate_gradient(lambda p: product(p) + shift * p, v, max_iters=30)
    if result.stop != "negative_curvature":
        return True
    logger.info("a part of the loss around the recognised outputs has negative curvature: its gradient alone is used")
    return False


def _close(a: Tensor, b: Tensor, eps: float, floor: float) -> bool:
    return bool((a - b).norm() <= eps**0.5 * b.norm() + floor)


def why_not(error: RuntimeError, backend: str) -> str:
    """Why a backend fails. A string: the error itself would keep the graph alive."""
    return f"{backend} cannot follow the closure: {type(error).__name__}: {error}".strip().splitlines()[0]
