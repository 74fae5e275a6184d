"""Kronecker factors for other uses than a step, against dense matrices and curvlinops."""

import logging
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers.models import CASES, Problem
from helpers.problems import assert_near, real
from torch import nn
from torch.distributions import Normal

from ngd_optim import linearize
from ngd_optim.factors import kronecker_factors

DAMPING = 0.3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def cnn() -> nn.Module:
    convolutions = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2))
    return nn.Sequential(convolutions, nn.Flatten(), nn.Linear(18, 3)).double()


def positions() -> nn.Module:
    """A linear layer at several positions of a sample."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)).double()


MODELS = {"mlp": (mlp, (12, 4)), "cnn": (cnn, (6, 1, 6, 6)), "positions": (positions, (7, 3, 4))}
LOSSES = {
    "cross entropy": (nn.CrossEntropyLoss(), lambda n: torch.arange(n) % 3),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), lambda n: torch.arange(n) % 3),
    "squares": (nn.MSELoss(), lambda n: real(n, 3)),
    "binary": (nn.BCEWithLogitsLoss(), lambda n: (real(n, 3) > 0).double()),
}


def dense_curvature(closure, params):
    point = linearize(closure, params)
    return torch.stack([point.curvature(row) for row in torch.eye(len(point.gradient)).double()])


def with_data(name: str, loss: str):
    make, shape = MODELS[name]
    function, targets = LOSSES[loss]
    x = real(*shape)
    return make(), function, x, targets(len(x))


@pytest.mark.parametrize("kind", ["expand", "reduce", "eigenvalues"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_they_are_those_of_curvlinops(name, loss, kind):
    curvlinops = pytest.importorskip("curvlinops")
    model, function, x, y = with_data(name, loss)
    sharing = "reduce" if kind == "reduce" else "expand"
    operator = (
        curvlinops.EKFACLinearOperator if kind == "eigenvalues" else curvlinops.KFACLinearOperator
    )
    params = list(model.parameters())
    theirs = operator(
        model,
        function,
        params,
        [(x, y)],
        fisher_type="type-2",
        kfac_approx=sharing,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    ours = kronecker_factors(
        lambda: function(model(x), y),
        model.named_parameters(),
        sharing=sharing,
        eigenvalues=kind == "eigenvalues",
    )
    expected = torch.stack([theirs @ row for row in torch.eye(ours.shape[0]).double()], 1)
    assert_near(ours.to_dense(), expected, 1e-12)


def blocks_of(matrix, factors, model):
    """The entries of a dense matrix that are within the blocks."""
    names, kept, first = {}, torch.zeros_like(matrix, dtype=torch.bool), 0
    for name, p in model.named_parameters():
        names[name] = torch.arange(first, first + p.numel())
        first += p.numel()
    for layer in factors.layers:
        inside = torch.cat([names[n] for n in (layer.weight, layer.bias) if n is not None])
        kept[inside[:, None], inside] = True
    return torch.where(kept, matrix, 0)


def test_of_one_sample_the_blocks_are_those_of_the_curvature():
    model, function, x, y = with_data("mlp", "cross entropy")
    for closure in (
        lambda: function(model(x[:1]), y[:1]),
        lambda: (model(x[:1]).sum(), Normal(model(x[:1]), 0.5)),
    ):
        factors = kronecker_factors(closure, model.named_parameters())
        dense = dense_curvature(closure, model.parameters())
        assert_near(factors.to_dense(), blocks_of(dense, factors, model), 1e-12)
        assert [layer.weight for layer in factors.layers] in (
            ["0.weight", "2.weight"],
            ["2.weight", "0.weight"],
        )
        assert not factors.diagonals


# A table keeps the eigenvalues of its product, and weight norm hides its matrix.
EXACT = [
    "mlp",
    "conv",
    "sdpa",
    "mha",
    "transformer",
    "lstm",
    "gru",
    "rnn",
    "frozen",
    "autograd_inside",
]


@pytest.mark.parametrize(
    ("name", "sharing"),
    [(name, sharing) for name in EXACT for sharing in ("expand", "reduce")][:-1],  # see below
)
def test_eigenvalues_are_the_diagonal_of_the_curvature_in_their_eigenvectors(name, sharing):
    problem = Problem(CASES[name], "mse_loss", torch.float64)
    problem.model.eval()
    trained = [(n, p) for n, p in problem.model.named_parameters() if p.requires_grad]
    plain, exact = (
        kronecker_factors(problem.closure, trained, sharing=sharing, eigenvalues=flag)
        for flag in (False, True)
    )
    _, dense = problem.dense()
    places, first = {}, 0
    for n, p in trained:
        places[n] = torch.arange(first, first + p.numel()).view(p.shape)
        first += p.numel()
    assert plain.layers
    for layer, other in zip(exact.layers, plain.layers, strict=True):
        assert torch.equal(layer.left, other.left)
        where = places[layer.weight].flatten(1)
        if layer.left.shape[1] != len(where):
            where = where.T
        if layer.bias is not None:
            where = torch.cat([where, places[layer.bias].view(-1, 1)], 1)
        left, right, values = layer.decomposition
        vectors = torch.kron(left[0], right[0])
        block = dense[where.flatten()[:, None], where.flatten()]
        expected = (vectors.T @ block @ vectors).diagonal()
        assert (values.flatten() - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_derivatives_that_use_a_weight_transposed_cannot_be_reduced():
    problem = Problem(CASES["autograd_inside"], "mse_loss", torch.float64)
    with pytest.raises(ValueError, match="used as it is and transposed"):
        kronecker_factors(problem.closure, problem.params, sharing="reduce")


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("dropout", "batch_norm")])
def test_every_model_has_factors(name):
    problem = Problem(CASES[name], "cross_entropy", torch.float64)
    problem.model.eval()
    factors = kronecker_factors(problem.closure, problem.params)
    values = factors.eigenvalues()
    assert len(values) == sum(p.numel() for p in problem.params)
    assert values.min() >= -1e-12
    assert values.max() > 1e-6


def test_what_is_in_no_layer_has_the_diagonal_in_the_mean():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = real(6, 4), torch.arange(6) % 3
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    generator = torch.Generator().manual_seed(1)
    estimates = [
        kronecker_factors(closure, model.named_parameters(), generator=generator)
        for _ in range(100)
    ]
    assert all(set(one.diagonals) == {"1.weight", "1.bias"} for one in estimates)
    found = torch.stack([torch.cat([*one.diagonals.values()]) for one in estimates])
    where = [
        n in ("1.weight", "1.bias") for n, p in model.named_parameters() for _ in range(p.numel())
    ]
    expected = dense_curvature(closure, model.parameters()).diagonal()[where]
    assert ((found.mean(0) - expected).abs() <= 5 * found.std(0) / math.sqrt(len(found))).all()
    assert torch.equal(estimates[0].layers[0].left, estimates[1].layers[0].left)  # not estimated


def test_draws_have_the_factors_as_mean():
    model, function, x, y = with_data("mlp", "cross entropy")
    closure = lambda: function(model(x), y)  # noqa: E731
    exact = kronecker_factors(closure, model.named_parameters()).to_dense()
    drawn = kronecker_factors(closure, model.named_parameters(), draws=1000).to_dense()
    one = kronecker_factors(closure, model.named_parameters(), draws=1).to_dense()
    assert (drawn - exact).norm() < 0.05 * exact.norm()
    assert (one - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("eigenvalues", [False, True])
def test_a_loader_has_the_factors_of_its_data(eigenvalues):
    """Means over batches of different sizes: the memory of one, and the curvature of all."""
    model, function, x, y = with_data("mlp", "cross entropy")
    alive: list[weakref.ref] = []

    class Loader:
        def __iter__(self):
            for part in (slice(0, 3), slice(3, 4), slice(4, 12)):

                def closure(part=part):
                    hidden = model[0](x[part])
                    assert not any(ref() is not None for ref in alive)
                    alive.append(weakref.ref(hidden))
                    return function(model[1:](hidden), y[part])

                yield closure, part.stop - part.start

    whole = kronecker_factors(
        lambda: function(model(x), y), model.named_parameters(), eigenvalues=eigenvalues
    )
    summed = kronecker_factors(Loader(), model.named_parameters(), eigenvalues=eigenvalues)
    assert len(alive) == 3 * (1 + eigenvalues)
    assert_near(summed.to_dense(), whole.to_dense(), 1e-12)
    v = real(whole.shape[0])
    assert_near(summed.scale(12).solve(v, 12 * DAMPING), whole.solve(v, DAMPING) / 12, 1e-12)


@pytest.mark.parametrize("eigenvalues", [False, True])
@pytest.mark.parametrize("name", ["mlp", "cnn", "norms", "embedding", "x @ W"])
def test_functions_are_those_of_the_dense_matrix(name, eigenvalues):
    if name == "x @ W":
        params = [nn.Parameter(real(4, 3)), nn.Parameter(real(3))]
        x, y = real(9, 4), torch.arange(9) % 3
        closure = lambda: F.cross_entropy(torch.addmm(params[1], x, params[0]), y)  # noqa: E731
    elif name in MODELS:
        model, function, x, y = with_data(name, "cross entropy")
        closure, params = lambda: function(model(x), y), list(model.parameters())
    else:
        problem = Problem(CASES[name], "cross_entropy", torch.float64)
        closure, params = problem.closure, problem.params
    factors = kronecker_factors(closure, params, eigenvalues=eigenvalues)
    n = factors.shape[0]
    dense = factors.to_dense()
    damped = dense + DAMPING * torch.eye(n).double()
    assert_near(dense, dense.T, 1e-12)
    for v in (real(n), real(n, 3)):
        assert_near(factors(v, DAMPING), damped @ v, 1e-12)
        assert_near(factors.solve(v, DAMPING), torch.linalg.solve(damped, v), 1e-12)
        root = factors.root(v, DAMPING)
        assert root.shape == v.shape
        assert_near(factors.root(root, DAMPING), damped @ v, 1e-12)
        twice = factors.inverse_root(factors.inverse_root(v, DAMPING), DAMPING)
        assert_near(twice, torch.linalg.solve(damped, v), 1e-12)
    assert_near(factors.logdet(DAMPING), damped.logdet(), 1e-12)
    assert_near(factors.trace(), dense.trace(), 1e-12)
    assert_near(factors.diagonal(), dense.diagonal(), 1e-12)
    assert_near(factors.eigenvalues(), torch.linalg.eigvalsh(dense), 1e-12)


def test_the_evidence_can_be_differentiated_in_the_damping():
    model, function, x, y = with_data("mlp", "squares")
    factors = kronecker_factors(lambda: function(model(x), y), model.parameters())
    damping = torch.tensor(DAMPING, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(factors.logdet(damping), damping)
    assert_near(slope, factors.solve(torch.eye(factors.shape[0]).double(), DAMPING).trace(), 1e-12)


def test_a_singular_curvature_is_not_inverted():
    layer = nn.Linear(4, 3, bias=False).double()
    factors = kronecker_factors(
        lambda: F.mse_loss(layer(real(2, 4)), real(2, 3)), layer.parameters()
    )
    for function in (factors.solve, factors.inverse_root):
        with pytest.raises(ValueError, match=r"F is singular.*use a damping above 0"):
            function(real(12))
    with pytest.raises(ValueError, match="F is singular"):
        factors.logdet()
    with pytest.raises(ValueError, match="damping must be at least 0"):
        factors.solve(real(12), -1.0)
    with pytest.raises(ValueError, match=r"v must have shape \(12,\) or \(12, k\), got \(3, 4\)"):
        factors(real(3, 4))


def test_a_weight_with_other_uses_is_told(caplog):
    table = nn.Parameter(real(5, 3))
    closure = lambda: F.cross_entropy(  # noqa: E731
        F.embedding(torch.tensor([0, 2, 1]), table) @ table.T, torch.tensor([0, 1, 2])
    )
    with caplog.at_level(logging.WARNING, "ngd_optim"):
        kronecker_factors(closure, [("table", table)])
    assert "table is also used in another way" in caplog.text


def test_nothing_is_left_changed():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    x, y = real(6, 4), torch.arange(6) % 3

    def closure():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    kronecker_factors(closure, model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, model.parameters(), before))
    assert model[1].num_batches_tracked == 1  # as of one run
    assert torch.is_grad_enabled()
    with pytest.raises(
        ValueError, match=r"rows of a layer belong to several samples.*sharing='expand'"
    ):
        kronecker_factors(closure, model.named_parameters(), eigenvalues=True)


LAYER = nn.Linear(2, 2)


@pytest.mark.parametrize("v", [torch.ones(6, dtype=torch.complex64), torch.ones(6).numpy()])
def test_vectors_are_real_tensors(v):
    curvature = kronecker_factors(right, LAYER.named_parameters())
    with pytest.raises(TypeError, match="v must be a real tensor"):
        curvature(v)


def right():
    return F.mse_loss(LAYER(torch.ones(3, 2)), torch.ones(3, 2))


def uneven():
    return F.mse_loss(LAYER(torch.ones(3, 2)), torch.ones(3, 2)) + F.mse_loss(
        LAYER(torch.ones(2, 2)), torch.ones(2, 2)
    )


@pytest.mark.parametrize(
    ("closures", "settings", "error", "sentence"),
    [
        (3, {}, TypeError, "closures must be a function"),
        ([], {}, ValueError, "the iterable is empty"),
        ([3], {}, TypeError, "closures must hold functions, or pairs"),
        ([(right, 0)], {}, ValueError, "size must be a number above 0, got 0"),
        (right, {"sharing": "expnd"}, ValueError, "sharing must be one of"),
        (right, {"draws": 0}, ValueError, "draws must be an integer, at least 1"),
        (
            iter([right]),
            {"eigenvalues": True},
            ValueError,
            "an iterator ends after once; pass a list",
        ),
        (lambda: LAYER.weight.sin().sum(), {}, ValueError, "need a metric at the model's outputs"),
        (uneven, {"sharing": "reduce"}, ValueError, r"different numbers of samples, \[2, 3\]"),
        (lambda: right() / 0, {}, RuntimeError, "not finite"),
        (lambda: None, {}, TypeError, "must return the loss as a tensor"),
    ],
)
def test_what_cannot_work_is_refused(closures, settings, error, sentence):
    with pytest.raises(error, match=sentence):
        kronecker_factors(closures, LAYER.named_parameters(), **settings)
