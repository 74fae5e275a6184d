"""Check a preconditioner: whether it is one, and what it saves."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from ngd_optim.curvature import OutputMetric, ScalarMetric
from ngd_optim.distributed import ALONE
from ngd_optim.linalg import IndefinitePreconditionerError, conjugate_gradient
from ngd_optim.names import BackendChoice, Curvature, PreconditionerName
from ngd_optim.parameters import FlatParameters
from ngd_optim.preconditioners import Diagonal, Nystrom, Preconditioner, build_preconditioner
from ngd_optim.shown import show
from ngd_optim.solvers import QuadraticModel
from ngd_optim.testing.point import RefusedError, Subject, examined, relative
from ngd_optim.testing.report import Report, show_error

_PROBES = 4


@dataclass(frozen=True, kw_only=True)
class PreconditionerReport(Report):
    """What :func:`check_preconditioner` has found; ``print`` shows it.

    Attributes:
        name: of what was formed; ``"none"`` where nothing was.
        asymmetry: ``|uᵀM⁻¹v − vᵀM⁻¹u|`` relative to both.
        nonlinearity: how far ``M⁻¹(u + 2 v)`` is from ``M⁻¹u + 2 M⁻¹v``, relative.
        is_definite: whether all random vectors have ``rᵀM⁻¹r > 0``.
        iterations: of conjugate gradients with it, to a residual of ``tol``.
        iterations_without: likewise without.
        products: how many it took to form.

    Examples:
        >>> import torch
        >>> from ngd_optim.testing import check_preconditioner
        >>> w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        >>> scale = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
        >>> report = check_preconditioner(
        ...     lambda r: r / (scale + 0.1), lambda: 0.5 * (scale * w**2).sum(), [w]
        ... )
        >>> report.iterations, report.iterations_without
        (1, 3)
    """

    name: str = "none"
    asymmetry: float = math.nan
    nonlinearity: float = math.nan
    is_definite: bool = False
    iterations: int = 0
    iterations_without: int = 0
    products: int = 0
    subject = "preconditioner"

    def rows(self) -> Iterator[tuple[str, str]]:
        """What was measured, by name."""
        if self.name == "none":
            return
        yield "formed", f"{self.name}, from {self.products} products"
        yield "asymmetry", show_error(self.asymmetry)
        yield "nonlinearity", show_error(self.nonlinearity)
        yield "definiteness", "positive" if self.is_definite else "not positive"
        yield "iterations", f"{self.iterations}, without it {self.iterations_without}"


def check_preconditioner(
    preconditioner: Preconditioner,
    closure: Callable[[], Any],
    params: Iterable[Any],
    *,
    damping: float = 0.1,
    tol: float = 1e-6,
    curvature: Curvature = "auto",
    backend: BackendChoice = "auto",
    generator: torch.Generator | None = None,
) -> PreconditionerReport:
    """Look whether a preconditioner is symmetric, linear and positive definite, and what it saves.

    Parameters, gradients, buffers and random numbers are as before afterwards.

    Args:
        preconditioner: as for :class:`~ngd_optim.NaturalCG`: a function ``r ↦ M⁻¹ r`` of flat vectors,
            a name, or a :class:`~ngd_optim.Nystrom` or :class:`~ngd_optim.Diagonal`.
        closure: as for :func:`check_closure`.
        params: likewise.
        damping: ``λ`` of the system ``(F + λI) x = −g``.
        tol: to which relative residual it is solved.
        curvature: as for :func:`~ngd_optim.linearize`.
        backend: likewise.
        generator: draws the random vectors. None: one of its own.

    Returns:
        The report, also where the library refuses the closure: the reason is among its ``problems``.

    Raises:
        TypeError, ValueError: the arguments are no preconditioner, closure and parameters.
        Exception: whatever the closure or the function raises.

    Examples:
        >>> import torch
        >>> from ngd_optim.testing import check_preconditioner
        >>> x, y = torch.randn(50, 5), torch.randint(0, 3, (50,))
        >>> model = torch.nn.Linear(5, 3)
        >>> def closure():
        ...     return torch.nn.functional.cross_entropy(model(x), y)
        >>> check_preconditioner("kfac", closure, model.parameters()).ok
        True
    """
    is_one = callable(preconditioner) or isinstance(preconditioner, Diagonal | Nystrom)
    if not (is_one or preconditioner in get_args(PreconditionerName)):
        raise ValueError(
            f"preconditioner must be a function, one of {get_args(PreconditionerName)}, Nystrom() or "
            f"Diagonal(), got {show(preconditioner)}"
        )
    if not damping > 0:
        raise ValueError(f"damping must be above 0, got {show(damping)}")
    built: list[Any] = []

    def observe(parameters: FlatParameters) -> Callable[[OutputMetric | ScalarMetric], None]:
        built.append(build_preconditioner(preconditioner, parameters, {}, generator))
        return built[0].observe

    try:
        with examined(closure, params, curvature, backend, generator, observe) as subject:
            return _measure(subject, built[0], damping, tol)
    except RefusedError as refused:
        return PreconditionerReport(problems=(str(refused),))


def _measure(subject: Subject, built: Any, damping: float, tol: float) -> PreconditionerReport:
    point, problems = subject.point, list(subject.heard.warnings)
    model = QuadraticModel(point.gradient, point.product, 0.0)
    model = model.with_damping(damping, is_first=True)
    solve = built.build(point, model, ALONE)
    if solve is None:
        return PreconditionerReport(
            problems=tuple(problems),
            notes=("no preconditioner was formed: the closure has no layers that it is for",),
        )
    u, v = subject.draw(), subject.draw()
    image, other = solve(u).clone(), solve(v).clone()
    both = solve(u + 2 * v)
    size = u.norm() * other.norm() + v.norm() * image.norm()
    report = partial(
        PreconditionerReport,
        name=built.name,
        asymmetry=relative(torch.dot(v, image) - torch.dot(u, other), size),
        nonlinearity=relative(both - image - 2 * other, both),
        is_definite=all(_is_positive(solve, subject.draw()) for _ in range(_PROBES)),
        products=built.products,
        notes=tuple(subject.heard.notes),
    )
    found = report()
    rounding = torch.finfo(u.dtype).eps ** 0.5
    if found.nonlinearity > rounding:
        problems.append(
            f"it is not linear: M⁻¹(u + 2 v) differs by {found.nonlinearity:.1e} (relative); return "
            "the product with one fixed matrix"
        )
    if found.asymmetry > rounding:
        problems.append(
            f"it is not symmetric, by {found.asymmetry:.1e} (relative); conjugate gradients need "
            "uᵀM⁻¹v = vᵀM⁻¹u, such as that of the mean of M⁻¹ and its transpose"
        )
    if not found.is_definite:
        problems.append(
            "it is not positive definite: some r has rᵀM⁻¹r ≤ 0; add a multiple of r to what it returns"
        )
        return report(problems=tuple(problems))
    run = partial(
        conjugate_gradient,
        model.system,
        model.right_side,
        max_iters=5000,
        tol=tol,
        progress_tol=0.0,
    )
    without = run().iterations
    try:
        within = run(preconditioner=solve).iterations
    except IndefinitePreconditionerError as error:
        return report(problems=(*problems, str(error)), iterations_without=without)
    found = report(problems=tuple(problems), iterations=within, iterations_without=without)
    if within <= without:
        return found
    longer = f"it makes the solve longer, by {within - without} iterations; preconditioner=None does without"
    return replace(found, notes=(*found.notes, longer))


def _is_positive(solve: Callable[[Tensor], Tensor], r: Tensor) -> bool:
    return torch.dot(r, solve(r)).item() > 0
