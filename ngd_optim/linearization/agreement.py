"""Which ways of forming products are right: they are compared with each other, and with autograd.

The backends are independent. A product that both give is right. Where they differ, the plain
pull-back decides: ``v ↦ J v`` must be its adjoint. A recording must give what it was recorded from.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor

from ngd_optim.autograd_graph import find_reached
from ngd_optim.curvature import OutputMetric, ScalarMetric, pull_back
from ngd_optim.linearization.backend import Product, explain_failure, reraise_own_kinds
from ngd_optim.names import Backend
from ngd_optim.parameters import FlatParameters
from ngd_optim.recording import record
from ngd_optim.tracing import ReplayedClosure

_LONG, _SMALL = 400, 2**18
"""Operations, and bytes that each computes on average.

To note so many small operations pays after some forty products only: autograd's engine, which
pushes through a graph that is there, is almost as fast as a replay.
"""

BACKENDS: tuple[Backend, ...] = get_args(Backend)

_MISSES = "{} misses a dependence on parameters that autograd sees"


def find_problems_of_backends(
    run: ReplayedClosure,
    metric: OutputMetric | ScalarMetric,
    flat: Tensor,
    parameters: FlatParameters,
    eps: float,
) -> dict[Backend, str]:
    """For each backend whose products are not right, a reason.

    The backends are independent. Where they differ, or only some of them work, autograd's plain
    pull-back decides, whose adjoint they must be.

    Raises:
        RuntimeError: there is something wrong with all of them.
    """
    v = parameters.unflatten(flat)
    products: dict[Backend, Tensor] = {}
    problems: dict[Backend, str] = {}
    for backend in BACKENDS:
        try:
            products[backend] = parameters.flatten(
                metric.product(run, parameters.tensors, backend)(v)
            )
            if backend == "torch.func" and not _all_are_substituted(run, metric, parameters):
                # Equal numbers prove nothing: a gate that is zero now hides what is missed.
                problems[backend] = _MISSES.format(backend)
        except RuntimeError as error:
            reraise_own_kinds(error)
            problems[backend] = explain_failure(error, backend)

    def disagree(backend: Backend, other: Backend) -> bool:
        return not are_close(products[backend], products[other], eps, eps)

    first: Backend | None = next(iter(products), None)
    if first is not None and not problems and not any(disagree(b, first) for b in products):
        return {}
    errors: dict[Backend, float] = {
        b: _adjoint_error(b, products, run, metric, v, parameters) for b in products
    }
    best = min(errors.values(), default=math.inf)
    for backend, error in errors.items():
        # Wrong products miss whole terms: errors of 1e-1 to 1; right ones agree to rounding.
        if not error <= min(50 * eps**0.5, 10 * max(best, eps)):
            problems[backend] = _MISSES.format(backend)
    reference: Backend | None = next((b for b in products if b not in problems), None)
    if reference is None and not all(product.isfinite().all() for product in products.values()):
        reference = first  # a product that is not finite is no witness: the step will be refused
    if reference is None:
        raise RuntimeError(f"no curvature product can be formed: {'; '.join(problems.values())}")
    others = list(BACKENDS)
    others.remove(reference)
    return {
        b: problems.get(b, f"it disagrees with {reference}")
        for b in others
        if b in problems or disagree(b, reference)
    }


def _all_are_substituted(
    run: ReplayedClosure, metric: OutputMetric | ScalarMetric, parameters: FlatParameters
) -> bool:
    """Whether forward mode has moved every parameter that the metric depends on."""
    reached = find_reached(metric.outputs, parameters.tensors)
    pairs = zip(parameters.tensors, reached, strict=True)
    return all(id(p) in run.substituted for p, flag in pairs if flag)


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
        return (
            0.0 if backend == "double-backward" or "double-backward" not in products else math.inf
        )
    generator = torch.Generator(device="cpu").manual_seed(1)
    u = [torch.randn(z.shape, generator=generator, device="cpu").to(z) for z in metric.outputs]
    pushed = metric.push(run, parameters.tensors, backend)(v)
    pulled = pull_back(metric.outputs, parameters.tensors)(u)
    (at_outputs, size_there), (at_parameters, size_here) = (
        _inner_product(u, pushed),
        _inner_product(pulled, v),
    )
    # ⟨u, J v⟩ = ⟨Jᵀu, v⟩ for random u and v, with the pull-back that autograd has.
    error = abs(at_outputs - at_parameters)
    return error / (size_there + size_here) if error else 0.0


def _inner_product(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[float, float]:
    """``⟨a, b⟩``, and how large it is for vectors of these norms that know nothing of each other."""
    x, y = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (a, b))
    return torch.dot(x, y).item(), (x.norm() * y.norm() / max(1, len(x)) ** 0.5).item()


def find_problem_of_recording(
    direct: Product, v: Tensor, eps: float, metric: OutputMetric | ScalarMetric, backend: Backend
) -> str | None:
    """None where a recording agrees with the product that it records, and saves time."""
    if isinstance(metric, ScalarMetric) and backend == "torch.func":
        # jvp(grad(mse_loss(reduction="sum"))) in a dispatch mode ends the process (torch 2.13).
        return "forward mode through a gradient cannot be watched safely"
    other = v.flip(0)
    try:
        _, recording = record(direct, v)
        is_small = recording.bytes < _SMALL * recording.length
        if backend == "double-backward" and recording.length > _LONG and is_small:
            return f"to record their {recording.length} small operations takes longer than it saves"
        agrees = are_close(recording(other), direct(other), eps, eps)
    except RuntimeError as error:
        reraise_own_kinds(error)
        return f"they cannot be recorded: {error}".splitlines()[0]
    return None if agrees else "what is recorded disagrees with them"


def coarsest_eps(dtypes: Iterable[torch.dtype]) -> float:
    """The largest rounding error of some dtypes; 0 if none is of floating point."""
    return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)


def are_close(a: Tensor, b: Tensor, eps: float, floor: float) -> bool:
    """``‖a − b‖ ≤ √eps ‖b‖ + floor``."""
    return bool((a - b).norm() <= eps**0.5 * b.norm() + floor)
