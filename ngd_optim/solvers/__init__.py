"""The damped quadratic model of a step, and its minimum."""

from ngd_optim.solvers.choose import Solver, build_solver, curvature_diagonal
from ngd_optim.solvers.iterative import ConjugateGradients
from ngd_optim.solvers.quadratic_model import QuadraticModel, UndampedModel

__all__ = [
    "ConjugateGradients",
    "QuadraticModel",
    "Solver",
    "UndampedModel",
    "build_solver",
    "curvature_diagonal",
]
