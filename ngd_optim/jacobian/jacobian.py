"""The Jacobian of a model's outputs.

From one pull-back where each output belongs to one sample; row by row for the parameters of which
that is not so.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ngd_optim.curvature import pull_back
from ngd_optim.jacobian.rows import OutputRows
from ngd_optim.parameters import FlatParameters

logger = logging.getLogger("ngd_optim")

_FEW_ROWS = 32
"""So many rows are sooner pulled back than told apart."""

_ROWS_AT_ONCE = 32
"""So many are pulled back together: each has the memory of a backward pass."""

_FEW_BYTES = 2**27
"""So large a Jacobian is no burden beside what a step holds anyway."""


def jacobian(outputs: Sequence[Tensor], parameters: FlatParameters) -> Tensor:
    """``∂z/∂θ``, shape (output elements, n), rows in the order of the flattened outputs."""
    rows = _empty(outputs, parameters)
    unknown = list(range(len(parameters.tensors)))
    if len(rows) > _FEW_ROWS:
        unknown = _fill_quickly(rows, outputs, parameters)
    if unknown and len(rows) > _FEW_ROWS:
        logger.info(
            "the Jacobian is pulled back row by row for %d of %d parameters: they do not meet the "
            "samples in matrix products or by broadcasting, or samples share more than parameters",
            len(unknown),
            len(parameters.tensors),
        )
    _fill_by_rows(rows, outputs, parameters, unknown)
    return rows


def compute_cheap_jacobian(outputs: Sequence[Tensor], parameters: FlatParameters) -> Tensor | None:
    """The same where it is small and takes one pull-back, or has a few rows; else None."""
    count = sum(z.numel() for z in outputs)
    if count * parameters.size * parameters.dtype.itemsize > _FEW_BYTES:
        return None
    if count <= _FEW_ROWS:
        return jacobian(outputs, parameters)
    rows = _empty(outputs, parameters)
    return None if _fill_quickly(rows, outputs, parameters, in_one_pass=True) else rows


def _empty(outputs: Sequence[Tensor], parameters: FlatParameters) -> Tensor:
    shape = sum(z.numel() for z in outputs), parameters.size
    return torch.zeros(shape, dtype=parameters.dtype, device=parameters.device)


def _fill_quickly(
    rows: Tensor, outputs: Sequence[Tensor], parameters: FlatParameters, *, in_one_pass: bool = False
) -> list[int]:
    """Returns the indexes of the parameters for which that did not succeed.

    A guess at the samples is tried before they are measured, which takes two more pull-backs.
    """
    check = None
    unknown = list(range(len(parameters.tensors)))
    for may_guess in (True, False):
        is_guess = False
        for z, block in zip(outputs, rows.split([z.numel() for z in outputs]), strict=True):
            if z.numel() <= 1:
                _fill_by_rows(block, [z], parameters, unknown)
                continue
            source = OutputRows(z, parameters, may_guess=may_guess)
            if in_one_pass and source.passes != 1:
                return unknown
            source.fill(block)
            is_guess |= source.is_guess
        check = check or _Check(outputs, parameters)
        wrong = check.wrong(rows)
        if not (wrong and is_guess):
            return wrong
        rows.zero_()
    return unknown


class _Check:
    """Compares rows with a pull-back of random numbers."""

    def __init__(self, outputs: Sequence[Tensor], parameters: FlatParameters) -> None:
        generator = torch.Generator().manual_seed(0)
        u = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z) for z in outputs]
        self._sizes = [p.numel() for p in parameters.tensors]
        self._u = torch.cat([part.reshape(-1) for part in u]).to(parameters.dtype)
        self._exact = parameters.flatten(pull_back(outputs, parameters.tensors)(u))
        self._eps = max(torch.finfo(t.dtype).eps for t in [*outputs, *parameters.tensors])

    def wrong(self, rows: Tensor) -> list[int]:
        """The indexes of the parameters whose columns are not the Jacobian's."""
        found = rows.T @ self._u
        sizes, exact = self._norms(found), self._norms(self._exact)
        # A gradient may be zero but for rounding errors; columns that were not filled are just zero.
        noise = 10 * self._eps * self._exact.norm() * (sizes > 0)
        is_right = self._norms(found - self._exact) <= self._eps**0.5 * exact + noise
        return [i for i, right in enumerate(is_right.tolist()) if not right]

    def _norms(self, flat: Tensor) -> Tensor:
        return torch.stack([part.norm() for part in flat.split(self._sizes)])


def _fill_by_rows(rows: Tensor, outputs: Sequence[Tensor], parameters: FlatParameters, which: Sequence[int]) -> None:
    """Pull back unit vectors to some parameters, several at once where torch can."""
    if not which:
        return
    tensors = [parameters.tensors[i] for i in which]
    columns = rows.split([p.numel() for p in parameters.tensors], 1)
    start = 0
    for z in outputs:
        for first in range(0, z.numel(), _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, z.numel() - first)
            u = torch.zeros(count, z.numel(), dtype=z.dtype, device=z.device)
            u[:, first : first + count].fill_diagonal_(1)
            pulled = _pull_rows(z, u.view(count, *z.shape), tensors)
            for i, part in zip(which, pulled, strict=True):
                columns[i][start + first : start + first + count] = part
        start += z.numel()


def _pull_rows(z: Tensor, u: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """For each parameter (rows, elements)."""

    def pulled(u: Tensor, batched: bool) -> Sequence[Tensor | None]:
        return torch.autograd.grad(z, params, u, retain_graph=True, allow_unused=True, is_grads_batched=batched)

    def filled(gradients: Sequence[Tensor | None], count: int) -> list[Tensor]:
        return [
            p.new_zeros(count, p.numel()) if g is None else g.reshape(count, -1)
            for p, g in zip(params, gradients, strict=True)
        ]

    try:
        return filled(pulled(u, True), len(u))
    except RuntimeError:  # torch.vmap does not know an operation
        single = [filled(pulled(row, False), 1) for row in u]
        return [torch.cat(parts) for parts in zip(*single, strict=True)]
