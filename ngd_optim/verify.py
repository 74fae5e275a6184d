"""What is checked at the first step with a closure, and remembered.

Tracing sees torch functions. What a closure hides from it (TorchScript, extensions, gradients changed after backward)
would give silently wrong steps, so the first step compares with plain autograd.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngd_optim.cg import conjugate_gradient
from ngd_optim.closure import Evaluation, ReplayedClosure
from ngd_optim.curvature import Backend, OutputMetric, ScalarMetric, penalty_of
from ngd_optim.parameters import FlatParameters
from ngd_optim.products import flat_product
from ngd_optim.recording import CannotReplayError, Recording

logger = logging.getLogger("ngd_optim")

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
        penalty: whether the loss depends on parameters around the outputs by a positive semidefinite Hessian.
        replays: whether a recorded product agrees with the direct one.
    """

    complete: bool = False
    backend: Backend = "torch.func"
    penalty: bool = False
    replays: bool = False

    def fall_back(self, reason: str) -> None:
        """Form the products by double-backward from now on."""
        logger.info("products by double-backward, because %s", reason)
        self.backend = "double-backward"

    def form_directly(self, reason: str) -> None:
        """Do not record products from now on."""
        logger.info("products are formed directly at each iteration, because they cannot be recorded: %s", reason)
        self.replays = False


def refuse_unsupported(traced: Evaluation) -> None:
    """Refuse what cannot work.

    Raises:
        RuntimeError: one sentence that says what to do instead.
    """
    for node in _nodes([traced.loss]):
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
) -> None:
    """Learn what the products of a closure need, and check them and the gradient.

    Nothing is learnt where the loss or the gradient is not finite.

    Raises:
        RuntimeError: the gradient is not what the closure gives without tracing, or no product can be formed.
    """
    dtypes = {traced.loss.dtype, *(z.dtype for z in traced.outputs), *(p.dtype for p in parameters.tensors)}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    if not (traced.loss.isfinite() and gradient.isfinite().all()):
        return
    _check_gradient(run, traced, gradient, parameters, eps)
    v = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).to(gradient)
    pieces = parameters.unflatten(v)
    _choose_backend(experience, run, metric, pieces, parameters, eps)
    if metric.has_penalty:
        experience.penalty = _has_semidefinite_penalty(run, v, parameters)
    direct = flat_product([metric.product(run, parameters.tensors, experience.backend)], parameters)
    try:
        experience.replays = _replays(direct, v, eps)
    except CannotReplayError as error:
        experience.form_directly(str(error))
    else:
        if not experience.replays:
            experience.form_directly("the replay disagrees with the product")
    experience.complete = True


def _check_gradient(
    run: ReplayedClosure, traced: Evaluation, gradient: Tensor, parameters: FlatParameters, eps: float
) -> None:
    plain = parameters.flatten(run.plain_gradients())
    floor = 100 * eps * (1 + traced.loss.abs().item())
    if not _close(gradient, plain, eps, floor):
        difference = ((gradient - plain).norm() / plain.norm()).item()
        raise RuntimeError(
            f"the gradient of the traced closure differs from plain autograd's by {difference:.2g} (relative): the "
            "closure changes gradients after backward (clipping, scaling, hooks), does not compute the same thing each "
            "time that it runs, or hides operations from torch functions; return the loss that is to be minimised"
        )


def _choose_backend(
    experience: Experience,
    run: ReplayedClosure,
    metric: OutputMetric | ScalarMetric,
    v: Sequence[Tensor],
    parameters: FlatParameters,
    eps: float,
) -> None:
    """Forward mode, where it can follow the closure and agrees with double-backward, which sees what autograd sees."""
    problem = "torch.func misses a dependence on parameters that autograd sees (TorchScript or an extension?)"
    product = reference = None
    try:
        product = parameters.flatten(metric.product(run, parameters.tensors, "torch.func")(v))
    except RuntimeError as error:
        problem = cannot_follow(error)
    try:
        reference = parameters.flatten(metric.product(run, parameters.tensors, "double-backward")(v))
    except RuntimeError:
        if product is None:
            raise
    if product is None or (reference is not None and not _close(product, reference, eps, eps)):
        experience.fall_back(problem)


def _replays(direct: Callable[[Tensor], Tensor], v: Tensor, eps: float) -> bool:
    """Whether what is recorded on one vector gives the product of another."""
    other = v.flip(0)
    return _close(Recording(direct, v)(other), direct(other), eps, eps)


def _has_semidefinite_penalty(run: ReplayedClosure, v: Tensor, parameters: FlatParameters) -> bool:
    penalty = penalty_of(run, parameters.tensors)
    if penalty is None:
        return False

    product = flat_product([penalty], parameters)
    image = product(v)
    if not image.any():
        return False
    shift = 1e-5 * image.norm() / v.norm()
    result = conjugate_gradient(lambda p: product(p) + shift * p, v, max_iters=30)
    if result.stop != "negative_curvature":
        return True
    logger.info("a part of the loss around the recognised outputs has negative curvature: its gradient alone is used")
    return False


def _close(a: Tensor, b: Tensor, eps: float, floor: float) -> bool:
    return bool((a - b).norm() <= eps**0.5 * b.norm() + floor)


def _nodes(roots: Sequence[Tensor]) -> Iterator[torch.autograd.graph.Node]:
    """Every node of the graph that leads to some tensors."""
    pending = [root.grad_fn for root in roots]
    seen = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending.extend(parent for parent, _ in node.next_functions)


def cannot_follow(error: RuntimeError) -> str:
    """Why forward mode fails. A string: the error itself would keep the graph alive."""
    return f"torch.func cannot follow the closure: {type(error).__name__}: {error}".strip().splitlines()[0]
