"""Kronecker factors of the curvature, in the mean over closures.

The gradient of a weight is ``Σ l rᵀ`` over the rows of its uses (see :mod:`~ngd_optim.jacobian.layers`).
With ``u`` at the outputs for each column of ``H_z^½``, which have ``Σ u uᵀ = H_z``:

- "expand": ``F ≈ (Σ l lᵀ) ⊗ (Σ r rᵀ) / n``, over all ``n`` rows (Martens & Grosse 2015; Grosse & Martens
  2016; Eschenhagen et al. 2023, section 3.2);
- "reduce": the same over samples, with the sum of a sample's rows on the side of the gradients and their
  mean on the side of the inputs (section 3.3).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ngd_optim.curvature import Graph, OutputMetric
from ngd_optim.factors.batch import Batch
from ngd_optim.factors.curvature import KroneckerCurvature, LayerCurvature
from ngd_optim.jacobian import Layer
from ngd_optim.kernels import twice_differentiable
from ngd_optim.kronecker import KroneckerFactors
from ngd_optim.names import Curvature
from ngd_optim.parameters import FlatParameters, name_parameters
from ngd_optim.real_parts import real_parts
from ngd_optim.shown import show
from ngd_optim.tracing import TracedClosure

logger = logging.getLogger("ngd_optim")

_NOT_FINITE = "use parameters where all is finite; ngd_optim.testing.check_closure tells more"
Sharing = Literal["expand", "reduce"]
_AT_ONCE = 2**24
"""Elements of samples' gradients that are held together."""


def kronecker_factors(
    closures: Any,
    params: Iterable[Any],
    *,
    sharing: Sharing = "expand",
    eigenvalues: bool = False,
    draws: int | None = None,
    curvature: Curvature = "auto",
    generator: torch.Generator | None = None,
) -> KroneckerCurvature:
    """The curvature as Kronecker factors of its layers, of one closure or in the mean over several.

    Layers are found in the graph, whatever code made it: modules, functional calls, attention,
    recurrent cells, convolutions, embeddings. What is in no layer has a diagonal. The memory is that
    of one closure at a time. A penalty on the weights is left out: add it as damping.

    Args:
        closures: a closure, as for :meth:`NaturalCG.step <ngd_optim.NaturalCG.step>`, whose loss is
            recognised or that returns a distribution; or an iterable of closures, which stands for
            the mean; or one of pairs ``(closure, size)``, for the mean in which each counts ``size``
            times: the number of samples, where a loss is their mean. Such a mean over ``N`` samples
            becomes their sum by ``scale(N)``.
        params: parameters, or pairs of a name and a parameter (``model.named_parameters()``), whose
            names the layers have then.
        sharing: how a weight that a sample uses at several positions is treated: ``"expand"``, each
            position counts as a sample; ``"reduce"``, gradients are summed and inputs averaged over
            them. The curvature of embeddings is "expand" always.
        eigenvalues: replace those of the Kronecker products by the exact diagonal in their
            eigenvectors (EKFAC: George et al. 2018), by a second pass over the closures, which must
            compute the same then.
        draws: random vectors per closure, with the metric as covariance, from which the factors are
            estimated. None: none are drawn, and the factors take one pull-back for each number that
            a sample has at the outputs; only the diagonals of what is in no layer are estimated, by
            random signs.
        curvature: as for :func:`~ngd_optim.linearize`; not ``"hessian"``.
        generator: draws. None: one of its own.

    Raises:
        TypeError, ValueError: the arguments do not fit, or the closures offer no such curvature.
        RuntimeError: something is not finite.
        Exception: whatever a closure raises.

    Examples:
        >>> import torch
        >>> from ngd_optim.factors import kronecker_factors
        >>> x, y = torch.randn(100, 3), torch.randint(0, 2, (100,))
        >>> model = torch.nn.Linear(3, 2)
        >>> def on(part):  # a batch of a loader
        ...     return lambda: torch.nn.functional.cross_entropy(model(x[part]), y[part])
        >>> batches = [slice(0, 50), slice(50, 100)]
        >>> F = kronecker_factors([(on(part), 50) for part in batches], model.named_parameters())
        >>> F = F.scale(100)  # of the sum over all samples
        >>> noise = torch.randn(8)
        >>> draw = F.inverse_root(noise, damping=1.0)  # of a Laplace approximation, less its mean
        >>> F.logdet(damping=1.0).shape
        torch.Size([])
    """
    if sharing not in get_args(Sharing):
        raise ValueError(f"sharing must be one of {get_args(Sharing)}, got {show(sharing)}")
    if draws is not None and not (isinstance(draws, int) and draws >= 1):
        raise ValueError(f"draws must be an integer, at least 1, or None, got {show(draws)}")
    parameters, names = name_parameters(params)
    generator = generator or torch.Generator(device="cpu").manual_seed(0)
    sums = _Sums(parameters, names)
    again = _Repeated(closures, is_needed=eigenvalues)

    def visit(work: Callable[[Batch], None]) -> None:
        for closure, size in again:
            sums.size += size * (again.passes == 1)
            with _graph_of(closure, parameters, curvature, puts_back=again.passes > 1) as metric:
                work(Batch(metric, parameters, size, draws, generator))

    visit(lambda batch: sums.add(batch, reduces=sharing == "reduce"))
    blocks, diagonals = sums.finish()
    if eigenvalues:
        values = {layer: torch.zeros_like(b.decomposition[2]) for layer, b in blocks.items()}
        visit(lambda batch: _add_squares(values, blocks, batch))
        blocks = {
            layer: block
            if block.left.ndim == 2 and sums.is_table(layer)
            else replace(block, eigenvalues=values[layer] / sums.size)
            for layer, block in blocks.items()
        }
    return KroneckerCurvature(parameters, blocks, diagonals)


class _Repeated:
    """The closures of an argument, with their sizes, checked one by one.

    Attributes:
        passes: how often they were begun.
    """

    def __init__(self, closures: Any, *, is_needed: bool) -> None:
        self.passes = 0
        self._closures = [closures] if callable(closures) else closures
        if not isinstance(self._closures, Iterable):
            raise TypeError(
                "closures must be a function that computes the loss, or an iterable of functions or of "
                f"pairs (function, size), got {show(closures)}"
            )
        if is_needed and isinstance(self._closures, Iterator):
            raise ValueError(
                "eigenvalues=True goes over the closures twice, and an iterator ends after once; pass a "
                "list, or an object whose __iter__ begins anew"
            )

    def __iter__(self) -> Iterator[tuple[Callable[[], Any], float]]:
        self.passes += 1
        is_empty = True
        for item in self._closures:
            is_empty = False
            closure, size = item if isinstance(item, tuple) and len(item) == 2 else (item, 1)
            if not callable(closure):
                raise TypeError(
                    "closures must hold functions, or pairs (function, size), such as "
                    f"(lambda: F.cross_entropy(model(x), y), len(x)), got {show(item)}"
                )
            if isinstance(size, Tensor) or not size > 0:
                raise ValueError(f"a closure's size must be a number above 0, got {show(size)}")
            yield closure, float(size)
        if is_empty:
            raise ValueError("there is no closure: the iterable is empty")


@contextmanager
def _graph_of(
    closure: Callable[[], Any], parameters: FlatParameters, curvature: Curvature, *, puts_back: bool
) -> Iterator[OutputMetric]:
    """The metric of a closure, which runs, with its graph."""
    run = TracedClosure(closure, parameters)
    try:
        with twice_differentiable(), torch.enable_grad():
            traced, metric = Graph(run, parameters, curvature).get()
            if not traced.loss.isfinite():
                raise RuntimeError(
                    f"the loss is not finite, {traced.loss.item():g}, and has no curvature; {_NOT_FINITE}"
                )
            if not isinstance(metric, OutputMetric):
                raise ValueError(
                    "Kronecker factors need a metric at the model's outputs; let the closure's loss come "
                    "from a recognised loss function, such as cross_entropy or mse_loss, or return "
                    "(loss, distribution)"
                )
            yield metric
    finally:
        if puts_back:  # so that two passes leave what one leaves
            run.rewind()


class _Sums:
    """Sums over closures: of both factors of each layer, of its rows, and of the diagonals of the rest."""

    def __init__(self, parameters: FlatParameters, names: Sequence[str]) -> None:
        self._parameters, self._names = parameters, names
        self._sides: dict[Layer, tuple[Tensor, Tensor]] = {}
        self._counts: dict[Layer, float] = {}
        self._tables: set[Layer] = set()
        self._diagonals: dict[int, Tensor] = {}
        self.size = 0.0

    def add(self, batch: Batch, *, reduces: bool) -> None:
        """The sums of one closure."""
        batch.warn_of_other_uses(self._names)
        for pulled in batch.pull():
            for layer, uses in pulled.sides.items():
                groups, rows, columns = layer.shape(self._parameters.tensors)
                is_table = not uses[0][0].is_floating_point()
                if is_table:
                    self._tables.add(layer)
                elif reduces:
                    uses = [batch.reduce(layer, uses)]
                zeros = self._parameters.tensors[layer.weight].new_zeros
                dtype = self._parameters.dtype
                if layer not in self._sides:
                    self._sides[layer] = (
                        zeros(_shape(groups, rows, diagonal=is_table), dtype=dtype),
                        zeros(_shape(groups, columns), dtype=dtype),
                    )
                    self._counts[layer] = 0.0
                left, right = self._sides[layer]
                for back, into in uses:
                    _add_moment(left, back)
                    _add_moment(right, into)
                    self._counts[layer] += back.shape[1]
            for i, gradient in pulled.outside.items():
                square = real_parts(gradient).to(self._parameters.dtype).square()
                self._diagonals[i] = self._diagonals[i] + square if i in self._diagonals else square

    def is_table(self, layer: Layer) -> bool:
        """Whether it is an embedding."""
        return layer in self._tables

    def finish(self) -> tuple[dict[Layer, LayerCurvature], dict[int, tuple[str, Tensor]]]:
        """The blocks and the diagonals.

        Raises:
            ValueError: the closures use a weight in different ways.
            RuntimeError: something is not finite.
        """
        inside: list[int] = []
        for layer in self._sides:
            inside += [i for i in (layer.weight, layer.bias) if i is not None]
        for i in range(len(self._names)):
            is_elsewhere = i in inside and bool(self._diagonals.get(i, torch.zeros(())).any())
            if inside.count(i) > 1 or is_elsewhere:
                raise ValueError(
                    f"the closures use {self._names[i]} in different ways, and its factors cannot be "
                    "added; form the factors of each kind of closure by a call of its own"
                )
        blocks = {
            layer: LayerCurvature(
                self._names[layer.weight],
                None if layer.bias is None else self._names[layer.bias],
                left / self.size,
                right / self._counts[layer],
                flipped=layer.flipped,
            )
            for layer, (left, right) in self._sides.items()
        }
        diagonals = {
            i: (self._names[i], value / self.size)
            for i, value in self._diagonals.items()
            if i not in inside
        }
        tensors = [t for b in blocks.values() for t in (b.left, b.right)]
        tensors += [value for _, value in diagonals.values()]
        if not all(t.isfinite().all() for t in tensors):
            raise RuntimeError(f"the factors have numbers that are not finite; {_NOT_FINITE}")
        return blocks, diagonals


def _shape(groups: int, side: int, *, diagonal: bool = False) -> tuple[int, ...]:
    return (groups, side) if diagonal or side > KroneckerFactors.longest else (groups, side, side)


def _add_moment(total: Tensor, rows: Tensor) -> None:
    """Add ``Σ x xᵀ``, or its diagonal; of a table's indices how often each comes."""
    if not rows.is_floating_point():
        total[0] += torch.bincount(rows.flatten(), minlength=total.shape[1]).to(total)
    elif total.ndim == 2:
        total += rows.square().sum(1)
    else:
        torch.baddbmm(total, rows.mT, rows, out=total)


def _add_squares(
    values: dict[Layer, Tensor], blocks: dict[Layer, LayerCurvature], batch: Batch
) -> None:
    """Add ``Σ (Qₗᵀ G Qᵣ)²`` over the gradients ``G = Σ l rᵀ`` of samples (George et al. 2018, equation 7)."""
    for pulled in batch.pull():
        for layer, uses in pulled.sides.items():
            if not uses[0][0].is_floating_point():
                continue  # of a table the product stays
            left, right, _ = blocks[layer].decomposition
            back, into = batch.join(layer, uses)
            back = back if left is None else back @ left.unsqueeze(1)
            into = into if right is None else into @ right.unsqueeze(1)
            if back.shape[2] == 1:  # G = l rᵀ, and its squares are those of both
                values[layer] += back[:, :, 0].square().mT @ into[:, :, 0].square()
                continue
            step = max(1, _AT_ONCE // (back.shape[0] * back.shape[3] * into.shape[3]))
            for b, i in zip(back.split(step, 1), into.split(step, 1), strict=True):
                values[layer] += (b.mT @ i).square().sum(1)
