"""The curvature as an operator: products, SciPy, traces, diagonals, eigenvalues, blocks."""

from ngd_optim.operators.estimates import Estimate
from ngd_optim.operators.operator import CurvatureOperator

__all__ = ["CurvatureOperator", "Estimate"]
