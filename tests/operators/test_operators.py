"""The curvature as an operator, against dense matrices, SciPy and NumPy."""

import builtins

import pytest
import torch
import torch.nn.functional as F
from helpers.models import CASES, Problem
from helpers.problems import assert_near, real, seeded
from torch import nn

from ngd_optim import conjugate_gradient, linearize
from ngd_optim.operators import CurvatureOperator
from ngd_optim.parameters import FlatParameters


def operator_of(matrix):
    """An operator with a given matrix."""
    parameters = FlatParameters([{"params": [nn.Parameter(torch.zeros(len(matrix)).to(matrix))]}])

    def multiply(v):
        return matrix @ v

    return CurvatureOperator(multiply, multiply, parameters)


def decaying(n=100, fall=0.7):
    Q = torch.linalg.qr(real(n, n)).Q
    return Q @ torch.diag(10 * fall ** torch.arange(n).double() + 1e-3) @ Q.T


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_products_with_several_vectors(name):
    problem = Problem(CASES[name], "cross_entropy", torch.float64)
    _, dense = problem.dense()
    point = linearize(problem.closure, problem.params)
    V = real(len(dense), 5)
    assert_near(point.curvature(V), dense @ V, 1e-9)
    assert_near(point.curvature @ V[:, 0], dense @ V[:, 0], 1e-9)
    assert point.curvature(V[:, :0]).shape == (len(dense), 0)
    assert_near(point.diagonal(), dense.diagonal(), 1e-9)


def test_most_products_with_several_vectors_are_one_replay():
    unknown = {
        name
        for name, case in CASES.items()
        if (problem := Problem(case, "mse_loss", torch.float32))
        and linearize(problem.closure, problem.params)._point.product._plain is None
    }
    assert unknown <= {"embedding"}


def test_a_hessian_and_its_blocks():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = real(6, 4)
    params = list(model.parameters())
    curvature = linearize(lambda: model(x).sin().mean(), params).curvature
    dense = curvature.to_dense()
    theta = nn.utils.parameters_to_vector(params).detach()

    def loss(theta):
        W, b, V, c = theta.split([12, 3, 6, 2])
        hidden = (x @ W.view(3, 4).T + b).tanh()
        return (hidden @ V.view(2, 3).T + c).sin().mean()

    assert_near(dense, torch.func.hessian(loss)(theta), 1e-12)
    where = torch.cat([torch.arange(21, 23), torch.arange(12)])
    block = curvature.block([params[3], params[0]])
    assert_near(block.to_dense(), dense[where[:, None], where], 1e-12)
    assert_near(block.block(params[0]).to_dense(), dense[:12, :12], 1e-12)
    for wrong, sentence in (
        ([], "must be some of the trainable parameters"),
        ([nn.Parameter(real(2))], "must be some of the trainable parameters"),
        ([params[0], params[0]], "has a parameter twice"),
    ):
        with pytest.raises(ValueError, match=sentence):
            curvature.block(wrong)


@pytest.mark.parametrize("sizes", [False, True])
def test_a_loader_has_the_curvature_of_its_data(sizes):
    model = nn.Linear(4, 3).double()
    x, y = real(12, 4), torch.arange(12) % 3

    def on(part):
        return lambda: F.cross_entropy(model(x[part]), y[part])

    parts = [slice(0, 6), slice(6, 12)] if not sizes else [slice(0, 1), slice(1, 12)]
    closures = ((on(p), p.stop - p.start) if sizes else on(p) for p in parts)
    mean = linearize(closures, model.parameters())
    whole = linearize(on(slice(0, 12)), model.parameters())
    assert_near(mean.loss, whole.loss, 1e-12)
    assert_near(mean.gradient, whole.gradient, 1e-12)
    assert_near(mean.curvature.to_dense(), whole.curvature.to_dense(), 1e-12)
    solution = conjugate_gradient(lambda v: mean.curvature(v) + 0.1 * v, whole.gradient, tol=1e-10)
    damped = whole.curvature.to_dense() + 0.1 * torch.eye(15).double()
    assert_near(solution.solution, torch.linalg.solve(damped, whole.gradient), 1e-8)


@pytest.mark.parametrize(
    ("closure", "error", "sentence"),
    [
        ([], TypeError, "linearize\\(\\) needs a closure"),
        (3, TypeError, "linearize\\(\\) needs a closure"),
        ([lambda: None, 3], TypeError, "pairs \\(closure, size\\)"),
        ([(lambda: None, 1), lambda: None], TypeError, "pairs \\(closure, size\\)"),
        ([(lambda: None, 0)], ValueError, "sizes of closures must be finite numbers above 0"),
        ([(lambda: None, float("inf"))], ValueError, "finite numbers above 0"),
        ([(lambda: None, "7")], ValueError, "finite numbers above 0"),
    ],
)
def test_what_is_no_closure_is_refused(closure, error, sentence):
    with pytest.raises(error, match=sentence):
        linearize(closure, [nn.Parameter(real(2))])


def test_parameters_may_have_names_and_must_be_several():
    model = nn.Linear(2, 2)
    named = linearize(lambda: model.weight.square().sum(), model.named_parameters())
    assert torch.equal(named.gradient[:4], 2 * model.weight.detach().flatten())
    for wrong in (model, model.weight, [3]):
        with pytest.raises(TypeError, match="params must be tensors, or pairs of a name"):
            linearize(lambda: model.weight.square().sum(), wrong)


class TestEstimates:
    def test_traces_are_right_in_the_mean_and_know_their_errors(self):
        matrix = decaying(fall=0.97)
        operator, generator = operator_of(matrix), seeded(3)
        found = [operator.trace(30, generator=generator) for _ in range(400)]
        values = torch.stack([one.value for one in found])
        deviation = values.std()
        assert abs(values.mean() - matrix.trace()) <= 4 * deviation / 400**0.5
        assert 0.5 < torch.stack([one.error for one in found]).mean() / deviation < 1.5

    def test_diagonals_are_right_in_the_mean(self):
        matrix = decaying(fall=0.97)
        operator, generator = operator_of(matrix), seeded(3)
        found = torch.stack([operator.diagonal(30, generator=generator).value for _ in range(400)])
        error = found.mean(0) - matrix.diagonal()
        assert (error.abs() <= 5 * found.std(0) / 400**0.5).all()

    def test_few_products_are_enough_where_eigenvalues_fall(self):
        """Hutchinson's estimate from as many products has a relative error of a tenth here."""
        matrix = decaying()
        operator = operator_of(matrix)
        assert abs(operator.trace(60).value / matrix.trace() - 1) < 1e-3
        assert operator.trace(60).error < 1e-3 * matrix.trace()
        assert_near(operator.diagonal(60).value, matrix.diagonal(), 1e-2)

    def test_they_are_those_of_curvlinops(self):
        curvlinops = pytest.importorskip("curvlinops")
        torch.manual_seed(0)
        matrix = decaying()
        theirs = curvlinops.xtrace(matrix, 40)
        ours = operator_of(matrix).trace(40)
        assert abs(ours.value - theirs) < 1e-2 * matrix.trace()

    @pytest.mark.parametrize("rank", [0, 1, 4])
    def test_of_low_rank_they_are_exact(self, rank):
        root = real(100, rank)
        matrix = root @ root.T
        operator = operator_of(matrix)
        torch.testing.assert_close(operator.trace(20).value, matrix.trace())
        torch.testing.assert_close(
            operator.diagonal(20).value, matrix.diagonal(), rtol=1e-6, atol=1e-9
        )

    def test_with_as_many_products_as_rows_they_are_exact(self):
        matrix = decaying(10)
        trace, error = operator_of(matrix).trace(10)
        assert_near(trace, matrix.trace(), 1e-12)
        assert error == 0
        diagonal, error = operator_of(matrix).diagonal()
        assert_near(diagonal, matrix.diagonal(), 1e-12)
        assert not error.any()

    @pytest.mark.parametrize("products", [3, 0, -1, 2.5, None])
    def test_too_few_products_are_refused(self, products):
        with pytest.raises(ValueError, match="products must be an integer, at least 4"):
            operator_of(decaying(10)).trace(products)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("count", [1, 4, 39, 40])
def test_eigenvalues_are_those_of_the_dense_matrix(which, count, dtype):
    matrix = decaying(40, 0.8) - 3 * torch.outer(v := real(40) / 40**0.5, v)
    values, vectors = operator_of(matrix.to(dtype)).eigenvalues(count, which)
    true = torch.linalg.eigvalsh(matrix)
    kept = {"largest": true, "smallest": -true, "magnitude": true.abs()}[which].argsort()[-count:]
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    assert values.dtype == vectors.dtype == dtype
    assert_near(values.double(), true[kept.sort().values], rtol)
    assert_near(matrix @ vectors.double(), vectors.double() * values.double(), 10 * rtol)


def test_eigenvalues_come_out_the_same_again():
    operator = operator_of(decaying())
    assert all(
        torch.equal(a, b)
        for a, b in zip(operator.eigenvalues(3), operator.eigenvalues(3), strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0,), "from 1 to 10"),
        ((11,), "from 1 to 10"),
        ((True,), "from 1 to 10, got True"),
        ((2.0,), "from 1 to 10, got 2.0"),
        ((2, "biggest"), "which must be one of"),
    ],
)
def test_bad_arguments_of_eigenvalues_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        operator_of(decaying(10)).eigenvalues(*arguments)


def test_scipy_solves_with_it():
    from scipy.sparse.linalg import aslinearoperator, minres

    matrix = decaying(20) + torch.eye(20).double()
    operator = operator_of(matrix).to_scipy()
    b = real(20)
    solution, info = minres(operator, b.numpy(), rtol=1e-12)
    assert info == 0
    assert_near(torch.as_tensor(solution), torch.linalg.solve(matrix, b), 1e-8)
    V = real(20, 3).numpy()
    assert_near(torch.as_tensor(operator @ V), matrix @ torch.as_tensor(V), 1e-12)
    assert_near(torch.as_tensor(operator.T @ V), matrix @ torch.as_tensor(V), 1e-12)
    assert aslinearoperator(operator).dtype == "float64"


def test_scipy_multiplies_complex_and_odd_arrays():
    matrix = decaying(20)
    operator = operator_of(matrix).to_scipy()
    z = torch.complex(real(20), 2 * real(20).flip(0)).numpy()
    expected = matrix.to(torch.complex128) @ torch.as_tensor(z)
    assert_near(torch.as_tensor(operator @ z), expected, 1e-12)
    backwards = real(20, 3).numpy()[::-1]
    backwards.flags.writeable = False
    assert_near(
        torch.as_tensor(operator @ backwards), matrix @ torch.as_tensor(backwards.copy()), 1e-12
    )


@pytest.mark.parametrize("v", [torch.ones(10, dtype=torch.complex64), torch.ones(10).numpy(), 1.0])
def test_what_is_no_real_tensor_is_refused(v):
    with pytest.raises(TypeError, match=r"v must be a real tensor, got .*; use to_scipy"):
        operator_of(decaying(10))(v)


def test_counts_may_be_numpys():
    count = torch.tensor([2]).numpy()[0]
    operator = operator_of(decaying(10))
    assert len(operator.eigenvalues(count)[0]) == 2
    assert operator.trace(2 * count).value > 0


def test_without_scipy_the_rest_is_there(monkeypatch):
    found = builtins.__import__

    def importing(name, *arguments):
        if name.startswith("scipy"):
            raise ImportError(name)
        return found(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", importing)
    operator = operator_of(decaying(20))
    assert operator.trace(10).value > 0
    with pytest.raises(ImportError, match="scipy"):
        operator.to_scipy()
