"""Linear algebra that knows nothing of networks."""

from ngd_optim.linalg.cg import CGResult as CGResult  # LinearSolution's name in pickles of 0.1.0
from ngd_optim.linalg.cg import (
    IndefinitePreconditionerError,
    LinearSolution,
    conjugate_gradient,
)
from ngd_optim.linalg.packed import order_of, pack, unpack

__all__ = [
    "IndefinitePreconditionerError",
    "LinearSolution",
    "conjugate_gradient",
    "order_of",
    "pack",
    "unpack",
]
