"""How products are formed: chosen once, before a solve, and right whichever way it is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import assert_near, real
from torch import nn
from torch.utils.checkpoint import checkpoint

from ngd_optim import NaturalCG, linearize
from ngd_optim.distributed import ALONE
from ngd_optim.linearization.backend import Way, form_product
from ngd_optim.linearization.product import ClosureProduct
from ngd_optim.replaying import Recording

BACKENDS = ["torch.func", "double-backward"]


def direct(matrix, failing=()):
    """Products by a matrix, which some backends cannot form; and the backends that were asked."""
    asked = []

    def product(backend):
        asked.append(backend)
        if backend in failing:
            raise RuntimeError("no")
        return lambda v: matrix @ v

    return product, asked


def test_the_first_way_that_works_is_taken_and_those_after_it_are_left():
    matrix, v = real(3, 3), real(3)
    ways = (Way("double-backward", True), Way("double-backward", False), Way("torch.func", False))
    product, asked = direct(matrix, failing=["double-backward"])
    formed, left = form_product(ways, product, v, ALONE)
    assert left == ways[2:]
    assert asked == ["double-backward", "double-backward", "torch.func"]
    assert torch.equal(formed.image_of(v), matrix @ v)
    assert torch.equal(formed.product(v), matrix @ v)


def test_where_no_way_works_there_is_no_product():
    product, _ = direct(real(3, 3), failing=BACKENDS)
    ways = (Way("torch.func", True), Way("torch.func", False))
    assert form_product(ways, product, real(3), ALONE) == (None, ())


def test_the_image_is_given_for_equal_vectors_only():
    matrix, v = real(3, 3), real(3)
    product, _ = direct(matrix)
    formed, _ = form_product((Way("torch.func", False),), product, v, ALONE)
    assert torch.equal(formed.image_of(v.clone()), matrix @ v)
    assert formed.image_of(2 * v) is None
    twice = v.mul_(2)
    assert formed.image_of(twice) is None
    assert formed.without_image().image_of(v) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointed_layers_in_a_row_have_as_many_products_as_one_asks_for(backend):
    torch.manual_seed(1)
    layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(4)]
    model, x, y = nn.Sequential(*layers).double(), real(2, 3, 8), real(2, 3, 8)

    def closure(use_checkpoints):
        h = x
        for layer in model:
            h = checkpoint(layer, h, use_reentrant=False) if use_checkpoints else layer(h)
        return F.mse_loss(h, y)

    params = list(model.parameters())
    point = linearize(lambda: closure(True), params, backend=backend)
    plain = linearize(lambda: closure(False), params)
    for _ in range(3):
        v = torch.randn_like(point.gradient)
        assert_near(point.curvature(v), plain.curvature(v), 1e-10)


@pytest.mark.parametrize(
    ("backend", "reduction"),
    [("torch.func", "sum"), ("double-backward", "sum"), ("double-backward", "mean")],
)
def test_the_hessian_of_a_squared_error(backend, reduction):
    """torch 2.13 ends the process where forward mode through this sum's gradient is recorded."""
    w, x, y = nn.Parameter(real(3)), real(5, 3), real(5)
    point = linearize(
        lambda: F.mse_loss(x @ w, y, reduction=reduction), [w], curvature="hessian", backend=backend
    )
    matrix = 2 * x.T @ x / (5 if reduction == "mean" else 1)
    assert (point.kind, point.backend) == ("hessian", backend)
    for _ in range(2):
        v = real(3)
        assert_near(point.curvature(v), matrix @ v, 1e-12)


def test_what_is_asked_for_after_products_is_the_same():
    """The graph is gone by then, and is made anew."""
    model, x, y = nn.Linear(4, 1).double(), real(9, 4), real(9, 1)
    first, later = (
        linearize(lambda: F.mse_loss(model(x), y), model.parameters()) for _ in range(2)
    )
    root, diagonal = first._point.square_root(), first.diagonal()
    v = torch.randn_like(later.gradient)
    image = later.curvature(v)
    assert_near(root.rows.T @ (root.rows @ v), image, 1e-12)
    assert torch.equal(later._point.square_root().rows, root.rows)
    assert torch.equal(later.diagonal(), diagonal)
    assert_near(
        diagonal,
        torch.stack([later.curvature(e)[i] for i, e in enumerate(torch.eye(5).double())]),
        1e-12,
    )
    assert torch.equal(later.curvature(v), image)


def test_the_diagonal_of_a_hessian_is_from_products():
    x = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert linearize(lambda: (x**3).sum() + x.prod(), [x]).diagonal().tolist() == [6.0, 12.0]


def test_a_backend_is_a_setting_of_the_optimizer_and_is_saved():
    model, x, y = nn.Linear(4, 3), torch.randn(9, 4), torch.arange(9) % 3
    steps = {}
    for backend in BACKENDS:
        twin = copy.deepcopy(model)
        optimizer = NaturalCG(twin.parameters(), backend=backend)
        optimizer.step(lambda twin=twin: F.cross_entropy(twin(x), y))
        assert (
            optimizer.last_step.backend
            == optimizer.state_dict()["param_groups"][0]["backend"]
            == backend
        )
        steps[backend] = nn.utils.parameters_to_vector(twin.parameters())
    assert_near(steps["torch.func"], steps["double-backward"], 1e-4)
    for make in (NaturalCG, lambda params, backend: linearize(lambda: 0, params, backend=backend)):
        with pytest.raises(ValueError, match="backend must be one of"):
            make(list(model.parameters()), backend="jax")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_closed_gate_hides_is_there_when_it_opens(backend):
    """Parameters inside vmap, behind a gate that is zero at first."""
    stem, head = nn.Conv1d(1, 1, 3, padding=1).double(), nn.Linear(8, 3).double()
    inside, gate = nn.Parameter(real(2, 8, 8)), nn.Parameter(torch.zeros(8, dtype=torch.float64))
    x, y = real(12, 1, 8), torch.arange(12) % 3

    def closure():
        h = stem(x).flatten(1)
        branch = torch.vmap(lambda w: torch.tanh(h @ w))(inside).mean(0)
        return F.cross_entropy(head(h + gate * branch), y)

    params = [*stem.parameters(), *head.parameters(), gate, inside]
    optimizer = NaturalCG(params, backend=backend)
    optimizer.step(closure)
    optimizer.step(closure)
    assert gate.any()
    point, exact = (linearize(closure, params, backend=b) for b in (backend, "double-backward"))
    v = torch.randn_like(point.gradient)
    assert_near(point.curvature(v), exact.curvature(v), 1e-9)


def test_errors_of_other_kinds_are_the_users():
    calls = []

    def product(backend):
        calls.append(backend)
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        form_product(
            (Way("torch.func", True), Way("double-backward", True)), product, real(3), ALONE
        )
    assert calls == ["torch.func"]


@pytest.mark.parametrize("warm_start", [0.0, 0.9])
def test_no_product_is_formed_for_nothing(warm_start, monkeypatch):
    """CG begins with the product that the choice of a way has formed."""
    model, x, y = nn.Linear(6, 3), torch.randn(20, 6), torch.arange(20) % 3
    optimizer = NaturalCG(model.parameters(), preconditioner=None, warm_start=warm_start)

    def closure():
        return F.cross_entropy(model(x), y)

    optimizer.step(closure)
    formed = []
    original = ClosureProduct._direct
    monkeypatch.setattr(
        ClosureProduct, "_direct", lambda *a: (formed.append("_direct"), original(*a))[1]
    )
    replays = []
    call = Recording.__call__
    monkeypatch.setattr(
        Recording, "__call__", lambda self, v: (replays.append(1), call(self, v))[1]
    )
    for directly in (["_direct"], ["_direct"], []):  # the third and later products are renewed
        formed.clear()
        replays.clear()
        optimizer.step(closure)
        assert formed == directly
        assert len(replays) == optimizer.last_step.n_product
