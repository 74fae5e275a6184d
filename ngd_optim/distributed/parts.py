"""Vectors of which each rank has a part: the optimizer's own, where the parameters are many.

They are added, multiplied and compared as whole ones are, each rank its own part. A dot product, a
norm or a question about all elements is asked of all ranks, and answered on each by the same plain
tensor. Anything else is refused, so that no part is taken for the whole.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ngd_optim.layout import is_spread, local_part, mesh_of, spread_part_like, spread_rows, whole
from ngd_optim.parameters import FlatParameters
from ngd_optim.real_parts import from_real_parts, real_parts, real_shape, real_size

# Their names since torch 2.13, which warns of the former ones.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SCATTER = "reduce_scatter_single" if hasattr(dist, "all_gather_single") else "reduce_scatter_tensor"


class Part(Tensor):
    """What this rank has of a vector. Rows that only pad it are zero, or multiplied by zeros."""

    group: Any

    @classmethod
    def of(cls, local: Tensor, group: Any) -> "Part":
        """The same memory as a part."""
        part = local.as_subclass(cls)
        part.group = group
        return part

    @property
    def local(self) -> Tensor:
        """Its numbers, as a plain tensor with the same memory."""
        return _plain(self)

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.__name__.strip("_")
        if name not in (*_OF_ALL, *_BY_ELEMENT, *_ABOUT):
            raise TypeError(
                f"{func.__name__} needs the whole vector, and each rank has a part of it"
            )
        named = kwargs or {}
        group = next(v.group for v in [*args, *named.values()] if isinstance(v, Part))
        plain, named = [_plain(v) for v in args], {k: _plain(v) for k, v in named.items()}
        if name in _OF_ALL:
            return _OF_ALL[name](group, *plain, **named)
        result = func(*plain, **named)
        if not isinstance(result, Tensor) or name in _ABOUT:
            return result
        if func.__name__.endswith("_") and not func.__name__.endswith("__"):
            return args[0]  # it was written to
        return cls.of(result, group)


def _plain(value: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor) if isinstance(value, Part) else value


def _sum(group: Any, value: Tensor, op: Any = None) -> Tensor:
    total = value.clone()
    dist.all_reduce(total, op or dist.ReduceOp.SUM, group=group)
    return total


def _all(group: Any, value: Tensor) -> Tensor:
    return _sum(group, value.all().int(), dist.ReduceOp.MIN).bool()


def _norm(group: Any, value: Tensor, p: Any = "fro", **options: Any) -> Tensor:
    if p != "fro" or any(options.values()):
        raise TypeError("of a vector in parts there is the Euclidean norm alone")
    return _sum(group, torch.dot(value, value)).sqrt()


def _max(group: Any, value: Tensor) -> Tensor:
    each = value.new_zeros(dist.get_world_size(group))
    each[dist.get_rank(group)] = value.max()
    return _sum(group, each).max()  # of one that is NaN, NaN


_OF_ALL: dict[str, Callable[..., Tensor | bool]] = {
    "dot": lambda group, a, b: _sum(group, torch.dot(a, b)),
    "norm": _norm,
    "max": _max,
    "all": _all,
    "any": lambda group, v: _sum(group, v.any().int(), dist.ReduceOp.MAX).bool(),
    "equal": lambda group, a, b: bool(_all(group, (a == b))),
    "allclose": lambda group, a, b, **options: bool(_all(group, torch.isclose(a, b, **options))),
}
_BY_ELEMENT = {
    *(
        "abs",
        "clamp",
        "div",
        "lerp",
        "maximum",
        "minimum",
        "mul",
        "nan_to_num",
        "neg",
        "reciprocal",
    ),
    *("add", "addcmul", "rsqrt", "sqrt", "square", "sub", "where", "truediv"),
    *("radd", "rdiv", "rmul", "rsub", "rtruediv"),
    *("eq", "ge", "gt", "isfinite", "le", "lt", "ne"),
    *("clone", "detach", "full_like", "to", "zero", "zeros_like"),
}
_ABOUT = {"get", "len", "dim", "size", "numel", "element_size", "data_ptr", "is_floating_point"}
"""What tells of a vector and not of its elements; attributes are got."""


class Division:
    """How vectors of all elements are divided over the ranks of a group.

    Each rank has as many rows of each parameter, as ``fully_shard`` has it; what is missing at the
    end is padded. Of parameters that lie otherwise (tensor parallel, replicas) each rank has as many
    elements.

    Args:
        params: what the vectors are for.
        group: the process group.
        mesh: the same as a mesh, if it was made.

    Attributes:
        follows_shards: whether the parameters lie in the same way.
        has_rows: whether all have their rows divided, but those that have none.
    """

    def __init__(self, params: Sequence[Tensor], group: Any, mesh: Any = None) -> None:
        self.group = group
        self._params = params
        self._mesh = mesh
        self._world, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self.follows_shards = all(has_rows_of(p, group) for p in params)
        self.has_rows = all(has_rows_of(p, group) or not is_spread(p) for p in params)
        shapes = [
            (len(p), real_size(p) // max(1, len(p)))
            if self.has_rows and p.ndim
            else (real_size(p), 1)
            for p in params
        ]
        rows = [-(-rows // self._world) for rows, _ in shapes]
        self.lengths = [n * width for n, (_, width) in zip(rows, shapes, strict=True)]
        """How many elements of each parameter a part has, padding included."""
        self.sizes = [rows * width for rows, width in shapes]
        """How many elements each parameter has."""

    @cached_property
    def mesh(self) -> Any:
        """Over which the rows lie."""
        return self._mesh or mesh_of(self.group, self._params[0].device)

    def part(self, flat: Tensor) -> Part:
        """This rank's part of a vector that every rank has."""
        return Part.of(self._padded(flat)[self._rank].clone(), self.group)

    def mean(self, flat: Tensor) -> Part:
        """This rank's part of the mean over the ranks of a vector that each has its own of."""
        total = flat.new_empty(sum(self.lengths))
        getattr(dist, SCATTER)(total, self._padded(flat).view(-1), group=self.group)
        return Part.of(total.div_(self._world), self.group)

    def whole(self, part: Part) -> Tensor:
        """All of it, on every rank."""
        local = part.local
        everything = local.new_empty(self._world * len(local))
        getattr(dist, GATHER)(everything, local, group=self.group)
        columns = everything.view(self._world, -1).split(self.lengths, 1)
        return torch.cat(
            [c.reshape(-1)[:size] for c, size in zip(columns, self.sizes, strict=True)]
        )

    def from_tensors(self, tensors: Iterable[Tensor | None], like: Tensor) -> Part:
        """Of one tensor for each parameter, in rows over the ranks or otherwise; None for zeros."""
        pieces = zip(tensors, self.lengths, self._params, strict=True)
        return Part.of(torch.cat([self._piece(t, n, like) for t, n, _ in pieces]), self.group)

    def to_rows(self, part: Part) -> list[Tensor]:
        """One tensor for each parameter, in rows over the ranks: copies; whole where it has no rows."""
        pieces = part.local.split(self.lengths)
        numbers = self._whole_numbers(part)
        return [
            numbers[i] if i in numbers else self._rows(p, piece)
            for i, (p, piece) in enumerate(zip(self._params, pieces, strict=True))
        ]

    def _piece(self, t: Tensor | None, length: int, like: Tensor) -> Tensor:
        if t is None:
            return like.new_zeros(length)
        if self.has_rows and has_rows_of(t, self.group):
            local = real_parts(local_part(t)).reshape(-1).to(like)
        else:
            local = real_parts(whole(t)).reshape(-1).to(like)[self._rank * length :][:length]
        return F.pad(local, (0, length - local.numel()))

    def _rows(self, p: Tensor, piece: Tensor) -> Tensor:
        count = min(piece.numel(), max(0, real_size(p) - self._rank * piece.numel()))
        part = piece[:count].view(-1, 2) if p.is_complex() else piece[:count]
        part = from_real_parts(p, part).to(p.dtype, copy=True)
        return spread_part_like(p, part) if is_spread(p) else spread_rows(p.shape, part, self.mesh)

    def _whole_numbers(self, part: Part) -> dict[int, Tensor]:
        """By index, parameters without dimensions: by an exchange, if there are any."""
        numbers = [i for i, p in enumerate(self._params) if not p.ndim]
        if not numbers:
            return {}
        pieces = self.whole(part).split(self.sizes)
        pairs = [(i, self._params[i]) for i in numbers]
        return {
            i: from_real_parts(p, pieces[i].view(real_shape(p))).to(p.dtype, copy=True)
            for i, p in pairs
        }

    def _padded(self, flat: Tensor) -> Tensor:
        """One row for each rank."""
        pieces = flat.split(self.sizes)
        return torch.cat(
            [
                F.pad(piece, (0, self._world * n - len(piece))).view(self._world, n)
                for piece, n in zip(pieces, self.lengths, strict=True)
            ],
            1,
        )


def has_rows_of(p: Any, group: Any) -> bool:
    """Whether it lies over the ranks of the group by rows."""
    if not is_spread(p) or p.device_mesh.ndim != 1 or p.device_mesh.get_group() != group:
        return False
    return p.placements[0].is_shard(0) and p.ndim > 0


class ParametersInParts:
    """Parameters as one vector of which each rank has a part.

    It has what a step needs of :class:`~ngd_optim.parameters.FlatParameters`, whose vectors are whole.

    Args:
        parameters: those.
        division: of their vectors.
    """

    def __init__(self, parameters: FlatParameters, division: Division) -> None:
        self._parameters = parameters
        self._division = division
        self.params = parameters.params
        self.dtype, self.device, self.size = parameters.dtype, parameters.device, parameters.size
        self.by_parameter = parameters.by_parameter
        self.positions, self.key = parameters.positions, parameters.key

    def flatten(self, tensors: Iterable[Tensor | None]) -> Tensor:
        """As :meth:`FlatParameters.flatten`."""
        return self._division.from_tensors(
            tensors, torch.empty((), dtype=self.dtype, device=self.device)
        )

    @property
    def mesh(self) -> Any:
        """Over which the rows of the state lie; None where it lies as the parameters do."""
        return self._division.mesh if self._division.has_rows else None

    @property
    def gathers(self) -> bool:
        """Whether :meth:`lay_out` takes all ranks, as parameters that are whole do."""
        return not self._division.follows_shards

    def lay_out(self, flat: Tensor) -> list[Tensor]:
        """As :meth:`FlatParameters.lay_out`."""
        assert isinstance(flat, Part)
        if self.gathers:
            return self._parameters.lay_out(self._division.whole(flat))
        return self._division.to_rows(flat)

    def to_state(self, flat: Tensor) -> list[Tensor]:
        """As :meth:`FlatParameters.to_state`; by rows, where these are divided."""
        assert isinstance(flat, Part)
        return self._division.to_rows(flat) if self._division.has_rows else self.lay_out(flat)

    def spread(
        self, per_group: Sequence[float], where: Sequence[bool] | None = None
    ) -> float | Tensor:
        """As :meth:`FlatParameters.spread`."""
        return self._in_parts(self._parameters.spread(per_group, where))

    def repeat(self, values: Sequence[float]) -> float | Tensor:
        """As :meth:`FlatParameters.repeat`."""
        return self._in_parts(self._parameters.repeat(values))

    def read(self) -> Tensor:
        """As :meth:`FlatParameters.read`."""
        return self._division.part(self._parameters.read())

    @torch.no_grad()
    def move(self, start: Tensor, step: Tensor, fraction: float) -> None:
        """As :meth:`FlatParameters.move`."""
        self.write(torch.add(start, step, alpha=fraction))

    def write(self, values: Tensor) -> None:
        """As :meth:`FlatParameters.write`."""
        assert isinstance(values, Part)
        self._parameters.write(self._division.whole(values))

    def _in_parts(self, value: float | Tensor) -> float | Tensor:
        return self._division.part(value) if isinstance(value, Tensor) else value
