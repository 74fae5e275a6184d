"""Linear algebra that knows nothing of networks."""

from ngd_optim.linalg.cg import CGResult, LinearSolution, conjugate_gradient
from ngd_optim.linalg.packed import order_of, pack, unpack

__all__ = ["CGResult", "LinearSolution", "conjugate_gradient", "order_of", "pack", "unpack"]
