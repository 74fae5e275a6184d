"""The preconditioner of one step's conjugate gradients: what it is, and when its ingredients are renewed.

What it keeps in the optimizer's state, for each parameter: ``left`` and ``right``, its Kronecker factors, or
``diagonal``; or ``sketch``, its rows of a sketch's basis. For the first parameter also ``products``, how many these
factors have served, or ``sketch_values`` and ``sketch_age``; and ``draws``, how often random vectors were drawn.
"""

import zlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ngd_optim.curvature.metric import OutputMetric, ScalarMetric
from ngd_optim.distributed import Ranks
from ngd_optim.jacobian.layers import Layer, uses_of
from ngd_optim.linearization.linearize import Linearization
from ngd_optim.parameters import FlatParameters
from ngd_optim.preconditioners.kronecker import (
    KroneckerFactors,
    factors_of,
    fits,
    is_worthwhile,
    kronecker_preconditioner,
    mean_of,
)
from ngd_optim.preconditioners.nystrom import Diagonal, Nystrom, Sketch, known
from ngd_optim.solvers.quadratic_model import QuadraticModel

PreconditionerName = Literal["auto", "kfac", "diagonal"]
Solve = Callable[[Tensor], Tensor]
Preconditioner = PreconditionerName | None | Solve | Diagonal | Nystrom

SHARE_OF_OLDER = 0.5
"""Of the older factors in renewed ones."""

RENEWED_AFTER = 10
"""Products that are formed with factors before they are renewed.

That takes a pull-back, and the products of what went in and what comes back with themselves: together about as much as
two products of linear layers, and several of convolutions.
"""

_NAMES = ("left", "right", "diagonal")
_SKETCH = ("sketch", "sketch_values", "sketch_age")


class Preconditioning:
    """One step's preconditioner. It sees the closures, is formed for the system, and keeps what the next step needs.

    This one is none.

    Attributes:
        name: what it formed, for the report.
        products: how many curvature products that took.
        layers: the weights with Kronecker factors, empty where these are not worthwhile; None: unknown.
    """

    name = "none"
    products = 0
    layers: tuple[Layer, ...] | None = None

    def observe(self, metric: OutputMetric | ScalarMetric) -> None:
        """See a closure's metric while its graph is at hand."""

    def formed(self, point: Linearization, model: QuadraticModel, ranks: Ranks) -> Solve | None:
        """The preconditioner for a model's system; None where there is none."""
        return None

    def keep(self, products: int) -> None:
        """Write to the optimizer's state, with how many products the step took."""


def preconditioning_of(
    kind: Preconditioner,
    parameters: FlatParameters,
    state: MutableMapping[Tensor, dict[str, Any]],
    layers: tuple[Layer, ...] | None,
    generator: torch.Generator | None,
) -> Preconditioning:
    """What a setting stands for in one step.

    Args:
        kind: the setting.
        parameters: of the step.
        state: the optimizer's; it is written to by ``keep`` only.
        layers: those of the last step; None: unknown.
        generator: draws the random vectors; None: one that starts anew at each renewal, from its number.
    """
    if kind in ("auto", "kfac"):
        return _Kronecker(parameters, state, layers, generator, must=kind == "kfac")
    sketch = Diagonal() if kind == "diagonal" else kind
    if isinstance(sketch, Diagonal | Nystrom):
        return _Sketched(sketch, parameters, state, generator)
    return _Given(sketch) if callable(sketch) else Preconditioning()


class _Given(Preconditioning):
    """The user's function."""

    def __init__(self, function: Solve) -> None:
        self._function = function

    def formed(self, point: Linearization, model: QuadraticModel, ranks: Ranks) -> Solve | None:
        self.name = "callable"
        return _checked(self._function)


class _Sketched(Preconditioning):
    """From products. The state has each parameter's part of the sketch, and for the first the rest."""

    def __init__(
        self,
        kind: Diagonal | Nystrom,
        parameters: FlatParameters,
        state: MutableMapping[Tensor, dict[str, Any]],
        generator: torch.Generator | None,
    ) -> None:
        self._kind = kind
        self._parameters = parameters
        self._state = state
        own = [state.get(p, {}) for p in parameters.tensors]
        self._draws = own[0].get("draws", 0)
        self._generator = generator or torch.Generator().manual_seed(self._draws)
        self._sketch = _sketch_of(own, parameters)

    def formed(self, point: Linearization, model: QuadraticModel, ranks: Ranks) -> Solve | None:
        """Drawn anew where what earlier steps left is too old or of another kind."""

        def counted(v: Tensor) -> Tensor:
            self.products += 1
            return model.curvature(v)

        kind, shift, old = self._kind, model.shift, self._sketch
        if old is None or len(old.basis) != len(shift) or bool(len(old.values)) != isinstance(kind, Nystrom):
            old = None
        if old is None or old.age >= kind.refresh:
            diagonal = point.quick_diagonal() if isinstance(kind, Diagonal) else None
            old = kind.drawn(counted, len(shift), shift, old, self._generator) if diagonal is None else known(diagonal)
            self._draws += 1
        self._sketch = old._replace(age=old.age + 1)
        if not (old.basis.isfinite().all() and old.values.isfinite().all()):
            self._sketch = None
            return None  # the step will be refused
        self.name = kind.name
        return kind.solve(old, shift)

    def keep(self, products: int) -> None:
        if self._sketch is None:
            return
        for entry in self._state.values():
            for name in _SKETCH:
                entry.pop(name, None)  # a parameter that has no part in this one, or is no longer the first
        basis, values, age = self._sketch
        tensors = self._parameters.tensors
        for p, part in zip(tensors, basis.split([p.numel() for p in tensors]), strict=True):
            self._state[p]["sketch"] = part
        self._state[tensors[0]] |= {"sketch_values": values, "sketch_age": age, "draws": self._draws}


class _Kronecker(Preconditioning):
    """From Kronecker factors, which are estimated while the closures are linearised.

    The state has each parameter's factors, and for the first how many products they have served and how often they were
    drawn.
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
        self._values = {(i, name): entry[name] for i, entry in enumerate(own) for name in _NAMES if name in entry}
        self._is_due = self._served >= RENEWED_AFTER
        self._generator = generator or torch.Generator().manual_seed(self._draws)
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
                    "preconditioner='kfac' needs a metric at the model's outputs: a recognised loss function or a "
                    "returned distribution, and not the Hessian of a scalar; use preconditioner='auto'"
                )
            self._estimates.append(None)
            return
        uses = uses_of(metric.outputs, self._parameters.tensors)
        layers = tuple(dict.fromkeys(use.layer for use in uses))
        if not (self._must or is_worthwhile(uses, self._parameters.tensors)):
            self._estimates.append(None)
        elif self._is_due or not fits(self._values, layers, self._parameters.tensors):
            self._estimates.append(factors_of(uses, metric, self._parameters, self._generator))
        else:
            self.layers = layers

    def formed(self, point: Linearization, model: QuadraticModel, ranks: Ranks) -> Solve | None:
        if ranks.any([bool(self._estimates)])[0]:  # a rank with a graph of its own may be alone
            self._renew(ranks)
        if not self.layers:
            return None
        self.name = "kfac"
        values = {key: value.to(self._parameters.dtype) for key, value in self._values.items()}
        shifts = self._parameters.views(model.shift)
        means = torch.stack([part.sum() / max(1, part.numel()) for part in shifts]).tolist()
        return kronecker_preconditioner(KroneckerFactors(self.layers, values), self._parameters, means)

    def keep(self, products: int) -> None:
        for i, p in enumerate(self._parameters.tensors):
            dtype = torch.promote_types(p.dtype, torch.float32)  # what load_state_dict leaves alone
            for name in _NAMES:
                self._state[p].pop(name, None)
                if (i, name) in self._values:
                    self._state[p][name] = self._values[i, name].to(dtype)
        self._state[self._parameters.tensors[0]] |= {"products": self._served + products, "draws": self._draws}

    def _renew(self, ranks: Ranks) -> None:
        """Mix the estimates of all closures and ranks with what was known."""
        self._served, self._draws = 0, self._draws + 1
        estimates = [factors for factors in self._estimates if factors is not None]
        mean = mean_of(estimates) if len(estimates) == len(self._estimates) else None
        del estimates
        self._estimates.clear()  # as large as what they become
        layers = None if mean is None else (mean.layers, sorted(mean.values))
        if not ranks.agree(zlib.crc32(repr(layers).encode())) or mean is None:
            self.layers, self._values = (), {}
            return
        values = {key: ranks.average(value) for key, value in mean.values.items()}
        if all(value.isfinite().all() for value in values.values()):  # else the step will be refused
            self.layers, mean = mean.layers, None
            self._values = {key: _mixed(values.pop(key), self._values.get(key)) for key in list(values)}


def _sketch_of(own: Sequence[Mapping[str, Any]], parameters: FlatParameters) -> Sketch | None:
    """What the state holds of the last sketch; None if that was of other parameters."""
    if not (all("sketch" in entry for entry in own) and "sketch_values" in own[0]):
        return None
    basis = torch.cat([entry["sketch"] for entry in own]).to(parameters.dtype)
    return Sketch(basis, own[0]["sketch_values"].to(basis), own[0]["sketch_age"])


def _mixed(value: Tensor, older: Tensor | None) -> Tensor:
    return value if older is None or older.shape != value.shape else value.lerp(older.to(value), SHARE_OF_OLDER)


def _checked(function: Solve) -> Solve:
    """A preconditioner of the user's, with errors that name it."""

    def solve(r: Tensor) -> Tensor:
        version = r._version
        z = function(r)
        if not isinstance(z, Tensor) or z.shape != r.shape:
            got = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"the preconditioner must return a vector of shape {tuple(r.shape)}, got {got}")
        if r._version != version:
            raise ValueError("the preconditioner must return a new vector, and it changed its argument in place")
        return z.to(r)

    return solve
