"""Symmetric matrices in half of their memory: the rectangular full packed format (Gustavson et al. 2010).

The lower triangle of an n×n matrix is a trapezoid, its first ⌈n/2⌉ columns, and a smaller triangle;
the latter, turned over, fills the corner above the trapezoid. What is linear, as means are, can be
done to packed matrices as they are.
"""

from torch import Tensor


def pack(matrix: Tensor) -> Tensor:
    """(..., n, n), of which the lower triangle counts → (..., n + 1, n / 2), or (..., n, (n + 1) / 2) for an odd n."""
    n = matrix.shape[-1]
    # An even n has one row more, so that both triangles fit beside each other.
    half, shift = (n + 1) // 2, 1 - n % 2
    result = matrix.new_empty(*matrix.shape[:-2], n + shift, half)
    result[..., shift:, :] = matrix[..., :half]
    # The trapezoid leaves its upper triangle free: the smaller triangle goes there, transposed.
    corner = result[..., : n - half, 1 - shift :]
    corner.tril_(-1).add_(matrix[..., half:, half:].mT.triu())
    return result


def order_of(rectangle: Tensor) -> int:
    """The ``n`` of a packed matrix."""
    rows, half = rectangle.shape[-2:]
    return 2 * half if rows == 2 * half + 1 else rows


def unpack(rectangle: Tensor) -> Tensor:
    """The symmetric matrix."""
    n, half = order_of(rectangle), rectangle.shape[-1]
    shift = rectangle.shape[-2] - n
    result = rectangle.new_zeros(*rectangle.shape[:-2], n, n)
    result[..., :half] = rectangle[..., shift:, :].tril()
    result[..., half:, half:] = rectangle[..., : n - half, 1 - shift :].triu().mT
    return result + result.tril(-1).mT
