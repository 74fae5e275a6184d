"""What a step on a stream of batches starts from: a gradient, and what the last step left in the optimizer's state.

The state has for each parameter ``momentum``, the average gradient; ``last_step``, the last change; and its
Kronecker factors: ``left`` and ``right`` with ``layer_groups``, ``layer_flipped`` and ``layer_bias`` (its
place among all parameters, -1 for none), or ``diagonal``. The first parameter also has ``steps``, how
many were taken; ``age``, how many with these factors; ``draws``, how often these were drawn; ``slope``,
that of the loss along the last step; ``decrement``, the average ``mᵀ (F + λI)⁻¹ m``; and ``weight``, the sum
of the gradients' weights in their average. All are tensors or numbers.
"""

import logging
import math
from collections.abc import Callable, Collection, MutableMapping, Sequence
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ngd_optim.jacobian import Layer
from ngd_optim.kronecker import KroneckerFactors
from ngd_optim.parameters import FlatParameters
from ngd_optim.real_parts import from_real_parts, real_parts
from ngd_optim.settings import check_shapes
from ngd_optim.shown import show
from ngd_optim.torch_internals import version_of

logger = logging.getLogger("ngd_optim")

_NUMBERS = ("steps", "age", "draws", "slope", "decrement", "weight")
_FACTORS = ("left", "right", "diagonal")
_DECREMENTS = 20
"""About how many of the last decrements count in their average."""

_GO_WITH = {"momentum": "weight", "last_step": "slope"}
_LAYER = ("layer_groups", "layer_flipped", "layer_bias")
_TENSORS = ("momentum", "last_step", *_FACTORS)


class StreamState:
    """The optimizer's state, read and written as flat vectors.

    Args:
        parameters: of the step that is now taken.
        state: the optimizer's; it is written to by :meth:`keep` only.
    """

    def __init__(
        self, parameters: FlatParameters, state: MutableMapping[Tensor, dict[str, Any]]
    ) -> None:
        self.parameters = parameters
        self._state = state
        # Of a step that may have begun with another parameter.
        numbers = next((entry for entry in state.values() if "steps" in entry), {})
        self.steps, self.age, self.draws = (numbers.get(k, 0) for k in ("steps", "age", "draws"))
        self.weight = numbers.get("weight", 0.0)
        moved = {id(p) for p, entry in state.items() if "last_step" in entry}
        same = moved == {id(p) for p in parameters.params}
        self.last_slope = numbers.get("slope", math.nan) if same else math.nan
        self.decrement = numbers.get("decrement", math.nan) if same else math.nan

    def is_due(self, every: int, also: Collection[int]) -> bool:
        """Whether factors are to be renewed: every so many steps, at the start also after some others."""
        is_time = self.steps % every == 0 or self.steps in also
        return (is_time and self.age > 0) or self.age >= every or self.factors is None

    @cached_property
    def factors(self) -> KroneckerFactors | None:
        """Those of all parameters; None if some have none, or have them of another shape."""
        params = self.parameters.params
        index = {position: i for i, position in enumerate(self.parameters.positions)}
        values: dict[tuple[int, str], Tensor] = {}
        layers: list[Layer] = []
        for i, p in enumerate(params):
            entry = self._of(p)
            if "layer_groups" in entry:
                groups, flipped, bias = (entry[name] for name in _LAYER)
                layers.append(Layer(i, index.get(bias), bool(flipped), groups))
            values |= {(i, name): real_parts(entry[name]) for name in _FACTORS if name in entry}
        factors = KroneckerFactors(tuple(layers), values)
        return factors if factors.fits(params) else None

    def flat(self, name: str) -> Tensor:
        """A new flat vector of what the parameters have under a name; 0 where they have nothing."""
        return self.parameters.flatten(self._of(p).get(name) for p in self.parameters.params)

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
        changes: Sequence[Tensor],
        slope: float,
        decrement: float,
        factors: KroneckerFactors | None,
    ) -> None:
        """For the next step.

        Args:
            momentum: flat.
            weight: of all gradients in it.
            changes: of the parameters, as they lie over ranks.
            slope: of the loss along the step.
            decrement: the average of ``mᵀ (F + λI)⁻¹ m``.
            factors: if they were renewed.
        """
        parts = zip(
            self.parameters.params,
            self.parameters.lay_out(momentum),
            changes,
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

    def _keep_factors(self, factors: KroneckerFactors) -> None:
        layers = {layer.weight: layer for layer in factors.layers}
        for i, p in enumerate(self.parameters.params):
            entry = self._state[p]
            for name in (*_FACTORS, *_LAYER):
                entry.pop(name, None)
            dtype = torch.promote_types(p.dtype, torch.float32)
            for name in _FACTORS:
                if (i, name) in factors.values:
                    value = factors.values[i, name]
                    is_like_it = name == "diagonal"
                    entry[name] = (from_real_parts(p, value) if is_like_it else value).to(dtype)
            if i in layers:
                _, bias, flipped, groups = layers[i]
                place = -1 if bias is None else self.parameters.positions[bias]
                entry |= dict(zip(_LAYER, (groups, int(flipped), place), strict=True))

    def _of(self, p: Tensor) -> dict[str, Any]:
        return self._state.get(p, {})  # the state is made where it is written to


def check_stream_state(state: MutableMapping[Any, dict[str, Any]]) -> None:
    """Check what was loaded; what is not finite is dropped, with a warning.

    Raises:
        ValueError: it is broken, or was saved of other parameters.
    """
    check_shapes(state, ("momentum", "last_step"))
    lost: set[str] = set()
    for entry in state.values():
        for name in (*_NUMBERS, *_LAYER):
            if not isinstance(entry.get(name, 0), Real):
                raise ValueError(
                    f"this state cannot be loaded, it is broken: {name} must be a number, got "
                    f"{show(entry[name])}"
                )
        tensors = {k: v for k, v in entry.items() if k in _TENSORS and isinstance(v, Tensor)}
        lost |= {name for name, value in tensors.items() if not value.isfinite().all()}
    if lost:
        logger.warning(
            "the loaded state has numbers that are not finite in its %s, which is dropped and found anew",
            ", ".join(sorted(lost)),
        )
    for entry in state.values():
        for name in lost:
            entry.pop(name, None)
            entry.pop(_GO_WITH.get(name, name), None)


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
    if returned.is_complex():
        raise TypeError(
            f"the closure must return a real loss, got one of dtype {returned.dtype}; return its real part, "
            "or the mean of abs().square()"
        )
    if returned.numel() != 1:
        raise ValueError(
            f"the closure must return a scalar loss, got shape {tuple(returned.shape)}; reduce it by mean()"
        )
    if not returned.requires_grad:
        raise ValueError(
            "the loss has no graph to differentiate: it was detached, computed under no_grad, or uses "
            "none of the parameters"
        )
    return returned
