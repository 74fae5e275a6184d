"""Natural-gradient and Gauss-Newton optimization by truncated conjugate gradients."""

import sys
import warnings
from typing import TYPE_CHECKING, Any

from ngd_optim import linalg, preconditioners
from ngd_optim.covariance import Covariance, estimate_covariance
from ngd_optim.kfac import KFAC
from ngd_optim.linalg import LinearSolution, LinearSolutions, conjugate_gradient
from ngd_optim.linearization import Linearization, linearize
from ngd_optim.optimizer import NaturalCG
from ngd_optim.own_losses import least_squares
from ngd_optim.plotting import plot_history
from ngd_optim.preconditioners import Diagonal, Nystrom
from ngd_optim.report import KFACReport, StepReport

__all__ = [
    "KFAC",
    "Covariance",
    "Diagonal",
    "KFACReport",
    "LinearSolution",
    "LinearSolutions",
    "Linearization",
    "NaturalCG",
    "Nystrom",
    "StepReport",
    "conjugate_gradient",
    "estimate_covariance",
    "least_squares",
    "linearize",
    "plot_history",
]
__version__ = "0.2.0"

# Pickles of 0.1.0 name these modules.
sys.modules[f"{__name__}.cg"] = linalg
sys.modules[f"{__name__}.sketches"] = preconditioners

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name != "CGResult":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        message = "ngd_optim.CGResult is deprecated since 0.2.0; use ngd_optim.LinearSolution"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return LinearSolution
