"""What has a kink has no curvature there that derivatives see: the loss takes that of the parabola above it.

That is what iteratively reweighted least squares does. It is for functions with a kink that a loss
ends in: absolute values, norms, hinges and maxima, of which it takes sums with constant weights.

A step rounds the kinks: nearer to one than a width, its model takes the parabola's slope as well as
its curvature, Huber's function in place of ``|r|``. The slope of ``|r|`` itself is ±1 however near
the kink is, and would carry the step past it: none would end near a kink. The width falls while
steps are taken; see :func:`~ngd_optim.step.damping.smoothing_factor`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ngd_optim.autograd_graph import find_linear_ends
from ngd_optim.real_parts import real_parts
from ngd_optim.recognised import LossCall, irls_weight

Weigh = Callable[[Tensor, float | None], Tensor]
"""``(c, smoothing) ↦ h``; see :class:`Kink`."""


@dataclass(frozen=True, slots=True)
class Kink:
    """A call of a function with a kink.

    Attributes:
        node: of its result in the graph.
        inputs: what it was given, where that requires a gradient.
        form: gives the coordinate ``z``, which is zero at the kink, and ``(c, smoothing) ↦ h`` for
            the slope ``c = ∂loss/∂result``: the second derivatives in ``z``, one for each element,
            at least 0. Where the loss is concave there they are 0. The smoothing is that of
            :func:`irls_weight`.
        takes_memory: whether the inputs would be let go after the call.
        is_smooth: whether it has no kink after all: a square, which that parabola is.
        is_length: whether it is a norm.
        flat: where ``flat · z < 0`` it is constant: 1 or -1, or 0 for nowhere.
        is_within: whether a recognised loss comes after it, which rounds its own kinks: then it has
            its parabola's curvature, and keeps its slope.
    """

    node: Any
    inputs: tuple[Tensor, ...]
    form: Callable[[], tuple[Tensor, Weigh]]
    takes_memory: bool
    is_smooth: bool
    is_length: bool = False
    flat: int = 0
    is_within: bool = False

    def formed(self) -> "Kink":
        """The same, with the coordinate computed: while the run is recorded."""
        found = self.form()
        return replace(self, form=lambda: found)


class Reading(NamedTuple):
    """How the arguments of a call are read: what the kink is in, and :attr:`Kink.form` as a function of that."""

    inputs: list[Tensor]
    form: Callable[..., tuple[Tensor, Weigh]]
    takes_memory: bool = False
    is_smooth: bool = False
    is_length: bool = False
    flat: int = 0


_LARGEST = 2**20
"""Bytes. Inputs that take memory beyond that are inside of a network."""


def call_with_kink(func: Any, args: Any, kwargs: Any) -> tuple[Any, Kink | None]:
    """Call one of :data:`KINKS`; also give the kink, unless it is of no use."""
    reading = None
    if args and isinstance(args[0], Tensor) and args[0].is_complex():
        return _call_with_modulus(func, *args, **kwargs)
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        try:
            reading = KINKS[func](*args, **kwargs)
        except TypeError:  # another form of the call
            reading = None
    if reading is None or not any(t.requires_grad for t in reading.inputs):
        return func(*args, **kwargs), None
    inputs = reading.inputs
    if reading.takes_memory:
        if any(t.numel() * t.element_size() > _LARGEST for t in inputs):
            return func(*args, **kwargs), None
    elif not reading.is_smooth:
        # Aliases leave out other uses of the inputs. A square counts only where the loss is a linear
        # function of kinks and squares, and there are no others.
        aliases = {id(t): t.view_as(t) for t in inputs}
        inputs = list(aliases.values())
        args = [aliases.get(id(a), a) for a in args]
        kwargs = {name: aliases.get(id(a), a) for name, a in kwargs.items()} if kwargs else kwargs
    result = func(*args, **kwargs)
    curved = tuple([t for t in inputs if t.requires_grad])
    form = partial(reading.form, *inputs)
    return result, Kink(result.grad_fn, curved, form, *reading[2:])


def _call_with_modulus(func: Any, z: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Kink | None]:
    """Of ``|z|``, the norm of both parts; no other kink is looked for in complex numbers."""
    if KINKS[func] is not _abs or not z.requires_grad:
        return func(z, *args, **kwargs), None
    parts = real_parts(z)
    result, reading = func(torch.view_as_complex(parts), *args, **kwargs), _norm(parts, dim=-1)
    assert reading is not None
    form = partial(reading.form, parts)
    return result, Kink(result.grad_fn, (parts,), form, takes_memory=False, is_smooth=False)


def _abs(x: Tensor) -> Reading:
    return Reading(
        [x], lambda x: (x, lambda c, smoothing: irls_weight(x, c.clamp(min=0), smoothing))
    )


def _norm(
    x: Tensor,
    p: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    out: Any = None,
    dtype: Any = None,
) -> Reading | None:
    if dtype is not None or p not in (None, "fro", 1, 2):
        return None
    dims = list(range(x.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)

    def form(x: Tensor) -> tuple[Tensor, Weigh]:
        length = torch.linalg.vector_norm(x.detach(), 1 if p == 1 else 2, dims, keepdim=True)

        def weigh(c: Tensor, smoothing: float | None) -> Tensor:
            slope = c.reshape(length.shape).clamp(min=0)
            return irls_weight(x if p == 1 else length, slope, smoothing).expand_as(x)

        return x, weigh

    return Reading([x], form, is_length=True)


def _distance(
    x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Reading | None:
    reading = _norm(x1, p, -1, keepdim)
    if reading is None:
        return None
    # Differences are let go: their form is made of new ones.
    return Reading([x1, x2], lambda a, b: reading.form(a - b + eps), True, is_length=True)


def _vector_norm(
    x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Reading | None:
    return _norm(x, ord, dim, keepdim, dtype=dtype)


def _matrix_norm(x: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False) -> Any:
    is_vector = x.ndim == 1 or isinstance(dim, int)
    return _norm(x, ord, dim, keepdim) if ord in (None, "fro") or is_vector else None


def _maximum(a: Tensor, b: Any = None, sign: int = 1) -> Reading | None:
    if not isinstance(b, Tensor):
        return None  # of one tensor along a dimension

    def form(a: Tensor, b: Tensor) -> tuple[Tensor, Weigh]:
        z = a - b
        return z, lambda c, smoothing: irls_weight(z, 0.5 * (sign * c).clamp(min=0), smoothing)

    constant = (not b.requires_grad) - (not a.requires_grad)
    return Reading([a, b], form, takes_memory=True, flat=sign * constant)


def _minimum(a: Tensor, b: Any = None) -> Reading | None:
    return _maximum(a, b, sign=-1)


def _clamp(x: Tensor, min: Any = None, max: Any = None) -> Reading | None:
    if (min is None) == (max is None):
        return None
    edge, sign = (min, 1) if max is None else (max, -1)

    def form(x: Tensor) -> tuple[Tensor, Weigh]:
        z = x - edge
        return z, lambda c, smoothing: irls_weight(z, 0.5 * (sign * c).clamp(min=0), smoothing)

    return Reading([x], form, takes_memory=True, flat=sign)


def _clamp_max(x: Tensor, max: Any) -> Reading | None:
    return _clamp(x, None, max)


def _relu(x: Tensor, inplace: bool = False) -> Reading | None:
    return None if inplace else _clamp(x, 0.0)


def _power(x: Tensor, exponent: Any = 2) -> Reading | None:
    if not isinstance(exponent, (int, float)) or not 1 <= exponent <= 2:
        return None
    # Of squares there may be thousands: no function is made for each.
    return Reading([x], partial(_form_of_power, exponent), is_smooth=exponent == 2)


def _form_of_power(exponent: float, x: Tensor) -> tuple[Tensor, Weigh]:
    # φ = |z|ᵉ has φ′/z = e |z|ᵉ⁻².
    def weigh(c: Tensor, smoothing: float | None) -> Tensor:
        return exponent * c.clamp(min=0) * irls_weight(x, 1.0, smoothing) ** (2 - exponent)

    return x, weigh


KINKS: dict[Any, Callable[..., Reading | None]] = {
    torch.abs: _abs,
    torch.Tensor.abs: _abs,
    torch.Tensor.__abs__: _abs,
    torch.absolute: _abs,
    torch.norm: _norm,
    torch.Tensor.norm: _norm,
    torch.linalg.norm: _matrix_norm,
    torch.linalg.vector_norm: _vector_norm,
    torch.pairwise_distance: _distance,
    torch.maximum: _maximum,
    torch.Tensor.maximum: _maximum,
    torch.max: _maximum,
    torch.Tensor.max: _maximum,
    torch.minimum: _minimum,
    torch.Tensor.minimum: _minimum,
    torch.min: _minimum,
    torch.Tensor.min: _minimum,
    torch.relu: _relu,
    torch.Tensor.relu: _relu,
    F.relu: _relu,
    torch.clamp: _clamp,
    torch.Tensor.clamp: _clamp,
    torch.clamp_min: _clamp,
    torch.Tensor.clamp_min: _clamp,
    torch.clamp_max: _clamp_max,
    torch.Tensor.clamp_max: _clamp_max,
    torch.pow: _power,
    torch.Tensor.pow: _power,
    torch.Tensor.__pow__: _power,
    torch.square: _power,
    torch.Tensor.square: _power,
}
"""Functions with a kink, and how their arguments are read."""


def find_last_kinks(
    loss: Tensor, kinks: Iterable[Kink], calls: Sequence[LossCall]
) -> tuple[tuple[Kink, ...], bool]:
    """The kinks that the loss ends in, with their coordinates, and whether it ends in nothing else that is curved.

    Also the norms that recognised losses with kinks are given, such as distances. None if these are
    squares alone.

    Args:
        loss: 0-dim, with its graph, if it has one.
        kinks: all that were met.
        calls: of recognised loss functions.
    """
    by_node = {kink.node: kink for kink in kinks}
    if loss.grad_fn is None or all(kink.is_smooth for kink in by_node.values()):
        return (), False
    ends = find_linear_ends(loss, {*by_node, *(call.result.grad_fn for call in calls)})
    last = {node: by_node[node] for node in ends if node in by_node}
    is_all = len(last) == len(ends)
    for call in calls:
        if call.loss.has_kinks and call.result.grad_fn in ends:
            for node in [node for z in call.outputs for node in find_linear_ends(z, {*by_node})]:
                if node in by_node and by_node[node].is_length:
                    last.setdefault(node, replace(by_node[node], is_within=True))
    if all(kink.is_smooth for kink in last.values()):
        return (), False
    return tuple(kink.formed() for kink in last.values()), is_all
