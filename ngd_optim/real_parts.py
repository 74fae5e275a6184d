"""Complex tensors as real ones, whose last dimension has the real and the imaginary part.

Flat vectors are real. Autograd's gradient of a real loss in a complex tensor is ``∂L/∂Re + i ∂L/∂Im``,
so its parts are the gradient in these real numbers, and the same holds for all derivatives.
"""

import torch
from torch import Tensor


def real_parts(tensor: Tensor) -> Tensor:
    """A complex tensor as numbers of shape (…, 2), a view where it can be; a real one as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def from_real_parts(like: Tensor, parts: Tensor) -> Tensor:
    """The inverse, for a tensor that is complex, a copy; and for one that is not."""
    # A view needs pairs at even places, which a flat vector, or many beside each other, do not have.
    return torch.complex(*parts.unbind(-1)) if like.is_complex() else parts


def real_shape(tensor: Tensor) -> tuple[int, ...]:
    """That of its real parts."""
    return (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)


def real_size(tensor: Tensor) -> int:
    """How many real numbers it has."""
    return 2 * tensor.numel() if tensor.is_complex() else tensor.numel()


def squared_modulus(tensor: Tensor) -> Tensor:
    """``|z|²``, without the root that ``abs`` takes, whose second derivative is infinite at zero."""
    if not tensor.is_complex():
        return tensor.square()
    return real_parts(tensor).square().sum(-1)
