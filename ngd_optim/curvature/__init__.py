"""What the curvature is, how its products are formed, and how a KL is measured."""

from ngd_optim.curvature.graph import Graph
from ngd_optim.curvature.metric import OutputMetric, ScalarMetric, build_kl, gauss_newton
from ngd_optim.curvature.vector_products import pull_back

__all__ = [
    "Graph",
    "OutputMetric",
    "ScalarMetric",
    "build_kl",
    "gauss_newton",
    "pull_back",
]
