"""Parameters as one flat vector, and back."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ngd_optim.layout import is_spread, local_part, spread_like, whole
from ngd_optim.real_parts import from_real_parts, real_parts, real_shape, real_size
from ngd_optim.shown import show
from ngd_optim.torch_internals import copy_all, flatten_dense, keep_versions, unflatten_dense


class FlatParameters:
    """The trainable parameters of some groups, addressed as one vector in the order of the groups.

    Frozen parameters (``requires_grad=False``) are left out. The vector has the widest of the
    parameters' dtypes, and float32 at least; parameters of other dtypes are converted on the way.
    It is real, and has two numbers for each of a complex parameter: nothing else knows of them.
    Of parameters that are spread over ranks it has all elements, on each rank.

    Args:
        groups: the optimizer's.
        weight_of: what the model computes with in place of a parameter; None: with itself.

    Attributes:
        params: the parameters that the optimizer was given: its state is theirs, and ``.grad``.

    Raises:
        TypeError: a parameter is of half precision other than bfloat16.
        ValueError: no parameter is trainable, or they live on several devices.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        weight_of: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        everything = [(i, p) for i, group in enumerate(groups) for p in group["params"]]
        self.positions = [n for n, (_, p) in enumerate(everything) if p.requires_grad]
        """The place of each among all parameters, frozen ones as well."""
        self.params: list[Tensor] = [everything[n][1] for n in self.positions]
        self._groups = [everything[n][0] for n in self.positions]
        if not self.params:
            raise ValueError(
                "there is nothing to optimize: no parameter has requires_grad=True; "
                "thaw some by requires_grad_(True)"
            )
        devices = {p.device for p in self.params}
        if len(devices) > 1:
            raise ValueError(
                f"all parameters must be on one device, got {', '.join(sorted(map(str, devices)))}; move "
                "the model to one of them"
            )
        (self.device,) = devices
        self.dtype = torch.float32
        for p in self.params:
            if p.dtype.to_real() is torch.float16:
                way_out = "complex64" if p.is_complex() else "bfloat16 or float32"
                name = str(p.dtype).removeprefix("torch.")
                raise TypeError(
                    f"{name} parameters are not supported: float16 has too little range for "
                    f"curvature products, and a GradScaler cannot scale them; use {way_out}"
                )
            self.dtype = torch.promote_types(self.dtype, p.dtype.to_real())
        # A flat step would move shared memory twice.
        parts = [local_part(p) for p in self.params]
        places = [part.data_ptr() for part in parts if part.numel()]
        if len(set(places)) < len(places) or any(
            0 in part.stride() and part.numel() > 1 for part in parts
        ):
            raise ValueError(
                "two parameters, or two elements of one, share the same memory; use one Parameter "
                "for both"
            )
        self._weight_of = weight_of
        self._is_spread = any(map(is_spread, self.params))
        self._has_complex = any(p.is_complex() for p in self.params)
        self.sizes = [real_size(p) for p in self.params]
        """How many numbers of the vector each parameter has."""
        starts = itertools.accumulate(self.sizes, initial=0)
        self._odd_pairs = [
            i
            for i, (p, start) in enumerate(zip(self.params, starts, strict=False))
            if start % 2 and p.ndim and p.shape[-1] == 2 and not p.is_complex()
        ]
        self.size = sum(self.sizes)
        """How many numbers the vector has."""

    @cached_property
    def tensors(self) -> list[Tensor]:
        """What the closure is a function of, in the same order."""
        return self.params if self._weight_of is None else [*map(self._weight_of, self.params)]

    @cached_property
    def leaves(self) -> list[Tensor]:
        """Each parameter, and each tensor of the closure, once."""
        return list({id(t): t for t in (*self.params, *self.tensors)}.values())

    @cached_property
    def _converts(self) -> bool:
        return any(is_spread(t) or t.dtype.to_real() != self.dtype for t in self.tensors)

    def flatten(self, tensors: Iterable[Tensor | None]) -> Tensor:
        """One tensor per parameter, of its shape, or None for zeros → a new flat vector.

        Where some are spread over ranks, it is made by all ranks together.
        """
        given = list(tensors)
        for p, t in zip(self.params, given, strict=True):
            if t is not None and t.layout != torch.strided:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} has a sparse gradient; "
                    "sparse gradients are not supported, use Embedding(sparse=False)"
                )
        with torch.no_grad():
            parts = [
                torch.zeros(size, dtype=self.dtype, device=self.device) if t is None else whole(t)
                for size, t in zip(self.sizes, given, strict=True)
            ]
            if self._has_complex:
                parts = [real_parts(part) for part in parts]
            if any(part.dtype != self.dtype for part in parts):
                parts = [part.to(self.dtype) for part in parts]
            return flatten_dense(parts)

    @property
    def key(self) -> tuple[int, ...]:
        """The same for the same parameters in the same order."""
        return tuple(map(id, self.params))

    def views(self, flat: Tensor) -> list[Tensor]:
        """A flat vector → one view of it per parameter, of its shape; (…, 2) of one that is complex."""
        if not self._has_complex:
            return unflatten_dense(flat, self.tensors)
        return [
            part.view(real_shape(t))
            for part, t in zip(flat.split(self.sizes), self.tensors, strict=True)
        ]

    def _complex_where_they_are(self, flat: Tensor) -> list[Tensor]:
        """The same, with the shapes of the parameters: copies of those that are complex."""
        views = self.views(flat)
        if not self._has_complex:
            return views
        return [from_real_parts(t, view) for t, view in zip(self.tensors, views, strict=True)]

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """A flat vector → one tensor per weight, of its shape and dtype; a view where the dtype agrees.

        A copy for ``torch.view_as_complex`` where it must be one: that reads pairs at even places only.
        """
        pieces = self._complex_where_they_are(flat)
        for i in self._odd_pairs:
            pieces[i] = pieces[i].clone()
        if not self._converts and flat.dtype == self.dtype:
            return pieces
        return [
            spread_like(t, piece.to(t.dtype)) for t, piece in zip(self.tensors, pieces, strict=True)
        ]

    def lay_out(self, flat: Tensor) -> list[Tensor]:
        """A flat vector → one tensor per parameter, as it lies over ranks; a view where it is whole."""
        return [
            spread_like(p, piece.to(p.dtype))
            for p, piece in zip(self.params, self._complex_where_they_are(flat), strict=True)
        ]

    def to_state(self, flat: Tensor) -> list[Tensor]:
        """A flat vector → one tensor per parameter, as the optimizer's state has it."""
        return self.lay_out(flat)

    def by_parameter(self, per_group: Sequence[float]) -> list[float]:
        """One value per group → one per parameter."""
        return [float(per_group[i]) for i in self._groups]

    def spread(
        self, per_group: Sequence[float], where: Sequence[bool] | None = None
    ) -> float | Tensor:
        """One value per group → the flat vector that has it at the group's parameters, and 0 where ``where`` is False.

        A plain number stands for a constant vector.
        """
        flags = [True] * len(self.tensors) if where is None else where
        values = [
            value * flag for value, flag in zip(self.by_parameter(per_group), flags, strict=True)
        ]
        return self.repeat(values)

    def repeat(self, values: Sequence[float]) -> float | Tensor:
        """One value per parameter → the flat vector that has it at the parameter's elements, or a number."""
        if len(set(values)) == 1:
            return values[0]
        repeats = torch.tensor(self.sizes, device=self.device)
        return torch.tensor(values, dtype=self.dtype, device=self.device).repeat_interleave(
            repeats, output_size=self.size
        )

    def read(self) -> Tensor:
        """The values, flat: a copy."""
        # Weights of mixed precision are rounded.
        exact = all(t.dtype == p.dtype for t, p in zip(self.tensors, self.params, strict=True))
        return self.flatten(self.tensors if exact else self.params)

    def keep(self, theta: Tensor | None) -> Callable[[], None]:
        """What sets the values to what they are now, ``theta`` if that is known; of parts it keeps this rank's."""
        if not self._is_spread:
            values = self.read() if theta is None else theta
            return lambda: self.write(values)
        parts = [local_part(p.detach()) for p in self.params]
        kept = [part.clone() for part in parts]
        return lambda: copy_all(parts, kept)

    @torch.no_grad()
    def move(self, start: Tensor, step: Tensor, fraction: float) -> None:
        """Set the values to ``start + fraction · step``."""
        self.write(torch.add(start, step, alpha=fraction))

    @contextmanager
    def displaced(self, start: Tensor, step: Tensor, fraction: float) -> Iterator[None]:
        """Have the values ``start + fraction · step`` in the block, and ``start`` again after it.

        Autograd's graphs at ``start`` stay valid.
        """
        with keep_versions(self.tensors):
            self.move(start, step, fraction)
            try:
                yield
            finally:
                self.write(start)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Set the values, bit for bit."""
        pieces = self._complex_where_they_are(values)
        if not (self._is_spread or self._has_complex):
            copy_all(self.tensors, pieces)
            return
        for targets in (self.params, self.tensors):
            for target, piece in zip(targets, pieces, strict=True):
                place = local_part(target)
                if place.untyped_storage().size():  # else it was given up
                    place.copy_(local_part(spread_like(target, piece)))


def name_parameters(params: Iterable[Any]) -> tuple[FlatParameters, list[str]]:
    """The trainable ones of some tensors, or of pairs of a name and a tensor, and their names.

    Raises:
        TypeError: there is something else.
        ValueError: none is trainable, or they live on several devices.
    """
    if isinstance(params, nn.Module | Tensor):
        raise TypeError(
            "params must be tensors, or pairs of a name and a tensor, such as "
            f"model.named_parameters(), got a {type(params).__name__}"
        )
    pairs = [p if isinstance(p, tuple) else (f"params[{i}]", p) for i, p in enumerate(params)]
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[1], Tensor):
            raise TypeError(
                "params must be tensors, or pairs of a name and a tensor, such as "
                f"model.named_parameters(), got {show(pair[-1])}"
            )
    parameters = FlatParameters([{"params": [p for _, p in pairs]}])
    return parameters, [name for name, p in pairs if p.requires_grad]


def forget(state: Mapping[Any, Any], names: Sequence[str]) -> None:
    """Take entries out of the state of every parameter. Users keep other things there as well."""
    for p, entry in state.items():
        if isinstance(p, Tensor):
            for name in names:
                entry.pop(name, None)
