"""What the curvature is, and how a KL is measured."""

from ngd_optim.curvature.metric import OutputMetric, ScalarMetric, kl_of, metric_of, penalty_of
from ngd_optim.curvature.vector_products import Map, flat_product, pull_back

__all__ = [
    "Map",
    "OutputMetric",
    "ScalarMetric",
    "flat_product",
    "kl_of",
    "metric_of",
    "penalty_of",
    "pull_back",
]
