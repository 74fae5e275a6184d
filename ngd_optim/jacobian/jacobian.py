"""The Jacobian of a model's outputs.

The pull-back of ``u = 1`` sums the rows of all samples. At the nodes where it sums, which are the
:mod:`~ngd_optim.jacobian.contractions`, its terms ``lₙ rₙᵀ`` still have them apart: those that
belong to one sample make that sample's row. A second pull-back tells which sample that is:
``u = w``, another weight for each sample, multiplies ``lₙ`` by the sample's weight. It does not
matter how the outputs are computed: by layers, by ``torch.func``, or with derivatives in them. At
the parameters the second pull-back is ``rowsᵀ w``, which checks the rows. Parameters that fail
are pulled back row by row.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ngd_optim.autograd_graph import Edge
from ngd_optim.jacobian.contractions import Contraction, contractions_of, shape_of
from ngd_optim.parameters import FlatParameters
from ngd_optim.real_parts import real_parts, real_shape
from ngd_optim.torch_internals import outputs_of, variable_of

logger = logging.getLogger("ngd_optim")

_FEW_ROWS = 32
"""So many rows of an output are sooner pulled back than told apart."""

_ROWS_AT_ONCE = 32
"""So many are pulled back together: each has the memory of a backward pass."""

_FEW_BYTES = 2**27
"""So large a Jacobian is no burden beside what a step holds anyway."""

_LARGE_MATRIX = 1024
"""Elements. Larger products are written in place; torch is slow at that for many small ones."""


def jacobian(outputs: Sequence[Tensor], parameters: FlatParameters) -> Tensor:
    """``∂z/∂θ``, shape (output elements, n), rows in the order of the flattened outputs."""
    rows, blocks = _zero_rows(outputs, parameters)
    slow: set[int] = set()
    for z, block in zip(outputs, blocks, strict=True):
        unknown = _fill_quickly(block, z, parameters)
        _fill_by_rows(block, z, parameters, unknown)
        slow.update(unknown)
    if slow:
        logger.info(
            "the Jacobian is pulled back row by row for %d of %d parameters: they do not meet the "
            "samples in matrix products or by broadcasting, or samples share more than parameters",
            len(slow),
            len(parameters.tensors),
        )
    return rows


def compute_cheap_jacobian(outputs: Sequence[Tensor], parameters: FlatParameters) -> Tensor | None:
    """The same where it is small and takes a few pull-backs; else None."""
    count = sum(z.numel() for z in outputs)
    if count * parameters.size * parameters.dtype.itemsize > _FEW_BYTES:
        return None
    rows, blocks = _zero_rows(outputs, parameters)
    for z, block in zip(outputs, blocks, strict=True):
        is_vector = z.numel() <= _FEW_ROWS or z.shape[1:].numel() == 1
        if not is_vector or _fill_quickly(block, z, parameters):
            return None
    return rows


def _zero_rows(
    outputs: Sequence[Tensor], parameters: FlatParameters
) -> tuple[Tensor, Sequence[Tensor]]:
    """Those of all outputs, and views of each output's own."""
    sizes = [z.numel() for z in outputs]
    shape = sum(sizes), parameters.size
    rows = torch.zeros(shape, dtype=parameters.dtype, device=parameters.device)
    return rows, rows.split(sizes)


class _Term(NamedTuple):
    """A contraction, its ``l`` at some ``u``, and which samples its terms belong to.

    The places are (samples, k), with one past the last where there is no term. They are None if
    each of the samples has one term, in order.
    """

    contraction: Contraction
    back: Tensor
    samples: slice
    places: Tensor | None


class _Measured(NamedTuple):
    """The terms that belong to one sample each, and another pull-back, which checks the rows."""

    samples: int
    terms: list[_Term]
    is_complete: bool
    u: Tensor
    pulled: Tensor


@torch.no_grad()
def _fill_quickly(block: Tensor, z: Tensor, parameters: FlatParameters) -> list[int]:
    """Write to rows that are zero; returns the indexes of the parameters that are still unknown."""
    everything = list(range(len(parameters.tensors)))
    if z.numel() <= _FEW_ROWS:
        _fill_by_rows(block, z, parameters, everything)
        return []
    # Where parameters meet data: the nodes that sum over samples.
    contractions = contractions_of(z, {id(p): i for i, p in enumerate(parameters.tensors)})
    measured = None
    # Each element may be a sample, or all those whose first indexes agree are of one sample.
    sizes = dict.fromkeys(z.shape[:count].numel() for count in range(z.ndim, 0, -1))
    for samples in sizes if contractions else ():
        if samples > 1 and not (measured and measured.is_complete):
            measured = _measure(z, samples, contractions, parameters)
    if measured is None or not measured.terms:
        return everything
    components = z.numel() // measured.samples
    rows = block.view(measured.samples, components, -1)
    terms = measured.terms  # at u = 1 where a sample has one component: those of its row
    for component in range(components):
        if components > 1:
            u = torch.zeros(measured.samples, components, dtype=z.dtype, device=z.device)
            u[:, component] = 1
            at_u, _ = _pull_back(z, [term.contraction for term in measured.terms], u.view(z.shape))
            terms = [
                term._replace(back=term.contraction.factors.back(gradient))
                for term, gradient in zip(measured.terms, at_u, strict=True)
                if gradient is not None
            ]
        _add_rows(rows[:, component], terms, parameters)
    return _wrong(block, z, measured, parameters)


def _measure(
    z: Tensor, samples: int, contractions: Sequence[Contraction], parameters: FlatParameters
) -> _Measured:
    """Pull back ``u = c`` and ``u = w c``, with a weight ``w`` for each sample."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    components = z.numel() // samples
    c = torch.ones(components, dtype=torch.float64, device="cpu")
    if components > 1:  # they may cancel, hence random coefficients
        c = torch.randn(components, generator=generator, dtype=torch.float64, device="cpu")
    weights, sample_at = _draw_weights(samples, generator, z)

    def spread(weights: Tensor) -> Tensor:
        return torch.outer(weights, c.to(z)).view(z.shape)

    u = spread(weights)
    at_c, _ = _pull_back(z, contractions, spread(torch.ones_like(weights)))
    at_u, pulled = _pull_back(z, contractions, u, parameters.tensors)
    terms, is_complete = [], True
    for contraction, own, weighted in zip(contractions, at_c, at_u, strict=True):
        if own is None or weighted is None:
            continue  # the output does not depend on it
        back = contraction.factors.back(own)
        found = _find_samples(back, contraction.factors.back(weighted), weights, sample_at)
        if found is None:
            is_complete = False
        else:
            terms.append(_Term(contraction, back, *found))
    if any(term.places is not None for term in terms):
        # Weights that found the places of single terms cannot check them: others do.
        u = spread(_draw_weights(samples, generator, z)[0])
        _, pulled = _pull_back(z, (), u, parameters.tensors)
    return _Measured(samples, terms, is_complete, u, parameters.flatten(pulled))


def _draw_weights(count: int, generator: torch.Generator, z: Tensor) -> tuple[Tensor, Tensor]:
    """A weight for each sample, and the sample at each point of the grid on which they are.

    No weight is the mean of others, as one of evenly spaced numbers is.
    """
    sample_at = torch.randperm(count, generator=generator, device="cpu")
    jitter = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu") / 2 - 0.25
    weights = torch.empty_like(jitter)
    weights[sample_at] = 1 + (torch.arange(count, device="cpu") + jitter) / count
    return weights.to(z), sample_at.to(z.device)


def _pull_back(
    z: Tensor, contractions: Sequence[Contraction], u: Tensor, params: Sequence[Tensor] = ()
) -> tuple[list[Tensor | None], Sequence[Tensor | None]]:
    """The gradients at contractions and at parameters."""
    nodes = list(dict.fromkeys(contraction.node for contraction in contractions))
    inputs: Any = [*(GradientEdge(node, 0) for node in nodes), *params]
    gradients = torch.autograd.grad(z, inputs, u, retain_graph=True, allow_unused=True)
    at = dict(zip(nodes, gradients, strict=False))
    return [at[contraction.node] for contraction in contractions], gradients[len(nodes) :]


def _find_samples(
    own: Tensor, weighted: Tensor, weights: Tensor, sample_at: Tensor
) -> tuple[slice, Tensor | None] | None:
    """The samples and places of terms at ``c`` and ``w c``; None if one belongs to several samples."""
    length, count = own.shape[1], len(weights)
    own, weighted = (real_parts(t).flatten(2) for t in (own, weighted))
    weights = weights.unsqueeze(1)
    most = torch.finfo(own.dtype).eps ** 0.5 * torch.linalg.vector_norm(weighted)

    def is_right(weights: Tensor) -> bool:
        error = torch.addcmul(weighted, weights, own, value=-1)
        return bool(torch.linalg.vector_norm(error) <= most)

    if not length or (length == count and is_right(weights)):
        return slice(length), None
    squares = own.square().sum((0, 2))
    factors = (own * weighted).sum((0, 2)) / squares.where(squares > 0, 1)
    points = ((factors.double() - 1) * count).round().nan_to_num().clamp(0, count - 1).long()
    sample = sample_at[points]
    # A part of a concatenated output has a run of samples in order: its largest term tells which.
    largest = int(squares.argmax())
    start = int(sample[largest]) - largest
    run = slice(start, start + length)
    if 0 <= start <= count - length and is_right(weights[run]):
        return run, None
    if not is_right(weights[sample]):
        return None
    kept = (squares > 0).nonzero().squeeze(1)
    kept = kept[torch.argsort(sample[kept], stable=True)]
    sample = sample[kept]
    counts = torch.bincount(sample, minlength=count)
    number = torch.arange(len(kept), device=kept.device) - (counts.cumsum(0) - counts)[sample]
    places = torch.full((count, int(counts.max())), length, device=kept.device)
    places[sample, number] = kept
    return slice(count), places


def _add_rows(block: Tensor, terms: Sequence[_Term], parameters: FlatParameters) -> None:
    """Add ``Σ lₙ rₙᵀ`` over the terms of each sample, and pull it back to parameters."""
    columns = block.split(parameters.sizes, 1)
    by_parameter = {id(p): part for p, part in zip(parameters.tensors, columns, strict=True)}
    by_target: dict[Edge, list[_Term]] = {}
    for term in terms:
        by_target.setdefault(term.contraction.target, []).append(term)
    computed: dict[Edge, Tensor] = {}
    for target, own in by_target.items():
        variable = variable_of(target[0])
        is_complex = any(term.back.is_complex() for term in own)
        if variable is not None and not is_complex:
            _add_sums(by_parameter[id(variable)], own)
            continue
        dtype = block.dtype.to_complex() if is_complex else block.dtype
        sums = block.new_zeros(len(block), shape_of(target).numel(), dtype=dtype)
        _add_sums(sums, own)
        if variable is None:
            computed[target] = sums
        else:  # it may be real, and cast
            sums = real_parts(sums).flatten(1) if variable.is_complex() else sums.real
            by_parameter[id(variable)].add_(sums)
    if not computed:
        return
    metadata = [outputs_of(node)[number] for node, number in computed]  # pyright: ignore
    sums = [
        (t if m.dtype.is_complex else t.real).view(len(block), *m.shape).to(m.dtype)
        for t, m in zip(computed.values(), metadata, strict=True)
    ]
    gradients = _pull_rows([GradientEdge(*edge) for edge in computed], sums, parameters.tensors)
    for p, part, gradient in zip(parameters.tensors, columns, gradients, strict=True):
        part.view(len(block), *real_shape(p)).add_(real_parts(gradient))


def _add_sums(block: Tensor, terms: Sequence[_Term]) -> None:
    """The same for one target, (samples, elements)."""
    pairs: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for contraction, back, samples, places in terms:
        _, into, transposed = contraction.factors
        left = _order(back.to(block.dtype), places)
        if into is None:
            block[samples].add_(left[0, :, 0] if left.shape[2] == 1 else left[0].sum(1))
            continue
        right = _order(into().to(block.dtype), places)
        left, right = (right, left) if transposed else (left, right)
        key = (samples.start or 0, *left.shape[:2], left.shape[3], right.shape[3])
        pairs.setdefault(key, []).append((left, right))
    for (start, groups, samples, rows, columns), same in pairs.items():
        left, right = (torch.cat(sides, 2) for sides in zip(*same, strict=True))
        matrices = block[start : start + samples].unflatten(1, (groups, rows, columns))
        if left.shape[2] == 1:  # torch forms many outer products sooner by broadcasting
            matrices.addcmul_(left.movedim(0, 1).mT, right.movedim(0, 1))
        elif rows * columns > _LARGE_MATRIX:
            for i in range(groups):
                torch.baddbmm(matrices[:, i], left[i].mT, right[i], out=matrices[:, i])
        else:
            matrices.add_((left.mT @ right).movedim(1, 0))


def _order(terms: Tensor, places: Tensor | None) -> Tensor:
    """(groups, n, …) → (groups, samples, k, …), with zeros where there are no terms."""
    return terms.unsqueeze(2) if places is None else F.pad(terms, (0, 0, 0, 1))[:, places]


def _wrong(block: Tensor, z: Tensor, measured: _Measured, parameters: FlatParameters) -> list[int]:
    """The indexes of the parameters whose columns are not the Jacobian's."""
    exact = measured.pulled
    # Jᵀ u, from the rows and from autograd: random u, so that no wrong row goes unseen.
    found = block.T @ measured.u.flatten().to(block.dtype)
    parts = torch.stack([found - exact, exact, found]).split(parameters.sizes, 1)
    error, size, filled = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts], 1)
    eps = max(torch.finfo(t.dtype).eps for t in [z, *parameters.tensors])
    # A gradient may be zero but for rounding errors; columns that were not filled are just zero.
    noise = 10 * eps * torch.linalg.vector_norm(exact) * (filled > 0)
    is_right = error <= eps**0.5 * size + noise
    return [i for i, right in enumerate(is_right.tolist()) if not right]


def _fill_by_rows(
    block: Tensor, z: Tensor, parameters: FlatParameters, which: Sequence[int]
) -> None:
    """Pull back unit vectors to some parameters, several at once where torch can."""
    if not which:
        return
    tensors = [parameters.tensors[i] for i in which]
    columns = block.split(parameters.sizes, 1)
    for first in range(0, z.numel(), _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, z.numel() - first)
        u = torch.zeros(count, z.numel(), dtype=z.dtype, device=z.device)
        u[:, first : first + count].fill_diagonal_(1)
        gradients = _pull_rows([z], [u.view(count, *z.shape)], tensors)
        for i, p, gradient in zip(which, tensors, gradients, strict=True):
            rows = columns[i][first : first + count]
            rows.view(count, *real_shape(p)).copy_(real_parts(gradient))


def _pull_rows(outputs: Any, u: Sequence[Tensor], params: Sequence[Tensor]) -> Sequence[Tensor]:
    """The pull-backs of several ``u``, in a dimension ahead; zeros may come without it."""

    def pulled(u: Sequence[Tensor], batched: bool) -> Sequence[Tensor]:
        return torch.autograd.grad(
            outputs, params, u, retain_graph=True, is_grads_batched=batched, materialize_grads=True
        )

    try:
        return pulled(u, True)
    except RuntimeError:  # torch.vmap does not know an operation
        single = [pulled(rows, False) for rows in zip(*u, strict=True)]
        return [torch.stack(parts) for parts in zip(*single, strict=True)]
