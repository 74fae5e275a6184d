"""Kronecker factors as the preconditioner of a step, and when they are renewed.

The optimizer's state has for each parameter ``left`` and ``right``, its Kronecker factors, or
``diagonal``; for the first parameter also ``products``, how many iterations these factors have served, and
``draws``, how often random vectors were drawn.
"""

import zlib
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from ngd_optim.curvature import OutputMetric, ScalarMetric
from ngd_optim.distributed import Ranks
from ngd_optim.jacobian import Layer, uses_of
from ngd_optim.linearization import Point
from ngd_optim.parameters import FlatParameters
from ngd_optim.preconditioners.base import Preconditioning, Solve
from ngd_optim.preconditioners.kronecker import (
    KroneckerFactors,
    average_factors,
    build_kronecker_preconditioner,
    estimate_factors,
    fits,
    is_worthwhile,
)
from ngd_optim.reading import read
from ngd_optim.solvers import QuadraticModel

SHARE_OF_OLDER = 0.5
"""Of the older factors in renewed ones."""

RENEWED_AFTER = 10
"""Iterations that factors serve before they are renewed.

That takes a pull-back, and the products of what went in and what comes back with themselves:
together about as much as two products of linear layers, and several of convolutions.
"""

_NAMES = ("left", "right", "diagonal")


class Kronecker(Preconditioning):
    """From Kronecker factors, which are estimated while the closures are linearised.

    The state has each parameter's factors, and for the first how many iterations they have served and
    how often they were drawn.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        state: MutableMapping[Tensor, dict[str, Any]],
        layers: tuple[Layer, ...] | None,
        generator: torch.Generator | None,
        *,
        must: bool,
    ) -> None:
        self.layers = layers
        self._must = must
        self._parameters = parameters
        self._state = state
        own = [state.get(p, {}) for p in parameters.tensors]
        self._served, self._draws = own[0].get("products", 0), own[0].get("draws", 0)
        self._values = {
            (i, name): entry[name]
            for i, entry in enumerate(own)
            for name in _NAMES
            if name in entry
        }
        self._is_due = self._served >= RENEWED_AFTER
        self._generator = generator or torch.Generator(device="cpu").manual_seed(self._draws)
        self._estimates: list[KroneckerFactors | None] = []

    def observe(self, metric: OutputMetric | ScalarMetric) -> None:
        """See what the graph tells of the layers, and estimate their factors if they are due.

        Raises:
            ValueError: factors are asked for where there is no metric at outputs of the model.
        """
        if not (self._is_due or self.layers is None):
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
        uses = uses_of(metric.outputs, self._parameters.tensors)
        layers = tuple(dict.fromkeys(use.layer for use in uses))
        if not uses or not (self._must or is_worthwhile(uses, self._parameters.tensors)):
            self._estimates.append(None)
        elif self._is_due or not fits(self._values, layers, self._parameters.tensors):
            self._estimates.append(
                estimate_factors(uses, metric, self._parameters, self._generator)
            )
        else:
            self.layers = layers

    def build(self, point: Point, model: QuadraticModel, ranks: Ranks) -> Solve | None:
        """From the factors, renewed if they were due."""
        if ranks.any([bool(self._estimates)])[0]:  # a rank with a graph of its own may be alone
            self._renew(ranks)
        if not self.layers:
            return None
        values = {key: value.to(self._parameters.dtype) for key, value in self._values.items()}
        shifts = self._parameters.views(model.shift)
        means = [part.sum() / max(1, part.numel()) for part in shifts]
        factors = KroneckerFactors(self.layers, values)
        try:
            solve = build_kronecker_preconditioner(factors, self._parameters, means)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            return None  # their numbers are at the end of the range; so are the products
        self.name = "kfac"
        return solve

    def keep(self, iterations: int) -> None:
        """The factors, and how many iterations they have served."""
        if self._estimates:
            self.layers = ()  # a direct solver had no use for them
        for i, p in enumerate(self._parameters.tensors):
            dtype = torch.promote_types(p.dtype, torch.float32)  # what load_state_dict leaves alone
            for name in _NAMES:
                self._state[p].pop(name, None)
                if (i, name) in self._values:
                    self._state[p][name] = self._values[i, name].to(dtype)
        self._state[self._parameters.tensors[0]] |= {
            "products": self._served + iterations,
            "draws": self._draws,
        }

    def _renew(self, ranks: Ranks) -> None:
        """Mix the estimates of all closures and ranks with what was known."""
        # Each renewal draws other vectors, and the same ones when a run is resumed.
        self._served, self._draws = 0, self._draws + 1
        estimates = [factors for factors in self._estimates if factors is not None]
        mean = average_factors(estimates) if len(estimates) == len(self._estimates) else None
        del estimates
        self._estimates.clear()  # as large as what they become
        layers = None if mean is None else (mean.layers, sorted(mean.values))
        # Ranks whose graphs differ must not average factors of different layers.
        if not ranks.agree(zlib.crc32(repr(layers).encode())) or mean is None:
            self.layers, self._values = (), {}
            return
        values = {key: ranks.average(value) for key, value in mean.values.items()}
        # Else the step will be refused.
        if all(read(*(value.isfinite().all() for value in values.values()))):
            self.layers, mean = mean.layers, None
            self._values = {
                key: _mix(values.pop(key), self._values.get(key)) for key in list(values)
            }


def _mix(value: Tensor, older: Tensor | None) -> Tensor:
    return (
        value
        if older is None or older.shape != value.shape
        else value.lerp(older.to(value), SHARE_OF_OLDER)
    )
