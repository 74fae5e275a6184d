"""The damped quadratic model of a step, and its minimum."""

from ngd_optim.solvers.choose import Solver, choose_solver, curvature_diagonal, direct_solver
from ngd_optim.solvers.direct import LeastSquares, SampleSpace
from ngd_optim.solvers.iterative import ConjugateGradients
from ngd_optim.solvers.quadratic_model import QuadraticModel

__all__ = [
    "ConjugateGradients",
    "LeastSquares",
    "QuadraticModel",
    "SampleSpace",
    "Solver",
    "choose_solver",
    "curvature_diagonal",
    "direct_solver",
]
