"""Kronecker factors of the curvature, and the inverse that they make."""

from ngd_optim.kronecker.blocks import build_kronecker_preconditioner
from ngd_optim.kronecker.factors import (
    KroneckerFactors,
    average_factors,
    estimate_factors,
    fits,
    is_worthwhile,
)

__all__ = [
    "KroneckerFactors",
    "average_factors",
    "build_kronecker_preconditioner",
    "estimate_factors",
    "fits",
    "is_worthwhile",
]
