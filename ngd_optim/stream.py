"""What a step on a stream of batches starts from: a gradient, and what the last step left in the optimizer's state.

The state has for each parameter ``momentum``, the average gradient; ``last_step``, the last change; and its
Kronecker factors, as :mod:`ngd_optim.kronecker.saved` tells, but ``layer_bias`` is a place among all
parameters. The first parameter also has ``steps``, how
many were taken; ``age``, how many with these factors; ``draws``, how often these were drawn; ``slope``,
that of the loss along the last step; ``decrement``, the average ``mᵀ (F + λI)⁻¹ m``; and ``weight``, the sum
of the gradients' weights in their average. All are tensors or numbers.
"""

import logging
import math
from collections.abc import Callable, Collection, MutableMapping, Sequence
from functools import cached_property
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ngd_optim.distributed import ALONE, ParametersInParts, Ranks
from ngd_optim.kronecker import KeptFactors
from ngd_optim.layout import is_spread, local_part
from ngd_optim.parameters import FlatParameters, forget
from ngd_optim.settings import check_shapes
from ngd_optim.shown import show
from ngd_optim.state import is_absent, make_empty, require_own_part
from ngd_optim.torch_internals import version_of
from ngd_optim.tracing import require_real_scalar

logger = logging.getLogger("ngd_optim")

_NUMBERS = ("steps", "age", "draws", "slope", "decrement", "weight")
_DECREMENTS = 20
"""About how many of the last decrements count in their average."""

_PARTS = {
    "momentum": ("momentum", "weight"),
    "last_step": ("last_step", "slope"),
    "Kronecker factors": KeptFactors.names,
}
"""What is dropped together."""

NAMES = tuple(dict.fromkeys((*_NUMBERS, *chain.from_iterable(_PARTS.values()))))
"""Those of all entries. Any others are the user's, and left alone."""


class StreamState:
    """The optimizer's state, read and written as flat vectors.

    Args:
        parameters: of the step that is now taken.
        state: the optimizer's; it is written to by :meth:`keep` only.
        own: the parameters as vectors of the step, which may be in parts; None: these are whole.
        ranks: those that take the step.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        state: MutableMapping[Tensor, dict[str, Any]],
        own: FlatParameters | ParametersInParts | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.parameters = parameters
        self.own = own or parameters
        self._ranks = ranks
        self._state = state
        # Of a step that may have begun with another parameter.
        numbers = next((entry for entry in state.values() if "steps" in entry), {})
        self.steps, self.age, self.draws = (numbers.get(k, 0) for k in ("steps", "age", "draws"))
        self.weight = numbers.get("weight", 0.0)
        moved = {id(p) for p, entry in state.items() if "last_step" in entry}
        same = moved == {id(p) for p in parameters.params}
        self.last_slope = numbers.get("slope", math.nan) if same else math.nan
        self.decrement = numbers.get("decrement", math.nan) if same else math.nan

    def is_due(self, every: int, also: Collection[int], *, is_known: bool) -> bool:
        """Whether factors are to be renewed: every so many steps, at the start also after some others.

        ``is_known`` tells that there are those of these parameters, so that the state is not asked.
        """
        is_time = self.steps % every == 0 or self.steps in also
        return (is_time and self.age > 0) or self.age >= every or not (is_known or self.has_factors)

    @cached_property
    def has_factors(self) -> bool:
        """Whether there are those of all parameters, of their shapes."""
        return KeptFactors.are_in(self.parameters, self._entries())

    @cached_property
    def factors(self) -> KeptFactors:
        """Those that there are; all ranks together."""
        entries = self._entries() if self.has_factors else None
        return KeptFactors.load(self.parameters, entries, self._ranks)

    def _entries(self) -> list[dict[str, Any]]:
        """Those of the parameters, with the bias's place among these."""
        index = {position: i for i, position in enumerate(self.parameters.positions)}
        found = [{"layer_groups": 0, **self._of(p)} for p in self.parameters.params]
        for entry in found:
            bias = entry.get("layer_bias", -1)
            if entry["layer_groups"] > 0 and bias is not None and bias >= 0:
                # It may be frozen by now: the factors are then of another layer.
                entry |= {"layer_bias": index[bias]} if bias in index else {"layer_groups": -1}
        return found

    def flat(self, name: str) -> Tensor:
        """A new flat vector of what the parameters have under a name; 0 where they have nothing."""
        return self.own.flatten(self._of(p).get(name) for p in self.parameters.params)

    def average_decrement(self, new: float) -> float:
        """The average of the decrements so far and a new one, which forgets the oldest."""
        if not math.isfinite(self.decrement):
            return new
        share = min(1 - 1 / _DECREMENTS, self.steps / (self.steps + 1))
        return share * self.decrement + (1 - share) * new

    def fall_to(self, average: float) -> float:
        """Which part of the last average decrement this one is; 1 where it rose, or is the first."""
        return min(1.0, average / self.decrement) if math.isfinite(self.decrement) else 1.0

    def generator(self) -> torch.Generator:
        """Draws other vectors for each renewal, and the same ones when a run is resumed."""
        return torch.Generator(device="cpu").manual_seed(self.draws)

    def keep(
        self,
        *,
        momentum: Tensor,
        weight: float,
        step: Tensor,
        slope: float,
        decrement: float,
        factors: KeptFactors | None,
    ) -> None:
        """For the next step.

        Args:
            momentum: flat.
            weight: of all gradients in it.
            step: flat.
            slope: of the loss along the step.
            decrement: the average of ``mᵀ (F + λI)⁻¹ m``.
            factors: if they were renewed.
        """
        parts = zip(
            self.parameters.params,
            self.own.to_state(momentum),
            self.own.to_state(step),
            strict=True,
        )
        ours = set(map(id, self.parameters.params))
        for p, entry in self._state.items():  # what is of a step of other parameters
            if id(p) not in ours:
                entry.pop("last_step", None)
            if "steps" in entry:
                for name in _NUMBERS:
                    entry.pop(name, None)
        for p, m, d in parts:
            self._state[p] |= {"momentum": m, "last_step": d}
        if factors is not None:
            self._keep_factors(factors)
        renewed = factors is not None
        self._state[self.parameters.params[0]] |= {
            "steps": self.steps + 1,
            "age": 1 if renewed else self.age + 1,
            "draws": self.draws + renewed,
            "slope": slope,
            "decrement": decrement,
            "weight": weight,
        }

    def _keep_factors(self, factors: KeptFactors) -> None:
        forget(self._state, KeptFactors.names)
        for p, entry in zip(self.parameters.params, factors.entries(), strict=True):
            if entry.get("layer_bias", -1) >= 0:
                entry["layer_bias"] = self.parameters.positions[entry["layer_bias"]]
            self._state[p] |= entry

    def _of(self, p: Tensor) -> dict[str, Any]:
        return self._state.get(p, {})  # the state is made where it is written to


def complete_stream_state(
    state: MutableMapping[Any, dict[str, Any]], parameters: FlatParameters, mesh: Any = None
) -> None:
    """Give each parameter the entries that it does not have, empty, as before the first step.

    Args:
        state: the optimizer's.
        parameters: of a step.
        mesh: over which the state lies of parameters that are whole themselves; None: over none.
    """
    state[parameters.params[0]] = dict(_AT_FIRST) | state[parameters.params[0]]
    for p in parameters.params:
        wide = torch.promote_types(p.dtype, torch.float32)
        tensors = {name: (tuple(p.shape), p.dtype) for name in ("momentum", "last_step")}
        tensors |= {name: (shape, wide) for name, shape in KeptFactors.sizes(p).items()}
        if p.ndim == 2:  # it may be a table
            tensors["table"] = (len(p),), wide
        empty = {
            name: make_empty(name, shape, dtype, p, mesh)
            for name, (shape, dtype) in tensors.items()
            if name not in state[p]
        }
        state[p] = {**_NO_LAYER, **empty, **state[p]}


_AT_FIRST = {
    "steps": 0,
    "age": 0,
    "draws": 0,
    "slope": math.nan,
    "decrement": math.nan,
    "weight": 0.0,
}
_NO_LAYER = {"layer_groups": -1, "layer_flipped": 0, "layer_bias": -1, "layer_table": 0}


def check_stream_state(state: MutableMapping[Any, dict[str, Any]]) -> None:
    """Check what was loaded; what is not finite is dropped, with a warning.

    Raises:
        ValueError: it is broken, or was saved of other parameters.
    """
    check_shapes(state, ("momentum", "last_step"))
    lost: set[str] = set()
    numbers = (*_NUMBERS, *_NO_LAYER)
    for p, entry in state.items():
        for name in [name for name in entry if is_absent(entry[name])]:
            del entry[name]
        for name in numbers:
            if not isinstance(entry.get(name, 0), Real):
                raise ValueError(
                    f"this state cannot be loaded, it is broken: {name} must be a number, got "
                    f"{show(entry[name])}"
                )
        tensors = {
            name: (part, entry[name])
            for part, names in _PARTS.items()
            for name in names
            if isinstance(entry.get(name), Tensor)
        }
        for name, (part, value) in tensors.items():
            require_own_part(value)
            if not local_part(value).isfinite().all():
                lost.add(part)
            elif isinstance(p, Tensor) and not is_spread(value) and not value.any():
                entry[name] = make_empty(name, value.shape, value.dtype, value, None)
    if lost:
        logger.warning(
            "the loaded state has numbers that are not finite in its %s, which is dropped and found anew",
            ", ".join(sorted(lost)),
        )
    for entry in state.values():
        for name in (name for part in lost for name in _PARTS[part]):
            entry.pop(name, None)


def differentiate(
    closures: Sequence[Callable[[], Any]], parameters: FlatParameters
) -> tuple[Tensor, list[Tensor | None]]:
    """Run each closure once: the mean of the losses, detached, and of their gradients.

    A closure that calls ``backward`` leaves its gradients in ``.grad``, with what it has added them to.
    Of another one, its loss is differentiated here, and ``.grad`` stays as it was. Of one that does
    nothing, as Lightning's under manual optimization, what there is in ``.grad`` counts.

    Raises:
        TypeError, ValueError: a closure returned something that is no loss.
    """
    if len(closures) == 1:
        return _differentiate(closures[0], parameters)
    params = parameters.params
    before = [p.grad for p in params]
    losses: list[Tensor] = []
    totals: list[Tensor | None] = [None] * len(params)
    called_backward = False
    for closure in closures:
        for p in params:
            p.grad = None
        loss, gradients = _differentiate(closure, parameters)
        losses.append(loss)
        called_backward |= any(p.grad is not None for p in params)
        totals = [_add(total, g, len(closures)) for total, g in zip(totals, gradients, strict=True)]
    for p, old, total in zip(params, before, totals, strict=True):
        p.grad = total if called_backward else old
    return torch.stack(losses).mean(), totals


def _add(total: Tensor | None, gradient: Tensor | None, n: int) -> Tensor | None:
    if gradient is None:
        return total
    return gradient / n if total is None else total + gradient / n


def _differentiate(
    closure: Callable[[], Any], parameters: FlatParameters
) -> tuple[Tensor, list[Tensor | None]]:
    params = parameters.params
    before = [(p.grad, None if p.grad is None else version_of(p.grad)) for p in params]
    with torch.enable_grad():
        returned = closure()
    if _has_called_backward(params, before):
        return _read(returned, parameters), [p.grad for p in params]
    if returned is None and any(p.grad is not None for p in params):
        return _read(returned, parameters), [p.grad for p in params]  # computed before the step
    loss = _require_loss(returned)
    kept = [p.grad for p in params]
    try:
        for p in params:
            p.grad = None
        loss.backward()  # not autograd.grad, of which DistributedDataParallel would know nothing
        return loss.detach().reshape(()), [p.grad for p in params]
    finally:
        for p, gradient in zip(params, kept, strict=True):
            p.grad = gradient


def _has_called_backward(params: Sequence[Tensor], before: Sequence[tuple[Any, Any]]) -> bool:
    """Whether there are new gradients; zeros in place of old ones are none."""
    changed = [
        p.grad
        for p, (old, version) in zip(params, before, strict=True)
        if p.grad is not None and not (p.grad is old and version_of(p.grad) == version)
    ]
    older = {id(old) for old, _ in before}
    # The host waits, for closures that only clear their gradients in place.
    return any(id(g) not in older or bool(g.any()) for g in changed)


def _read(returned: Any, parameters: FlatParameters) -> Tensor:
    """The loss, as torch's own optimizers give back whatever their closure returned."""
    loss = returned[0] if isinstance(returned, tuple) and returned else returned
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.detach().reshape(())
    value = float(loss) if isinstance(loss, Real) else math.nan
    return torch.tensor(value, dtype=parameters.dtype, device=parameters.device)


def _require_loss(returned: Any) -> Tensor:
    if not isinstance(returned, Tensor):
        raise TypeError(
            f"the closure must return the loss as a tensor, or call backward, got {type(returned).__name__}"
        )
    require_real_scalar(returned)
    if not returned.requires_grad:
        raise ValueError(
            "the loss has no graph to differentiate: it was detached, computed under no_grad, or uses "
            "none of the parameters"
        )
    return returned
