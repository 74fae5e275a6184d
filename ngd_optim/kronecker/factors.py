"""Kronecker factors of the curvature: added, averaged and mixed.

Where a weight's gradient is ``Σₙ lₙ rₙᵀ`` (see :mod:`~ngd_optim.jacobian.layers`), the curvature's
block for it is nearly ``(Σ l lᵀ) ⊗ (Σ r rᵀ) / n`` (Martens & Grosse 2015; convolutions: Grosse &
Martens 2016; weights that are used several times, "expand": Eschenhagen et al. 2023).
"""

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ngd_optim.distributed import ALONE, Ranks
from ngd_optim.jacobian import Layer
from ngd_optim.linalg import pack, unpack
from ngd_optim.reading import read
from ngd_optim.real_parts import real_shape

Values = Mapping[tuple[int, str], Tensor]
"""By index of a parameter and name.

For the weight of a layer ``"left"``, a packed matrix with as many rows and columns as the weight
has rows, for each group, and ``"right"``, likewise for its columns; their diagonals, (groups, rows)
or (groups, columns), where they are too large. For what is in no layer ``"diagonal"``, shaped like
the parameter's real parts.
"""


@dataclass(frozen=True)
class KroneckerFactors:
    """Factors of the blocks of weights, and diagonals for all other parameters."""

    longest: ClassVar[int] = 4096
    """A longer side of a weight has only the diagonal of its factor."""

    layers: tuple[Layer, ...]
    values: dict[tuple[int, str], Tensor]

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are."""
        # The host waits once for all: such factors are not mixed with the older ones.
        return all(read(*(value.isfinite().all() for value in self.values.values())))

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Whether they are of some parameters: of their shapes, and of all that are in no layer."""
        shapes: dict[tuple[int, str], tuple[int, ...]] = {}
        for layer in self.layers:
            groups, rows, columns = layer.shape(params)
            shapes |= {
                (layer.weight, "left"): (groups, rows),
                (layer.weight, "right"): (groups, columns),
            }
        inside = {i for layer in self.layers for i in (layer.weight, layer.bias)}
        shapes |= {(i, "diagonal"): real_shape(p) for i, p in enumerate(params) if i not in inside}
        return shapes.keys() == self.values.keys() and all(
            _shape(key[1], self.values[key]) == shapes[key] for key in shapes
        )

    def add(self, other: "KroneckerFactors") -> "KroneckerFactors":
        """The sums of the values; of a layer that only one has, its own."""
        layers = {layer.weight: layer for layer in (*other.layers, *self.layers)}
        inside = {i for layer in layers.values() for i in (layer.weight, layer.bias)}
        values: dict[tuple[int, str], Tensor] = {}
        for part in (self, other):
            own = {layer.weight for layer in part.layers if layers[layer.weight] == layer}
            for key, value in part.values.items():
                i, name = key
                if i not in inside if name == "diagonal" else i in own:
                    values[key] = values[key] + value if key in values else value
        return KroneckerFactors(tuple(layers.values()), values)

    def scale(self, factor: float) -> "KroneckerFactors":
        """All values times a number."""
        return KroneckerFactors(self.layers, {key: factor * v for key, v in self.values.items()})

    def normalise(self, known: Collection[Layer], ranks: Ranks = ALONE) -> "KroneckerFactors":
        """With ``trace(L) = trace(R) = √t`` for layers that were not known, whose traces are both ``t``.

        Of several ranks, which have the same layers, ``t`` is the mean.
        """
        values = dict(self.values)
        for layer in self.layers:
            if layer not in known:
                for key in ((layer.weight, "left"), (layer.weight, "right")):
                    trace = ranks.average(trace_of(unpack_factor(values[key])))
                    trace = trace.clamp(min=torch.finfo(trace.dtype).tiny)
                    values[key] = scale_factor(values[key], trace.rsqrt())
        return KroneckerFactors(self.layers, values)

    def with_layers_of(self, older: "KroneckerFactors") -> "KroneckerFactors":
        """With the layers that only older ones have, whose weights were not used this time."""
        missing = {layer.weight for layer in older.layers} - {layer.weight for layer in self.layers}
        if not missing:
            return self
        kept = tuple(layer for layer in older.layers if layer.weight in missing)
        values = {key: older.values[key] for key in older.values if key[0] in missing}
        return KroneckerFactors(kept, values).add(self)

    @staticmethod
    def average(
        estimates: Sequence["KroneckerFactors | None"], ranks: Ranks
    ) -> "KroneckerFactors | None":
        """The mean over closures and ranks; None if they do not use the parameters in the same way."""
        total = KroneckerFactors.agreed(estimates, ranks)
        if total is None:
            return None
        values = {key: ranks.average(value) for key, value in total.values.items()}
        return KroneckerFactors(total.layers, values)

    @staticmethod
    def agreed(
        estimates: Sequence["KroneckerFactors | None"], ranks: Ranks
    ) -> "KroneckerFactors | None":
        """This rank's mean over closures; None if some of these, or of the ranks, use the parameters in another way."""
        total, *others = estimates or (None,)
        for other in others:
            agree = total is not None and other is not None and total.layers == other.layers
            total = total.add(other) if agree else None  # pyright: ignore
        layers = None if total is None else (total.layers, sorted(total.values))
        # Ranks whose graphs differ must not average factors of different layers.
        if not ranks.agree(zlib.crc32(repr(layers).encode())) or total is None:
            return None
        return total.scale(1 / len(estimates)) if others else total

    def mix(self, older: Values, share: float) -> dict[tuple[int, str], Tensor]:
        """The values, with a share of older ones where these have the same shape; they are taken out one by one."""
        values = self.values
        return {key: _mix(values.pop(key), older.get(key), share) for key in list(values)}


def _mix(value: Tensor, older: Tensor | None, share: float) -> Tensor:
    if older is None or older.shape != value.shape:
        return value
    return value.lerp(older.to(value), share)


def _shape(name: str, value: Tensor) -> tuple[int, ...]:
    if name == "diagonal" or value.ndim == 2:
        return tuple(value.shape)
    return len(value), unpack(value[:0]).shape[-1]


def pack_factor(factor: Tensor) -> Tensor:
    """A ``"left"`` or ``"right"`` as it is kept."""
    return pack(factor) if factor.ndim == 3 else factor


def unpack_factor(factor: Tensor) -> Tensor:
    """The matrices of a ``"left"`` or ``"right"``; the diagonals, where it has these alone."""
    return unpack(factor) if factor.ndim == 3 else factor


def trace_of(factor: Tensor) -> Tensor:
    """That of each matrix, or of the diagonals."""
    return factor.sum(-1) if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1).sum(-1)


def scale_factor(factor: Tensor, scale: Tensor) -> Tensor:
    """Each matrix, or its diagonal, times a number of its own."""
    return factor * scale.view(-1, *[1] * (factor.ndim - 1))
