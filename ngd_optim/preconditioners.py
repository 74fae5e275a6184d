"""The preconditioner of one step's conjugate gradients: what it is, and when its ingredients are renewed."""

import zlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ngd_optim.curvature import OutputMetric, ScalarMetric
from ngd_optim.distributed import Ranks
from ngd_optim.kronecker import (
    KroneckerFactors,
    Layer,
    factors_of,
    fit,
    is_worthwhile,
    kronecker_preconditioner,
    mean_of,
    uses_of,
)
from ngd_optim.model import QuadraticModel
from ngd_optim.parameters import FlatParameters
from ngd_optim.sketches import Diagonal, Nystrom, Sketch

PreconditionerName = Literal["auto", "kfac", "diagonal"]
Solve = Callable[[Tensor], Tensor]
Preconditioner = PreconditionerName | None | Solve | Diagonal | Nystrom

MEMORY = 0.5
"""Share of the older factors in renewed ones."""

RENEWED_AFTER = 10
"""Products that are formed with factors before they are renewed, which costs about as much as one or two."""

_NAMES = ("left", "right", "diagonal")


class Preconditioning:
    """Gathers what a step's preconditioner is made of while closures are linearised, forms it, and keeps it.

    What must outlive the step is in the optimizer's state: for each parameter its factors, and for the first how many
    products they have served and how often they were drawn.

    Args:
        kind: the setting.
        parameters: of the step.
        state: the optimizer's; it is written to in :meth:`keep` only.
        layers: those of the last step; None: unknown.
        generator: draws the random vectors; None: one that starts anew at each renewal, from its number.

    Attributes:
        layers: those of this step.
        name: what it formed: ``"kfac"``, ``"diagonal"``, ``"nystrom"``, ``"callable"`` or ``"none"``.
        products: how many curvature products that took.
    """

    def __init__(
        self,
        kind: Preconditioner,
        parameters: FlatParameters,
        state: MutableMapping[Tensor, dict[str, Any]],
        layers: tuple[Layer, ...] | None,
        generator: torch.Generator | None,
    ) -> None:
        self.layers = layers
        self.name = "none"
        self.products = 0
        self._kind = Diagonal() if kind == "diagonal" else kind
        self._parameters = parameters
        self._state = state
        own = [state.get(p, {}) for p in parameters.tensors]
        self._products, self._draws = own[0].get("products", 0), own[0].get("draws", 0)
        self._values = {(i, name): entry[name] for i, entry in enumerate(own) for name in _NAMES if name in entry}
        self._is_due = self._products >= RENEWED_AFTER
        self._generator = generator or torch.Generator().manual_seed(self._draws)
        self._sketch = _sketch_of(own)
        self._estimates: list[KroneckerFactors | None] = []

    def observe(self, metric: OutputMetric | ScalarMetric) -> None:
        """See what a closure's graph tells of the layers, and estimate their factors if they are due.

        Raises:
            ValueError: ``preconditioner="kfac"`` is asked for where there is no metric at outputs of the model.
        """
        if self._kind not in get_args(PreconditionerName) or not (self._is_due or self.layers is None):
            return
        if isinstance(metric, ScalarMetric):
            if self._kind == "kfac":
                raise ValueError(
                    "preconditioner='kfac' needs a metric at the model's outputs: a recognised loss function or a "
                    "returned distribution, and not the Hessian of a scalar; use preconditioner='auto'"
                )
            self._estimates.append(None)
            return
        uses = uses_of(metric.outputs, self._parameters.tensors)
        layers = tuple(dict.fromkeys(use.layer for use in uses))
        if self._kind == "auto" and not is_worthwhile(uses, self._parameters.tensors):
            self._estimates.append(None)
        elif self._is_due or not fit(self._values, layers, self._parameters.tensors):
            self._estimates.append(factors_of(uses, metric, self._parameters, self._generator))
        else:
            self.layers = layers

    def formed(self, model: QuadraticModel, ranks: Ranks) -> Solve | None:
        """The preconditioner for a model's system; None where there is none."""
        shift = model.shift
        if isinstance(self._kind, Diagonal | Nystrom):
            return self._sketched(self._kind, model.curvature, shift)
        if callable(self._kind):
            self.name = "callable"
            return _checked(self._kind)
        if ranks.any([bool(self._estimates)])[0]:  # a rank with a graph of its own may be alone
            self._renew(ranks)
        if not self.layers:
            return None
        self.name = "kfac"
        values = {key: value.to(self._parameters.dtype) for key, value in self._values.items()}
        means = torch.stack([part.sum() / max(1, part.numel()) for part in self._parameters.views(shift)]).tolist()
        return kronecker_preconditioner(KroneckerFactors(self.layers, values), self._parameters, means)

    def _sketched(self, kind: Diagonal | Nystrom, curvature: Solve, shift: Tensor) -> Solve | None:
        """A preconditioner from products, formed anew where what earlier steps left is too old or not of its kind."""

        def counted(v: Tensor) -> Tensor:
            self.products += 1
            return curvature(v)

        old = self._sketch
        if old is None or len(old.basis) != len(shift) or bool(len(old.values)) != isinstance(kind, Nystrom):
            old = None
        if old is None or old.age >= kind.refresh:
            old = kind.drawn(counted, len(shift), shift, old, self._generator)
            self._draws += 1
        self._sketch = old._replace(age=old.age + 1)
        if not (old.basis.isfinite().all() and old.values.isfinite().all()):
            self._sketch = None
            return None  # the step will be refused
        self.name = kind.name
        return kind.solve(old, shift)

    def keep(self, products: int) -> None:
        """Write what the next step needs to the state, with how many products this one took."""
        if isinstance(self._kind, Diagonal | Nystrom) and self._sketch is not None:
            basis, values, age = self._sketch
            tensors = self._parameters.tensors
            for p, part in zip(tensors, basis.split([p.numel() for p in tensors]), strict=True):
                self._state[p]["sketch"] = part
            more = {"sketch_values": values, "sketch_age": age, "draws": self._draws}
            self._state[self._parameters.tensors[0]] |= more
        if self._kind not in get_args(PreconditionerName):
            return
        for i, p in enumerate(self._parameters.tensors):
            dtype = torch.promote_types(p.dtype, torch.float32)  # what load_state_dict leaves alone
            for name in _NAMES:
                self._state[p].pop(name, None)
                if (i, name) in self._values:
                    self._state[p][name] = self._values[i, name].to(dtype)
        self._state[self._parameters.tensors[0]] |= {"products": self._products + products, "draws": self._draws}

    def _renew(self, ranks: Ranks) -> None:
        """Mix the estimates of all closures and ranks with what was known."""
        self._products, self._draws = 0, self._draws + 1
        estimates = [factors for factors in self._estimates if factors is not None]
        mean = mean_of(estimates) if len(estimates) == len(self._estimates) else None
        layers = None if mean is None else (mean.layers, sorted(mean.values))
        if not ranks.agree(zlib.crc32(repr(layers).encode())) or mean is None:
            self.layers, self._values = (), {}
            return
        values = {key: ranks.average(value) for key, value in mean.values.items()}
        if all(value.isfinite().all() for value in values.values()):  # else the step will be refused
            self.layers = mean.layers
            self._values = {key: _mixed(value, self._values.get(key)) for key, value in values.items()}


def _sketch_of(own: Sequence[Mapping[str, Any]]) -> Sketch | None:
    """What the state holds of the last sketch."""
    if not all("sketch" in entry for entry in own):
        return None
    basis = torch.cat([entry["sketch"] for entry in own])
    return Sketch(basis, own[0]["sketch_values"].to(basis), own[0]["sketch_age"])


def _mixed(value: Tensor, older: Tensor | None) -> Tensor:
    return value if older is None or older.shape != value.shape else value.lerp(older.to(value), MEMORY)


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
