"""Where a closure's graph uses its weights.

A parameter may enter the graph as a factor of a matrix product or as the kernel of a convolution.
Its gradient is then a sum of outer products ``Σₙ lₙ rₙᵀ`` of what comes back from the output and
what went in. The autograd graph shows all such uses, whatever code made them: modules, functional
calls, attention, recurrent cells, the derivatives of a network in a PDE residual.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from ngd_optim.autograd_graph import nodes
from ngd_optim.torch_internals import outputs_of, saved_by, variable_of

CONVOLUTION = "ConvolutionBackward0"
_TRANSPOSES = {"TBackward0", "TransposeBackward0", "PermuteBackward0"}
_SAME_VALUES = {*_TRANSPOSES, "AliasBackward0", "ToCopyBackward0"}
# By node, its two factors as autograd saves them; whatever is added comes before them.
_MATRIX_PRODUCTS = {
    "MmBackward0": ("self", "mat2"),
    "AddmmBackward0": ("mat1", "mat2"),
    "BmmBackward0": ("self", "mat2"),
    "BaddbmmBackward0": ("batch1", "batch2"),
    "MvBackward0": ("self", "vec"),
}
PRODUCTS = {*_MATRIX_PRODUCTS, CONVOLUTION}


class Layer(NamedTuple):
    """A weight, seen as matrices with one pair of factors each, and the bias that shares them.

    Attributes:
        weight, bias: indexes of parameters.
        flipped: whether the matrix is the weight's transpose: that of ``x @ weight + bias``.
        groups: how many matrices: those of a convolution.
    """

    weight: int
    bias: int | None
    flipped: bool
    groups: int

    def shape(self, params: Sequence[Tensor]) -> tuple[int, int, int]:
        """That of :meth:`join`: (groups, rows, columns)."""
        n_out, *rest = params[self.weight].shape
        rows, columns = n_out // self.groups, math.prod(rest)
        rows, columns = (columns, rows) if self.flipped else (rows, columns)
        return self.groups, rows, columns + (self.bias is not None)

    def join(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Tensors shaped like the parameters → (groups, rows, columns), with the bias as last column."""
        matrix = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        matrix = matrix.mT if self.flipped else matrix
        return matrix if bias is None else torch.cat([matrix, bias.reshape(self.groups, -1, 1)], -1)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inverse of :meth:`join`, but for the shapes."""
        weight, bias = (matrix, None) if self.bias is None else (matrix[..., :-1], matrix[..., -1])
        return (weight.mT if self.flipped else weight), bias


class Use(NamedTuple):
    """A node of the graph that uses a weight.

    Attributes:
        node: its gradient function.
        layer: the weight.
        adds_bias: whether the layer's bias is added here.
        length: ``n``, how many rows there are.
        rows: makes of the gradient at the node ``l`` and ``r`` for the weight as it is, not
            flipped: (groups, n, rows of the weight) and (groups, n, columns). Of a table ``l`` has one 1,
            whose index is given: (1, n, 1) integers.
    """

    node: Node
    layer: Layer
    adds_bias: bool
    length: int
    rows: Callable[[Tensor], tuple[Tensor, Tensor]]

    def zeros(self) -> Tensor:
        """The gradient at the node where nothing comes back."""
        out = outputs_of(self.node)[0]  # pyright: ignore[reportAttributeAccessIssue]
        return torch.zeros(out.shape, dtype=out.dtype, device=out.device)

    def sides(
        self, gradient: Tensor, dtype: torch.dtype, kept: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """``l`` and ``r`` for the layer's matrix, with ones for its bias: (groups, n, rows) and (groups, n, columns).

        Of some rows only, ``r`` has the weight of all.
        """
        back, into = (rows[:, kept] for rows in self.rows(gradient))
        back, into = back.to(dtype) if back.is_floating_point() else back, into.to(dtype)
        if self.layer.flipped:
            back, into = into, back
        if self.layer.bias is not None:
            ones = into.new_full((*into.shape[:-1], 1), float(self.adds_bias))
            into = torch.cat([into, ones], -1)
        return back, into if kept.step in (None, 1) else math.sqrt(kept.step) * into


def uses_of(
    roots: Sequence[Tensor], params: Sequence[Tensor], *, tables: bool = False
) -> list[Use]:
    """Every use of a parameter in a matrix product or a convolution, in the graph that leads to some tensors.

    With ``tables``, also of embeddings that are used in no other way. Complex parameters have no uses.
    """
    index = {id(p): i for i, p in enumerate(params) if not p.is_complex()}
    uses = (_use(node, index, params) for node in nodes(roots))
    found = [use for use in uses if use is not None and params[use.layer.weight].numel()]
    layers: dict[int, Layer] = {}
    taken: set[int | None] = {None}
    for use in sorted(found, key=lambda use: use.layer.bias is None):
        layer = use.layer if use.layer.bias not in taken else use.layer._replace(bias=None)
        taken.add(layers.setdefault(layer.weight, layer).bias)
    uses = [
        use._replace(layer=layer, adds_bias=use.layer == layer)
        for use in found
        if (layer := layers[use.layer.weight]).groups == use.layer.groups
    ]
    if tables:
        lookups = (_lookup(node, index, params) for node in nodes(roots))
        uses += [use for use in lookups if use is not None and use.layer.weight not in layers]
    return uses


class Factors(NamedTuple):
    """What makes ``Σₙ lₙ rₙᵀ`` of the gradient of a node's input.

    Attributes:
        back: makes ``l`` of the gradient at the node, (groups, n, rows).
        into: gives ``r``, (groups, n, columns), the conjugate of what went in; None for ones, with
            one column.
        transposed: whether the sum is the transpose of the input's gradient, for each group.
    """

    back: Callable[[Tensor], Tensor]
    into: Callable[[], Tensor] | None
    transposed: bool


def factors_at(node: Any, position: int) -> Factors | None:
    """Those for an input of a matrix product or the kernel of a convolution; else None."""
    if node.name() == CONVOLUTION:
        return (
            _convolution_factors(node)
            if position == 1 and not saved_by(node, "transposed")
            else None
        )
    names = _MATRIX_PRODUCTS.get(node.name())
    place = position - len(node.next_functions) + 2
    if names is None or place < 0 or saved_by(node, "alpha") not in (None, 1):
        return None
    other = names[1 - place]

    def into() -> Tensor:
        matrix = _batched(saved_by(node, other).to_dense()).conj()
        return matrix.mT if place == 0 else matrix

    if place == 0:  # the gradient of a in a b is g b*ᵀ
        return Factors(lambda gradient: _batched(gradient).mT, into, transposed=False)
    return Factors(_batched, into, transposed=True)  # that of b is (gᵀ a*)ᵀ


def _convolution_factors(node: Any) -> Factors:
    groups = saved_by(node, "groups")

    def back(gradient: Tensor) -> Tensor:
        return gradient.unflatten(1, (groups, -1)).flatten(3).movedim(1, 0).mT.flatten(1, 2)

    def into() -> Tensor:
        padding = [side for size in reversed(saved_by(node, "padding")) for side in (size, size)]
        patches = F.pad(saved_by(node, "input"), padding)
        kernel = saved_by(node, "weight").shape[2:]
        sizes = zip(kernel, saved_by(node, "stride"), saved_by(node, "dilation"), strict=True)
        for dim, (size, stride, dilation) in enumerate(sizes, start=2):
            patches = patches.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        # (batch, channels, *positions, *kernel) → (groups, batch × positions, channels × kernel)
        patches = patches.unflatten(1, (groups, -1)).flatten(3, 2 + len(kernel)).flatten(4)
        return patches.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)

    return Factors(back, into, transposed=False)


def _batched(factor: Tensor) -> Tensor:
    """As matrices; a vector is a column."""
    matrix = factor.unsqueeze(-1) if factor.ndim == 1 else factor
    return matrix if matrix.ndim == 3 else matrix.unsqueeze(0)


def _use(node: Any, index: Mapping[int, int], params: Sequence[Tensor]) -> Use | None:
    if node.name() not in ("AddmmBackward0", "MmBackward0", CONVOLUTION):
        return None
    out = outputs_of(node)[0]
    sources = [source_of(parent) for parent, _ in node.next_functions]
    arguments = [(index.get(id(variable_of(source))), transposed) for source, transposed in sources]
    found = [
        (weight, transposed, own)
        for position, (weight, transposed) in enumerate(arguments)
        if weight is not None and (own := factors_at(node, position)) is not None
    ]
    is_convolution = node.name() == CONVOLUTION
    if len(found) != 1 or out.dtype.is_complex or (is_convolution and found[0][1]):
        return None
    weight, transposed, factors = found[0]
    channels = int(factors.transposed or is_convolution)  # the dimension of the output
    added = arguments[2 if is_convolution else 0][0] if channels and len(arguments) == 3 else None
    is_bias = added is not None and tuple(params[added].shape) == tuple(out.shape[1:2])
    layer = Layer(
        weight,
        added if is_bias and saved_by(node, "beta") in (None, 1) else None,
        flipped=factors.transposed and not transposed,
        groups=saved_by(node, "groups") if is_convolution else 1,
    )
    length = math.prod(out.shape) // max(1, out.shape[channels])

    def rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
        assert factors.into is not None
        back, into = factors.back(gradient), factors.into()
        return (into, back) if factors.transposed ^ transposed else (back, into)

    return Use(node, layer, layer.bias is not None, length, rows)


def _lookup(node: Any, index: Mapping[int, int], params: Sequence[Tensor]) -> Use | None:
    if node.name() != "EmbeddingBackward0" or saved_by(node, "scale_grad_by_freq"):
        return None
    weight = index.get(id(variable_of(source_of(node.next_functions[0][0])[0])))
    if weight is None:
        return None
    padding, (size, width) = saved_by(node, "padding_idx"), params[weight].shape

    def rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
        indices, gradient = (
            saved_by(node, "indices").reshape(1, -1, 1),
            gradient.reshape(1, -1, width),
        )
        # −1, for none, is saved as an unsigned number.
        return indices, gradient * (indices != padding) if padding < size else gradient

    length = math.prod(outputs_of(node)[0].shape[:-1])
    return Use(node, Layer(weight, None, flipped=False, groups=1), False, length, rows)


def source_of(node: Any) -> tuple[Any, bool]:
    """The node that an argument of an operation copies, and whether it, a matrix, is transposed."""
    transposed = False
    while node is not None and node.name() in _SAME_VALUES:
        if node.name() in _TRANSPOSES:
            if len(outputs_of(node)[0].shape) != 2:
                break
            # Dimension −1 is saved as an unsigned number, which is odd.
            transposed ^= node.name() != "PermuteBackward0" or saved_by(node, "dims")[0] % 2 == 1
        node = node.next_functions[0][0]
    return node, transposed
