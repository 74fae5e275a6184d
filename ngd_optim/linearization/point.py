"""A closure at one point: its loss, its gradient and its curvature product."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from ngd_optim.autograd_graph import find_reached
from ngd_optim.curvature import Graph, OutputMetric, ScalarMetric, build_kl
from ngd_optim.distributed import ALONE, Common, Ranks
from ngd_optim.jacobian import SqrtGGN, compute_cheap_diagonal, square_root_of
from ngd_optim.linearization.backend import Way
from ngd_optim.linearization.checks import (
    Checked,
    Signature,
    ask_again,
    assume_unchecked,
    check_closure,
    refuse_unsupported,
    signature_of,
    warn_of_constants,
)
from ngd_optim.linearization.product import (
    ClosureProduct,
    MeanProduct,
    RanksProduct,
    average,
)
from ngd_optim.names import BackendChoice, Curvature, Kind
from ngd_optim.parameters import FlatParameters
from ngd_optim.reading import read
from ngd_optim.tracing import TracedClosure

Observer = Callable[[OutputMetric | ScalarMetric], None]
"""Is shown a closure's metric while its graph is at hand."""


_CHECKPOINT_CHANGED = (
    "a checkpointed part of the closure was not the same when it ran again; let it compute the same each "
    "time, from what it is given"
)
_WRITTEN_TO = (
    "the loss was computed from something that has been written to since, in the closure or by a step, "
    "and can no longer be differentiated; compute all of it in the closure, from copies (clone()) of "
    "what the closure writes to, and from changed weights by torch.func.functional_call"
)

_KINDS: tuple[Kind, ...] = get_args(Kind)
_OTHER_KIND = (
    "the closures of the ranks give curvatures of different kinds; let them all return the same: a loss of "
    "one kind, (loss, distribution) or (loss, kl)"
)

Learnt = dict[Any, Checked]
"""What was learnt of closures, by how they are linearised and the signature of their trace.

It is not saved, and learnt anew if lost.
"""

_MOST = 256
"""So much is kept, and the oldest given up: closures whose hooks are new at each step are new each time."""


@dataclass(frozen=True)
class Point:
    """What is known about closures at the current parameters. All vectors are flat, in the order of the parameters.

    It is valid only while the parameters are where they were: products read them, and do not check.

    Attributes:
        loss: the loss, detached, 0-dim.
        gradient: its gradient, shape ``(n,)``; zero for parameters that the loss does not use.
        product: ``v ↦ F v``.
        reached: for each parameter, whether the loss depends on it.
        used: for each parameter, whether the loss or the metric does.
        kind: what the curvature is.
        has_kl: whether the closure returned a distribution or a KL, so that the KL can be measured.
        is_least_squares: whether all that the metric comes from is
            :func:`~ngd_optim.least_squares`.
        is_estimated: whether the gradient is that of a mean over samples, which are drawn anew for
            each step: an energy.
        outputs: how many elements the model's outputs have; 0 where the curvature is not made at
            the outputs of one closure alone: a Hessian, a scalar KL, a penalty beside them, several
            closures or processes.
        graph: of the closure whose outputs these are.
        parameters: what the vectors are in the order of.
        measure: evaluates the closure at the parameters as they are then, and gives the loss
            (infinite outside of its domain, where it raises an exception) and the KL from the
            prediction here, in nats per sample; None where the metric has only its second-order
            model.
        is_empty: tells, before products are formed, whether tensors without elements went into the
            loss, such as an empty batch.
        writes_parameters: whether a closure of the loss changes the parameters, such as by putting
            them back into bounds.
        bend: what the gradient of the model, whose kinks are rounded, has more than the loss's;
            None: nothing.
        hidden: how much higher the loss with rounded kinks is than the loss, 0-dim; None: they are
            not rounded.
    """

    loss: Tensor
    gradient: Tensor
    product: ClosureProduct | MeanProduct | RanksProduct
    reached: list[bool]
    used: list[bool]
    kind: Kind
    has_kl: bool
    is_least_squares: bool
    outputs: int
    graph: Graph
    parameters: FlatParameters
    measure: Callable[[], tuple[float, float | None]]
    is_empty: Callable[[], bool]
    writes_parameters: bool = False
    is_estimated: bool = False
    bend: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def model_gradient(self) -> Tensor:
        """The gradient of the quadratic model: that of the loss with its kinks rounded."""
        return self.gradient if self.bend is None else self.gradient + self.bend

    def square_root(self) -> SqrtGGN | None:
        """The matrix ``A`` with ``F = AᵀA``, where there are outputs; None if ``F`` is indefinite."""
        traced, metric = self.graph.get()
        assert isinstance(metric, OutputMetric)

        def evaluate_outputs() -> Sequence[Tensor] | None:
            self.graph.run.count += 1
            return self.graph.evaluate_outputs()

        return square_root_of(metric, traced.loss, self.parameters, evaluate_outputs)

    def compute_cheap_diagonal(self) -> Tensor | None:
        """The diagonal of ``F``, where it takes as little as some products; else None."""
        if not self.outputs:
            return None
        _, metric = self.graph.get()
        assert isinstance(metric, OutputMetric)
        return compute_cheap_diagonal(metric, self.parameters)

    @property
    def value(self) -> float:
        """The loss as a number."""
        return self._read[0]

    @property
    def is_finite(self) -> bool:
        """Whether the whole gradient is."""
        return bool(self._read[1])

    @property
    def hidden_by_rounding(self) -> float:
        """How much the loss can fall, where kinks are, that its model does not see."""
        return self._read[2]

    @cached_property
    def _read(self) -> list[Any]:
        hidden = torch.zeros_like(self.loss) if self.hidden is None else self.hidden
        # The host waits once a step: nothing is solved where they are not finite.
        return read(self.loss, self.gradient.isfinite().all(), hidden)

    @property
    def rounding(self) -> float:
        """Differences of the loss below this are noise."""
        return 10 * torch.finfo(self.loss.dtype).eps * abs(self.value)

    def average(self, ranks: Ranks) -> "Point":
        """The mean over several processes. What it measures and multiplies by is then global as well."""
        if ranks.group is None:
            return self
        assert not isinstance(self.product, RanksProduct)
        n = len(self.used)
        flags = ranks.any([*self.reached, *self.used, self.bend is not None])
        bend = torch.zeros_like(self.gradient) if self.bend is None else self.bend
        hidden = torch.zeros_like(self.loss) if self.hidden is None else self.hidden

        def measure() -> tuple[float, float | None]:
            loss, kl = ranks.together(self.measure)
            values = torch.tensor(
                [loss, kl or 0.0, kl is not None], dtype=torch.float64, device=self.gradient.device
            )
            loss, mean_kl, has_kl = ranks.average(values).tolist()
            return loss, mean_kl if has_kl else None

        return replace(
            self,
            loss=ranks.average(self.loss),
            gradient=ranks.mean(self.gradient),
            reached=flags[:n],
            used=flags[n : 2 * n],
            bend=ranks.mean(bend) if flags[-1] else None,
            hidden=ranks.average(hidden) if flags[-1] else None,
            outputs=0,
            product=RanksProduct(self.product, ranks),
            measure=measure,
        )

    def with_curvature_of(self, other: "Point") -> "Point":
        """The same loss and gradient, with another closure's curvature."""
        used = [a or b for a, b in zip(self.used, other.used, strict=True)]
        return replace(
            self,
            used=used,
            outputs=other.outputs,
            is_least_squares=other.is_least_squares,
            kind=other.kind,
            graph=other.graph,
            product=other.product,
            bend=other.bend,
            hidden=other.hidden,
        )


@torch.enable_grad()
def linearize_closure(
    run: TracedClosure,
    parameters: FlatParameters,
    curvature: Curvature,
    backend: BackendChoice,
    learnt: Learnt,
    ranks: Ranks = ALONE,
    observe: Observer | None = None,
    *,
    smoothing: float | None = None,
    keep_graph: bool = True,
    captures: bool = False,
) -> Point:
    """A closure at the current parameters.

    What is learnt of it is common to all ranks; what is returned is this rank's.

    Args:
        run: the closure.
        parameters: what it is a function of.
        curvature: the setting of that name.
        backend: likewise.
        learnt: what was learnt of closures at earlier points; it is added to.
        ranks: those that take the same step.
        observe: is shown the metric; None: nobody is.
        smoothing: how wide kinks are rounded; None: they are not.
        keep_graph: hold the graph; else each product runs the closure again.
        captures: replay recorded products by CUDA graphs.
    """
    params = parameters.tensors
    graph = Graph(run, parameters, curvature, smoothing)

    def differentiate() -> tuple[Signature, list[bool], Tensor]:
        traced, metric = graph.get()
        signature = signature_of(graph, parameters)
        if (curvature, backend, signature) not in learnt:
            refuse_unsupported(traced, metric)
            warn_of_constants(traced)
        try:
            if run.gradient is not None:  # by the closure's own backward
                return signature, find_reached([traced.loss], params), run.gradient
            gradients = torch.autograd.grad(
                traced.loss, params, retain_graph=True, allow_unused=True
            )
        except CheckpointError as error:
            raise RuntimeError(_CHECKPOINT_CHANGED) from error
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                raise RuntimeError(_WRITTEN_TO) from error
            raise
        reached = [gradient is not None for gradient in gradients]
        return signature, reached, parameters.flatten(gradients)

    signature, reached, gradient = ranks.together(differentiate)
    traced, metric = graph.get()
    key = curvature, backend, signature

    def learn() -> Checked:
        checked = check_closure(
            graph,
            gradient,
            parameters,
            ranks,
            backend=backend,
            prefers_forward=signature.prefers_forward,
        )
        if checked is None:
            return assume_unchecked(backend)
        if len(learnt) >= _MOST:
            del learnt[next(iter(learnt))]
        learnt[key] = checked
        return checked

    kind = Common(_KINDS.index(metric.kind), _OTHER_KIND)
    # A rank that does not know the closure takes the others along to the check, which communicates.
    if ranks.all(key in learnt, [kind]):
        checked = learnt[key] = ask_again(learnt[key], graph, gradient, parameters, ranks)
    else:
        checked = learn()
    graph.replays, graph.is_repeatable = checked.replays, checked.is_repeatable

    def keep_ways(ways: tuple[Way, ...]) -> None:
        learnt[key] = replace(learnt.get(key, checked), ways=ways)

    if observe is not None:
        ranks.together(lambda: observe(metric))
    # What this holds of the old prediction is detached: the graph is not kept alive by it.
    kl = build_kl(traced)

    def measure() -> tuple[float, float | None]:
        there = graph.evaluate_trial()
        if there is None:
            return math.inf, None
        divergence = kl(there)
        # The host waits once a trial point: whether it is taken depends on it.
        if divergence is None:
            return read(there.loss)[0], None
        loss, divergence = read(there.loss, divergence)
        return loss, divergence

    at_outputs = isinstance(metric, OutputMetric)
    bend = metric.bend(params) if at_outputs else None
    point = Point(
        loss=traced.loss.detach(),
        gradient=gradient,
        product=ClosureProduct(
            graph,
            parameters,
            checked,
            ranks,
            keep_ways,
            learn,
            keep_graph=keep_graph,
            captures=captures,
        ),
        reached=reached,
        used=reached if all(reached) else find_reached([traced.loss, *metric.outputs], params),
        kind=metric.kind,
        has_kl=traced.metric is not None,
        is_least_squares=traced.is_least_squares and at_outputs,
        outputs=sum(z.numel() for z in metric.outputs) if at_outputs and not checked.penalty else 0,
        graph=graph,
        parameters=parameters,
        measure=measure,
        is_empty=graph.is_empty,
        writes_parameters=run.writes_parameters,
        is_estimated=traced.is_estimated,
        bend=None if bend is None else parameters.flatten(bend),
        hidden=metric.hidden if at_outputs else None,
    )
    # Each product of a list runs its closure again, so that one graph is in memory at a time.
    if not keep_graph:
        graph.release(for_good=False)
    return point


def linearize_mean(
    parameters: FlatParameters,
    curvature: Curvature,
    backend: BackendChoice,
    learnt: Learnt,
    ranks: Ranks,
    runs: Sequence[TracedClosure],
    observe: Observer | None = None,
    *,
    smoothing: float | None = None,
    weights: Sequence[float] | None = None,
    captures: bool = False,
) -> Point:
    """The mean of some closures, and over processes; see :func:`linearize_closure` for the arguments.

    ``weights`` are those of the closures in the mean, and add up to 1; None: equal ones. Of several
    closures there is the graph of one at a time: each product runs each of them again.
    """
    parts = [
        linearize_closure(
            run,
            parameters,
            curvature,
            backend,
            learnt,
            ranks,
            observe,
            smoothing=smoothing,
            keep_graph=len(runs) == 1,
            captures=captures,
        )
        for run in runs
    ]
    if len(parts) > 1:
        ranks.together(lambda: _require_one_kind(parts))
    return (parts[0] if len(parts) == 1 else _average_points(parts, weights)).average(ranks)


def _average_points(parts: Sequence[Point], weights: Sequence[float] | None) -> Point:
    def mean(values: Sequence[float]) -> float:
        if weights is None:
            return fmean(values)
        return math.fsum(w * v for w, v in zip(weights, values, strict=True))

    def measure() -> tuple[float, float | None]:
        losses, kls = zip(*(part.measure() for part in parts), strict=True)
        return mean(losses), None if None in kls else mean(kls)

    losses = torch.stack([part.loss for part in parts])
    shares = weights or [1 / len(parts)] * len(parts)
    pairs = list(zip(parts, shares, strict=True))
    bends = [share * part.bend for part, share in pairs if part.bend is not None]
    hidden = [share * part.hidden for part, share in pairs if part.hidden is not None]
    return replace(
        parts[0],
        loss=losses.mean() if weights is None else losses @ losses.new_tensor(weights),
        gradient=average((part.gradient for part in parts), weights),
        product=MeanProduct(
            [part.product for part in parts if isinstance(part.product, ClosureProduct)], weights
        ),
        reached=[any(flags) for flags in zip(*(part.reached for part in parts), strict=True)],
        used=[any(flags) for flags in zip(*(part.used for part in parts), strict=True)],
        is_least_squares=all(part.is_least_squares for part in parts),
        outputs=0,
        measure=measure,
        is_empty=lambda: any(part.is_empty() for part in parts),
        writes_parameters=any(part.writes_parameters for part in parts),
        bend=torch.stack(bends).sum(0) if bends else None,
        hidden=torch.stack(hidden).sum() if hidden else None,
    )


def _require_one_kind(parts: Sequence[Point]) -> None:
    kinds = dict.fromkeys((part.kind, part.has_kl) for part in parts)
    if len(kinds) > 1:
        shown = ", ".join(
            f"{kind!r} {'with' if has_kl else 'without'} a KL" for kind, has_kl in kinds
        )
        raise ValueError(
            "the closures of a list must all return the same, a loss, (loss, distribution) or "
            f"(loss, kl), and losses of one kind; got curvatures {shown}"
        )
