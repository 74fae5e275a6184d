"""A curvature that is only multiplied, with what can be had of it by products."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ngd_optim.operators.estimates import Estimate, estimate_diagonal, estimate_trace
from ngd_optim.parameters import FlatParameters
from ngd_optim.shown import show

Which = Literal["largest", "smallest", "magnitude"]
_SCIPY_NAMES = {"largest": "LA", "smallest": "SA", "magnitude": "LM"}
_FEWEST = 4


class CurvatureOperator:
    """A symmetric matrix ``F``, shape (n, n), that is never built: :attr:`ngd_optim.Linearization.curvature`.

    ``F(v)``, or ``F @ v``, is the product with a flat vector, ``(n,)``, or with several as columns,
    ``(n, k)``, which takes less time than one by one. It is valid only while the parameters are where
    they were: it reads them, and does not check.

    Attributes:
        shape: ``(n, n)``.
        dtype: of the products.
        device: of the products.

    Examples:
        >>> import torch
        >>> from ngd_optim import linearize
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        >>> F = linearize(lambda: (x**3).sum(), [x]).curvature  # diag(6 x)
        >>> F(torch.ones(3)), F(torch.eye(3)).diagonal()
        (tensor([ 6., 12., 18.]), tensor([ 6., 12., 18.]))
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        multiply: Callable[[Tensor], Tensor],
        parameters: FlatParameters,
    ) -> None:
        self._product = product
        self._multiply = multiply
        self._parameters = parameters
        self.shape = parameters.size, parameters.size
        self.dtype, self.device = parameters.dtype, parameters.device

    def __call__(self, v: Tensor) -> Tensor:
        """``F v``, of the shape of ``v``.

        Raises:
            TypeError: ``v`` is no tensor, or complex.
            ValueError: ``v`` has another length than the gradient.
        """
        if not isinstance(v, Tensor) or v.is_complex():
            kind = v.dtype if isinstance(v, Tensor) else type(v).__name__
            raise TypeError(
                f"v must be a real tensor, got {kind}; use to_scipy() for arrays and for complex vectors, and "
                "torch.view_as_real(v).flatten() for what belongs to complex parameters"
            )
        if v.ndim not in (1, 2) or len(v) != self.shape[0]:
            n = self.shape[0]
            raise ValueError(f"v must have shape ({n},) or ({n}, k), got {tuple(v.shape)}")
        # The same tensor where it can be: a recording knows it again.
        v = (v.detach() if v.requires_grad else v).to(self.device, self.dtype)
        return self._product(v) if v.ndim == 1 else self._multiply(v)

    __matmul__ = __call__

    def to_dense(self) -> Tensor:
        """``F`` itself, from ``n`` products."""
        return self(torch.eye(self.shape[0], dtype=self.dtype, device=self.device))

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator``, which takes and gives arrays on the CPU.

        Raises:
            ImportError: SciPy is not installed.
        """
        import scipy.sparse.linalg as scipy_linalg

        def multiply(array: Any) -> Any:
            if array.dtype.kind == "c":
                return multiply(array.real) + 1j * multiply(array.imag)
            # A copy: strides below 0 and arrays that are read-only are no tensors.
            return self(torch.as_tensor(array.copy(), device=self.device)).cpu().numpy()

        make: Any = scipy_linalg.LinearOperator
        return make(
            self.shape,
            matvec=lambda v: multiply(v.reshape(-1)),
            rmatvec=lambda v: multiply(v.reshape(-1)),
            matmat=multiply,
            rmatmat=multiply,
            dtype=torch.empty((), dtype=self.dtype, device="cpu").numpy().dtype,
        )

    def eigenvalues(
        self,
        count: int = 6,
        which: Which = "largest",
        *,
        tol: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Some eigenvalues and their eigenvectors, by SciPy's Lanczos iteration (``eigsh``).

        Args:
            count: how many, at least 1; of as many as there are, or almost, by ``n`` products.
            which: the ``"largest"``, the ``"smallest"``, or those of largest ``"magnitude"``.
            tol: relative accuracy; 0: that of the numbers.
            generator: draws the vector that it starts from. None: one of its own.

        Returns:
            The eigenvalues, ascending, shape (count,), and the eigenvectors as columns, (n, count).

        Raises:
            ImportError: SciPy is not installed.
            ValueError: an argument is out of range.

        Examples:
            >>> import torch
            >>> from ngd_optim import linearize
            >>> x = torch.nn.Parameter(torch.arange(1.0, 9.0))
            >>> F = linearize(lambda: (x**2 * torch.arange(8)).sum(), [x]).curvature
            >>> values, vectors = F.eigenvalues(2)
            >>> values.round(decimals=3)
            tensor([12., 14.])
        """
        n = self.shape[0]
        if not 1 <= (number := _integer(count)) <= n:
            raise ValueError(f"count must be an integer from 1 to {n}, got {show(count)}")
        count = number
        if which not in get_args(Which):
            raise ValueError(f"which must be one of {get_args(Which)}, got {show(which)}")
        if count >= n - 1:
            values, vectors = torch.linalg.eigh(_symmetric(self.to_dense()))
            return _choose(values, vectors, count, which)
        import scipy.sparse.linalg as scipy_linalg

        start = _draw((n,), generator).to(self.dtype)
        solve: Any = scipy_linalg.eigsh
        values, vectors = solve(
            self.to_scipy(),
            k=count,
            which=_SCIPY_NAMES[which],
            v0=start.cpu().numpy(),
            tol=tol,
        )
        order = values.argsort()
        found = (torch.as_tensor(a.copy()) for a in (values[order], vectors[:, order]))
        values, vectors = (t.to(self.device, self.dtype) for t in found)
        return values, vectors

    def trace(self, products: int = 60, *, generator: torch.Generator | None = None) -> Estimate:
        """The trace, estimated by XTrace (Epperly, Tropp & Webber 2024); exact if ``n`` products are allowed.

        Args:
            products: how many it takes at most, at least 4.
            generator: draws the random vectors. None: one of its own.

        Raises:
            ValueError: ``products`` is below 4.
        """
        return self._estimate(
            products, generator, estimate_trace, lambda dense: dense.diagonal().sum()
        )

    def diagonal(self, products: int = 60, *, generator: torch.Generator | None = None) -> Estimate:
        """The diagonal, shape (n,), estimated by XDiag; see :meth:`trace` for the arguments.

        :meth:`Linearization.diagonal <ngd_optim.Linearization.diagonal>` is exact.
        """
        return self._estimate(products, generator, estimate_diagonal, torch.Tensor.diagonal)

    def block(self, params: Sequence[Tensor]) -> "CurvatureOperator":
        """The block of some of the parameters, in the order in which they are given.

        Raises:
            ValueError: one of them is none of the operator's trainable parameters, or comes twice.
        """
        params = [params] if isinstance(params, Tensor) else list(params)
        index = {id(p): i for i, p in enumerate(self._parameters.tensors)}
        if not params or any(id(p) not in index for p in params):
            raise ValueError(
                "params must be some of the trainable parameters that the curvature was taken in, "
                f"got {show(params)}"
            )
        chosen = [index[id(p)] for p in params]
        if len(set(chosen)) < len(chosen):
            raise ValueError("params has a parameter twice")
        sizes = self._parameters.sizes
        inner = FlatParameters([{"params": params}])

        def multiply(v: Tensor) -> Tensor:
            parts = dict(zip(chosen, v.split([sizes[i] for i in chosen]), strict=True))
            whole = torch.cat(
                [
                    parts[i].to(self.dtype)
                    if i in parts
                    else torch.zeros(size, *v.shape[1:], dtype=self.dtype, device=self.device)
                    for i, size in enumerate(sizes)
                ]
            )
            images = self(whole).split(sizes)
            return torch.cat([images[i] for i in chosen]).to(v.dtype)

        return CurvatureOperator(multiply, multiply, inner)

    def _estimate(
        self,
        products: int,
        generator: torch.Generator | None,
        estimate: Callable[..., Estimate],
        exact: Callable[[Tensor], Tensor],
    ) -> Estimate:
        if (number := _integer(products)) < _FEWEST:
            raise ValueError(
                f"products must be an integer, at least {_FEWEST}, got {show(products)}"
            )
        products = number
        if self.shape[0] <= products:
            value = exact(self.to_dense())
            return Estimate(value, torch.zeros_like(value))
        generator = generator or torch.Generator(device="cpu").manual_seed(0)
        like = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        return estimate(self, like, products, generator)


def _integer(value: Any) -> int:
    """An integer of whichever kind; 0 of anything else."""
    try:
        return 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return 0


def _draw(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    generator = generator or torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, device=generator.device)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _choose(values: Tensor, vectors: Tensor, count: int, which: Which) -> tuple[Tensor, Tensor]:
    key = {"largest": values, "smallest": -values, "magnitude": values.abs()}[which]
    kept = key.argsort()[-count:].sort().values
    return values[kept], vectors[:, kept]
