"""Kronecker factors that serve several steps: renewed, inverted, and kept in the optimizer's state.

Each rank has them whole; or, where the step's vectors are in parts, an equal part of each. One rank
then owns each layer: it gathers the layer's factors to invert them, and for each solution the
layer's part of the vector.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ngd_optim.distributed import Ranks
from ngd_optim.jacobian import Layer
from ngd_optim.kronecker.blocks import KroneckerInverse, mean_shift, relative_shift
from ngd_optim.kronecker.factors import KroneckerFactors, Values, pack_factor, unpack_factor
from ngd_optim.kronecker.saved import (
    LAYER,
    TENSORS,
    describe,
    find_sizes_of_factors,
    load_factors,
    names_in_use,
    to_saved,
)
from ngd_optim.layout import is_spread, local_part, spread_like, whole
from ngd_optim.parameters import FlatParameters
from ngd_optim.real_parts import from_real_parts, real_shape

Key = tuple[int, str]


class KeptFactors:
    """Factors that each rank has whole.

    Args:
        parameters: whose factors they are.
        layers: None: not known.
        values: as :class:`KroneckerFactors` has them; not all, if the layers are not known.
    """

    in_parts = False

    names = (*TENSORS, *LAYER, "layer_table")
    """Of all entries of the state."""

    def __init__(
        self,
        parameters: FlatParameters,
        layers: tuple[Layer, ...] | None = None,
        values: Mapping[Key, Tensor] | None = None,
    ) -> None:
        self.parameters = parameters
        self.layers = layers
        self.values = dict(values or {})

    @staticmethod
    def load(
        parameters: FlatParameters, entries: Sequence[Mapping[str, Any]] | None, ranks: Ranks
    ) -> "KeptFactors":
        """Of what the state has for each parameter; None: it has none."""
        if ranks.division is not None and ranks.division.has_rows:
            return OwnedFactors.of_entries(parameters, entries, ranks)
        if entries is None:
            return KeptFactors(parameters)
        own = [_map_tensors(whole, entry) for entry in entries]
        return KeptFactors(parameters, *load_factors(own, parameters.params))

    @staticmethod
    def are_in(parameters: FlatParameters, entries: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the state has those of all parameters."""
        own = [_map_tensors(_shape_of, entry) for entry in entries]
        kept = KeptFactors(parameters, *load_factors(own, parameters.params))
        return kept.layers is not None and kept.fits(kept.layers)

    @staticmethod
    def sizes(p: Tensor) -> dict[str, tuple[int, ...]]:
        """The shapes of what a parameter's state has of them, before there are any."""
        return find_sizes_of_factors(p)

    def fits(self, layers: Sequence[Layer]) -> bool:
        """Whether these are the layers whose factors there are."""
        return KroneckerFactors(tuple(layers), self.values).fits(self.parameters.params)

    def renew(
        self, new: KroneckerFactors, share: float, ranks: Ranks, *, keeps_unseen: bool
    ) -> "KeptFactors":
        """The mean over the ranks of new ones, mixed with a share of these.

        Args:
            new: this rank's, of layers that all ranks have. Its values are taken out.
            share: of the older ones, where they are of the same shape.
            ranks: those that take the step.
            keeps_unseen: keep the layers that ``new`` does not have.
        """
        mean = KroneckerFactors(new.layers, {k: ranks.average(v) for k, v in new.values.items()})
        if keeps_unseen:
            mean = mean.with_layers_of(KroneckerFactors(self.layers or (), self.values))
        return KeptFactors(self.parameters, mean.layers, mean.mix(self.values, share))

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are."""
        return KroneckerFactors((), self.values).is_finite

    def invert(
        self, shift: Tensor | None = None, *, relative: float = 0.0
    ) -> "KroneckerInverse | OwnedInverse":
        """``r ↦ (F + λI)⁻¹ r``.

        Args:
            shift: ``λ`` as a vector of the step, of which each parameter's mean counts.
            relative: without it, ``λ`` is this times the mean eigenvalue of each layer.

        Raises:
            torch.linalg.LinAlgError: their numbers are at the end of the range.
        """
        assert self.layers is not None
        dtype = self.parameters.dtype
        factors = KroneckerFactors(self.layers, {k: v.to(dtype) for k, v in self.values.items()})
        views = None if shift is None else dict(enumerate(self.parameters.views(shift)))
        return _invert(factors, self.parameters, views, relative)

    def entries(self) -> list[dict[str, Any]]:
        """What the state has of them, for each parameter."""
        layers = {layer.weight: layer for layer in self.layers or ()}
        unknown = {"layer_groups": -1 if self.layers is None else 0}
        params = self.parameters.params
        found: list[dict[str, Any]] = [
            describe(layers[i]) if i in layers else dict(unknown) for i in range(len(params))
        ]
        for (i, name), tensor in self._saved(layers):
            dtype = torch.promote_types(params[i].dtype, torch.float32)
            found[i] |= {name: tensor.to(dtype)} | ({"layer_table": 1} if name == "table" else {})
        return found

    def _saved(self, layers: Mapping[int, Layer]) -> Iterator[tuple[Key, Tensor]]:
        for (i, name), value in self.values.items():
            p = self.parameters.params[i]
            for saved, tensor in to_saved(name, value, layers.get(i), p).items():
                yield (i, saved), spread_like(p, tensor) if saved == "diagonal" else tensor


class OwnedFactors(KeptFactors):
    """Factors of which each rank has a part. ``values`` have their shapes, and no numbers."""

    in_parts = True

    def __init__(
        self,
        parameters: FlatParameters,
        layers: tuple[Layer, ...] | None,
        rows: Mapping[Key, Tensor],
        ranks: Ranks,
    ) -> None:
        super().__init__(parameters, layers)
        self._rows, self._ranks = dict(rows), ranks
        self.values = {} if layers is None else self._restore({})

    @classmethod
    def of_entries(
        cls, parameters: FlatParameters, entries: Sequence[Mapping[str, Any]] | None, ranks: Ranks
    ) -> "OwnedFactors":
        """As :meth:`load`."""
        own = [_map_tensors(_shape_of, entry) for entry in entries or ()]
        layers = load_factors(own, parameters.params)[0] if own else None
        if entries is None or layers is None:
            return cls(parameters, None, {}, ranks)
        used = names_in_use(layers, own, parameters.params)
        rows = {(i, name): entries[i][name] for i, names in used.items() for name in names}
        return cls(parameters, layers, rows, ranks)

    def renew(
        self, new: KroneckerFactors, share: float, ranks: Ranks, *, keeps_unseen: bool
    ) -> KeptFactors:
        """As :meth:`KeptFactors.renew`; one reduce-scatter for each factor."""
        layers = {layer.weight: layer for layer in new.layers}
        older = {layer.weight: layer for layer in self.layers or ()}
        unseen = [one for w, one in older.items() if keeps_unseen and w not in layers]
        inside = {i for layer in unseen for i in (layer.weight, layer.bias)}
        rows = {key: t for key, t in self._rows.items() if key[0] in inside}
        for i, name in sorted(new.values):
            layer, value = layers.get(i), new.values.pop((i, name))
            if i in inside:
                continue
            is_known = self.layers is not None and layer == older.get(i)
            for saved, tensor in to_saved(name, value, layer, self.parameters.params[i]).items():
                before = self._rows.get((i, saved)) if is_known else None
                rows[i, saved] = ranks.mean_in_rows(tensor, before, share)
        return OwnedFactors(self.parameters, (*unseen, *new.layers), rows, ranks)

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are, on all ranks."""
        return self._ranks.all(all(local_part(t).isfinite().all() for t in self._rows.values()))

    def invert(self, shift: Tensor | None = None, *, relative: float = 0.0) -> "OwnedInverse":
        """As :meth:`KeptFactors.invert`, of vectors in parts; all ranks together."""
        assert self.layers is not None
        ranks, params = self._ranks, self.parameters.params
        owner = share_layers(self.layers, params, ranks.size)
        found = None if shift is None else ranks.owners(owner).gather(shift)
        keys = list(self._rows)
        like = torch.empty((), dtype=self.parameters.dtype, device=self.parameters.device)
        gathered = ranks.gather_at_owners(
            list(self._rows.values()), [owner[i] for i, _ in keys], like
        )
        values = self._restore({keys[j]: tensor for j, tensor in gathered.items()})
        own = {k: v for k, v in values.items() if not v.is_meta}
        layers = tuple(layer for layer in self.layers if owner[layer.weight] == ranks.rank)
        inverse: KroneckerInverse | None = None
        with suppress(torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
            inverse = _invert(KroneckerFactors(layers, own), self.parameters, found, relative)
        if not ranks.all(inverse is not None) or inverse is None:
            raise torch.linalg.LinAlgError("a rank cannot invert its factors")  # pyright: ignore
        return OwnedInverse(inverse, self.layers, values, self.parameters, owner, ranks)

    def _saved(self, layers: Mapping[int, Layer]) -> Iterator[tuple[Key, Tensor]]:
        yield from self._rows.items()

    def _restore(self, gathered: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """The values that the state stands for; what is not gathered has its shape alone."""
        layers = {layer.weight: layer for layer in self.layers or ()}
        own: list[dict[str, Any]] = [
            describe(layers[i]) if i in layers else {"layer_groups": 0}
            for i in range(len(self.parameters.params))
        ]
        for (i, name), tensor in self._rows.items():
            found = gathered.get((i, name))
            own[i][name] = (
                torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                if found is None
                else from_real_parts(tensor, found.view(real_shape(tensor)))
            )
            own[i] |= {"layer_table": 1} if name == "table" and i in layers else {}
        return load_factors(own, self.parameters.params)[1]


class OwnedInverse:
    """``r ↦ M⁻¹ r`` of vectors in parts: one exchange brings each layer's part of ``r`` to its owner, one back.

    Args:
        inverse: of the factors that this rank owns.
        layers: of all ranks.
        shapes: those of their factors.
        parameters: whose vectors they are.
        owner: the rank of each.
        ranks: all of them.
    """

    def __init__(
        self,
        inverse: KroneckerInverse,
        layers: Sequence[Layer],
        shapes: Values,
        parameters: FlatParameters,
        owner: Sequence[int],
        ranks: Ranks,
    ) -> None:
        self._inverse = inverse
        self._layers = layers
        self._packed = {key: tuple(value.shape) for key, value in shapes.items()}
        self._parameters = parameters
        self._owner, self._ranks = owner, ranks
        self._owners = ranks.owners(owner)

    def __call__(self, r: Tensor) -> Tensor:
        """The solution, in parts."""
        tensors = self._parameters.params
        sources = {i: v.view(real_shape(tensors[i])) for i, v in self._owners.gather(r).items()}
        targets = {i: torch.empty_like(v) for i, v in sources.items()}
        self._inverse.solve(sources, targets)
        return self._owners.spread(targets, r)

    def pairs_on_all_ranks(self) -> dict[Layer, tuple[Tensor, Tensor]]:
        """As :attr:`KroneckerInverse.pairs`, whole on each rank: two broadcasts for each layer."""
        found: dict[Layer, tuple[Tensor, Tensor]] = {}
        for layer in self._layers:
            own = self._inverse.pairs.get(layer, (None, None))
            left, right = (
                self._from_owner(layer, name, side)
                for name, side in zip(("left", "right"), own, strict=True)
            )
            found[layer] = left, right
        return found

    def _from_owner(self, layer: Layer, name: str, own: Tensor | None) -> Tensor:
        packed = (
            torch.empty(
                self._packed[layer.weight, name],
                dtype=self._parameters.dtype,
                device=self._parameters.device,
            )
            if own is None
            else pack_factor(own)
        )
        return unpack_factor(self._ranks.from_rank(packed, self._owner[layer.weight]))


def share_layers(layers: Sequence[Layer], params: Sequence[Tensor], ranks: int) -> list[int]:
    """For each parameter the rank that owns it: equal shares of the work of inverting."""
    costs = [float(p.numel()) for p in params]
    for layer in layers:
        groups, rows, columns = layer.shape(params)
        costs[layer.weight] = float(groups * (rows**3 + columns**3))
        if layer.bias is not None:
            costs[layer.bias] = 0.0
    owner = Ranks.share_out(costs, ranks)
    for layer in layers:
        if layer.bias is not None:
            owner[layer.bias] = owner[layer.weight]
    return owner


def _invert(
    factors: KroneckerFactors,
    parameters: FlatParameters,
    shift: Mapping[int, Tensor] | None,
    relative: float,
) -> KroneckerInverse:
    found = relative_shift(factors, relative) if shift is None else mean_shift(shift)
    return KroneckerInverse(factors, parameters, found)


def _map_tensors(function: Callable[[Tensor], Tensor], entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: function(v) if name in TENSORS else v for name, v in entry.items()}


def _shape_of(tensor: Tensor) -> Tensor:
    """What stands for a tensor that may lie over ranks."""
    if not is_spread(tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
