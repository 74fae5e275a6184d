"""First aid: check a closure, its metric or a preconditioner, and read what was found."""

from ngd_optim.testing.closure import ClosureReport, check_closure
from ngd_optim.testing.metric import MetricReport, check_metric
from ngd_optim.testing.preconditioner import PreconditionerReport, check_preconditioner

__all__ = [
    "ClosureReport",
    "MetricReport",
    "PreconditionerReport",
    "check_closure",
    "check_metric",
    "check_preconditioner",
]
