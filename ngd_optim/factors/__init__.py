"""The curvature in Kronecker factors, for other uses than a step: Laplace approximations, influence functions."""

from ngd_optim.factors.curvature import KroneckerCurvature, LayerCurvature
from ngd_optim.factors.estimate import kronecker_factors

__all__ = ["KroneckerCurvature", "LayerCurvature", "kronecker_factors"]
