"""What the curvature is, and how a KL is measured."""

from ngd_optim.curvature.metric import OutputMetric, ScalarMetric, build_kl, metric_of, penalty_of
from ngd_optim.curvature.vector_products import pull_back

__all__ = [
    "OutputMetric",
    "ScalarMetric",
    "build_kl",
    "metric_of",
    "penalty_of",
    "pull_back",
]
