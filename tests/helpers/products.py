"""Products that are formed in a way of the test's choice."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ngd_optim.curvature import Graph
from ngd_optim.distributed import ALONE
from ngd_optim.linearization.backend import Way
from ngd_optim.linearization.checks import Checked
from ngd_optim.linearization.product import ClosureProduct
from ngd_optim.parameters import FlatParameters
from ngd_optim.tracing import TracedClosure


def product_by(
    way: Way, closure: Callable[[], Any], params: Sequence[Tensor], *, keep_graph: bool = True
) -> ClosureProduct:
    """The Gauss-Newton product of a closure, with nothing checked."""
    parameters = FlatParameters([{"params": params}])
    graph = Graph(TracedClosure(closure, parameters), parameters, "ggn")
    checked = Checked((way,))
    return ClosureProduct(
        graph,
        parameters,
        checked,
        ALONE,
        lambda ways: None,
        lambda: checked,
        keep_graph=keep_graph,
        captures=False,
    )
