"""The metric at a model's outputs, as a closure's trace shows it."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ngd_optim.curvature import Graph, OutputMetric
from ngd_optim.names import Curvature
from ngd_optim.parameters import FlatParameters
from ngd_optim.tracing import TracedClosure


def output_metric_of(
    closure: Callable[[], Any], params: Iterable[Tensor], curvature: Curvature = "ggn"
) -> OutputMetric:
    parameters = FlatParameters([{"params": list(params)}])
    _, metric = Graph(TracedClosure(closure, parameters), parameters, curvature).get()
    assert isinstance(metric, OutputMetric)
    return metric
