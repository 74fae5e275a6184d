"""Kronecker factors of the curvature, and the inverse that they make."""

from ngd_optim.kronecker.blocks import KroneckerInverse
from ngd_optim.kronecker.estimate import estimate_factors, is_worthwhile
from ngd_optim.kronecker.factors import KroneckerFactors
from ngd_optim.kronecker.kept import KeptFactors
from ngd_optim.kronecker.sampling import draw

__all__ = [
    "KeptFactors",
    "KroneckerFactors",
    "KroneckerInverse",
    "draw",
    "estimate_factors",
    "is_worthwhile",
]
