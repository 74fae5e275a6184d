"""What is checked at the first step with a closure, and remembered.

What a closure hides from autograd, or changes behind its back, would give silently wrong steps. So
the first step compares what it is made of with differences and with plain autograd.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ngd_optim.autograd_graph import dtypes, nodes
from ngd_optim.curvature import Graph, OutputMetric, ScalarMetric, pull_back
from ngd_optim.distributed import Ranks
from ngd_optim.linalg import conjugate_gradient
from ngd_optim.linearization.agreement import (
    Verdict,
    are_close,
    coarsest_eps,
    find_motion,
    find_problem_of_recording,
    judge_backend,
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
from ngd_optim.recording import KeptRecordings
from ngd_optim.torch_internals import hooks_of
from ngd_optim.tracing import Evaluation

logger = logging.getLogger("ngd_optim")

_PREFERENCE: tuple[Backend, ...] = ("double-backward", "torch.func", "differences")
"""Double-backward uses the graph that is there; differences are the way of last resort."""

_HOOK = "BackwardHookFunctionBackward"
"""The node by which a module's hooks see gradients: an autograd.Function whose forward is the identity."""

_PREFER_FORWARD = {
    # Double-backward gives hooks gradients with a graph of their own, which they may keep.
    _HOOK,
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
            semidefinite Hessian; None: by one that is zero so far, as where its weight is zero, so
            that it is asked again at each step.
        replays: whether trial points replay what was recorded of the closure; else they run it.
        is_repeatable: whether the closure is known to compute the same each time that it runs.
        recordings: of its products, from earlier steps.
    """

    ways: tuple[Way, ...]
    penalty: bool | None = False
    replays: bool = True
    is_repeatable: bool = False
    recordings: KeptRecordings = field(default_factory=KeptRecordings)


class Signature(NamedTuple):
    """What must be the same for what was learnt of a closure to hold.

    Attributes:
        operations: the kinds of operations in its graph.
        differentiable: which of the outputs are.
        metric: of what type it returned one.
        hooks: those on the parameters' gradients.
        recorded: what the recording says of it: that it depends on the parameters, why it cannot
            be replayed, whether it reads values, asks conditions, calls Functions, uses float16.
        prefers_forward: whether forward mode is the better way where both are right.
    """

    operations: frozenset[str]
    differentiable: tuple[bool, ...]
    metric: type
    hooks: tuple[int, ...]
    recorded: tuple[bool | str | None, ...]
    prefers_forward: bool


def signature_of(graph: Graph, parameters: FlatParameters) -> Signature:
    """That of a closure that was traced."""
    traced, _ = graph.get()
    recorder = graph.recorder
    operations = frozenset(node.name() for node in nodes([traced.loss]))
    hooks = tuple(key for p in parameters.tensors for key in hooks_of(p) or ())
    has_hooks = traced.has_hooks or bool(hooks)
    return Signature(
        operations,
        tuple(sorted({z.requires_grad for z in traced.outputs})),
        type(traced.metric),
        hooks,
        (
            recorder.depends(traced.loss),
            recorder.problem,
            recorder.reads_values,
            recorder.has_conditions,
            recorder.calls_functions,
            recorder.uses_float16,
        ),
        has_hooks or not _PREFER_FORWARD.isdisjoint(operations),
    )


def assume_unchecked(backend: BackendChoice) -> Checked:
    """What is assumed of a closure whose loss or gradient is not finite: there is nothing to compare."""
    backends = _PREFERENCE if backend == "auto" else (backend,)
    return Checked(tuple(Way(b, recorded=False) for b in backends))


def refuse_unsupported(traced: Evaluation, metric: OutputMetric | ScalarMetric) -> None:
    """Refuse what cannot work, at the first step with a closure of this signature.

    Raises:
        RuntimeError: one sentence that says what to do instead.
        NotImplementedError: likewise, of a distribution.
    """
    if isinstance(metric, OutputMetric):
        metric.make_hessian()
    for node in nodes([traced.loss]):
        if node.name() in _REFUSED:
            raise RuntimeError(_REFUSED[node.name()])
    if torch.float16 in dtypes([traced.loss, *metric.outputs]):
        raise RuntimeError(
            "the loss is computed from the parameters by way of float16, which has too little range "
            "for curvature products, and a GradScaler cannot scale them; use "
            "torch.autocast(..., dtype=torch.bfloat16), or float32"
        )


def warn_of_constants(traced: Evaluation) -> None:
    """Tell of residuals without a graph, at the first step with a closure: ``create_graph`` was forgotten."""
    for call in traced.losses:
        residuals = call.arguments.arguments.get("residuals", ())
        for number, r in enumerate(residuals, start=1):
            if not r.requires_grad:
                logger.warning(
                    "residual %d of %d of least_squares(), of shape %s, depends on no parameter, and the fit "
                    "does not see it: take derivatives of the network by torch.func, or by "
                    "torch.autograd.grad(..., create_graph=True), and detach no part of it",
                    number,
                    len(residuals),
                    tuple(r.shape),
                )


def check_closure(
    graph: Graph,
    gradient: Tensor,
    parameters: FlatParameters,
    ranks: Ranks,
    *,
    backend: BackendChoice,
    prefers_forward: bool,
) -> Checked | None:
    """Learn what the products of a closure need, and check them and the gradient.

    Args:
        graph: of the closure.
        gradient: of its loss, flat.
        parameters: what the closure is a function of.
        ranks: those that take the same step.
        backend: what the user asks for.
        prefers_forward: the signature's.

    Returns:
        None where the loss or the gradient is not finite, so that nothing is learnt.

    Raises:
        RuntimeError: the loss does not follow the parameters, or no product can be formed as asked.
    """
    traced, metric = graph.get()
    # The gradient is known to the rounding of its ends; what happens in between (autocast) rounds
    # products as well.
    noise = coarsest_eps({t.dtype for t in (traced.loss, *traced.outputs, *parameters.tensors)})
    eps = max(noise, coarsest_eps(dtypes([traced.loss, *metric.outputs])))
    if not ranks.all(bool(traced.loss.isfinite() and gradient.isfinite().all())):
        return None
    v = _any_direction(gradient)

    ranks.together(lambda: _refuse_nonlinear_hooks(metric, parameters, eps))
    motion = ranks.together(lambda: find_motion(graph, gradient, parameters, eps))
    graph.replays, graph.is_repeatable = ranks.all(motion.replays), motion.is_repeatable
    if traced.is_estimated and not motion.replays:
        raise RuntimeError(
            "an energy at trial points needs the closure's recording, and there is none, because "
            f"{graph.problem or 'it reads numbers that depend on the parameters'}; draw the samples "
            "before the step, and compute in the closure with torch alone"
        )
    if motion.problem is not None and not traced.is_estimated:
        logger.warning(
            "the loss does not move as its gradient says: %s. Likely causes: a straight-through "
            "estimator, weights that are projected or renormalised in forward, hooks on gradients, "
            "padding_idx of an embedding whose weight is used elsewhere, third derivatives of "
            "layer_norm or batch_norm, something computed from the parameters before the closure "
            "ran. Steps are made for the gradient and judged by the loss, and may be turned down",
            motion.problem,
        )
    first = _choose_backend(
        graph, v, parameters, eps, ranks, backend=backend, prefers_forward=prefers_forward
    )
    penalty = metric.kind == "ggn" and find_penalty(graph, v, parameters, ranks)
    ways = [Way(first, recorded=False)]
    direct = direct_product(first, graph, parameters, penalty=False)
    ranks.together(lambda: metric.check(parameters, direct, v))
    problem = ranks.together(lambda: find_problem_of_recording(direct, v, eps, first))
    if ranks.all(problem is None):
        ways.insert(0, Way(first, recorded=True))
    else:
        log_change(Way(first, recorded=True), ways[0], problem or ON_ANOTHER_RANK)
    return Checked(tuple(ways), penalty, graph.replays, graph.is_repeatable)


def _choose_backend(
    graph: Graph,
    v: Tensor,
    parameters: FlatParameters,
    eps: float,
    ranks: Ranks,
    *,
    backend: BackendChoice,
    prefers_forward: bool,
) -> Backend:
    """The first backend whose products are right on all ranks.

    Raises:
        RuntimeError: there is none, or it is not the one that the user asks for.
    """
    # Sorting is stable: the others keep their order.
    preferred = sorted(_PREFERENCE, key=lambda b: prefers_forward and b != "torch.func")
    candidates: list[Backend] = preferred if backend == "auto" else [backend]
    verdicts: dict[Backend, Verdict] = {}
    chosen: Backend | None = None
    for candidate in candidates:
        if candidate == "differences" and backend == "auto":
            chosen = _choose_almost_right(verdicts, eps, ranks)
            # A Hessian's differences are their own witness, and come last.
            if chosen is None and isinstance(graph.get()[1], ScalarMetric):
                chosen = _choose_agreeing(verdicts, eps, ranks, graph)
        if chosen is None:
            judge = partial(judge_backend, candidate, graph, v, parameters, eps)
            verdicts[candidate] = ranks.together(judge)
            if ranks.all(verdicts[candidate].is_right):
                chosen = candidate
        if chosen is not None:
            break
    if chosen is None:
        chosen = _choose_almost_right(verdicts, eps, ranks)
    if chosen is None:
        chosen = _choose_agreeing(verdicts, eps, ranks, graph)
    # Where no product is finite, the step will be refused.
    formed = [verdict for verdict in verdicts.values() if verdict.product is not None]
    is_hopeless = bool(formed) and not any(verdict.is_finite for verdict in formed)
    if chosen is None and isinstance(graph.get()[1], OutputMetric) and ranks.all(is_hopeless):
        chosen = candidates[0]
    problems = [
        ON_ANOTHER_RANK if verdict.is_right else verdict.problem
        for candidate, verdict in verdicts.items()
        if candidate != chosen
    ]
    if chosen is None and backend != "auto":
        raise RuntimeError(
            f"backend={backend!r} cannot form the products of this closure: {problems[0]}; use "
            "backend='auto'"
        )
    if chosen is None:
        raise RuntimeError(
            f"no curvature product can be formed: {'; '.join(problems)}; write the closure in "
            "torch operations that can be differentiated, and let it compute the same each time "
            "that it runs"
        )
    if chosen == "differences" and backend == "auto":
        logger.warning(
            "curvature products are formed by differences, which are less exact, because %s; write "
            "the closure in torch operations that can be differentiated twice for exact ones",
            "; ".join(problems),
        )
    elif problems:
        logger.info("products by %s, because %s", chosen, problems[-1])
    return chosen


def _choose_almost_right(
    verdicts: Mapping[Backend, Verdict], eps: float, ranks: Ranks
) -> Backend | None:
    """The best backend, where the witness is not exact: in low precision and along kinks."""
    for b, verdict in sorted(verdicts.items(), key=lambda item: item[1].error):
        if verdict.product is not None and ranks.all(verdict.error <= 50 * eps**0.5):
            return b
    return None


def _choose_agreeing(
    verdicts: Mapping[Backend, Verdict], eps: float, ranks: Ranks, graph: Graph
) -> Backend | None:
    """The first of two backends that agree, where the witness is of no use: where hooks scale gradients."""
    exact: list[Backend] = [b for b in verdicts if b != "differences"]
    products = [product for b in exact if (product := verdicts[b].product) is not None]
    # That two agree proves nothing where both may miss what an autograd.Function hides.
    functions = {
        node.name() for node in nodes([graph.get()[0].loss]) if isinstance(node, BackwardCFunction)
    }
    agree = len(products) == 2 and (
        functions <= {_HOOK} and are_close(products[0], products[1], eps**0.5, eps)
    )
    return exact[0] if ranks.all(agree) else None


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
    if not all(are_close(pulled, once, eps**0.5, eps) for pulled in scaled):
        raise RuntimeError(
            "a hook on a parameter changes gradients by a function that is not linear, such as "
            "clipping or normalising, and no curvature product survives that; remove it, the "
            "trust region takes its place"
        )


def ask_again(
    checked: Checked, graph: Graph, gradient: Tensor, parameters: FlatParameters, ranks: Ranks
) -> Checked:
    """The same, with the question of the penalty answered, if it is open and can be by now."""
    if checked.penalty is not None:
        return checked
    penalty = find_penalty(graph, _any_direction(gradient), parameters, ranks)
    if penalty is None:
        return checked
    # What was recorded of products is without it.
    return replace(checked, penalty=penalty, recordings=KeptRecordings())


def find_penalty(graph: Graph, v: Tensor, parameters: FlatParameters, ranks: Ranks) -> bool | None:
    """``Checked.penalty``, on all ranks the same."""
    found = ranks.together(lambda: _is_semidefinite(graph, v, parameters))
    if ranks.all(found is None):
        return None
    return ranks.all(found is not False)


def _any_direction(gradient: Tensor) -> Tensor:
    # A random vector meets every direction; a generator of its own leaves the user's alone.
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(gradient.shape, generator=generator, device="cpu").to(gradient)


def _is_semidefinite(graph: Graph, v: Tensor, parameters: FlatParameters) -> bool | None:
    """Whether the Hessian around the outputs is positive semidefinite; None: it is zero."""
    penalty = graph.penalty()
    if penalty is None:
        return False

    product = flat_product([penalty], parameters)
    image = product(v)
    if not image.any():  # the host waits, at first steps and while it is zero
        return None
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
