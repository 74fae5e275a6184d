"""What the optimizer's state holds: its entries by name, made in full and checked when they are loaded.

After a step each parameter has every entry that its shape and the settings allow, empty ones
included: which they are does not depend on what happened. So ``torch.distributed.checkpoint``, which
loads into what a new optimizer has, finds a place for all that was saved. Empty tensors are zeros
expanded from one number.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngd_optim.kronecker import KeptFactors
from ngd_optim.layout import (
    is_of_this_rank,
    is_spread,
    local_part,
    zeros_in_rows,
    zeros_spread_like,
)
from ngd_optim.parameters import FlatParameters
from ngd_optim.preconditioners import Diagonal, Nystrom
from ngd_optim.real_parts import real_size
from ngd_optim.settings import Settings
from ngd_optim.shown import show

logger = logging.getLogger("ngd_optim")


class _Entry(NamedTuple):
    """What an entry may be, in words and as a function of it and its parameter, and what it is lost with."""

    words: str
    holds: Callable[[Any, Tensor], bool]
    part_of: str


def _is_number(value: Any, _: Tensor) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_integer(value: Any, _: Tensor) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and -1 <= int(value) < 2**63


def _has_dimensions(*allowed: int) -> Callable[[Any, Tensor], bool]:
    def holds(value: Any, _: Tensor) -> bool:
        return (
            isinstance(value, Tensor)
            and value.layout == torch.strided
            and value.is_floating_point()
            and value.ndim in allowed
        )

    return holds


def _has_rows(value: Any, p: Tensor) -> bool:
    return _has_dimensions(2)(value, p) and len(value) == real_size(p)


def _is_like(value: Any, p: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    is_inexact = value.is_complex() if p.is_complex() else value.is_floating_point()
    return is_inexact and value.shape == p.shape


_NUMBER = "a number", _is_number
_INTEGER = "an integer, at least -1", _is_integer
_LIKE_IT = "a tensor of its shape, complex if it is", _is_like
_FACTOR = "a tensor of one to three dimensions", _has_dimensions(1, 2, 3)

_ENTRIES = {
    **{name: _Entry(*_NUMBER, "last step") for name in ("slope", "new_loss", "lr")},
    "smoothing": _Entry(*_NUMBER, "rounding of kinks"),
    "solution": _Entry(*_LIKE_IT, "last step"),
    "largest_curvature": _Entry(*_LIKE_IT, "largest curvature"),
    "diagonal": _Entry(*_LIKE_IT, "Kronecker factors"),
    **{
        name: _Entry(*_FACTOR, "Kronecker factors")
        for name in ("left", "right", "grouped_left", "grouped_right")
    },
    **{
        name: _Entry(*_INTEGER, "layers")
        for name in ("layer_groups", "layer_flipped", "layer_bias")
    },
    **{name: _Entry(*_INTEGER, "counters") for name in ("products", "draws")},
    "sketch": _Entry("a matrix with a row for each of its elements", _has_rows, "sketch"),
    "sketch_values": _Entry("a vector", _has_dimensions(1), "sketch"),
    "sketch_age": _Entry(*_INTEGER, "sketch"),
}
_LIE_LIKE_IT = {name for name, entry in _ENTRIES.items() if entry.holds is _LIKE_IT[1]}
_LIE_LIKE_IT |= {"momentum", "last_step"}
"""Those that are spread over ranks as their parameter is."""
_LIE_IN_ROWS = _LIE_LIKE_IT | {"left", "right", "table"}
"""Those that are spread by rows where the state is to be sharded."""

NAMES = tuple(_ENTRIES)
"""Those of all entries. Any others are the user's, and left alone."""


_FEW = 2**16
"""More parameters than this are seldom solved for directly, with a largest curvature, unless one says so."""

# Made in full.


def complete_state(
    state: MutableMapping[Any, dict[str, Any]],
    parameters: FlatParameters,
    settings: Settings,
    mesh: Any = None,
) -> None:
    """Give each parameter the entries that it does not have, empty.

    Args:
        state: the optimizer's.
        parameters: of a step.
        settings: of that step.
        mesh: over which the state of parameters is spread that are whole themselves; None: over none.
    """
    known: dict[Any, tuple[dict[str, float], list[tuple[str, Any, torch.dtype]]]] = {}
    for p in parameters.params:
        entry, is_first = state[p], p is parameters.params[0]
        key = p.shape, p.dtype, is_first
        if key not in known:  # the same for parameters that are alike, of which there may be many
            numbers = dict(_numbers(settings, is_first=is_first))
            known[key] = numbers, list(_tensors(settings, parameters, p))
        numbers, tensors = known[key]
        for name in numbers.keys() - entry.keys():
            entry[name] = numbers[name]
        for name, shape, dtype in tensors:
            if name not in entry:
                entry[name] = make_empty(name, shape, dtype, p, mesh)


def make_empty(name: str, shape: Sequence[int], dtype: torch.dtype, p: Tensor, mesh: Any) -> Tensor:
    """Zeros with the memory of one, as the entry of this name lies for a parameter."""
    if is_spread(p) and name in _LIE_LIKE_IT:
        return zeros_spread_like(p, dtype)
    if mesh is not None and shape and name in _LIE_IN_ROWS:
        return zeros_in_rows(shape, dtype, mesh)
    return _empty(shape, dtype, p.device)


def give_memory(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A state whose empty tensors can be written to, as ``torch.distributed.checkpoint`` does when it loads."""
    return {
        key: {name: _write(value) for name, value in entry.items()}
        if isinstance(entry, dict)
        else entry
        for key, entry in state.items()
    }


def _write(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    part = local_part(value)
    is_empty = part.numel() > 1 and not any(part.stride())
    return torch.zeros_like(value, memory_format=torch.contiguous_format) if is_empty else value


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros with the memory of one."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def _numbers(settings: Settings, *, is_first: bool) -> Iterator[tuple[str, float]]:
    yield "lr", 0.0
    if is_first:
        yield from (("slope", 0.0), ("new_loss", 0.0), ("smoothing", 1.0))
    if settings.preconditioner in ("auto", "kfac"):
        yield from (("layer_groups", -1), ("layer_flipped", 0), ("layer_bias", -1))
        if is_first:
            yield from (("products", 0), ("draws", 0))
    if is_first and _sketch_columns(settings):
        yield from (("draws", 0), ("sketch_age", -1))


def _tensors(
    settings: Settings, parameters: FlatParameters, p: Tensor
) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    wide = torch.promote_types(p.dtype, torch.float32)
    yield "solution", tuple(p.shape), p.dtype
    scale = settings.damping_scale
    if scale == "diagonal" or (scale == "auto" and parameters.size <= _FEW):
        yield "largest_curvature", tuple(p.shape), p.dtype
    if settings.preconditioner in ("auto", "kfac"):
        for name, shape in KeptFactors.sizes(p).items():
            yield name, shape, wide
    columns = min(_sketch_columns(settings), parameters.size)
    if columns:
        yield "sketch", (real_size(p), columns), parameters.dtype
        if p is parameters.params[0]:
            has_values = isinstance(settings.preconditioner, Nystrom)
            yield "sketch_values", (columns * has_values,), parameters.dtype


def _sketch_columns(settings: Settings) -> int:
    kind = settings.preconditioner
    if isinstance(kind, Nystrom):
        return kind.rank
    return int(kind == "diagonal" or isinstance(kind, Diagonal))


# Loaded.


def check_state(state: MutableMapping[Any, Any], params: Sequence[Tensor]) -> None:
    """Check a state that was saved before it takes the place of another; what is not finite is dropped from it.

    Entries that are not of this optimizer are left alone.

    Args:
        state: by parameter.
        params: all of the optimizer's.

    Raises:
        ValueError: an entry is not what it must be, or was saved of parameters of other shapes.
    """
    own = [p for p in params if p in state]
    for p in own:
        if not isinstance(state[p], dict):
            raise ValueError(
                f"the state of a parameter must be a dict of its entries, got {show(state[p])}"
            )
    _spread_rates(state, own)
    lost: set[str] = set()
    for p in own:
        for name, allowed in _ENTRIES.items():
            value: Any = state[p].get(name)
            if is_absent(value):
                state[p].pop(name, None)
                continue
            if not allowed.holds(value, p):
                is_tensor = isinstance(value, Tensor)
                got = tuple(value.shape) if is_tensor else show(value)
                why = (
                    "was saved of other parameters"
                    if is_tensor
                    else "is broken, or of other parameters"
                )
                raise ValueError(
                    f"this state cannot be loaded, it {why}: one of shape {tuple(p.shape)} had {got} as "
                    f"{name!r}, which must be {allowed.words}"
                )
            require_own_part(value)
            if isinstance(value, Tensor) and not is_spread(value) and not value.any():
                state[p][name] = _empty(value.shape, value.dtype, value.device)
            if not _is_finite(value):
                lost.add(allowed.part_of)
    for part in sorted(lost):
        logger.warning(
            "the loaded state has numbers that are not finite in its %s, which is dropped and found anew",
            part,
        )
        for p in own:
            for name, allowed in _ENTRIES.items():
                if allowed.part_of == part:
                    state[p].pop(name, None)


def require_own_part(value: Any) -> None:
    """Check that what was loaded has the part of this rank.

    Raises:
        ValueError: it has that of another one.
    """
    if not is_of_this_rank(value):
        raise ValueError(
            "this state has the part of another rank: each saves its own; save and load by "
            "torch.distributed.checkpoint, or one file for each rank"
        )


def join_keys(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A saved state by index, where ``dcp.load`` has put tensors at ``0`` and numbers at ``"0"``."""
    joined = dict(state)
    for key in state:
        if isinstance(key, str) and key.isdecimal() and isinstance(state.get(int(key)), dict):
            joined[int(key)] = joined[int(key)] | joined.pop(key)
    return joined


def refuse_complex_for_real(state: Mapping[Tensor, Any]) -> None:
    """Refuse a saved state whose imaginary parts torch would drop.

    Raises:
        ValueError: it has complex tensors for a real parameter.
    """
    for p, entry in state.items():
        values = entry.values() if isinstance(entry, Mapping) else ()
        if any(isinstance(v, Tensor) and v.is_complex() for v in values) and not p.is_complex():
            raise ValueError(
                f"this state cannot be loaded, it was saved of a complex parameter of shape {tuple(p.shape)}, "
                f"and this one is real ({p.dtype}); make it complex, or begin without a state"
            )


def keep_precision(
    state: Mapping[Any, dict[str, Any]], saved: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Undo that torch gave all tensors the dtype of their parameter, which is too coarse for some.

    Args:
        state: by parameter, as torch has loaded it.
        saved: what was loaded.
    """
    widest = torch.float32
    for p in saved:
        widest = torch.promote_types(widest, p.dtype.to_real())
    for p, entry in saved.items():
        for name, value in state.get(p, {}).items():
            part = _ENTRIES[name].part_of if name in _ENTRIES else ""
            dtype = widest if part == "sketch" else p.dtype
            if name in KeptFactors.names:
                dtype = torch.promote_types(p.dtype, torch.float32)
            if isinstance(value, Tensor) and value.dtype != dtype:
                wide = entry[name].to(value.device, dtype)
                state[p][name] = (
                    wide
                    if is_spread(wide) or value.any()
                    else _empty(value.shape, dtype, value.device)
                )


def is_absent(value: Any) -> bool:
    """Flat distributed checkpoints give an empty dict for what was not saved."""
    return value is None or (isinstance(value, dict) and not value)


def _is_finite(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return math.isfinite(value)
    return bool(local_part(value).isfinite().all())


def _spread_rates(state: Mapping[Any, dict[str, Any]], own: Sequence[Tensor]) -> None:
    """Version 0.1.0 kept the rates of all parameters in a list of the first."""
    stepped = [state[p] for p in own if "solution" in state[p]]
    for entry in stepped:
        rates = entry.get("lr")
        if isinstance(rates, list) and all(
            _is_number(rate, p) for rate, p in zip(rates, own, strict=False)
        ):
            del entry["lr"]
            if len(rates) == len(stepped):
                for other, rate in zip(stepped, rates, strict=True):
                    other["lr"] = rate
