"""Natural-gradient and Gauss-Newton optimization by truncated conjugate gradients."""

from ngd_optim.cg import CGResult, conjugate_gradient
from ngd_optim.history import plot_history
from ngd_optim.linearization import Linearization, linearize
from ngd_optim.optimizer import NaturalCG
from ngd_optim.report import StepReport
from ngd_optim.residuals import least_squares
from ngd_optim.sketches import Diagonal, Nystrom

__all__ = [
    "CGResult",
    "Diagonal",
    "Linearization",
    "NaturalCG",
    "Nystrom",
    "StepReport",
    "conjugate_gradient",
    "least_squares",
    "linearize",
    "plot_history",
]
__version__ = "0.1.0"
