"""Check a metric: whether what serves as the curvature is one, and measures the KL that it should."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngd_optim.curvature import ScalarMetric
from ngd_optim.linalg import conjugate_gradient
from ngd_optim.names import BackendChoice, Curvature, Kind
from ngd_optim.testing.point import RefusedError, Subject, examined, relative
from ngd_optim.testing.report import Report, show_error

_DIFFERENT = 0.05
"""A KL that is off by this part of its quadratic model, however short the step, is another one."""


@dataclass(frozen=True, kw_only=True)
class MetricReport(Report):
    """What :func:`check_metric` has found; ``print`` shows it.

    Attributes:
        kind: what the curvature is.
        asymmetry: ``|uᵀF v − vᵀF u|`` relative to both.
        is_semidefinite: whether no direction of negative curvature was met, by random vectors and
            thirty iterations of conjugate gradients.
        kl_at_start: the KL of the prediction from itself; None where the closure returns none.
        kl_error: relative difference between the KL at a short step and its model ``½ dᵀF d``; None
            likewise.

    Examples:
        >>> import torch
        >>> from ngd_optim.testing import check_metric
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> check_metric(lambda: (w**3).sum(), [w]).is_semidefinite
        True
    """

    kind: Kind | None = None
    asymmetry: float = math.nan
    is_semidefinite: bool = False
    kl_at_start: float | None = None
    kl_error: float | None = None
    subject = "metric"

    def rows(self) -> Iterator[tuple[str, str]]:
        """What was measured, by name."""
        if self.kind is None:
            return
        yield "curvature", self.kind
        yield "asymmetry", show_error(self.asymmetry)
        yield "definiteness", "no negative curvature" if self.is_semidefinite else "indefinite"
        if self.kl_at_start is not None:
            yield "KL here", f"{self.kl_at_start:.1e}"
            yield "KL nearby", f"difference from ½ dᵀF d: {show_error(self.kl_error)}"


def check_metric(
    closure: Callable[[], Any],
    params: Iterable[Any],
    *,
    curvature: Curvature = "auto",
    backend: BackendChoice = "auto",
    generator: torch.Generator | None = None,
) -> MetricReport:
    """Compare the curvature of a closure with what a metric must be, and with the KL that it measures.

    It is for closures that return a distribution of one's own, or a KL. Parameters, gradients,
    buffers and random numbers are as before afterwards.

    Args:
        closure: as for :func:`check_closure`.
        params: likewise.
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
        >>> from torch.distributions import Normal
        >>> from ngd_optim.testing import check_metric
        >>> model = torch.nn.Linear(3, 1)
        >>> def closure():
        ...     prediction = Normal(model(torch.ones(4, 3)), 1.0)
        ...     return -prediction.log_prob(torch.zeros(4, 1)).mean(), prediction
        >>> report = check_metric(closure, model.parameters())
        >>> report.ok, report.kind, report.kl_at_start
        (True, 'fisher', 0.0)
    """
    try:
        with examined(closure, params, curvature, backend, generator) as subject:
            return _measure(subject)
    except RefusedError as refused:
        return MetricReport(problems=(str(refused),))


def _measure(subject: Subject) -> MetricReport:
    point, problems = subject.point, []
    _, metric = point.graph.get()
    returned = metric.scalar if point.has_kl and isinstance(metric, ScalarMetric) else None
    kl_at_start = point.measure()[1] if returned is None else returned.item()
    v, u = subject.draw(), subject.draw()
    point.product.form(v)
    image, other = point.product(v), point.product(u)
    if not (image.isfinite().all() and other.isfinite().all()):
        return MetricReport(
            problems=("its products have numbers that are not finite; start from other parameters",)
        )
    size = u.norm() * image.norm() + v.norm() * other.norm()
    is_semidefinite = _is_semidefinite(subject, v, image)
    if not is_semidefinite and point.kind != "hessian":
        problems.append(
            "the metric has negative curvature, and steps may raise what it measures; return a KL "
            "that is smallest at the parameters as they are"
        )
    kl_error = None
    if kl_at_start is not None:
        kl_error = _compare_kl(subject, v, torch.dot(v, image).item(), kl_at_start)
        if kl_error is not None and kl_error > _DIFFERENT:
            problems.append(
                f"the KL of a short step differs from ½ dᵀF d by {kl_error:.1e} (relative); let the "
                "closure return the KL from the prediction before the step to the one after it"
            )
    return MetricReport(
        problems=(*subject.heard.warnings, *problems),
        notes=tuple(subject.heard.notes),
        kind=point.kind,
        asymmetry=relative(torch.dot(u, image) - torch.dot(v, other), size),
        is_semidefinite=is_semidefinite,
        kl_at_start=kl_at_start,
        kl_error=kl_error,
    )


def _is_semidefinite(subject: Subject, v: Tensor, image: Tensor) -> bool:
    if not image.any():
        return True
    product = subject.point.product
    shift = 1e-5 * image.norm() / v.norm()  # rounding is no curvature
    result = conjugate_gradient(lambda p: product(p) + shift * p, v, max_iters=30)
    return result.stop != "negative_curvature"


def _compare_kl(subject: Subject, d: Tensor, curvature: float, start: float) -> float | None:
    """The least difference between the KL and its model over steps of some lengths."""
    if curvature <= 0:
        return None
    theta, errors = subject.parameters.read(), []
    for kl in (1e-2, 1e-3, 1e-4):
        length = math.sqrt(2 * kl / curvature)  # ½ dᵀF d is the KL
        found = []
        for side in (length, -length):  # their mean has no third order
            with subject.parameters.displaced(theta, d, side):
                found.append(subject.point.measure()[1])
        if any(one is None or not math.isfinite(one) for one in found):
            return None
        errors.append(abs(sum(found) / 2 - start - kl) / kl)
    return min(errors)
