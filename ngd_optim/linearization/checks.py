"""What is checked at the first step with a closure, and remembered.

Tracing sees torch functions. What a closure hides from it (TorchScript, extensions, gradients
changed after backward) would give silently wrong steps, so the first step compares with plain
autograd.
"""

import copy
import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ngd_optim.autograd_graph import dtypes, leaves, nodes
from ngd_optim.curvature import OutputMetric, ScalarMetric, penalty_of, pull_back
from ngd_optim.distributed import Ranks
from ngd_optim.linalg import conjugate_gradient
from ngd_optim.linearization.agreement import (
    BACKENDS,
    are_close,
    coarsest_eps,
    find_problem_of_recording,
    find_problems_of_backends,
)
from ngd_optim.linearization.backend import (
    ON_ANOTHER_RANK,
    Way,
    direct_product,
    flat_product,
    log_change,
)
from ngd_optim.names import Backend, BackendChoice
from ngd_optim.parameters import FlatParameters
from ngd_optim.torch_internals import hooks_of
from ngd_optim.tracing import Evaluation, ReplayedClosure

logger = logging.getLogger("ngd_optim")

_PREFERENCE: tuple[Backend, ...] = ("double-backward", "torch.func")
"""Double-backward needs no other run of the closure."""

_PREFER_FORWARD = {
    # Double-backward gives hooks gradients with a graph of their own, which they may keep.
    "BackwardHookFunctionBackward",
    # The first product takes 1.1 gradients more by double-backward, which is not won back in ten.
    "ConvolutionBackward0",
}
"""Names of nodes for which forward mode is tried first."""

_REFUSED = {
    "CheckpointFunctionBackward": "reentrant checkpointing cannot be differentiated twice; "
    "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
    "GatherBackward": "torch.nn.DataParallel runs the model in threads that cannot be traced; "
    "use torch.nn.parallel.DistributedDataParallel",
}


@dataclass(frozen=True)
class Checked:
    """What is known of a closure from its first step.

    Attributes:
        ways: those to form products that were found right, in order of preference.
        penalty: whether the loss depends on parameters around the outputs by a positive
            semidefinite Hessian.
    """

    ways: tuple[Way, ...]
    penalty: bool = False


class Signature(NamedTuple):
    """What must be the same for what was learnt of a closure to hold.

    Attributes:
        operations: of its graph.
        differentiable: which of the outputs are.
        metric: of what type it returned one.
        prefers_forward: whether forward mode is the better way where both are right.
    """

    operations: tuple[str, ...]
    differentiable: tuple[bool, ...]
    metric: type
    prefers_forward: bool


def signature_of(traced: Evaluation, parameters: FlatParameters) -> Signature:
    """That of a closure that was traced."""
    operations = tuple(node.name() for node in nodes([traced.loss]))
    differentiable = tuple(z.requires_grad for z in traced.outputs)
    has_hooks = traced.has_hooks or any(hooks_of(p) for p in parameters.tensors)
    prefers_forward = has_hooks or not _PREFER_FORWARD.isdisjoint(operations)
    return Signature(operations, differentiable, type(traced.metric), prefers_forward)


def assume_unchecked(backend: BackendChoice) -> Checked:
    """What is assumed of a closure whose loss or gradient is not finite: there is nothing to compare."""
    backends = BACKENDS if backend == "auto" else (backend,)
    return Checked(tuple(Way(b, recorded=False) for b in backends))


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
            "float16 has too little range for curvature products, and a GradScaler cannot scale "
            "them; use torch.autocast(..., dtype=torch.bfloat16), or float32"
        )


def check_closure(
    run: ReplayedClosure,
    traced: Evaluation,
    metric: OutputMetric | ScalarMetric,
    gradient: Tensor,
    parameters: FlatParameters,
    ranks: Ranks,
    *,
    backend: BackendChoice,
    prefers_forward: bool,
) -> Checked | None:
    """Learn what the products of a closure need, and check them and the gradient.

    Args:
        run: the closure.
        traced: its evaluation at the parameters.
        metric: of that.
        gradient: of that, flat.
        parameters: what the closure is a function of.
        ranks: those that take the same step.
        backend: what the user asks for.
        prefers_forward: the signature's.

    Returns:
        None where the loss or the gradient is not finite, so that nothing is learnt.

    Raises:
        RuntimeError: the gradient is not what the closure gives without tracing, or no product can
            be formed as asked.
        ValueError: the parameters differ between ranks.
    """
    run = copy.copy(run)  # these runs do not count as the step's
    ends = [traced.loss, *traced.outputs, *parameters.tensors]
    # The gradient is known to the rounding of its ends; what happens in between (autocast) rounds
    # products as well.
    noise = coarsest_eps({t.dtype for t in ends})
    eps = max(noise, coarsest_eps(dtypes([traced.loss, *metric.outputs])))
    ranks.require_equal(parameters.read())
    if not ranks.all(bool(traced.loss.isfinite() and gradient.isfinite().all())):
        return None
    plain = ranks.average(
        ranks.together(lambda: parameters.flatten(run.compute_plain_gradients(leaves(traced.loss))))
    )
    floor = 100 * noise * (1 + ranks.average(traced.loss.detach().abs()).item())
    _check_gradient(ranks.average(gradient), plain, eps, floor)
    # A random vector meets every direction; a generator of its own leaves the user's alone.
    generator = torch.Generator(device="cpu").manual_seed(0)
    v = torch.randn(gradient.shape, generator=generator, device="cpu").to(gradient)

    ranks.together(lambda: _refuse_nonlinear_hooks(metric, parameters, eps))
    problems = ranks.together(lambda: find_problems_of_backends(run, metric, v, parameters, eps))
    # Sorting is stable: the others keep their order.
    preferred = sorted(_PREFERENCE, key=lambda b: prefers_forward and b != "torch.func")
    right: list[Backend] = [b for b in preferred if ranks.all(b not in problems)]
    if not right:
        raise RuntimeError("no curvature product can be formed by one backend on all ranks")
    if backend == "auto" and right[0] != preferred[0]:
        logger.info(
            "products by %s, because %s", right[0], problems.get(preferred[0], ON_ANOTHER_RANK)
        )
    elif backend != "auto" and backend not in right:
        raise RuntimeError(
            f"backend={backend!r} cannot form the products of this closure: "
            f"{problems.get(backend, ON_ANOTHER_RANK)}; use backend='auto'"
        )
    if backend != "auto":
        right = [backend]
    first = right[0]
    penalty = metric.kind == "ggn" and ranks.all(
        ranks.together(lambda: _has_semidefinite_penalty(run, v, parameters))
    )
    ways = [Way(b, recorded=False) for b in right]
    direct = direct_product(first, run, metric, parameters, penalty=False)
    ranks.together(lambda: metric.check(parameters, direct, v))
    problem = ranks.together(lambda: find_problem_of_recording(direct, v, eps, metric, first))
    if ranks.all(problem is None):
        ways.insert(0, Way(first, recorded=True))
    else:
        log_change(Way(first, recorded=True), ways[0], problem or ON_ANOTHER_RANK)
    return Checked(tuple(ways), penalty)


def _check_gradient(gradient: Tensor, plain: Tensor, eps: float, floor: float) -> None:
    if not are_close(gradient, plain, eps, floor):
        difference = ((gradient - plain).norm() / plain.norm()).item()
        raise RuntimeError(
            "the gradient of the traced closure differs from plain autograd's by "
            f"{difference:.2g} (relative): the closure changes gradients after backward "
            "(clipping, scaling, hooks), does not compute the same thing each time that it runs "
            "(draw the batch before the step, not in the closure), or hides operations from torch "
            "functions; return the loss that is to be minimised"
        )


def _refuse_nonlinear_hooks(
    metric: OutputMetric | ScalarMetric, parameters: FlatParameters, eps: float
) -> None:
    """Hooks on parameters run in the pull-back of every product, which must stay linear."""
    if not any(hooks_of(p) for p in parameters.tensors):
        return
    pull = pull_back(metric.outputs, parameters.tensors)
    # A linear hook scales with its argument; clipping and normalising do not.
    once, *scaled = (
        parameters.flatten(pull([torch.full_like(z, scale) for z in metric.outputs])) / scale
        for scale in (1, 1e4, 1e8)
    )
    if not all(are_close(pulled, once, eps, eps) for pulled in scaled):
        raise RuntimeError(
            "a hook on a parameter changes gradients by a function that is not linear, such as "
            "clipping or normalising, and no curvature product survives that; remove it, the "
            "trust region takes its place"
        )


def _has_semidefinite_penalty(run: ReplayedClosure, v: Tensor, parameters: FlatParameters) -> bool:
    penalty = penalty_of(run, parameters.tensors)
    if penalty is None:
        return False

    product = flat_product([penalty], parameters)
    image = product(v)
    if not image.any():
        return True  # now: a weight of zero, or a penalty without curvature
    # A singular Hessian, as of a penalty on some weights, passes; CG finds negative curvature in a
    # few iterations if it counts.
    shift = 1e-5 * image.norm() / v.norm()
    result = conjugate_gradient(lambda p: product(p) + shift * p, v, max_iters=30)
    if result.stop != "negative_curvature":
        return True
    logger.info(
        "a part of the loss around the recognised outputs has negative curvature: its gradient "
        "alone is used"
    )
    return False
