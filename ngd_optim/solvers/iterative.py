"""The linear system of a step, solved by conjugate gradients."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from ngd_optim.linalg import (
    IndefinitePreconditionerError,
    LinearSolution,
    conjugate_gradient,
)
from ngd_optim.reading import read
from ngd_optim.solvers.quadratic_model import QuadraticModel
from ngd_optim.solvers.solver import Solver


@dataclass(frozen=True)
class ConjugateGradients(Solver):
    """Truncated conjugate gradients; see :func:`~ngd_optim.conjugate_gradient` for the arguments.

    ``form`` chooses how products are formed, with the first vector; ``precondition`` builds the
    preconditioner for a model; ``reject`` takes note of one that is not positive definite, or
    raises.
    """

    x0: Tensor
    max_iters: int
    tol: float
    progress_tol: float
    boundary: float | None
    form: Callable[[Tensor], None]
    precondition: Callable[[QuadraticModel], Callable[[Tensor], Tensor] | None]
    reject: Callable[[IndefinitePreconditionerError], None]
    name = "cg"
    is_direct = False

    def solve(self, model: QuadraticModel) -> LinearSolution:
        """By products with the curvature only."""
        b = model.right_side
        # It may need the graph, which recorded products let go.
        preconditioner = self.precondition(model)
        # CG multiplies x0 first or, without a preconditioner, b. The host waits: to know with which vector
        # products are formed, and not to form any where the step will be refused.
        is_finite, starts = read(b.isfinite().all(), self.x0.any())
        if is_finite:
            self.form(self.x0 if starts else b)
        solve = partial(
            conjugate_gradient,
            model.system,
            b,
            x0=self.x0 if starts else None,
            max_iters=self.max_iters,
            tol=self.tol,
            progress_tol=self.progress_tol,
            boundary=self.boundary,
        )
        try:
            return solve(preconditioner=preconditioner)
        except IndefinitePreconditionerError as error:
            self.reject(error)
            lost = error.products
        solution = solve()
        return replace(solution, products=lost + solution.products)
