"""The metric at a model's outputs, as a closure's trace shows it."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ngd_optim.curvature import OutputMetric, metric_of
from ngd_optim.names import Curvature
from ngd_optim.tracing import ReplayedClosure


def output_metric_of(
    closure: Callable[[], Any], params: Iterable[Tensor], curvature: Curvature = "ggn"
) -> OutputMetric:
    metric = metric_of(ReplayedClosure(closure, list(params))(), curvature)
    assert isinstance(metric, OutputMetric)
    return metric
