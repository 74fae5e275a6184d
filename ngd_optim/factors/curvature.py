"""A block-diagonal curvature whose blocks are Kronecker products: its functions by eigenvectors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ngd_optim.jacobian import Layer
from ngd_optim.parameters import FlatParameters
from ngd_optim.shown import show


@dataclass(frozen=True)
class LayerCurvature:
    """The block of a weight, and of the bias that is added to its products: ``left ⊗ right``, for each group.

    Attributes:
        weight: the weight's name.
        bias: the bias's; None if there is none.
        left: the factor of the weight's rows, shape (groups, rows, rows); of a longer side than 4,096
            the diagonal, (groups, rows).
        right: that of its columns, with one more for the bias, likewise.
        flipped: whether the weight is used as ``x @ weight``: its columns are the rows here.
        eigenvalues: in the eigenvectors of both, shape (groups, rows, columns), that replace their
            products (EKFAC: George et al. 2018); None: their products.

    Examples:
        >>> import torch
        >>> from ngd_optim.factors import kronecker_factors
        >>> model = torch.nn.Linear(3, 2)
        >>> F = kronecker_factors(
        ...     lambda: torch.nn.functional.mse_loss(model(torch.ones(5, 3)), torch.ones(5, 2)),
        ...     model.named_parameters(),
        ... )
        >>> (layer,) = F.layers
        >>> layer.weight, layer.bias, layer.left.shape, layer.right.shape
        ('weight', 'bias', torch.Size([1, 2, 2]), torch.Size([1, 4, 4]))
    """

    weight: str
    bias: str | None
    left: Tensor
    right: Tensor
    eigenvalues: Tensor | None = None
    flipped: bool = False

    @cached_property
    def decomposition(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The eigenvectors of both factors, None for the identity's, and the eigenvalues of the block."""
        (left, left_vectors), (right, right_vectors) = map(_decompose, (self.left, self.right))
        values = self.eigenvalues
        if values is None:
            values = left.unsqueeze(-1) * right.unsqueeze(-2)
        return left_vectors, right_vectors, values


class KroneckerCurvature:
    """A curvature ``F`` as :func:`kronecker_factors` finds it: a block for each layer, a diagonal for the rest.

    Vectors are flat, in the order of the parameters, shape ``(n,)``; or several as columns,
    ``(n, k)``. A ``damping`` λ ≥ 0 is added to the whole diagonal: ``F + λI``, exactly. It may be a
    0-dim tensor, and what depends on it can be differentiated in it.

    Attributes:
        layers: the blocks.
        diagonals: for parameters that are in no layer, by name, shaped like the parameter; (…, 2),
            for its real and imaginary parts, like one that is complex.

    Examples:
        >>> import torch
        >>> from ngd_optim.factors import kronecker_factors
        >>> x, y = torch.randn(100, 3), torch.randint(0, 2, (100,))
        >>> model = torch.nn.Linear(3, 2)
        >>> F = kronecker_factors(
        ...     lambda: torch.nn.functional.cross_entropy(model(x), y), model.named_parameters()
        ... )
        >>> v = torch.randn(8)
        >>> torch.allclose(F.solve(F(v, damping=0.1), damping=0.1), v, atol=1e-4)
        True
    """

    def __init__(
        self,
        parameters: FlatParameters,
        layers: Mapping[Layer, LayerCurvature],
        diagonals: Mapping[int, tuple[str, Tensor]],
    ) -> None:
        self._parameters = parameters
        self._layers = dict(layers)
        self._diagonals = dict(diagonals)
        self.layers = tuple(layers.values())
        self.diagonals = dict(diagonals.values())

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return self._parameters.size, self._parameters.size

    def __call__(self, v: Tensor, damping: float | Tensor = 0.0) -> Tensor:
        """``(F + λI) v``."""
        return self._apply(lambda values: values + damping, v, damping)

    def solve(self, v: Tensor, damping: float | Tensor = 0.0) -> Tensor:
        """``(F + λI)⁻¹ v``.

        Raises:
            ValueError: λ is 0 and F singular to rounding.
        """
        return self._apply(lambda values: 1 / (values + damping), v, damping, inverts=True)

    def root(self, v: Tensor, damping: float | Tensor = 0.0) -> Tensor:
        """``(F + λI)^½ v``, by the symmetric root."""
        return self._apply(lambda values: (values + damping).sqrt(), v, damping)

    def inverse_root(self, v: Tensor, damping: float | Tensor = 0.0) -> Tensor:
        """``(F + λI)^-½ v``: of standard normal numbers, draws with covariance ``(F + λI)⁻¹``.

        Raises:
            ValueError: λ is 0 and F singular to rounding.
        """
        return self._apply(lambda values: (values + damping).rsqrt(), v, damping, inverts=True)

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """``log det(F + λI)``, 0-dim.

        Raises:
            ValueError: λ is 0 and F singular to rounding.
        """
        self._check(damping, inverts=True)
        return torch.stack([(values + damping).log().sum() for values in self._eigenvalues()]).sum()

    def trace(self) -> Tensor:
        """``trace F``, 0-dim."""
        return torch.stack([values.sum() for values in self._eigenvalues()]).sum()

    def eigenvalues(self) -> Tensor:
        """All of them, ascending, shape (n,)."""
        return torch.cat([values.flatten() for values in self._eigenvalues()]).sort().values

    def diagonal(self) -> Tensor:
        """That of ``F``, shape (n,)."""
        result = torch.zeros(
            self.shape[0], dtype=self._parameters.dtype, device=self._parameters.device
        )
        targets = self._parameters.views(result)
        for layer, block in self._layers.items():
            left, right, values = block.decomposition
            squares = values if left is None else left.square() @ values
            squares = squares if right is None else squares @ right.square().mT
            self._write(layer, squares, targets)
        for i, (_, value) in self._diagonals.items():
            targets[i].copy_(value)
        return result

    def to_dense(self) -> Tensor:
        """``F`` itself, shape (n, n)."""
        n = self.shape[0]
        return self(torch.eye(n, dtype=self._parameters.dtype, device=self._parameters.device))

    def scale(self, factor: float) -> "KroneckerCurvature":
        """``factor · F``: of a mean over ``N`` samples, ``N`` times it is that of their sum."""
        if not factor >= 0:
            raise ValueError(f"factor must be at least 0, got {show(factor)}")
        layers = {
            layer: replace(
                block,
                left=factor * block.left,
                eigenvalues=None if block.eigenvalues is None else factor * block.eigenvalues,
            )
            for layer, block in self._layers.items()
        }
        diagonals = {i: (name, factor * value) for i, (name, value) in self._diagonals.items()}
        return KroneckerCurvature(self._parameters, layers, diagonals)

    def _eigenvalues(self) -> Iterator[Tensor]:
        for block in self.layers:
            yield block.decomposition[2]
        yield from self.diagonals.values()

    def _apply(
        self,
        function: Callable[[Tensor], Tensor],
        v: Tensor,
        damping: float | Tensor,
        *,
        inverts: bool = False,
    ) -> Tensor:
        """``f(F) v``, where ``f`` is a function of eigenvalues."""
        if not isinstance(v, Tensor) or v.is_complex():
            kind = v.dtype if isinstance(v, Tensor) else type(v).__name__
            raise TypeError(f"v must be a real tensor, got {kind}; use torch.as_tensor for arrays")
        if v.ndim not in (1, 2) or len(v) != self.shape[0]:
            raise ValueError(
                f"v must have shape ({self.shape[0]},) or ({self.shape[0]}, k), got {tuple(v.shape)}"
            )
        self._check(damping, inverts=inverts)
        columns = v.unsqueeze(1) if v.ndim == 1 else v
        sources = list(columns.T.to(self._parameters.dtype).split(self._parameters.sizes, 1))
        parts: dict[int, Tensor] = {}
        for layer, block in self._layers.items():
            left, right, values = block.decomposition
            matrix = self._join(layer, sources)
            matrix = matrix if left is None else left.mT @ matrix
            matrix = function(values) * (matrix if right is None else matrix @ right)
            matrix = matrix if left is None else left @ matrix
            matrix = matrix if right is None else matrix @ right.mT
            weight, bias = layer.split(matrix)
            parts[layer.weight] = weight.reshape(len(matrix), -1)
            if layer.bias is not None and bias is not None:
                parts[layer.bias] = bias.reshape(len(matrix), -1)
        for i, (_, value) in self._diagonals.items():
            parts[i] = function(value.flatten()) * sources[i]
        result = torch.cat([parts[i] for i in range(len(sources))], 1).T
        return result.squeeze(1) if v.ndim == 1 else result

    def _join(self, layer: Layer, flat: Sequence[Tensor]) -> Tensor:
        """Vectors as rows → (vectors, groups, rows, columns), as :meth:`Layer.join` does it of one."""
        count, rows = len(flat[0]), len(self._parameters.tensors[layer.weight])
        matrix = flat[layer.weight].view(count, layer.groups, rows // layer.groups, -1)
        matrix = matrix.mT if layer.flipped else matrix
        if layer.bias is None:
            return matrix
        bias = flat[layer.bias].view(count, layer.groups, -1, 1)
        return torch.cat([matrix, bias], -1)

    def _write(self, layer: Layer, matrix: Tensor, targets: Sequence[Tensor]) -> None:
        weight, bias = layer.split(matrix)
        targets[layer.weight].copy_(weight.reshape(targets[layer.weight].shape))
        if layer.bias is not None and bias is not None:
            targets[layer.bias].copy_(bias.reshape(-1))

    def _check(self, damping: float | Tensor, *, inverts: bool) -> None:
        value = float(damping.detach() if isinstance(damping, Tensor) else damping)
        if not value >= 0:
            raise ValueError(f"damping must be at least 0, got {show(damping)}")
        if inverts and not value:
            low, high = self._range
            if low <= torch.finfo(self._parameters.dtype).eps * high:
                raise ValueError(
                    "F is singular: its eigenvalues reach from "
                    f"{low:.2g} to {high:.2g}; use a damping above 0, such as a prior's precision"
                )

    @cached_property
    def _range(self) -> tuple[float, float]:
        pairs = [(v.amin().item(), v.amax().item()) for v in self._eigenvalues() if v.numel()]
        return min(low for low, _ in pairs), max(high for _, high in pairs)


def _decompose(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues, at least 0, and eigenvectors; None for those of a diagonal."""
    if factor.ndim == 2:
        return factor, None
    values, vectors = torch.linalg.eigh(factor)
    return values.clamp(min=0), vectors
