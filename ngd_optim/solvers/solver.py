"""What every solver of a step's linear system offers."""

from abc import ABC, abstractmethod

from torch import Tensor

from ngd_optim.jacobian import SqrtGGN
from ngd_optim.linalg import LinearSolution
from ngd_optim.names import SolverName
from ngd_optim.solvers.quadratic_model import QuadraticModel


class Solver(ABC):
    """Solves ``(F + W + diag(λ)) x = b`` at one point.

    Attributes:
        name: ``"cg"``, ``"dense"`` or ``"sample"``.
        is_direct: whether it solves exactly, and another damping costs no new products.
        diagonal: that of ``F``, shape (n,), where the solver knows it.
    """

    name: SolverName
    is_direct: bool = True
    diagonal: Tensor | None = None

    @abstractmethod
    def solve(self, model: QuadraticModel) -> LinearSolution:
        """The solution for a model with this point's curvature."""


class RootSolver(Solver):
    """A direct solver that has a square root of the curvature.

    Attributes:
        square_root: the matrix ``A`` with ``F = AᵀA``, shape (m, n).
    """

    def __init__(self, square_root: SqrtGGN) -> None:
        self.square_root = square_root
        self.diagonal = square_root.rows.square().sum(0)

    @abstractmethod
    def pull_back(self, u: Tensor) -> Tensor:
        """``(F + W + diag(λ))⁻¹ Aᵀ u``, (m,) → (n,), for the model that was solved last."""
