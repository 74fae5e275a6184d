"""Properties of aten operations."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngd_optim.torch_internals import schema_of

_TAGS = torch.Tag
# The shape of the result depends on values, but of the index or mask, not of what is indexed.
_BY_CONSTANTS = {torch.ops.aten.index.Tensor, torch.ops.aten.masked_select.default}

_UNMARKED_VIEWS = {torch.ops.aten._unsafe_view.default}

STATISTICS: dict[Any, tuple[int, int, int]] = {
    operation.default: (3, 4, 5)
    for operation in (
        torch.ops.aten.native_batch_norm,
        torch.ops.aten.cudnn_batch_norm,
        torch.ops.aten.miopen_batch_norm,
    )
}
"""Operations that change running statistics, which their schema hides.

Where these are among the arguments, and then whether they change.
"""


class Facts(NamedTuple):
    """Properties of an aten overload.

    Attributes:
        in_place: it writes to an argument.
        written: the arguments that it writes to, each its index and name.
        pointwise: each element of the result depends on the same element of the arguments only.
        random: it draws random numbers.
        shares_memory: what it gives lies in an argument's memory.
        asks_about_shapes: it gives no tensor, and nothing that depends on values.
        looks_at_shapes_only: it gives new tensors, whose values do not depend on its arguments'.
        replayable: it does the same for other values of its arguments (of the first, if
            ``by_constants``).
        has_statistics: it is one of :data:`STATISTICS`.
        by_constants: the shape of its result depends on the values of all arguments but the first.
    """

    in_place: bool
    written: tuple[tuple[int, str], ...]
    pointwise: bool
    random: bool
    shares_memory: bool
    asks_about_shapes: bool
    looks_at_shapes_only: bool
    replayable: bool
    has_statistics: bool
    by_constants: bool


_FOUND: dict[int, tuple[Any, Facts]] = {}


def facts(func: Any) -> Facts:
    """What is known of an aten overload."""
    # Looked up at each call of each operation of a recorded function.
    found = _FOUND.get(
        id(func)
    )  # an overload's own hash is computed in Python, and takes longer than all of this
    if found is None:
        found = _FOUND[id(func)] = func, _facts(func)
    return found[1]


def _facts(func: Any) -> Facts:
    reads_values, random = (
        _TAGS.data_dependent_output in func.tags,
        _TAGS.nondeterministic_seeded in func.tags,
    )
    schema = schema_of(func)
    in_place, gives_tensors = (
        schema.is_mutable,
        any("Tensor" in str(r.type) for r in schema.returns),
    )
    name = func.overloadpacket.__name__
    return Facts(
        in_place=in_place,
        written=tuple(
            (index, argument.name)
            for index, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ),
        pointwise=_TAGS.pointwise in func.tags,
        random=random,
        shares_memory=func.is_view or _TAGS.inplace_view in func.tags or func in _UNMARKED_VIEWS,
        asks_about_shapes=not (gives_tensors or reads_values or in_place),
        looks_at_shapes_only=name.endswith("_like") or name.startswith("new_"),
        replayable=not (reads_values or random or _TAGS.dynamic_output_shape in func.tags),
        has_statistics=func in STATISTICS,
        by_constants=func in _BY_CONSTANTS,
    )


def find_written(fact: Facts, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that a call of the operation with these facts writes to."""
    written: list[Tensor] = []
    for index, name in fact.written:
        value = args[index] if index < len(args) else kwargs.get(name)
        tensors = value if isinstance(value, (list, tuple)) else (value,)
        written += [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    return written


def tensors_of(result: Any) -> list[tuple[int | None, Tensor]]:
    """The tensors that an operation gave, each with its index in the result, or None where that is one tensor."""
    if isinstance(result, Tensor):
        return [(None, result)]
    if isinstance(result, (list, tuple)):
        return [(index, value) for index, value in enumerate(result) if isinstance(value, Tensor)]
    return []


@cache
def find_out_variant(function: Any) -> tuple[Any, str] | None:
    """The overload that writes its result to a given tensor, and that argument's name."""
    # mul.Tensor(self, other) has mul.out(self, other, *, out): same arguments and one more.
    packet = function.overloadpacket
    wanted = [(a.name, str(a.type)) for a in schema_of(function).arguments]
    for name in packet.overloads():
        overload = getattr(packet, name)
        arguments = schema_of(overload).arguments
        outs = [a.name for a in arguments if a.is_out]
        if len(outs) == 1 and [(a.name, str(a.type)) for a in arguments if not a.is_out] == wanted:
            return overload, outs[0]
    return None
