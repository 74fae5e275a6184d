"""Kronecker factors as the preconditioner of a step, and when they are renewed.

The optimizer's state has each parameter's factors, as :mod:`ngd_optim.kronecker.saved` tells; for the
first parameter also ``products``, how many iterations these factors have served, and ``draws``, how
often random vectors were drawn.
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from ngd_optim.curvature import OutputMetric, ScalarMetric
from ngd_optim.distributed import Ranks
from ngd_optim.jacobian import uses_of
from ngd_optim.kronecker import KeptFactors, KroneckerFactors, estimate_factors, is_worthwhile
from ngd_optim.layout import is_spread
from ngd_optim.linearization import Point
from ngd_optim.parameters import FlatParameters, forget
from ngd_optim.preconditioners.base import Preconditioning, Solve
from ngd_optim.solvers import QuadraticModel

SHARE_OF_OLDER = 0.5
"""Of the older factors in renewed ones."""

RENEWED_AFTER = 10
"""Iterations that factors serve before they are renewed.

That takes a pull-back, and the products of what went in and what comes back with themselves:
together about as much as two products of linear layers, and several of convolutions.
"""


class Kronecker(Preconditioning):
    """From Kronecker factors, which are estimated while the closures are linearised.

    The state has each parameter's factors, and for the first how many iterations they have served and
    how often they were drawn.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        state: MutableMapping[Tensor, dict[str, Any]],
        generator: torch.Generator | None,
        ranks: Ranks,
        *,
        must: bool,
    ) -> None:
        self._must = must
        self._parameters = parameters
        self._state = state
        entries = [state.get(p, {}) for p in parameters.params]
        self._served, self._draws = entries[0].get("products", 0), entries[0].get("draws", 0)
        self._kept = KeptFactors.load(parameters, entries if self._draws else None, ranks)
        self._known, self._is_new = self._kept.layers, False
        self._is_due = self._served >= RENEWED_AFTER
        self._generator = generator or torch.Generator(device="cpu").manual_seed(self._draws)
        self._estimates: list[KroneckerFactors | None] = []

    def observe(self, metric: OutputMetric | ScalarMetric) -> None:
        """See what the graph tells of the layers, and estimate their factors if they are due.

        Raises:
            ValueError: factors are asked for where there is no metric at outputs of the model.
        """
        if not (self._is_due or self._kept.layers is None):
            return
        if isinstance(metric, ScalarMetric):
            if self._must:
                raise ValueError(
                    "preconditioner='kfac' needs a metric at the model's outputs: a recognised "
                    "loss function or a returned distribution, and not the Hessian of a scalar; "
                    "use preconditioner='auto'"
                )
            self._estimates.append(None)
            return
        if any(map(is_spread, self._parameters.tensors)):
            if self._must:
                raise ValueError(
                    "preconditioner='kfac' needs weights that are whole in a layer, and these lie over "
                    "ranks (tensor parallel); use preconditioner='auto', 'diagonal' or Nystrom()"
                )
            self._estimates.append(None)
            return
        uses = uses_of(metric.outputs, self._parameters.tensors)
        layers = tuple(dict.fromkeys(use.layer for use in uses))
        if not uses or not (self._must or is_worthwhile(uses, self._parameters.tensors)):
            self._estimates.append(None)
        elif self._is_due or not self._kept.fits(layers):
            self._estimates.append(
                estimate_factors(uses, metric, self._parameters, self._generator)
            )
        else:
            self._kept.layers = layers

    def precondition(self, point: Point, model: QuadraticModel, ranks: Ranks) -> Solve | None:
        """As :meth:`build`; factors in parts are for vectors in parts."""
        if self._kept.in_parts:
            return self.build(point, model, ranks)
        return super().precondition(point, model, ranks)

    def build(self, point: Point, model: QuadraticModel, ranks: Ranks) -> Solve | None:
        """From the factors, renewed if they were due."""
        if ranks.any([bool(self._estimates)])[0]:  # a rank with a graph of its own may be alone
            self._renew(ranks)
        if not self._kept.layers:
            return None
        try:
            solve = self._kept.invert(model.shift)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            return None  # their numbers are at the end of the range; so are the products
        self.name = "kfac"
        return solve

    def keep(self, iterations: int) -> None:
        """The factors, and how many iterations they have served."""
        if self._estimates:
            self._kept.layers = ()  # a direct solver had no use for them
        first = self._parameters.params[0]
        self._state[first] |= {"products": self._served + iterations, "draws": self._draws}
        if not self._is_new and self._kept.layers == self._known:
            return
        forget(self._state, KeptFactors.names)
        for p, entry in zip(self._parameters.params, self._kept.entries(), strict=True):
            self._state[p] |= entry

    def _renew(self, ranks: Ranks) -> None:
        """Mix the estimates of all closures and ranks with what was known."""
        # Each renewal draws other vectors, and the same ones when a run is resumed.
        self._is_new = True
        self._served, self._draws = 0, self._draws + 1
        mean = KroneckerFactors.agreed(self._estimates, ranks)
        self._estimates.clear()  # as large as what they become
        if mean is None:
            self._kept = KeptFactors(self._parameters, ())
            return
        new = self._kept.renew(mean, SHARE_OF_OLDER, ranks, keeps_unseen=False)
        if new.is_finite:  # else the step will be refused
            self._kept = new
