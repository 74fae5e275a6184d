"""Check a closure: what is seen in it, and whether it is right."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ngd_optim.curvature import OutputMetric
from ngd_optim.linearization import Point
from ngd_optim.names import Backend, BackendChoice, Curvature, Kind
from ngd_optim.testing.point import RefusedError, Subject, compare_slopes, examined, relative
from ngd_optim.testing.report import Report, show_error

_COARSE = 0.05
"""Products agree with differences to this part, in float32 and along kinks."""

_ROUNDS, _SECONDS = 15, 0.5
_HELD = {
    "detached": "what is detached",
    "no_grad": "what is computed under no_grad",
    "constant": "what is made a leaf of the closure's own",
}


@dataclass(frozen=True, kw_only=True)
class ClosureReport(Report):
    """What :func:`check_closure` has found; ``print`` shows it.

    Attributes:
        loss: its value.
        is_repeatable: whether the closure gives the same loss when it runs again, with the same
            random numbers of torch.
        draws: whether that depends on torch's random numbers (dropout).
        gradient_error: relative difference between the gradient's slope and that of the loss, along
            a random direction; None if nobody can tell.
        recognised: what defines the curvature: loss functions, distributions, ``"kl"``; empty for
            the Hessian of the loss.
        kind: what the curvature is.
        outputs: how many numbers the model gave to the loss, or to the distribution; 0 for a
            Hessian.
        product_error: relative difference of a product from one by differences; None if there is
            none.
        asymmetry: ``|uᵀF v − vᵀF u|`` relative to both.
        backend: what forms the products.
        is_recorded: whether they are replayed from a recording.
        product_cost: the time of a product in gradients, by the closure itself.
        unused: names of parameters that the loss does not depend on.
        held: why something that depends on the parameters is a constant to autograd:
            ``"detached"``, ``"no_grad"``, ``"constant"``.
        replays: whether trial points replay what was recorded of the closure; else they run it.

    Examples:
        >>> import torch
        >>> from ngd_optim.testing import check_closure
        >>> model = torch.nn.Linear(3, 2)
        >>> report = check_closure(lambda: model(torch.ones(4, 3)).cos().mean(), model.parameters())
        >>> report.kind, report.recognised
        ('hessian', ())
    """

    loss: float = math.nan
    is_repeatable: bool = False
    draws: bool = False
    gradient_error: float | None = None
    recognised: tuple[str, ...] = ()
    kind: Kind | None = None
    outputs: int = 0
    product_error: float | None = None
    asymmetry: float | None = None
    backend: Backend | None = None
    is_recorded: bool = False
    product_cost: float = math.nan
    unused: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    replays: bool = False
    subject = "closure"

    def rows(self) -> Iterator[tuple[str, str]]:
        """What was measured, by name."""
        if self.kind is None:
            return
        yield "loss", f"{self.loss:.6g}"
        again = (
            "the same loss when it runs again" if self.is_repeatable else "another loss each time"
        )
        yield "deterministic", again + ", with the same random numbers" * self.draws
        yield (
            "gradient",
            f"difference from differences of the loss: {show_error(self.gradient_error)}",
        )
        names = {"ggn": "the Gauss-Newton matrix", "fisher": "the Fisher information"}
        matrix = names.get(self.kind, "the Hessian of the loss")
        origin = f" of {', '.join(self.recognised)}" if self.recognised else ""
        yield (
            "curvature",
            matrix + origin + (f", at {self.outputs} outputs" if self.outputs else ""),
        )
        yield "products", f"difference from differences: {show_error(self.product_error)}"
        yield "asymmetry", show_error(self.asymmetry)
        recorded = "recorded" if self.is_recorded else "formed anew each time"
        yield "backend", f"{self.backend}, {recorded}"
        yield "cost", f"a product takes {self.product_cost:.2g} gradients"
        yield "trial points", "replay the recording" if self.replays else "run the closure"
        if self.unused:
            yield "unused", f"the loss does not depend on {', '.join(self.unused)}"
        if self.held:
            yield "held fixed", ", ".join(_HELD[name] for name in self.held)


def check_closure(
    closure: Callable[[], Any],
    params: Iterable[Any],
    *,
    curvature: Curvature = "auto",
    backend: BackendChoice = "auto",
    generator: torch.Generator | None = None,
) -> ClosureReport:
    """Look at a closure as a step does, and compare what it gives with differences.

    It answers: does it compute the same each time; do value, gradient and curvature product agree;
    which loss or metric is recognised; what is constant; how products are formed, and what one
    costs. Parameters, gradients, buffers and random numbers are as before afterwards. The closure
    runs some ten times: what it does outside of torch, such as taking a batch, is done as often.

    Args:
        closure: as for :meth:`NaturalCG.step <ngd_optim.NaturalCG.step>`; not a list.
        params: the parameters, or pairs of a name and a parameter (``model.named_parameters()``),
            whose names the report has then.
        curvature: as for :func:`~ngd_optim.linearize`.
        backend: likewise.
        generator: draws the random directions. None: one of its own.

    Returns:
        The report, also where the library refuses the closure: the reason is among its ``problems``.

    Raises:
        TypeError, ValueError: the arguments are no closure and no parameters.
        Exception: whatever the closure raises.

    Examples:
        >>> import torch
        >>> from ngd_optim.testing import check_closure
        >>> x, y = torch.randn(20, 3), torch.randint(0, 2, (20,))
        >>> model = torch.nn.Linear(3, 2)
        >>> report = check_closure(
        ...     lambda: torch.nn.functional.cross_entropy(model(x), y), model.named_parameters()
        ... )
        >>> report.ok, report.kind, report.recognised
        (True, 'ggn', ('cross_entropy',))
        >>> print(report)
        closure: right
          loss ...
    """
    try:
        with examined(closure, params, curvature, backend, generator) as subject:
            return _measure(subject, closure)
    except RefusedError as refused:
        return ClosureReport(problems=(str(refused),))


def _measure(subject: Subject, closure: Callable[[], Any]) -> ClosureReport:
    point, heard, run = subject.point, subject.heard, subject.run
    graph = point.graph
    traced, metric = graph.get()
    held = tuple(sorted(graph.recorder.held))
    if not point.is_finite or not math.isfinite(point.value):
        problem = f"the loss is {point.value:g} and its gradient has numbers that are not finite"
        return ClosureReport(
            problems=(problem + "; start from parameters where both are finite",), loss=point.value
        )
    v, u = subject.draw(), subject.draw()
    # Differences need the graph, which products let go.
    witness = _product_by_differences(point, v)
    recognised = _recognised(traced, metric.kind)
    point.product.form(v)
    image, other = point.product(v), point.product(u)
    product_error = None if witness is None else relative(image - witness, witness)
    across = torch.dot(u, image), torch.dot(v, other)
    size = u.norm() * image.norm() + v.norm() * other.norm()
    asymmetry = relative(across[0] - across[1], size)
    again = [run.run_again(graph=False).loss.item() for _ in range(2)]
    is_repeatable = all(math.isclose(one, point.value, rel_tol=1e-5) for one in again)
    gradient_error, is_other = _compare_gradient(subject)
    problems = list(heard.warnings)
    if is_other and not any("gradient says" in problem for problem in problems):
        problems.append(
            f"the loss has another slope than its gradient says, by {gradient_error:.1e} (relative); "
            "look for parts of it that autograd does not see"
        )
    if product_error is not None and product_error > _COARSE:
        problems.append(
            f"a curvature product differs from one by differences, by {product_error:.1e} "
            "(relative); look for an autograd.Function whose derivatives are not its own"
        )
    if not any(point.reached):
        problems.append(
            "the loss depends on none of these parameters; were they copied or built anew, or are they "
            "another model's?"
        )
    notes = list(heard.notes)
    if not is_repeatable:
        notes.append(
            "the closure computes another loss when it runs again; a step runs it once, but a list of "
            "closures, and trial points where an `if` goes another way, need one that repeats itself"
        )
    return ClosureReport(
        problems=tuple(problems),
        notes=tuple(notes),
        loss=point.value,
        is_repeatable=is_repeatable,
        draws=is_repeatable and _draws(subject, closure),
        gradient_error=gradient_error,
        recognised=recognised,
        kind=point.kind,
        outputs=sum(z.numel() for z in metric.outputs) if isinstance(metric, OutputMetric) else 0,
        product_error=product_error,
        asymmetry=asymmetry,
        backend=point.product.backend,
        is_recorded=point.product.ways[0].recorded,  # pyright: ignore[reportAttributeAccessIssue]
        product_cost=_cost(subject, closure, v),
        unused=tuple(
            name for name, used in zip(subject.names, point.used, strict=True) if not used
        ),
        held=held,
        replays=graph.replays,
    )


def _product_by_differences(point: Point, v: Tensor) -> Tensor | None:
    """``F v`` by differences of outputs or gradients; None where they cannot be had."""
    graph, parameters = point.graph, point.parameters
    pieces = parameters.unflatten(v)
    try:
        product = parameters.flatten(graph.product("differences")(pieces))
        around = graph.penalty() if point.product.has_penalty else None  # pyright: ignore
    except RuntimeError:
        return None
    return product if around is None else product + parameters.flatten(around(pieces))


def _recognised(traced: Any, kind: Kind) -> tuple[str, ...]:
    """Names of what defines the curvature."""
    if kind == "hessian":
        return ()
    if kind == "fisher":
        return ("kl",) if isinstance(traced.metric, Tensor) else _names_of_heads(traced.metric)
    names = [call.name for call in traced.losses if call.result.requires_grad]
    kinks = ["kinks"] if any(not kink.is_smooth for kink in traced.kinks) else []
    return tuple(dict.fromkeys([*names, *kinks]))


def _names_of_heads(metric: Any) -> tuple[str, ...]:
    if isinstance(metric, dict):
        metric = list(metric.values())
    if isinstance(metric, list | tuple):
        return tuple(name for part in metric for name in _names_of_heads(part))
    return (type(metric).__name__,)


def _compare_gradient(subject: Subject) -> tuple[float | None, bool]:
    g = subject.point.gradient
    if not g.any():
        return None, False
    # Mostly along the gradient, where there is something to see, and a little into all directions.
    direction = g * (1 + subject.draw()) / g.norm() + subject.draw() / len(g) ** 0.5
    slope = torch.dot(g, direction).item()
    return compare_slopes(subject, lambda: subject.point.measure()[0], direction, slope)


def _draws(subject: Subject, closure: Callable[[], Any]) -> bool:
    """Whether the loss is another one where torch's random numbers are others."""
    losses: list[float] = []
    for seed in (0, 1):
        subject.run.rewind()
        torch.manual_seed(seed)
        with torch.enable_grad():
            returned = closure()
        loss = returned[0] if isinstance(returned, tuple) else returned
        losses.append(float(loss.detach() if isinstance(loss, Tensor) else loss))
    return not math.isclose(*losses, rel_tol=1e-6)


def _cost(subject: Subject, closure: Callable[[], Any], v: Tensor) -> float:
    """The time of a product ÷ that of the closure with its gradient, each in turn: of the medians."""
    params, device = subject.parameters.tensors, subject.parameters.device

    def differentiate() -> None:
        with torch.enable_grad():
            returned = closure()
            loss = returned[0] if isinstance(returned, tuple) else returned
            if isinstance(loss, Tensor) and loss.requires_grad and not subject.run.leaves_gradients:
                torch.autograd.grad(loss, params, allow_unused=True)

    def seconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        return time.perf_counter() - start

    gradients, products = [], []
    begin = time.perf_counter()
    while len(products) < 3 or (len(products) < _ROUNDS and time.perf_counter() - begin < _SECONDS):
        gradients.append(seconds(differentiate))
        products.append(seconds(lambda: subject.point.product(v)))
    return median(products) / median(gradients)
