"""Which solver a step takes."""

from typing import Protocol

from torch import Tensor

from ngd_optim.linalg import CGResult
from ngd_optim.linearization import Linearization
from ngd_optim.names import SolverName
from ngd_optim.solvers.direct import LeastSquares, Matrix, SampleSpace
from ngd_optim.solvers.quadratic_model import QuadraticModel


class Solver(Protocol):
    """Solves ``(F + W + diag(λ)) x = b`` at one point.

    Attributes:
        name: ``"cg"``, ``"dense"`` or ``"sample"``.
        diagonal: that of ``F``, where the solver knows it.
    """

    @property
    def name(self) -> SolverName: ...  # noqa: D102

    @property
    def diagonal(self) -> Tensor | None: ...  # noqa: D102

    def solve(self, model: QuadraticModel) -> CGResult:
        """The solution for a model with this point's curvature."""
        ...


_FEW = 4096
"""Direct solvers are chosen for so many unknowns at most: parameters or outputs, whichever are fewer."""

_LARGEST_JACOBIAN = 2**30
"""And for a Jacobian of so many bytes at most."""

_NEEDS_OUTPUTS = (
    "needs one closure in one process, with a recognised loss function or a returned distribution: no other loss, no "
    "scalar KL, no list of closures, and no penalty on the weights within the loss (weight_decay is allowed)"
)


def choose_solver(name: SolverName, point: Linearization) -> SolverName:
    """``"cg"``, ``"dense"`` or ``"sample"``.

    ``"auto"`` is a direct solver for :func:`~ngd_optim.least_squares`, where the step is only as good as the solution:
    ``"dense"``, or ``"sample"`` where there are fewer outputs than parameters. It is ``"cg"`` for every other loss, and
    for what is too large.

    Raises:
        ValueError: ``"sample"`` is asked for and the metric does not live at the outputs of one model.
    """
    m, n = point.root_shape
    if name == "sample" and not m:
        raise ValueError(f"solver='sample' {_NEEDS_OUTPUTS}")
    if not point.gradient.isfinite().all():
        return "cg"  # which says so
    if name != "auto":
        return name
    few = n if not m else min(m, n)
    bytes_needed = point.gradient.element_size() * n * (m or n)
    if not point.is_least_squares or few > _FEW or bytes_needed > _LARGEST_JACOBIAN:
        return "cg"
    return "sample" if m and m < n else "dense"


def direct_solver(name: SolverName, point: Linearization) -> "Solver":
    """The solver of that name, ``"dense"`` or ``"sample"``, at a point.

    Raises:
        ValueError: ``"sample"`` is asked for and the metric at the outputs is indefinite.
    """
    root = point.square_root() if point.root_shape[0] else None
    if root is not None:
        return SampleSpace(root) if name == "sample" else LeastSquares(root)
    if name == "sample":
        raise ValueError("the metric at the model's outputs is not positive semidefinite")
    return Matrix(point.curvature, point.gradient)


def curvature_diagonal(solver: Solver, point: Linearization) -> Tensor:
    """The diagonal of ``F``, exactly; to be asked before any product.

    Raises:
        ValueError: neither the solver knows it nor the outputs tell.
    """
    if solver.diagonal is not None:
        return solver.diagonal
    if not point.root_shape[0]:
        raise ValueError(f"damping_scale='diagonal' {_NEEDS_OUTPUTS}, or solver='dense'; else use 'identity'")
    root = point.square_root()
    if root is None:
        raise ValueError("the metric at the model's outputs is not positive semidefinite")
    return root.rows.square().sum(0)
