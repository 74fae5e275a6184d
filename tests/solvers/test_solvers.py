"""Direct solvers and the steps that they make, against dense float64 matrices."""

import pytest
import torch
import torch.nn.functional as F
from helpers.classics import NIST
from helpers.outputs import FORMS, Problem
from helpers.problems import (
    BATCH,
    assert_near,
    dense_gauss_newton,
    flat_function,
    flatten,
)
from torch import nn
from torch.func import jacrev

from ngd_optim import NaturalCG, least_squares, linearize
from ngd_optim.jacobian import SqrtGGN
from ngd_optim.parameters import FlatParameters
from ngd_optim.solvers import direct
from ngd_optim.solvers.direct import LeastSquares, Matrix, SampleSpace
from ngd_optim.solvers.quadratic_model import QuadraticModel


def tanh_net(outputs=1):
    return nn.Sequential(
        nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)
    ).double()


def identity(like):
    return torch.eye(len(like), dtype=torch.float64)


@pytest.mark.parametrize("scale", ["identity", "diagonal"])
@pytest.mark.parametrize("solver", ["dense", "sample"])
@pytest.mark.parametrize("form", FORMS)
def test_step_is_that_of_the_dense_matrix_and_of_exact_conjugate_gradients(form, solver, scale):
    fixed = {"damping": 1e-3, "adapt_damping": False, "damping_scale": scale, "weight_decay": 1e-2}
    problem = Problem(form)
    steps = {}
    for name in (solver, "cg"):
        twin = Problem(form)
        optimizer = NaturalCG(
            twin.model.parameters(),
            solver=name,
            cg_tol=1e-14,
            cg_progress_tol=0.0,
            max_kl=None,
            max_backtracks=0,
            **fixed,
        )
        optimizer.step(twin.closure)
        steps[name] = flatten(twin.model.parameters()) - twin.theta
        report = optimizer.last_step
        assert report.solver == name
        assert report.cg_stop == ("tolerance" if name == "cg" else "exact")
        predicted = 0.5 * steps[name] @ problem.curvature @ steps[name]
        assert report.kl == pytest.approx(predicted.item(), rel=1e-6) or form == "normal"
    diagonal = problem.curvature.diagonal()
    damping = 1e-3 * (
        torch.ones_like(diagonal) if scale == "identity" else diagonal.where(diagonal > 0, 1)
    )
    system = problem.curvature + (damping + 1e-2).diag()
    truth = -torch.linalg.solve(system, problem.gradient + 1e-2 * problem.theta)
    assert_near(steps[solver], truth, 1e-9)
    assert_near(steps[solver], steps["cg"], 1e-8)


@pytest.mark.parametrize("solver", ["dense", "sample"])
def test_gradient_from_elsewhere(solver):
    """The curvature may come from another closure, in whose rows the gradient does not lie."""
    problem, other = Problem("least_squares"), Problem("cross_entropy")
    optimizer = NaturalCG(
        problem.model.parameters(),
        solver=solver,
        damping=0.1,
        adapt_damping=False,
        max_backtracks=0,
        damping_scale="identity",
    )
    x = torch.randn(BATCH, 3, dtype=torch.float64)
    labels = torch.arange(BATCH) % 3
    optimizer.step(
        problem.closure, curvature_closure=lambda: F.cross_entropy(problem.model(x), labels)
    )
    curvature = dense_gauss_newton(
        flat_function(other.model, x), problem.theta, lambda z: F.cross_entropy(z, labels)
    )
    truth = -torch.linalg.solve(curvature + 0.1 * identity(curvature), problem.gradient)
    assert_near(flatten(problem.model.parameters()) - problem.theta, truth, 1e-9)


def test_dense_solver_of_a_hessian_raises_the_damping_until_it_is_definite():
    theta = nn.Parameter(torch.tensor([0.1, 0.2], dtype=torch.float64))
    optimizer = NaturalCG([theta], solver="dense", damping=1e-3, damping_scale="identity")

    def closure():
        return -(theta[0] ** 2) + theta[0] ** 4 + theta[1] ** 2

    for _ in range(30):
        optimizer.step(closure)
    assert optimizer.last_step.solver == "dense"
    assert closure().item() == pytest.approx(-0.25, abs=1e-12)


def test_more_damping_needs_no_new_jacobian():
    problem = Problem("least_squares")
    parameters = FlatParameters([{"params": list(problem.model.parameters())}])
    root = linearize(problem.closure, parameters.tensors)._point.square_root()
    for solver in (
        LeastSquares(root),
        SampleSpace(root),
        Matrix(lambda v: problem.curvature @ v, problem.gradient),
    ):
        for damping in (1.0, 1e-2, 3.0):
            model = QuadraticModel(problem.gradient, lambda v: problem.curvature @ v, 0.0, damping)
            system = problem.curvature + damping * identity(problem.curvature)
            result = solver.solve(model)
            assert_near(result.solution, -torch.linalg.solve(system, problem.gradient), 1e-10)
            assert result.residual < 1e-10
            assert result.x_dot_ax == pytest.approx(
                (result.solution @ system @ result.solution).item(), rel=1e-10
            )


@pytest.mark.parametrize(
    ("damping", "dtype", "is_refined"),
    [
        (1.0, torch.float64, True),
        (1e-6, torch.float64, True),
        (1e-12, torch.float64, True),
        (1e-16, torch.float64, False),
        (1e-20, torch.float64, False),
        (1e-1, torch.float32, True),
        (1e-9, torch.float32, False),
    ],
)
@pytest.mark.parametrize("decays", [False, True])
def test_refined_solutions_are_as_exact_as_those_of_a_qr(damping, dtype, is_refined, decays):
    """Singular values from 1 to 1e-9; with little damping the normal equations are singular, and a QR solves."""
    m, n = 400, 260
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(k, n, dtype=torch.float64)).Q for k in (m, n))
    A = (left * torch.logspace(0, -9, n, dtype=torch.float64) @ right.T).to(dtype)
    s, theta = torch.randn(m, dtype=torch.float64).to(dtype), torch.randn(n).to(dtype)
    decay = 1e-3 * damping if decays else 0.0
    model = QuadraticModel(A.T @ s + decay * theta, lambda v: A.T @ (A @ v), decay, damping)
    solver = LeastSquares(SqrtGGN(A, s, lambda: None))
    found = solver.solve(model)
    assert solver._is_refined == is_refined
    # ‖A x + s‖² + ‖√(W + λ) x + √(W + λ)⁻¹ W θ‖², a least-squares problem with more rows.
    root = (damping + decay) ** 0.5
    rows = torch.cat([A.double(), root * torch.eye(n, dtype=torch.float64)])
    right_side = torch.cat([s.double(), decay / root * theta.double()])
    truth = -torch.linalg.lstsq(rows, right_side.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    # That of a backward stable solution: the condition number of the rows is 1 / root.
    bound = 100 * torch.finfo(dtype).eps / min(root, 1.0)
    error = (rows @ (found.solution.double() - truth)).norm() / (rows @ truth).norm()
    assert error < bound
    u = torch.randn(m, dtype=torch.float64).to(dtype)
    pulled = torch.linalg.lstsq(
        rows, torch.cat([u, torch.zeros(n, dtype=dtype)]).double().unsqueeze(1), driver="gelsd"
    ).solution.squeeze(1)
    error = (rows @ (solver.pull_back(u).double() - pulled)).norm() / (rows @ pulled).norm()
    assert error < bound


def test_a_pull_back_that_cannot_be_refined_takes_a_qr(monkeypatch):
    A = torch.randn(300, 260, dtype=torch.float64)
    solver = LeastSquares(SqrtGGN(A, A[:, 0], lambda: None))
    solver.solve(QuadraticModel(A.T @ A[:, 0], lambda v: A.T @ (A @ v), 0.0, 0.5))
    assert solver._is_refined
    monkeypatch.setattr(direct.RefinedCholesky, "solve", lambda *_: None)
    u = torch.randn(300, dtype=torch.float64)
    truth = torch.linalg.solve(A.T @ A + 0.5 * identity(A.T), A.T @ u)
    assert_near(solver.pull_back(u), truth, 1e-9)


def test_few_parameters_are_left_to_a_qr():
    A = torch.randn(50, 20, dtype=torch.float64)
    solver = LeastSquares(SqrtGGN(A, A[:, 0], lambda: None))
    solver.solve(QuadraticModel(A.T @ A[:, 0], lambda v: A.T @ (A @ v), 0.0, 1.0))
    assert not solver._is_refined


@pytest.mark.parametrize(
    ("outputs", "samples", "chosen"),
    [(1, 12, "sample"), (1, 80, "dense"), (2, 12, "sample"), (2, 40, "dense")],
)
def test_auto_solves_where_it_is_cheaper(outputs, samples, chosen):
    model = tanh_net(outputs)  # 59 parameters, or 65
    x = torch.rand(samples, 2, dtype=torch.float64)
    optimizer = NaturalCG(model.parameters())
    optimizer.step(lambda: least_squares(model(x) - 1.0))
    assert optimizer.last_step.solver == chosen
    optimizer.step(lambda: F.mse_loss(model(x), torch.ones(samples, outputs).double()))
    assert optimizer.last_step.solver == "cg"


def test_auto_leaves_large_problems_to_conjugate_gradients():
    model = nn.Linear(80, 80)
    x = torch.randn(100, 80)
    optimizer = NaturalCG(model.parameters())
    optimizer.step(lambda: least_squares(model(x) - x))  # 6,480 parameters and 8,000 residuals
    assert optimizer.last_step.solver == "cg"


def test_a_rejected_solution_is_solved_again_at_the_same_jacobian():
    theta = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = NaturalCG([theta], damping=1e-6)

    def closure():  # Rosenbrock
        return least_squares(torch.stack([10 * (theta[1] - theta[0] ** 2), 1 - theta[0]]))

    before = optimizer.step(closure).item()
    report = optimizer.last_step
    assert report.accepted
    assert report.backtracks > 0
    assert report.damping > 1e-6
    assert report.new_loss < before
    # A look along each solution; where the residuals bend too much, a point is not even tried.
    assert 3 + report.backtracks <= report.n_forward <= 1 + 2 * (report.backtracks + 1)


@pytest.mark.parametrize("solver", ["dense", "sample"])
def test_geodesic_acceleration_is_the_second_order_path(solver):
    """The correction is −½ (F + λ)⁻¹ Jᵀ r″ with r″ the residuals' second derivative along the step."""
    steps = {}
    for geodesic in (False, True):
        theta = nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))
        x = torch.linspace(0, 1, 2 if solver == "sample" else 7, dtype=torch.float64)

        def residuals(b, x=x):
            return b[0] * (b[1] * x).exp() + b[2] * x - 0.5

        optimizer = NaturalCG(
            [theta],
            solver=solver,
            damping=1.0,
            adapt_damping=False,
            damping_scale="identity",
            geodesic=geodesic,
        )
        before = theta.detach().clone()
        optimizer.step(lambda theta=theta, residuals=residuals: least_squares(residuals(theta)))
        assert optimizer.last_step.step_scale == 1.0
        steps[geodesic] = theta.detach() - before
    J, d = jacrev(residuals)(before), steps[False]
    second = torch.func.jvp(lambda b: torch.func.jvp(residuals, (b,), (d,))[1], (before,), (d,))[1]
    correction = torch.linalg.solve(J.T @ J / len(x) + identity(J.T), -0.5 * J.T @ second / len(x))
    assert_near(steps[True] - d, correction, 1e-2)  # a finite difference over a tenth of the step


@pytest.mark.parametrize("adapt_damping", [True, False])
def test_a_step_along_which_residuals_bend_too_much_is_shortened_by_damping(adapt_damping):
    """Each attempt looks along its solution; none but the last is tried. A damping that is given is kept."""
    theta = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = NaturalCG([theta], damping=1e-3, adapt_damping=adapt_damping)
    optimizer.step(lambda: least_squares(torch.stack([theta[0] ** 4 + 1, 0.01 * theta[0]])))
    report = optimizer.last_step
    assert report.accepted
    if not adapt_damping:
        assert report.damping == 1e-3
        return
    assert report.backtracks > 0
    assert report.damping > 1e-3
    assert report.n_forward == 3 + report.backtracks


def test_a_first_step_is_not_many_times_as_long_as_the_parameters():
    """From (1, 1) a Gauss-Newton step along an exponential's tail would end where nothing has a slope any more."""
    problem = NIST["BoxBOD"]
    start = torch.tensor(problem.starts[0], dtype=torch.float64)
    theta = nn.Parameter(start.clone())
    optimizer = NaturalCG([theta])
    optimizer.step(lambda: least_squares(problem.residuals(theta)))
    assert optimizer.last_step.backtracks > 0
    scale = jacrev(problem.residuals)(start).square().mean(0).sqrt()
    assert (scale * (theta.detach() - start)).norm() <= 15 * (scale * start).norm()


@pytest.mark.parametrize("solver", ["cg", "dense", "sample"])
def test_momentum_is_spring(solver):
    """``x = argmin ½ ‖A x + s‖² + ½ λ ‖x − μ x_before‖²`` (Goldshlager, Abrahamsen & Lin 2024, equation 23)."""
    problem = Problem("least_squares")
    optimizer = NaturalCG(
        problem.model.parameters(),
        solver=solver,
        momentum=0.9,
        damping=0.3,
        adapt_damping=False,
        damping_scale="identity",
        max_backtracks=0,
        geodesic=False,
        cg_tol=1e-14,
        cg_progress_tol=0.0,
    )
    last = torch.zeros_like(problem.theta)
    for _ in range(3):
        theta = flatten(problem.model.parameters())
        twin = Problem("least_squares", theta)
        system = twin.curvature + 0.3 * identity(twin.curvature)
        last = torch.linalg.solve(system, 0.3 * 0.9 * last - twin.gradient)
        optimizer.step(problem.closure)
        assert_near(flatten(problem.model.parameters()) - theta, last, 1e-8)


def test_momentum_that_leads_uphill_is_left_out():
    problem = Problem("least_squares")
    optimizer = NaturalCG(problem.model.parameters(), solver="dense", momentum=0.99, damping=10.0)
    optimizer.step(problem.closure)
    point = linearize(problem.closure, problem.model.parameters())
    uphill = FlatParameters(optimizer.param_groups).unflatten(
        10 * point.gradient / point.gradient.norm()
    )
    for p, wrong in zip(problem.model.parameters(), uphill, strict=True):
        optimizer.state[p]["solution"] = wrong
    optimizer.step(problem.closure)
    assert optimizer.last_step.accepted
    assert optimizer.last_step.new_loss < optimizer.last_step.loss


def test_sample_solver_refuses_what_has_no_outputs():
    theta = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="solver='sample' needs one closure"):
        NaturalCG([theta], solver="sample").step(lambda: theta.square().sum())
    model = nn.Linear(2, 1)
    closures = [lambda: least_squares(model(torch.ones(3, 2)))] * 2
    with pytest.raises(ValueError, match="solver='sample' needs one closure"):
        NaturalCG(model.parameters(), solver="sample").step(closures)


def test_indefinite_metric_at_the_outputs():
    model = nn.Linear(2, 3).double()
    x = torch.randn(4, 2, dtype=torch.float64)

    def closure():  # weighs one sample's loss negatively
        return (
            F.mse_loss(model(x), x[:, :1], reduction="none") * torch.tensor([1.0, -1.0, 1.0])
        ).mean()

    with (
        pytest.warns(UserWarning, match="target size"),
        pytest.raises(ValueError, match="not positive semidefinite"),
    ):
        NaturalCG(model.parameters(), solver="sample").step(closure)


@pytest.mark.parametrize(
    ("name", "value"),
    [("solver", "qr"), ("damping_scale", "trace"), ("momentum", 1.0), ("momentum", -0.1)],
)
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=name):
        NaturalCG([nn.Parameter(torch.ones(1))], **{name: value})


def test_scaled_damping_with_cg_needs_the_diagonal():
    x = nn.Parameter(torch.ones(3))
    optimizer = NaturalCG([x], solver="cg", damping_scale="diagonal")
    with pytest.raises(
        ValueError, match=r"damping_scale='diagonal' needs one closure.* else use 'identity'"
    ):
        optimizer.step(lambda: x.pow(4).sum())
    assert torch.equal(x, torch.ones(3))


@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_a_diagonal_that_is_not_finite_is_forgotten(solver):
    x = nn.Parameter(torch.ones(3))
    optimizer = NaturalCG([x], solver=solver, damping_scale="diagonal")
    optimizer.step(lambda: least_squares(x * torch.nan))
    assert not optimizer.last_step.accepted
    optimizer.step(lambda: least_squares(2 * x))
    assert optimizer.last_step.accepted
    assert_near(optimizer.state[x]["largest_curvature"], torch.full((3,), 4 / 3), 1e-6)


@pytest.mark.parametrize("fails", [2, 4])
def test_an_exception_while_solving_again_leaves_the_damping(fails):
    x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = NaturalCG([x], geodesic=False)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == fails:
            raise KeyboardInterrupt
        too_high = 1e3 if 1 < len(calls) < fails else 0.0  # every trial point is turned down
        # The noise cannot be replayed: trial points run the closure.
        noise = F.rrelu(x, 1.0, 1.0, training=True) - x
        return least_squares(10 * (x[1] - x[0] ** 2) + too_high, 1 - x[0], noise)

    calls += [1] * fails  # the first step learns how to form the products, undisturbed
    optimizer.step(closure)
    damping = optimizer.param_groups[0]["damping"]
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["damping"] == damping


@pytest.mark.parametrize(
    ("solver", "sizes", "samples", "message"),
    [
        (
            "dense",
            (1, 70_000),
            4,
            r"a matrix of 37 GiB for 70,000 parameters and 4 outputs; .*'sample' or 'cg'",
        ),
        (
            "sample",
            (1, 1),
            70_000,
            "a matrix of 37 GiB for 1 parameters and 70,000 outputs; .*'cg'",
        ),
    ],
)
def test_a_direct_solver_refuses_what_does_not_fit(solver, sizes, samples, message):
    weight = nn.Parameter(torch.zeros(sizes, dtype=torch.float64))
    x = torch.ones(samples, 1, dtype=torch.float64)
    optimizer = NaturalCG([weight], solver=solver)
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: least_squares((x @ weight).mean(1) - 1))


@pytest.mark.parametrize("is_least_squares", [True, False])
def test_a_direct_solver_says_beforehand_that_it_will_take_long(
    is_least_squares, monkeypatch, caplog
):
    monkeypatch.setattr(direct, "_SPEED", {"cpu": 1.0})
    monkeypatch.setattr(direct, "_told", set())
    theta = nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = NaturalCG([theta], solver="dense")
    for unit in ("none", "auto", "again"):  # it is said once
        caplog.clear()
        monkeypatch.setattr(direct, "_LONG", 1e9 if unit == "none" else 30.0)
        optimizer.step(
            lambda: least_squares(theta.expand(3, 5)) if is_least_squares else (theta**4).sum()
        )
        told = [r.getMessage() for r in caplog.records if "takes about" in r.getMessage()]
        expected = 2 * 15 * 5 * 5 if is_least_squares else 5**3 // 3
        assert [f"takes about {expected} seconds" in line for line in told] == [True] * (
            unit == "auto"
        )
