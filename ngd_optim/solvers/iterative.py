"""The linear system of a step, solved by conjugate gradients."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ngd_optim.linalg import CGResult, conjugate_gradient
from ngd_optim.names import SolverName
from ngd_optim.solvers.quadratic_model import QuadraticModel


@dataclass(frozen=True)
class ConjugateGradients:
    """Truncated conjugate gradients; see :func:`~ngd_optim.conjugate_gradient` for the arguments.

    ``precondition`` forms the preconditioner for a model.
    """

    x0: Tensor
    max_iters: int
    tol: float
    progress_tol: float
    boundary: float | None
    precondition: Callable[[QuadraticModel], Callable[[Tensor], Tensor] | None]
    diagonal: Tensor | None = None
    name: SolverName = "cg"

    def solve(self, model: QuadraticModel) -> CGResult:
        """By products with the curvature only."""
        return conjugate_gradient(
            model.system,
            model.right_side,
            x0=self.x0,
            max_iters=self.max_iters,
            tol=self.tol,
            progress_tol=self.progress_tol,
            boundary=self.boundary,
            preconditioner=self.precondition(model),
        )
