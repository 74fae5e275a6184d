"""Products that are formed in a way of the test's choice."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ngd_optim.distributed import ALONE
from ngd_optim.linearization.backend import Way
from ngd_optim.linearization.checks import Checked
from ngd_optim.linearization.product import ClosureProduct, Graph
from ngd_optim.parameters import FlatParameters
from ngd_optim.tracing import ReplayedClosure


def product_by(
    way: Way, closure: Callable[[], Any], params: Sequence[Tensor], *, keep_graph: bool = True
) -> ClosureProduct:
    """The Gauss-Newton product of a closure, with nothing checked."""
    graph = Graph(ReplayedClosure(closure, params), "ggn")
    parameters = FlatParameters([{"params": params}])
    return ClosureProduct(
        graph, parameters, Checked((way,)), ALONE, lambda ways: None, keep_graph=keep_graph
    )
