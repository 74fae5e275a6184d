"""Where the graph uses weights, and what follows from that: the Jacobian and a square root of the curvature."""

from ngd_optim.jacobian.layers import Layer, Use, uses_of
from ngd_optim.jacobian.square_root import NotSemidefiniteError, Root, quick_diagonal, root_of

__all__ = [
    "Layer",
    "NotSemidefiniteError",
    "Root",
    "Use",
    "quick_diagonal",
    "root_of",
    "uses_of",
]
