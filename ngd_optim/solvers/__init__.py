"""The damped quadratic model of a step, and its minimum."""

from ngd_optim.solvers.choose import build_solver, curvature_diagonal
from ngd_optim.solvers.iterative import ConjugateGradients
from ngd_optim.solvers.quadratic_model import QuadraticModel
from ngd_optim.solvers.solver import RootSolver, Solver

__all__ = [
    "ConjugateGradients",
    "QuadraticModel",
    "RootSolver",
    "Solver",
    "build_solver",
    "curvature_diagonal",
]
