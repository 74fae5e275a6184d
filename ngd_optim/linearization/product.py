"""The curvature product of closures, on flat vectors."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ngd_optim.curvature import Graph
from ngd_optim.distributed import Ranks
from ngd_optim.kernels import twice_differentiable
from ngd_optim.linearization.backend import (
    Formed,
    Product,
    Way,
    direct_product,
    form_product,
    reraise_own_kinds,
)
from ngd_optim.linearization.checks import Checked
from ngd_optim.names import Backend
from ngd_optim.parameters import FlatParameters
from ngd_optim.recording import record
from ngd_optim.replaying import Recording

_BYTES_AT_ONCE = 2**26
"""That a replay for several vectors computes."""


class ClosureProduct:
    """``v ↦ F v`` of one closure.

    How it is formed is chosen once, with the first vector, by :func:`form_product`: call
    :meth:`form` to have that done before a solve begins.

    Args:
        graph: of the closure.
        parameters: what it is a function of.
        checked: what is known of it.
        ranks: those that choose alike.
        keep_ways: is told the ways that are left where one no longer works.
        learn: checks the closure anew, where none works any longer.
        captures: whether recorded products are replayed by CUDA graphs.
        keep_graph: hold the graph for products that need it; else each of them runs the closure
            again, and nothing is recorded.

    Attributes:
        ways: those that are left after the choice; the first one is taken.
        has_penalty: whether the Hessian of a weight penalty in the loss is added.
    """

    def __init__(
        self,
        graph: Graph,
        parameters: FlatParameters,
        checked: Checked,
        ranks: Ranks,
        keep_ways: Callable[[tuple[Way, ...]], None],
        learn: Callable[[], Checked],
        *,
        keep_graph: bool,
        captures: bool,
    ) -> None:
        self._keep_ways = keep_ways
        self._learn = learn
        self._graph = graph
        self._parameters = parameters
        self._recordings = checked.recordings
        self.has_penalty = bool(checked.penalty)
        self._ranks = ranks
        self._keep_graph = keep_graph
        self._captures = captures
        self.ways = self._usable(checked)
        self._formed: Formed | None = None
        self._plain: Recording | None = None

    @property
    def backend(self) -> Backend:
        """What forms the products."""
        return self.ways[0].backend

    def form(self, v: Tensor) -> None:
        """Choose how to form products, with ``v``, whose product is remembered until the next call."""
        if self._formed is not None:  # a preconditioner has asked for products
            product = self._formed.product
            self._formed = Formed.of(product, v, product(v))
            return
        formed, ways = self._try_ways(v)
        if formed is None:
            # What was learnt of the closure holds no longer.
            checked = self._learn()
            self._recordings = checked.recordings
            self.has_penalty = bool(checked.penalty)
            self.ways = self._usable(checked)
            formed, ways = self._try_ways(v)
        if formed is None:
            raise RuntimeError(
                "curvature products that were right a moment ago can no longer be formed; let the "
                "closure compute the same each time that it runs"
            )
        if ways != self.ways:
            self.ways = ways
            self._keep_ways(ways)
        # A recording holds the constants that it needs; the graph's memory is for the solve.
        if self.ways[0].recorded or not self._keep_graph:
            self._graph.release(for_good=self._keep_graph)
        self._formed = formed

    def __call__(self, v: Tensor) -> Tensor:
        """The product with ``v``, a new tensor."""
        if self._formed is None:
            self.form(v)
        assert self._formed is not None
        formed, self._formed = self._formed, self._formed.without_image()
        image = formed.image_of(v)
        return formed.product(v) if image is None else image

    def multiply(self, rows: Tensor) -> Tensor:
        """The products with several vectors, as rows: at once by ``torch.vmap``, where it can."""
        if self._plain is not None:
            step = max(1, _BYTES_AT_ONCE // max(1, self._plain.plan.bytes))
            try:
                return torch.cat([self._plain.multiply(part) for part in rows.split(step)])
            except RuntimeError as error:
                reraise_own_kinds(error)
                self._plain = None  # it does not know an operation
        return torch.stack([self(row) for row in rows])

    def record_for_several(self, v: Tensor) -> None:
        """Record the product for :meth:`multiply`, before :meth:`form` lets the graph go."""
        way = self.ways[0]
        if not way.recorded:
            return
        try:
            image, plain = record(self._direct(way.backend), v, optimises=False)
            found = plain.multiply(torch.stack([v, v]))[1]
        except RuntimeError as error:
            reraise_own_kinds(error)
            return
        if (found - image).norm() <= torch.finfo(v.dtype).eps ** 0.5 * image.norm():
            self._plain = plain

    def _try_ways(self, v: Tensor) -> tuple[Formed | None, tuple[Way, ...]]:
        graph = self._graph

        def form_recorded(make: Callable[[], Product], v: Tensor) -> tuple[Tensor, Product]:
            with twice_differentiable(
                recomputes=graph.run.recomputes
            ):  # the graph may be made anew
                about = graph.describe()
            return self._recordings.form(graph.recorder, about, make, v, captures=self._captures)

        return form_product(self.ways, self._direct, v, self._ranks, form_recorded)

    def _usable(self, checked: Checked) -> tuple[Way, ...]:
        return tuple(way for way in checked.ways if self._keep_graph or not way.recorded)

    def _direct(self, backend: Backend) -> Callable[[Tensor], Tensor]:
        if self._keep_graph:
            return direct_product(backend, self._graph, self._parameters, penalty=self.has_penalty)

        def by_rerun(v: Tensor) -> Tensor:
            product = direct_product(
                backend, self._graph, self._parameters, penalty=self.has_penalty
            )
            image = product(v)
            self._graph.release(for_good=False)
            return image

        return by_rerun


class MeanProduct:
    """The mean of some closures' products; only one closure's graph is in memory.

    Args:
        products: of the closures.
        weights: that they have in the mean, which add up to 1; None: equal ones.
    """

    def __init__(
        self, products: Sequence[ClosureProduct], weights: Sequence[float] | None = None
    ) -> None:
        self._products = products
        self._weights = weights

    @property
    def backend(self) -> Backend:
        """What forms the first one."""
        return self._products[0].backend

    def record_for_several(self, v: Tensor) -> None:
        """Nothing is recorded of several closures."""

    def form(self, v: Tensor) -> None:
        """Choose how to form each."""
        for product in self._products:
            product.form(v)

    def __call__(self, v: Tensor) -> Tensor:
        """The mean, a new tensor."""
        return average((product(v) for product in self._products), self._weights)

    def multiply(self, rows: Tensor) -> Tensor:
        """The means for several vectors, as rows."""
        return average((product.multiply(rows) for product in self._products), self._weights)


def average(parts: Iterable[Tensor], weights: Sequence[float] | None) -> Tensor:
    """The mean of some tensors, one in memory at a time, in the memory of the first; None: of equal weights."""
    if weights is not None:
        parts = (part.mul_(weight) for part, weight in zip(parts, weights, strict=True))
    remaining = iter(parts)
    total, number = next(remaining), 1
    for part in remaining:
        total.add_(part)
        number += 1
    return total if weights is not None else total.div_(number)


class RanksProduct:
    """The mean of a product over processes."""

    def __init__(self, product: "ClosureProduct | MeanProduct", ranks: Ranks) -> None:
        self._product = product
        self._ranks = ranks

    @property
    def backend(self) -> Backend:
        """What forms this rank's."""
        return self._product.backend

    def form(self, v: Tensor) -> None:
        """Choose how to form it; all ranks choose alike."""
        self._product.form(self._ranks.whole(v))

    def __call__(self, v: Tensor) -> Tensor:
        """The mean, a new tensor; see :meth:`Ranks.mean_deferring_errors`."""
        v = self._ranks.whole(v)
        return self._ranks.mean_deferring_errors(lambda: self._product(v), v)
