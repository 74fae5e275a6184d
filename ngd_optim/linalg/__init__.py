"""Linear algebra that knows nothing of networks."""

from ngd_optim.linalg.cg import CGResult as CGResult  # LinearSolution's name in pickles of 0.1.0
from ngd_optim.linalg.cg import (
    IndefinitePreconditionerError,
    LinearSolution,
    conjugate_gradient,
)
from ngd_optim.linalg.packed import pack, unpack
from ngd_optim.linalg.several import LinearSolutions

__all__ = [
    "IndefinitePreconditionerError",
    "LinearSolution",
    "LinearSolutions",
    "conjugate_gradient",
    "pack",
    "unpack",
]
