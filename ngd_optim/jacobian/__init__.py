"""Where the graph uses weights, the Jacobian, and the square root of the curvature that follows."""

from ngd_optim.jacobian.layers import Layer, Use, uses_of
from ngd_optim.jacobian.square_root import SqrtGGN, compute_cheap_diagonal, square_root_of

__all__ = ["Layer", "SqrtGGN", "Use", "compute_cheap_diagonal", "square_root_of", "uses_of"]
