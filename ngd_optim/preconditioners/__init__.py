"""What conjugate gradients are preconditioned by."""

from ngd_optim.preconditioners.base import Preconditioning
from ngd_optim.preconditioners.choose import Preconditioner, build_preconditioner
from ngd_optim.preconditioners.sketches import Diagonal, Nystrom

__all__ = [
    "Diagonal",
    "Nystrom",
    "Preconditioner",
    "Preconditioning",
    "build_preconditioner",
]
