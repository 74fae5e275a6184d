"""The linear system of a step, solved by conjugate gradients."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ngd_optim.linalg import LinearSolution, conjugate_gradient
from ngd_optim.names import SolverName
from ngd_optim.solvers.quadratic_model import QuadraticModel


@dataclass(frozen=True)
class ConjugateGradients:
    """Truncated conjugate gradients; see :func:`~ngd_optim.conjugate_gradient` for the arguments.

    ``form`` chooses how products are formed, with the first vector; ``precondition`` builds the
    preconditioner for a model.
    """

    x0: Tensor
    max_iters: int
    tol: float
    progress_tol: float
    boundary: float | None
    form: Callable[[Tensor], None]
    precondition: Callable[[QuadraticModel], Callable[[Tensor], Tensor] | None]
    name: SolverName = "cg"
    diagonal: Tensor | None = None
    square_root: None = None
    pull_back: None = None

    def solve(self, model: QuadraticModel) -> LinearSolution:
        """By products with the curvature only."""
        b = model.right_side
        # The first product of the solve is that of x0, or of b.
        if b.isfinite().all():
            self.form(self.x0 if self.x0.any() else b)
        return conjugate_gradient(
            model.system,
            b,
            x0=self.x0,
            max_iters=self.max_iters,
            tol=self.tol,
            progress_tol=self.progress_tol,
            boundary=self.boundary,
            preconditioner=self.precondition(model),
        )
