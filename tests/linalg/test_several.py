"""Several right-hand sides, against dense solves."""

import pytest
import torch
from helpers.problems import assert_near, seeded

from ngd_optim import LinearSolutions

N = 30


def matrix(condition=1e3, seed=0):
    Q, _ = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64, generator=seeded(seed)))
    return Q * torch.logspace(0, -torch.tensor(condition).log10().item(), N, dtype=Q.dtype) @ Q.T


def sides(k, seed=1):
    return torch.randn(k, N, dtype=torch.float64, generator=seeded(seed))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_solutions_and_scalars_are_those_of_the_dense_matrix(k, scale):
    A, B = matrix(), sides(k)
    B[-1] *= scale
    found = LinearSolutions.find(A.mv, B, tol=1e-12, max_iters=200)
    true = torch.linalg.solve(A, B.T).T
    for x, y in zip(found.solutions, true, strict=True):
        assert_near(x / y.norm(), y / y.norm())
    size = (true * B).sum(1).sqrt()
    assert_near(found.scalars / size / size[:, None], B @ true.T / size / size[:, None])
    assert found.is_finite


@pytest.mark.parametrize("max_iters", [1, 2, 5])
def test_scalars_hold_exactly_however_early_the_solves_are_cut_off(max_iters):
    A, B = matrix(), sides(2)
    found = LinearSolutions.find(A.mv, B, max_iters=max_iters, tol=0.0)
    X = found.solutions
    assert_near(found.scalars, B @ X.T, 1e-10)
    assert_near(found.scalars, X @ A @ X.T, 1e-10)
    assert found.products == 2 * max_iters + 2
    # In the norm of A the projection is at least as near to the solution as each solve alone.
    true = torch.linalg.solve(A, B.T).T
    for x, y, solve in zip(X, true, found.solves, strict=True):
        error, alone = ((v - y) @ A @ (v - y) for v in (x, solve.solution))
        assert error <= alone * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_hand_sides_that_are_parallel_or_zero(dtype):
    A = matrix().to(dtype)
    b = sides(1)[0].to(dtype)
    found = LinearSolutions.find(A.mv, torch.stack([b, -2 * b, 0 * b]), tol=1e-7, max_iters=500)
    x = torch.linalg.solve(A.double(), b.double())
    factors = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    rtol = 1e-3 if dtype == torch.float32 else 1e-6
    assert_near(found.solutions.double(), factors[:, None] * x, rtol)
    assert_near(found.scalars, factors[:, None] * factors * (b.double() @ x), rtol)


@pytest.mark.parametrize("where", ["right_side", "product"])
def test_what_is_not_finite_is_told(where):
    A, B = matrix(), sides(2)
    if where == "right_side":
        B[1, 0] = torch.inf
    else:
        A = A * torch.nan
    found = LinearSolutions.find(A.mv, B)
    assert not found.is_finite
    assert found.scalars.isnan().all()
    assert [s.stop for s in found.solves].count("not_finite") == (1 if where == "right_side" else 2)
