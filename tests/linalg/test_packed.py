"""Packed symmetric matrices."""

import pytest
import torch

from ngd_optim.linalg import pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [*range(1, 9), 33, 64])
def test_packing_loses_nothing_and_takes_half_the_memory(n, dtype):
    A = torch.randn(3, n, n, dtype=dtype)
    A = A + A.mT
    P = pack(A)
    assert P.numel() == 3 * n * (n + 1) // 2
    assert P.dtype == dtype
    assert torch.equal(unpack(P), A)


def test_only_the_lower_triangle_counts():
    A = torch.randn(7, 7)
    assert torch.equal(unpack(pack(A)), A.tril() + A.tril(-1).mT)
    assert torch.equal(pack(A), pack(A.tril()))


@pytest.mark.parametrize("n", [4, 5])
def test_means_of_packed_matrices_are_packed_means(n):
    A, B = (x + x.mT for x in torch.randn(2, n, n, dtype=torch.float64))
    torch.testing.assert_close(unpack(pack(A).lerp(pack(B), 0.3)), A.lerp(B, 0.3))
