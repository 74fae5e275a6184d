"""How a closure's curvature products are formed: the one place that decides, before a solve begins."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ngd_optim.curvature import Graph
from ngd_optim.distributed import Ranks
from ngd_optim.kernels import twice_differentiable
from ngd_optim.names import Backend
from ngd_optim.parameters import FlatParameters
from ngd_optim.program import CannotReplayError
from ngd_optim.recording import record
from ngd_optim.torch_internals import version_of

logger = logging.getLogger("ngd_optim")

ON_ANOTHER_RANK = "another rank needs it"

Product = Callable[[Tensor], Tensor]


class Way(NamedTuple):
    """A way to form products: by a backend, at each iteration or from a recording of the first one."""

    backend: Backend
    recorded: bool


class Formed(NamedTuple):
    """A product that can be called, and its value for the vector that it was formed with.

    Attributes:
        product: ``v ↦ F v``.
        first: that vector, and its version: CG changes vectors in place.
        image: the value.
    """

    product: Product
    first: tuple[Tensor, int] | None
    image: Tensor | None

    @classmethod
    def of(cls, product: Product, v: Tensor, image: Tensor) -> "Formed":
        """For ``image = product(v)``."""
        return cls(product, (v, version_of(v)), image)

    def image_of(self, v: Tensor) -> Tensor | None:
        """The value for ``v``, if that equals the vector; CG starts from copies of what it is given."""
        if self.first is None:
            return None
        first, version = self.first
        is_unchanged = version_of(first) == version
        # The host waits, once a solve: it saves a product.
        return self.image if is_unchanged and (v is first or torch.equal(first, v)) else None

    def without_image(self) -> "Formed":
        """The product alone."""
        return Formed(self.product, None, None)


def record_anew(make: Callable[[], Product], v: Tensor) -> tuple[Tensor, Product]:
    """The product with ``v``, and what was recorded of it."""
    return record(make(), v)


def form_product(
    ways: tuple[Way, ...],
    direct: Callable[[Backend], Product],
    v: Tensor,
    ranks: Ranks,
    form_recorded: Callable[[Callable[[], Product], Tensor], tuple[Tensor, Product]] = record_anew,
) -> tuple[Formed | None, tuple[Way, ...]]:
    """The product by the first way that works, on all ranks the same, and the ways that are left for later steps.

    None if no way works any longer.

    Args:
        ways: those that were found right, in order of preference.
        direct: makes the product of a backend.
        v: the vector that it is formed with, of its first product.
        ranks: those that must agree.
        form_recorded: as :func:`record_anew`; it is given what makes the direct product.
    """
    for i, way in enumerate(ways):

        def attempt(way: Way = way) -> Formed | str:
            try:
                if way.recorded:
                    image, product = form_recorded(partial(direct, way.backend), v)
                    return Formed.of(product, v, image)
                product = direct(way.backend)
                return Formed.of(product, v, product(v))
            except RuntimeError as error:
                reraise_own_kinds(error)
                return explain_failure(error, way)

        # A rank that fails takes the others along to the next way: their products are added up.
        formed = ranks.together(attempt)
        if ranks.all(isinstance(formed, Formed)):
            assert isinstance(formed, Formed)
            return formed, ways[i:]
        if i + 1 < len(ways):
            log_change(way, ways[i + 1], formed if isinstance(formed, str) else ON_ANOTHER_RANK)
    return None, ()


def direct_product(
    backend: Backend, graph: Graph, parameters: FlatParameters, *, penalty: bool
) -> Product:
    """``v ↦ F v`` for flat vectors, formed anew at each call.

    Args:
        backend: what forms it.
        graph: of the closure.
        parameters: what it is a function of.
        penalty: whether the Hessian of what the loss takes from parameters around the outputs is
            added.
    """
    with twice_differentiable():
        graph.get()  # its run tells whether it recomputes
    recomputes = graph.run.recomputes
    with twice_differentiable(recomputes=recomputes):
        products = [graph.product(backend)]
        around = graph.penalty() if penalty else None
    product = flat_product(products if around is None else [*products, around], parameters)

    def in_context(v: Tensor) -> Tensor:
        # Checkpoints run parts of the closure again, here, and must find the kernels of the trace.
        with twice_differentiable(recomputes=recomputes):
            return product(v)

    return in_context


def flat_product(
    products: Sequence[Callable[[Sequence[Tensor]], Sequence[Tensor]]], parameters: FlatParameters
) -> Callable[[Tensor], Tensor]:
    """The sum of some products, from flat vectors to flat vectors."""

    def product(v: Tensor) -> Tensor:
        pieces = parameters.unflatten(v)
        first, *rest = (parameters.flatten(part(pieces)) for part in products)
        return sum(rest, first)

    return product


def reraise_own_kinds(error: RuntimeError) -> None:
    """Raise an error whose kind tells that no way is to blame: memory, linear algebra, the user's."""
    if type(error) not in (RuntimeError, NotImplementedError, CannotReplayError):
        raise error


def explain_failure(error: RuntimeError, way: Way) -> str:
    """Why a way fails. A string: the error itself would keep the graph alive."""
    if not isinstance(error, CannotReplayError):
        reason = f"{way.backend} cannot follow the closure: {type(error).__name__}: {error}"
    elif way.recorded:
        reason = f"they cannot be recorded: {error}"
    else:
        reason = f"{way.backend} needs a recording of the closure, and there is none: {error}"
    return reason.strip().splitlines()[0]


def log_change(way: Way, other: Way, reason: str) -> None:
    """Say which way is taken in place of another."""
    if other.backend != way.backend:
        logger.info("products by %s, because %s", other.backend, reason)
    else:
        logger.info("products are formed directly at each iteration, because %s", reason)
