"""Kronecker factors of the curvature, and the inverse that they make."""

from ngd_optim.kronecker.blocks import KroneckerInverse, relative_shift
from ngd_optim.kronecker.estimate import estimate_factors, is_worthwhile
from ngd_optim.kronecker.factors import KroneckerFactors, average_factors

__all__ = [
    "KroneckerFactors",
    "KroneckerInverse",
    "average_factors",
    "estimate_factors",
    "is_worthwhile",
    "relative_shift",
]
