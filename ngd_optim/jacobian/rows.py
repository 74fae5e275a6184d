"""The rows of a Jacobian from a few pull-backs.

The pull-back of ``u = 1`` sums the rows of all samples. At the nodes where it sums, which are the
:mod:`~ngd_optim.jacobian.contractions`, its terms ``l_n r_nᵀ`` still have them apart: those that
belong to one sample make that sample's row. Which sample that is follows from the position of a
term, or is measured: ``u = w``, another weight for each sample, multiplies ``l_n`` by its weight.
It does not matter how the outputs are computed: by layers, by ``torch.func``, or with derivatives
in them. Nothing here checks the rows.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ngd_optim.autograd_graph import leaf
from ngd_optim.jacobian.contractions import Contraction, Edge, contractions_of, shape_of
from ngd_optim.parameters import FlatParameters

_LARGE_MATRIX = 1024
"""Elements. Larger products are written in place; torch is slow at that for many small ones."""


class _Layout(NamedTuple):
    """Which dimensions of an output count its samples, and which the components of a sample."""

    shape: torch.Size
    samples: tuple[int, ...]

    @property
    def components(self) -> tuple[int, ...]:
        return tuple(dim for dim in range(len(self.shape)) if dim not in self.samples)

    @property
    def size(self) -> int:
        return math.prod(self.shape[dim] for dim in self.samples)

    def each_component(self, block: Tensor) -> Iterator[Tensor]:
        """Views (samples, …) of a tensor that is shaped like the output, with any dimensions after."""
        ahead = block.movedim((*self.samples, *self.components), tuple(range(len(self.shape))))
        own = [slice(None)] * len(self.samples)
        for component in product(*(range(self.shape[dim]) for dim in self.components)):
            yield ahead[(*own, *component)].flatten(0, len(own) - 1)


class _Term(NamedTuple):
    """A contraction, and where the terms of each sample are."""

    contraction: Contraction
    where: "_Where | None"


class _Where(NamedTuple):
    """For each sample the places of its terms, (samples, k), and which of these there are."""

    places: Tensor
    exists: Tensor | None

    def order(self, terms: Tensor) -> Tensor:
        """(groups, length, rows) → (groups, samples, k, rows), filled with zeros."""
        ordered = terms[:, self.places]
        return ordered if self.exists is None else ordered * self.exists.unsqueeze(-1)


class OutputRows:
    """Writes the rows of one output.

    Attributes:
        passes: how many pull-backs that takes, one for each component of a sample.
        is_guess: whether the samples were told by position, and not measured.
    """

    def __init__(self, z: Tensor, parameters: FlatParameters, *, may_guess: bool) -> None:
        self._z = z
        self._parameters = parameters
        self._index = {id(p): i for i, p in enumerate(parameters.tensors)}
        self._contractions = contractions_of(z, self._index)
        guess = self._guessed_layout() if may_guess else None
        self.is_guess = guess is not None
        if guess is not None:
            self._layout = guess
            self._terms = [_Term(contraction, None) for contraction in self._contractions]
        else:
            self._layout, self._terms = self._measure()
        self.passes = z.numel() // self._layout.size if self._terms else 0

    @torch.no_grad()
    def fill(self, block: Tensor) -> None:
        """Write to rows that are zero."""
        u = torch.zeros_like(self._z, memory_format=torch.contiguous_format)
        rows = self._layout.each_component(block.view(*self._z.shape, block.shape[1]))
        for own, unit in zip(rows, self._layout.each_component(u), strict=True):
            if not self._terms:
                return
            u.zero_()
            unit.fill_(1)
            self._fill_component(own, self._pull([term.contraction for term in self._terms], u))

    def _guessed_layout(self) -> _Layout | None:
        """That in which each contraction has one term for each sample, in their order."""
        lengths = {contraction.length for contraction in self._contractions}
        for layout in _layouts(self._z.shape):
            if lengths == {layout.size}:
                return layout
        return None

    @torch.no_grad()
    def _measure(self) -> tuple[_Layout, list[_Term]]:
        """The first layout in which each term belongs to one sample; if there is none, the last.

        That has only those contractions of whose terms it is true.
        """
        layout, terms = _Layout(self._z.shape, tuple(range(self._z.ndim))), []
        for layout in _layouts(self._z.shape):
            terms = self._measured(layout)
            if len(terms) == len(self._contractions):
                break
        return layout, terms

    def _measured(self, layout: _Layout) -> list[_Term]:
        z = self._z
        generator = torch.Generator().manual_seed(0)
        components = z.numel() // layout.size
        # The components of a sample may cancel, hence random coefficients.
        coefficients = torch.randn(components, generator=generator, dtype=torch.float64).to(z)
        # No weight is the mean of two others, as one of evenly spaced numbers is.
        weights = torch.linspace(0, 1, layout.size, dtype=torch.float64, device=z.device).exp2()
        ones, weighted = (torch.zeros_like(z, memory_format=torch.contiguous_format) for _ in range(2))
        units = zip(layout.each_component(ones), layout.each_component(weighted), coefficients, strict=True)
        for at_ones, at_weights, coefficient in units:
            at_ones.fill_(coefficient)
            at_weights.copy_(weights * coefficient)
        pulled = zip(self._pull(self._contractions, ones), self._pull(self._contractions, weighted), strict=True)
        terms = []
        for contraction, (at_ones, at_weights) in zip(self._contractions, pulled, strict=True):
            if at_ones is None or at_weights is None:
                terms.append(_Term(contraction, None))  # which the output does not depend on
                continue
            sample = _samples(contraction.back(at_ones), contraction.back(at_weights), weights)
            if sample is not None:
                terms.append(_Term(contraction, _where(sample, layout.size)))
        return terms

    def _pull(self, contractions: Sequence[Contraction], u: Tensor) -> list[Tensor | None]:
        """The gradients at contractions."""
        nodes = list(dict.fromkeys(contraction.node for contraction in contractions))
        if not nodes:
            return []
        edges = [GradientEdge(node, 0) for node in nodes]
        gradients = torch.autograd.grad(self._z, edges, u, retain_graph=True, allow_unused=True)
        at = dict(zip(nodes, gradients, strict=True))
        return [at[contraction.node] for contraction in contractions]

    def _fill_component(self, block: Tensor, gradients: Sequence[Tensor | None]) -> None:
        by_target: dict[Edge, list[tuple[_Term, Tensor]]] = {}
        for term, gradient in zip(self._terms, gradients, strict=True):
            if gradient is not None:
                by_target.setdefault(term.contraction.target, []).append((term, gradient))
        columns = dict(zip(self._index, block.split([p.numel() for p in self._parameters.tensors], 1), strict=True))
        computed: dict[Edge, Tensor] = {}
        for target, own in by_target.items():
            variable = leaf(target[0])
            if variable is None:
                computed[target] = block.new_zeros(len(block), shape_of(target).numel())
            _add_sums(computed[target] if variable is None else columns[id(variable)], own)
        if computed:
            self._pull_to_parameters(computed, list(columns.values()))

    def _pull_to_parameters(self, computed: dict[Edge, Tensor], columns: Sequence[Tensor]) -> None:
        """Add what belongs to tensors that are computed from parameters alone."""
        outputs = [GradientEdge(*edge) for edge in computed]
        metadata = [node._input_metadata[number] for node, number in computed]  # pyright: ignore
        rows = [t.view(len(t), *m.shape).to(m.dtype) for t, m in zip(computed.values(), metadata, strict=True)]
        try:
            gradients = torch.autograd.grad(
                outputs, self._parameters.tensors, rows, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:  # torch.vmap does not know an operation; the check will miss these rows
            return
        for part, gradient in zip(columns, gradients, strict=True):
            if gradient is not None:
                part.add_(gradient.reshape(part.shape))


def _layouts(shape: torch.Size) -> list[_Layout]:
    """From one in which each element is a sample, to those in which one dimension counts them."""
    leading = [tuple(range(count)) for count in range(len(shape), 0, -1)]
    others = [(dim,) for dim in range(1, len(shape))]
    distinct = {tuple(dim for dim in dims if shape[dim] > 1): dims for dims in [*leading, *others]}
    return [_Layout(shape, dims) for large, dims in distinct.items() if large]


def _samples(ones: Tensor, weighted: Tensor, weights: Tensor) -> Tensor | None:
    """For each term its sample, −1 where the term is zero; None if a term belongs to several."""
    ones, weighted = (t.movedim(1, 0).flatten(1) for t in (ones, weighted))
    squares = ones.square().sum(1)
    factors = (ones * weighted).sum(1) / squares.where(squares > 0, 1)
    last = len(weights) - 1
    sample = (factors.double().clamp(1, 2).log2() * last).round().long()
    error = (weighted - weights[sample].to(ones.dtype).unsqueeze(1) * ones).norm()
    if not error <= torch.finfo(ones.dtype).eps ** 0.5 * weighted.norm():
        return None
    return sample.where(squares > 0, -1)


def _where(sample: Tensor, count: int) -> _Where:
    kept = (sample >= 0).nonzero().squeeze(1)
    kept = kept[torch.argsort(sample[kept], stable=True)]
    sample = sample[kept]
    counts = torch.bincount(sample, minlength=count)
    number = torch.arange(len(sample), device=sample.device) - (counts.cumsum(0) - counts)[sample]
    places = sample.new_zeros(count, int(counts.max()))
    places[sample, number] = kept
    if places.numel() == len(kept):
        return _Where(places, None)
    return _Where(places, torch.arange(places.shape[1], device=sample.device) < counts.unsqueeze(1))


def _add_sums(block: Tensor, own: Sequence[tuple[_Term, Tensor]]) -> None:
    """Add ``Σ lₙ rₙᵀ`` over the terms of each sample, (samples, elements of the target)."""
    pairs: dict[tuple[int, int, int], list[tuple[Tensor, Tensor]]] = {}
    for (contraction, where), gradient in own:
        back = _by_sample(contraction.back(gradient).to(block.dtype), where)
        if contraction.into is None:
            block.add_(back[0, :, 0] if where is None else back[0].sum(1))
            continue
        into = _by_sample(contraction.into().to(block.dtype), where)
        left, right = (into, back) if contraction.transposed else (back, into)
        pairs.setdefault((len(left), left.shape[-1], right.shape[-1]), []).append((left, right))
    for (groups, rows, columns), same in pairs.items():
        left, right = (torch.cat(sides, 2) for sides in zip(*same, strict=True))
        matrices = block.unflatten(1, (groups, rows, columns))
        if rows * columns > _LARGE_MATRIX:
            for i in range(groups):
                torch.baddbmm(matrices[:, i], left[i].mT, right[i], out=matrices[:, i])
        else:
            matrices.add_((left.mT @ right).movedim(1, 0))


def _by_sample(terms: Tensor, where: _Where | None) -> Tensor:
    return terms.unsqueeze(2) if where is None else where.order(terms)
