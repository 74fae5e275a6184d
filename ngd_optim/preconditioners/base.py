"""The preconditioner of one step's conjugate gradients: none, or the user's function."""

import logging
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ngd_optim.curvature import OutputMetric, ScalarMetric
from ngd_optim.distributed import Ranks
from ngd_optim.linalg import IndefinitePreconditionerError
from ngd_optim.linearization import Point
from ngd_optim.solvers import QuadraticModel
from ngd_optim.torch_internals import version_of

logger = logging.getLogger("ngd_optim")
Solve = Callable[[Tensor], Tensor]


class Preconditioning:
    """One step's preconditioner. It sees the closures, is formed for the system, and keeps what the next step needs.

    This one is none.

    Attributes:
        name: what it formed, for the report.
        products: how many curvature products that took.
    """

    name = "none"
    products = 0

    def observe(self, metric: OutputMetric | ScalarMetric) -> None:
        """See a closure's metric while its graph is at hand."""

    def precondition(self, point: Point, model: QuadraticModel, ranks: Ranks) -> Solve | None:
        """The preconditioner for a model's system; None where there is none.

        It works on whole vectors, of which those of the step may be parts.
        """
        if ranks.division is None or type(self) is Preconditioning:
            return self.build(point, model, ranks)
        solve = self.build(point, _on_whole_vectors(model, ranks), ranks)
        return None if solve is None else lambda r: ranks.own(solve(ranks.whole(r)))

    def build(self, point: Point, model: QuadraticModel, ranks: Ranks) -> Solve | None:
        """That for a model of whole vectors."""
        return None

    def reject(self, error: IndefinitePreconditionerError) -> None:
        """What was built is not positive definite, as rounding can make it: the system is solved without it."""
        logger.warning(
            "the system is solved without the preconditioner %r: %s", self.name, error.args[0]
        )
        self.name = "none"

    def keep(self, iterations: int) -> None:
        """Write to the optimizer's state, with how many iterations were preconditioned."""


def _on_whole_vectors(model: QuadraticModel, ranks: Ranks) -> QuadraticModel:
    def whole(value: float | Tensor) -> float | Tensor:
        return ranks.whole(value) if isinstance(value, Tensor) else value

    return replace(
        model,
        gradient=ranks.whole(model.gradient),
        curvature=lambda v: ranks.whole(model.curvature(ranks.own(v))),
        decay=whole(model.decay),
        damping=whole(model.damping),
        centre=None,
        scale=None,
    )


class Given(Preconditioning):
    """The user's function."""

    def __init__(self, function: Solve) -> None:
        self._function = function

    def build(self, point: Point, model: QuadraticModel, ranks: Ranks) -> Solve | None:
        """The function, with its results checked. Where it raises on one rank, all go on to the next product."""
        self.name = "callable"
        function = _check_results(self._function)

        def solve(r: Tensor) -> Tensor:
            z = ranks.deferring_errors(lambda: function(r))
            return r if z is None else z

        return solve

    def reject(self, error: IndefinitePreconditionerError) -> None:
        """It is the user's to mend."""
        raise error


def _check_results(function: Solve) -> Solve:
    """A preconditioner of the user's, with errors that name it."""

    def solve(r: Tensor) -> Tensor:
        version = version_of(r)
        # It may be a module, or change r; either would spoil the solve without a word.
        z = function(r)
        if not isinstance(z, Tensor) or z.shape != r.shape:
            got = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(
                f"the preconditioner must return a vector of shape {tuple(r.shape)}, got {got}"
            )
        if version_of(r) != version:
            raise ValueError(
                "the preconditioner must return a new vector, and it changed its argument in place"
            )
        return z.to(r)

    return solve
