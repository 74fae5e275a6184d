"""Conjugate gradients against SciPy, dense solves and their own theory."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from helpers.problems import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ngd_optim import conjugate_gradient
from ngd_optim.linalg import cg
from ngd_optim.linalg.scalars import OnDevice

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
reproducible = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def spd(n, condition, seed=0, dtype=torch.float64):
    """A matrix with eigenvalues between 1 and ``condition``, and a right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    A = (Q * torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ Q.T
    return A.to(dtype), torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)


def model_value(A, b, x):
    """φ(x) = ½ xᵀA x − bᵀx."""
    return (0.5 * x @ A @ x - b @ x).item()


def assert_scalars(result, A, b):
    """The scalars that the recursion tracks are those of the solution."""
    x = result.solution
    tolerance = TOLERANCE[b.dtype]
    size = max((x @ b).abs().item(), (x.abs() @ A.abs() @ x.abs()).item())
    assert result.x_dot_b == pytest.approx((x @ b).item(), rel=tolerance, abs=tolerance * size)
    assert result.x_dot_r == pytest.approx((x @ (b - A @ x)).item(), abs=tolerance * size)
    assert result.x_dot_ax == pytest.approx((x @ A @ x).item(), rel=tolerance, abs=tolerance * size)
    assert result.residual == pytest.approx(
        ((b - A @ x).norm() / b.norm()).item(), rel=tolerance, abs=tolerance
    )


@pytest.mark.parametrize("start", ["zero", "near"])
@pytest.mark.parametrize(("n", "condition"), [(1, 1), (5, 10), (30, 30), (200, 30)])
def test_same_iterates_as_scipy(n, condition, start):
    A, b = spd(n, condition)
    x0 = (
        None
        if start == "zero"
        else torch.linalg.solve(A, b) * 0.9 + 0.01 * torch.randn(n, dtype=b.dtype)
    )
    theirs = []
    scipy.sparse.linalg.cg(
        A.numpy(),
        b.numpy(),
        x0=None if x0 is None else x0.numpy(),
        rtol=1e-5,
        callback=lambda x: theirs.append(x.copy()),
    )
    ours = conjugate_gradient(A.mv, b, x0=x0, tol=1e-5)
    assert ours.stop == "tolerance"
    assert ours.iterations == len(theirs)
    assert ours.products == ours.iterations + (start == "near")
    for i, x in enumerate(theirs, start=1):
        cut = conjugate_gradient(A.mv, b, x0=x0, tol=1e-5, max_iters=i)
        assert cut.iterations == i
        assert_near(cut.solution, torch.from_numpy(x))
        assert_scalars(cut, A, b)


@pytest.mark.parametrize("n", [1, 7, 40])
def test_same_solution_as_a_dense_solve(n):
    A, b = spd(n, 100)
    result = conjugate_gradient(A.mv, b, tol=1e-13)
    assert_near(result.solution, torch.linalg.solve(A, b), 1e-10)
    assert result.residual <= 1e-13
    assert_scalars(result, A, b)


@reproducible
@given(
    n=st.integers(1, 10),
    condition=st.floats(1, 10),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_properties(n, condition, seed, scale, dtype):
    A, b = spd(n, condition, seed, dtype)
    b = b * scale
    directions = []

    def matvec(p):
        directions.append(p.clone())
        return A @ p

    untouched = b.clone()
    tol = {torch.float32: 1e-3, torch.float64: 1e-6}[dtype]
    result = conjugate_gradient(matvec, b, tol=tol)
    assert result.stop == "tolerance"
    assert 1 <= result.iterations <= n
    assert result.products == result.iterations == len(directions)
    assert result.solution.dtype == dtype
    assert result.x_dot_b > 0
    assert torch.equal(b, untouched)
    assert ((b - A @ result.solution).norm() / b.norm()).item() <= 1.1 * tol
    assert_scalars(result, A, b)
    P = torch.stack(directions).double()
    P = P @ A.double() @ P.T
    P = P / P.diag().sqrt().outer(P.diag().sqrt())
    assert (P - torch.eye(len(P))).abs().max() < {torch.float32: 1e-2, torch.float64: 1e-8}[dtype]


@reproducible
@given(
    n=st.integers(2, 12),
    condition=st.floats(1, 30),
    seed=st.integers(0, 2**20),
    cut=st.integers(1, 12),
)
def test_every_iterate_is_a_descent_and_minimises_the_model_on_the_krylov_space(
    n, condition, seed, cut
):
    A, b = spd(n, condition, seed)
    result = conjugate_gradient(A.mv, b, tol=1e-4, max_iters=min(cut, n))
    x = result.solution
    assert (b @ x).item() > 0
    assert result.x_dot_ax <= result.x_dot_b * (1 + 1e-9)
    # Krylov basis from the definition, orthonormalised as it grows.
    basis = [b / b.norm()]
    while len(basis) < result.iterations:
        v = A @ basis[-1]
        for _ in range(2):
            v = v - sum((v @ q) * q for q in basis)
        basis.append(v / v.norm())
    V = torch.stack(basis, 1)
    best = V @ torch.linalg.solve(V.T @ A @ V, V.T @ b)
    assert model_value(A, b, x) == pytest.approx(model_value(A, b, best), rel=1e-8)


def worth_no_more(values, fraction):
    """First i where φ gained less per iteration, over the last max(3, i/10), than that fraction of φ(xᵢ)/(5 + i)."""
    for i, value in enumerate(values):
        k = max(3, i // 10)
        if i >= k and (values[i - k] - value) / k < fraction * -value / (5 + i):
            return i
    return None


@pytest.mark.parametrize(("fraction", "window"), [(1.5, 3), (1.0, 6), (0.9, 7)])
def test_progress_rule(fraction, window):
    A, b = (
        torch.logspace(0, 5, 300, dtype=torch.float64).diag(),
        torch.ones(300, dtype=torch.float64),
    )
    values = [
        model_value(A, b, conjugate_gradient(A.mv, b, tol=0.0, max_iters=i).solution)
        for i in range(250)
    ]
    expected = worth_no_more(values, fraction)
    result = conjugate_gradient(A.mv, b, tol=0.0, progress_tol=fraction, max_iters=1000)
    assert (result.stop, result.iterations) == ("progress", expected)
    assert max(3, expected // 10) == window
    assert_scalars(result, A, b)
    assert (
        conjugate_gradient(A.mv, b, tol=0.0, progress_tol=0.0, max_iters=expected + 1).stop
        == "max_iters"
    )


def test_good_start_is_used():
    A, b = spd(20, 100)
    exact = torch.linalg.solve(A, b)
    done = conjugate_gradient(A.mv, b, x0=exact)
    assert (done.iterations, done.products, done.stop) == (0, 1, "tolerance")
    assert_near(done.solution, exact, 1e-14)
    x0 = 0.9 * exact
    cut = conjugate_gradient(A.mv, b, x0=x0, max_iters=3)
    assert (cut.iterations, cut.products, cut.stop) == (3, 4, "max_iters")
    assert model_value(A, b, cut.solution) < model_value(A, b, x0)
    assert torch.equal(x0, 0.9 * exact)
    assert_scalars(cut, A, b)
    assert torch.equal(conjugate_gradient(A.mv, b, x0=x0, max_iters=0).solution, x0)


@pytest.mark.parametrize("times", [2.5, 1e3, 1e100])
def test_start_that_is_too_far_is_used_as_far_as_it_is_good(times):
    A, b = spd(20, 100)
    x0 = torch.linalg.solve(A, b) + 0.1 * torch.linspace(-1, 1, 20, dtype=b.dtype)
    best = (x0 @ b) / (x0 @ A @ x0) * x0
    result = conjugate_gradient(A.mv, b, x0=times * x0, max_iters=0)
    assert_near(result.solution, best, 1e-12)
    assert_scalars(result, A, b)
    later = conjugate_gradient(A.mv, b, x0=times * x0, max_iters=4)
    assert_near(later.solution, conjugate_gradient(A.mv, b, x0=best, max_iters=4).solution, 1e-8)
    assert later.products == 5


@pytest.mark.parametrize("times", [-1.0, math.nan, math.inf])
def test_bad_start_is_refused(times):
    A, b = spd(20, 100)
    result = conjugate_gradient(A.mv, b, x0=times * torch.linalg.solve(A, b), max_iters=7)
    from_zero = conjugate_gradient(A.mv, b, max_iters=7)
    assert torch.equal(result.solution, from_zero.solution)
    assert result.products == from_zero.products + 1
    assert result.residual == from_zero.residual


def test_zero_start_costs_nothing():
    A, b = spd(6, 10)
    assert conjugate_gradient(A.mv, b, x0=torch.zeros(6, dtype=b.dtype), max_iters=2).products == 2


def test_start_is_rewarded_in_the_progress_rule():
    A, b = (
        torch.logspace(0, 5, 300, dtype=torch.float64).diag(),
        torch.ones(300, dtype=torch.float64),
    )
    x0 = conjugate_gradient(A.mv, b, tol=0.0, max_iters=150).solution
    result = conjugate_gradient(A.mv, b, x0=x0, tol=0.0, progress_tol=0.5, max_iters=1000)
    assert (result.stop, result.iterations) == ("progress", 3)


@pytest.mark.parametrize("eigenvalue", [-1.0, 0.0])
def test_negative_curvature_at_once_gives_the_right_hand_side(eigenvalue):
    A, b = (
        torch.tensor([[eigenvalue, 0], [0, 2]], dtype=torch.float64),
        torch.tensor([3.0, 0], dtype=torch.float64),
    )
    result = conjugate_gradient(A.mv, b)
    assert (result.stop, result.iterations) == ("negative_curvature", 1)
    assert torch.equal(result.solution, b)
    assert_scalars(result, A, b)


def test_negative_curvature_later_gives_the_last_iterate():
    A, b = spd(12, 1e3)
    A = A - 1.5 * torch.eye(12, dtype=A.dtype)
    result = conjugate_gradient(A.mv, b, tol=1e-12)
    assert result.stop == "negative_curvature"
    assert result.iterations > 2
    before = conjugate_gradient(A.mv, b, tol=1e-12, max_iters=result.iterations - 1)
    assert before.stop == "max_iters"
    assert torch.equal(result.solution, before.solution)
    assert_scalars(result, A, b)


@pytest.mark.parametrize("boundary", [1e-3, 50.0])
@pytest.mark.parametrize("first", [True, False])
def test_negative_curvature_is_followed_to_the_boundary(first, boundary):
    """To xᵀA x + τ² |pᵀA p| = boundary, from the last iterate x along the last direction p."""
    A, b = spd(12, 30, seed=1)  # the fourth of twelve iterations meets it: no matter of rounding
    A = A - (1e4 if first else 1.5) * torch.eye(12, dtype=A.dtype)
    directions = []

    def matvec(p):
        directions.append(p.clone())
        return A @ p

    result = conjugate_gradient(matvec, b, tol=1e-12, boundary=boundary)
    assert result.stop == "negative_curvature"
    assert (result.iterations == 1) == first
    x = conjugate_gradient(A.mv, b, tol=1e-12, max_iters=result.iterations - 1).solution
    p = directions[-1]
    room = max(0.0, boundary - (x @ A @ x).item())
    assert (room > 0) == (first or boundary > 1)
    assert_near(result.solution, x + (room / (p @ A @ p).abs()).sqrt() * p)
    assert model_value(A, b, result.solution) <= model_value(A, b, x) + 1e-12
    assert_scalars(result, A, b)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_product_that_is_not_finite_gives_the_last_iterate(at, poison):
    A, b = spd(8, 100)
    calls = []

    def matvec(p):
        calls.append(1)
        return A @ p * (poison if len(calls) == at else 1.0)

    result = conjugate_gradient(matvec, b)
    assert (result.stop, result.iterations) == ("not_finite", at)
    assert result.not_finite == "product"
    assert torch.equal(result.solution, conjugate_gradient(A.mv, b, max_iters=at - 1).solution)
    assert_scalars(result, A, b)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("start", [None, "given"])
def test_a_right_hand_side_that_is_not_finite_gives_zero(poison, start):
    A, b = spd(8, 100)
    b[3] = poison
    result = conjugate_gradient(A.mv, b, x0=None if start is None else torch.ones_like(b))
    assert (result.stop, result.iterations) == ("not_finite", 0)
    assert result.not_finite == "b"
    assert not result.solution.any()


@pytest.mark.parametrize("x0", [None, torch.zeros(8), torch.ones(8)])
def test_zero_right_hand_side(x0):
    A, _ = spd(8, 100, dtype=torch.float32)
    result = conjugate_gradient(A.mv, torch.zeros(8), x0=x0)
    assert (result.stop, result.iterations, result.residual) == ("tolerance", 0, 0.0)
    assert not result.solution.any()
    assert (result.x_dot_b, result.x_dot_r, result.x_dot_ax) == (0.0, 0.0, 0.0)


def test_no_iterations():
    A, b = spd(8, 100)
    result = conjugate_gradient(A.mv, b, max_iters=0)
    assert (result.stop, result.iterations, result.products, result.residual) == (
        "max_iters",
        0,
        0,
        1.0,
    )
    assert not result.solution.any()


@pytest.mark.parametrize(
    ("b", "arguments", "message"),
    [
        (torch.ones(2, 2), {}, r"b must be a vector, got shape \(2, 2\)"),
        (torch.ones(2), {"x0": torch.ones(3)}, r"x0 must have the shape of b, \(2,\), got \(3,\)"),
        (torch.ones(2), {"max_iters": -1}, "max_iters must be at least 0, got -1"),
        (torch.ones(2), {"tol": -1e-3}, "tol must be at least 0, got -0.001"),
        (torch.ones(2), {"tol": math.nan}, "tol must be at least 0, got nan"),
        (torch.ones(2), {"progress_tol": -0.5}, "progress_tol must be at least 0, got -0.5"),
        (torch.ones(2), {"progress_tol": math.nan}, "progress_tol must be at least 0, got nan"),
    ],
)
def test_bad_arguments(b, arguments, message):
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(lambda v: v, b, **arguments)


def test_singular_but_consistent_system():
    """The solution is the one of least norm, which lies in the Krylov space."""
    J = torch.randn(5, 9, dtype=torch.float64)
    b = J.T @ torch.randn(5, dtype=torch.float64)
    result = conjugate_gradient(lambda v: J.T @ (J @ v), b, tol=1e-12)
    assert_near(result.solution, torch.from_numpy(np.linalg.pinv((J.T @ J).numpy()) @ b.numpy()))


def preconditioners(A):
    """Of all kinds: exact, good, useless and bad ones, all positive definite."""
    n = len(A)
    inverse = torch.linalg.inv(A)
    other = spd(n, 5, seed=3)[0]
    return {
        "itself": lambda r: r,
        "constant": lambda r: 2**-10 * r,  # which rounds nothing
        "diagonal": lambda r: r / A.diag(),
        "exact": lambda r: inverse @ r,
        "near": lambda r: inverse @ r + 0.01 * r,
        "unrelated": lambda r: other @ r,
    }


PRECONDITIONERS = list(preconditioners(torch.eye(2)))


def starts(A, b):
    return {"zero": None, "near": 0.9 * torch.linalg.solve(A, b) + 0.01 * b}


@pytest.mark.parametrize("start", ["zero", "near"])
@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_same_preconditioned_iterates_as_scipy(name, start):
    A, b = spd(30, 30)
    M, x0 = preconditioners(A)[name], starts(A, b)[start]
    theirs = []
    scipy.sparse.linalg.cg(
        A.numpy(),
        b.numpy(),
        x0=None if x0 is None else x0.numpy(),
        M=scipy.sparse.linalg.LinearOperator(
            A.shape, lambda r: M(torch.from_numpy(r)).numpy(), dtype=np.float64
        ),
        rtol=1e-3,
        callback=lambda x: theirs.append(x.copy()),
    )
    ours = conjugate_gradient(A.mv, b, x0=x0, tol=1e-3, preconditioner=M)
    assert (ours.stop, ours.iterations) == ("tolerance", len(theirs))
    assert ours.products == ours.iterations + (start == "near")
    for i, x in enumerate(theirs, start=1):
        cut = conjugate_gradient(A.mv, b, x0=x0, tol=1e-3, max_iters=i, preconditioner=M)
        assert_near(cut.solution, torch.from_numpy(x))
        assert_scalars(cut, A, b)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_the_preconditioner_changes_the_speed_and_not_the_solution(name):
    A, b = spd(40, 1e3)
    result = conjugate_gradient(A.mv, b, tol=1e-12, preconditioner=preconditioners(A)[name])
    assert result.stop == "tolerance"
    assert_near(result.solution, torch.linalg.solve(A, b), 1e-9)
    plain = conjugate_gradient(A.mv, b, tol=1e-12).iterations
    assert result.iterations <= {
        "exact": 1,
        "constant": plain,
        "itself": plain,
        "near": plain // 2,
    }.get(name, 3 * plain)


def test_the_progress_rule_sees_the_model_of_a_preconditioned_solve():
    """Its value comes from rᵀM⁻¹r, not from rᵀr."""
    A, b = (
        torch.logspace(0, 5, 300, dtype=torch.float64).diag(),
        torch.ones(300, dtype=torch.float64),
    )
    M = lambda r: r / A.diag().sqrt()  # noqa: E731
    settings = {"tol": 0.0, "preconditioner": M}
    result = conjugate_gradient(A.mv, b, progress_tol=0.5, max_iters=300, **settings)
    values = [
        model_value(A, b, conjugate_gradient(A.mv, b, max_iters=i, **settings).solution)
        for i in range(100)
    ]
    assert (result.stop, result.iterations) == ("progress", worth_no_more(values, 0.5))


def test_a_residual_that_is_small_enough_is_not_preconditioned():
    A, b = spd(8, 100)
    calls = []

    def preconditioner(r):
        calls.append(1)
        return r / A.diagonal()

    result = conjugate_gradient(A.mv, b, preconditioner=preconditioner)
    assert (result.stop, len(calls)) == ("tolerance", result.iterations)
    assert conjugate_gradient(A.mv, 0 * b, preconditioner=preconditioner).iterations == 0
    assert len(calls) == result.iterations


@pytest.mark.parametrize(("sign", "starting"), [(-1.0, 0), (0.0, 0), (-1.0, 3)])
def test_a_preconditioner_that_is_not_positive_definite_is_refused(sign, starting):
    A, b = spd(8, 100)
    calls = []

    def preconditioner(r):
        calls.append(1)
        return r if len(calls) <= starting else sign * r

    with pytest.raises(
        ValueError, match=r"the preconditioner must be positive definite, .* rᵀM⁻¹r = -?\d"
    ):
        conjugate_gradient(A.mv, b, tol=1e-12, preconditioner=preconditioner)
    assert len(calls) == starting + 1


def test_a_preconditioner_that_is_not_finite_gives_the_last_iterate():
    A, b = spd(8, 100)
    calls = []

    def preconditioner(r):
        calls.append(1)
        return r * (math.nan if len(calls) == 4 else 1.0)

    result = conjugate_gradient(A.mv, b, tol=1e-12, preconditioner=preconditioner)
    assert (result.stop, result.iterations) == ("not_finite", 3)
    assert result.not_finite == "preconditioner"
    assert torch.equal(
        result.solution, conjugate_gradient(A.mv, b, tol=1e-12, max_iters=3).solution
    )


def test_preconditioned_negative_curvature():
    A, b = spd(12, 1e3)
    M = lambda r: r / A.diag()  # noqa: E731
    indefinite = A - 1.5 * torch.eye(12, dtype=A.dtype)
    result = conjugate_gradient(indefinite.mv, b, tol=1e-12, preconditioner=M)
    assert result.stop == "negative_curvature"
    before = conjugate_gradient(
        indefinite.mv, b, tol=1e-12, max_iters=result.iterations - 1, preconditioner=M
    )
    assert torch.equal(result.solution, before.solution)
    first = conjugate_gradient((-A).mv, b, preconditioner=M)
    assert (first.stop, first.iterations) == ("negative_curvature", 1)
    assert torch.equal(first.solution, M(b))


ILL = torch.logspace(0, 5, 300, dtype=torch.float64)
WELL = torch.logspace(0, 2, 300, dtype=torch.float64)
EIGHT = torch.logspace(0, 2, 8, dtype=torch.float64).repeat(5)
ONES = torch.ones(300, dtype=torch.float64)


def poisoned(at):
    """A diagonal matrix whose product is NaN once."""
    calls = []

    def matvec(p):
        calls.append(1)
        return ILL * p * (math.nan if len(calls) == at else 1.0)

    return matvec


ENDINGS = {
    "tolerance": (lambda: WELL.mul, ONES, {}),
    "tolerance at once": (lambda: ILL.mul, 0 * ONES, {}),
    "tolerance at a look": (lambda: EIGHT.mul, ONES[:40], {"tol": 1e-9}),
    "tolerance at the last iteration": (
        lambda: EIGHT.mul,
        ONES[:40],
        {"tol": 1e-9, "max_iters": 8},
    ),
    "tolerance, preconditioned": (
        lambda: ILL.mul,
        ONES,
        {"preconditioner": lambda r: r / (1 + ILL)},
    ),
    "tolerance, from a start": (lambda: WELL.mul, ONES, {"x0": 0.5 * ONES / WELL.sqrt()}),
    "progress": (lambda: ILL.mul, ONES, {"tol": 0.0, "progress_tol": 1.0}),
    "max_iters": (lambda: ILL.mul, ONES, {"tol": 0.0, "max_iters": 13}),
    "max_iters at once": (lambda: ILL.mul, ONES, {"max_iters": 0}),
    "negative_curvature": (lambda: (ILL - 20).mul, ONES, {}),
    "negative_curvature at once": (lambda: torch.neg, ONES, {}),
    "negative_curvature, to a boundary": (lambda: (ILL - 20).mul, ONES, {"boundary": 100.0}),
    "not_finite, a product": (lambda: poisoned(5), ONES, {}),
    "not_finite at once": (lambda: ILL.mul, ONES * math.nan, {}),
}


class TestAccelerator:
    """The solve as it runs on an accelerator, here on the CPU."""

    @pytest.mark.parametrize("name", ENDINGS)
    def test_stops_where_the_host_does(self, name, monkeypatch):
        matvec, b, settings = ENDINGS[name]
        host = conjugate_gradient(matvec(), b, **settings)
        monkeypatch.setattr(cg, "choose_scalars", lambda device: OnDevice)
        device = conjugate_gradient(matvec(), b, **settings)
        assert host.stop == name.split(" at ")[0].split(",")[0]
        assert (device.stop, device.iterations) == (host.stop, host.iterations)
        assert (host.iterations == 0) == (
            name.endswith("at once") and host.stop != "negative_curvature"
        )
        if host.solution.any():
            assert_near(device.solution, host.solution, 1e-12)
        else:
            assert not device.solution.any()
        for scalar in ("residual", "x_dot_b", "x_dot_r"):
            assert getattr(device, scalar) == pytest.approx(
                getattr(host, scalar), rel=1e-9, abs=1e-12, nan_ok=True
            )
        until_seen = -(-host.iterations // 8) * 8
        formed = min(until_seen, settings.get("max_iters", 250)) + ("x0" in settings)
        assert (host.products, device.products) == (host.iterations + ("x0" in settings), formed)

    def test_every_iterate(self, monkeypatch):
        host = [
            conjugate_gradient(ILL.mul, ONES, tol=0.0, max_iters=i).solution for i in range(1, 30)
        ]
        monkeypatch.setattr(cg, "choose_scalars", lambda device: OnDevice)
        for i, x in enumerate(host, start=1):
            assert_near(conjugate_gradient(ILL.mul, ONES, tol=0.0, max_iters=i).solution, x, 1e-12)

    def test_float32_keeps_its_type(self, monkeypatch):
        monkeypatch.setattr(cg, "choose_scalars", lambda device: OnDevice)
        A, b = spd(30, 10, dtype=torch.float32)
        result = conjugate_gradient(A.mv, b, tol=1e-4)
        assert (result.stop, result.solution.dtype) == ("tolerance", torch.float32)
        assert_near(result.solution, torch.linalg.solve(A, b), 1e-3)

    def test_an_indefinite_preconditioner_is_refused(self, monkeypatch):
        monkeypatch.setattr(cg, "choose_scalars", lambda device: OnDevice)
        with pytest.raises(
            ValueError,
            match=r"must be positive definite, .* rᵀM⁻¹r = -300; use one that is, or None$",
        ):
            conjugate_gradient(ILL.mul, ONES, preconditioner=torch.neg)

    @pytest.mark.parametrize("preconditioner", [None, lambda r: r / ILL.sqrt()])
    def test_the_host_reads_only_when_it_looks(self, preconditioner, monkeypatch):
        monkeypatch.setattr(cg, "choose_scalars", lambda device: OnDevice)
        events = []

        class Reads(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                # On the CPU several numbers are read one after the other, at one look.
                if func is torch.ops.aten._local_scalar_dense.default and events[-1:] != ["read"]:
                    events.append("read")
                return func(*args, **(kwargs or {}))

        def matvec(v):
            events.append("product")
            return ILL * v

        with Reads():
            conjugate_gradient(
                matvec,
                ONES,
                tol=0.0,
                progress_tol=1e-9,
                max_iters=40,
                preconditioner=preconditioner,
            )
        loop = events[events.index("product") : len(events) - events[::-1].index("product")]
        assert loop == (["product"] * 8 + ["read"]) * 4 + ["product"] * 8
