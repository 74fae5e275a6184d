"""Preconditioners from products alone: what they find, what they make of it, and how many iterations they save."""

import copy

import pytest
import torch
from helpers.problems import assert_near, flatten, seeded
from torch import nn

from ngd_optim import Diagonal, NaturalCG, Nystrom, least_squares, linearize
from ngd_optim.preconditioners.sketches import Sketch

N = 60


def with_spectrum(values):
    """A symmetric matrix with these eigenvalues."""
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
    return Q @ torch.diag(values) @ Q.T


def shift_of(value):
    return torch.full((N,), value, dtype=torch.float64)


def test_nystrom_has_the_matrix_itself_where_its_rank_suffices():
    values = torch.zeros(N, dtype=torch.float64)
    values[:5] = torch.tensor([9.0, 5.0, 3.0, 1.0, 0.1])
    F = with_spectrum(values)
    sketch = Nystrom(rank=8).draw(lambda v: F @ v, N, shift_of(1e-3), None, seeded())
    assert_near(sketch.values[:5], values[:5], 1e-10)
    assert sketch.values[5:].abs().max() < 1e-10
    assert_near(sketch.basis @ torch.diag(sketch.values) @ sketch.basis.T, F, 1e-10)
    r = torch.randn(N, dtype=torch.float64)
    damped = (
        F + 1e-3 * torch.eye(N, dtype=torch.float64)
    ) / 1e-3  # up to a factor, which changes nothing
    assert_near(Nystrom().solve(sketch, shift_of(1e-3))(r), torch.linalg.solve(damped, r), 1e-6)


def test_nystrom_doubles_its_rank_until_the_damping_hides_the_rest():
    F = with_spectrum(10.0 ** -torch.arange(N, dtype=torch.float64).div(6))
    products = []

    def product(v):
        products.append(v)
        return F @ v

    kind = Nystrom(rank=3, largest_rank=50)
    sketch = kind.draw(product, N, shift_of(1e-4), None, seeded())
    assert len(sketch.values) == len(products) == 24  # 3, 6, 12, 24: no product is formed twice
    assert sketch.values[-1] <= 1e-3
    assert len(kind.draw(product, N, shift_of(0.0), None, seeded()).values) == 50
    assert len(kind.draw(product, N, shift_of(10.0), sketch, seeded()).values) == 24


def test_diagonal_is_exact_for_a_diagonal_matrix_and_close_for_others():
    entries = torch.logspace(-3, 2, N, dtype=torch.float64)
    sketch = Diagonal(probes=1).draw(lambda v: entries * v, N, shift_of(0.1), None, seeded())
    assert_near(sketch.basis.squeeze(1), entries, 1e-12)
    r = torch.randn(N, dtype=torch.float64)
    assert_near(Diagonal().solve(sketch, shift_of(0.1))(r), r / (entries + 0.1), 1e-12)
    F = with_spectrum(torch.linspace(1, 2, N, dtype=torch.float64))
    sketch = Diagonal(probes=2000).draw(lambda v: F @ v, N, shift_of(0.1), None, seeded())
    assert (sketch.basis.squeeze(1) - F.diagonal()).abs().max() < 0.1


def test_a_negative_diagonal_makes_no_negative_preconditioner():
    sketch = Sketch(
        torch.linspace(-1, 1, N, dtype=torch.float64).unsqueeze(1), shift_of(0.0)[:0], 0
    )
    assert (Diagonal().solve(sketch, shift_of(0.0))(shift_of(1.0)) > 0).all()


def ill_conditioned(scaled):
    """A linear layer on features of very different sizes, or with a spectrum that decays along other directions."""
    torch.manual_seed(3)
    x = torch.randn(200, N, dtype=torch.float64) * torch.logspace(0, -3, N, dtype=torch.float64)
    if not scaled:
        x = x @ torch.linalg.qr(torch.randn(N, N, dtype=torch.float64)).Q
    model = nn.Linear(N, 1).double()
    y = torch.randn(200, 1, dtype=torch.float64)
    return model, lambda: least_squares(model(x) - y)


EXACT = {
    "solver": "cg",
    "damping": 1e-6,
    "adapt_damping": False,
    "cg_tol": 1e-9,
    "max_cg_iters": 3000,
    "cg_progress_tol": 0.0,
}


def step_with(preconditioner, scaled):
    model, closure = ill_conditioned(scaled)
    start = flatten(model.parameters())
    optimizer = NaturalCG(model.parameters(), preconditioner=preconditioner, **EXACT)
    optimizer.step(closure)
    return optimizer.last_step, flatten(model.parameters()) - start


@pytest.mark.parametrize(
    ("preconditioner", "scaled", "saved"),
    [(Nystrom(rank=30), True, 3), (Nystrom(rank=30), False, 3), (Diagonal(), True, 15)],
)
def test_fewer_iterations_to_the_same_step(preconditioner, scaled, saved):
    plain, wanted = step_with(None, scaled)
    report, found = step_with(preconditioner, scaled)
    assert plain.cg_stop == report.cg_stop == "tolerance"
    assert saved * report.cg_iters <= plain.cg_iters
    assert_near(found, wanted, 1e-3)
    assert report.preconditioner == preconditioner.name
    assert (report.n_product > report.cg_iters) is isinstance(
        preconditioner, Nystrom
    )  # the diagonal is exact here
    assert plain.n_product == plain.cg_iters


@pytest.mark.parametrize("damping", [1e-1, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nystrom_in_single_precision_stays_definite_however_small_the_damping(
    damping, seed, caplog
):
    torch.manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(N, N)).Q
    x, y = torch.randn(200, N) * torch.logspace(0, -3, N) @ Q, torch.randn(200, 1)
    model = nn.Linear(N, 1)
    optimizer = NaturalCG(
        model.parameters(), preconditioner=Nystrom(), solver="cg", damping=damping
    )
    for _ in range(15):
        optimizer.step(lambda: least_squares(model(x) - y))
        assert optimizer.last_step.preconditioner == "nystrom"
    assert "without the preconditioner" not in caplog.text


@pytest.mark.parametrize("kind", [Nystrom(rank=5), Diagonal()])
def test_one_of_the_librarys_that_is_indefinite_is_left_out(kind, monkeypatch, caplog):
    """The step is the one without it, and the report and the log say so."""
    plain, wanted = step_with(None, True)
    monkeypatch.setattr(type(kind), "solve", lambda self, sketch, shift: lambda r: -r)
    report, found = step_with(kind, True)
    assert torch.equal(found, wanted)
    assert report.preconditioner == "none"
    assert report.cg_iters == plain.cg_iters
    assert report.n_product > plain.n_product
    assert f"solved without the preconditioner '{kind.name}'" in caplog.text


def with_two_outputs():
    """The same features, and two outputs for each sample."""
    torch.manual_seed(3)
    x = torch.randn(200, N, dtype=torch.float64) * torch.logspace(0, -3, N, dtype=torch.float64)
    y = torch.randn(200, 2, dtype=torch.float64)
    model = nn.Linear(N, 2).double()
    return model, lambda: nn.functional.mse_loss(model(x).tanh(), y)


def diagonals(closure, params):
    """The diagonal that is found in one pull-back, and the one from products with unit vectors."""
    found = linearize(closure, params)._point.compute_cheap_diagonal()
    point = linearize(closure, params)
    units = torch.eye(len(point.gradient), dtype=torch.float64)
    return found, torch.stack([point.curvature(unit)[i] for i, unit in enumerate(units)])


def test_the_diagonal_is_exact_where_it_takes_one_pull_back():
    model, closure = ill_conditioned(True)
    found, wanted = diagonals(closure, list(model.parameters()))
    assert_near(found, wanted, 1e-12)
    few = torch.randn(4, N, dtype=torch.float64)
    wide = nn.Linear(N, 3).double()
    labels = torch.tensor([0, 1, 2, 0])
    found, wanted = diagonals(
        lambda: nn.functional.cross_entropy(wide(few), labels), list(wide.parameters())
    )
    assert_near(found, wanted, 1e-12)


def test_the_diagonal_is_estimated_where_it_takes_more(monkeypatch):
    model, closure = with_two_outputs()
    assert (
        linearize(closure, model.parameters())._point.compute_cheap_diagonal() is None
    )  # several outputs of a sample
    model, closure = ill_conditioned(True)

    def penalised():
        return closure() + model.weight.pow(4).sum()

    beside = linearize(penalised, model.parameters())  # a Hessian beside the outputs
    assert beside._point.compute_cheap_diagonal() is None
    assert (
        linearize(
            lambda: model.weight.pow(4).sum(), model.parameters()
        )._point.compute_cheap_diagonal()
        is None
    )
    norm = nn.Sequential(model, nn.BatchNorm1d(1, dtype=torch.float64))
    x = torch.randn(200, N, dtype=torch.float64)
    mixed = linearize(
        lambda: least_squares(norm(x)), norm.parameters()
    )  # samples that share statistics
    assert mixed._point.compute_cheap_diagonal() is None
    monkeypatch.setattr("ngd_optim.jacobian.jacobian._FEW_BYTES", 200 * (N + 1) * 8 - 1)
    assert linearize(closure, model.parameters())._point.compute_cheap_diagonal() is None  # memory


@pytest.mark.parametrize(
    "kind", [Nystrom(rank=5, largest_rank=5, refresh=2), Diagonal(probes=5, refresh=2)]
)
def test_sketches_are_kept_renewed_and_saved(kind):
    model, closure = with_two_outputs()
    optimizer = NaturalCG(model.parameters(), preconditioner=kind, solver="cg", warm_start=0.0)
    drawn = []
    for _ in range(4):
        optimizer.step(closure)
        drawn.append(optimizer.last_step.n_product - optimizer.last_step.cg_iters)
    assert drawn == [5, 0, 5, 0]
    twin, same_closure = with_two_outputs()
    twin.load_state_dict(model.state_dict())
    resumed = NaturalCG(twin.parameters(), preconditioner=kind, solver="cg", warm_start=0.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        optimizer.step(closure)
        resumed.step(same_closure)
        assert torch.equal(flatten(model.parameters()), flatten(twin.parameters()))
        assert repr(optimizer.last_step) == repr(
            resumed.last_step
        )  # NaN, where a field has no value, equals itself


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Nystrom(rank=0), "rank must be an integer, at least 1, got 0"),
        (lambda: Nystrom(rank=9, largest_rank=8), "largest_rank must be at least rank, got 8 < 9"),
        (lambda: Nystrom(refresh=0), "refresh must be"),
        (lambda: Diagonal(probes=1.5), "probes must be an integer, at least 1, got 1.5"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [Nystrom(rank=4, refresh=3), Diagonal(probes=4, refresh=3)])
@pytest.mark.parametrize("part", [0, 2])
def test_sketches_of_other_parameters_are_drawn_anew(kind, part):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, labels = torch.randn(30, 6, dtype=torch.float64), torch.arange(30) % 3
    optimizer = NaturalCG(model.parameters(), preconditioner=kind)
    for frozen in (False, False, True, True, False, True, False):
        model[part].requires_grad_(not frozen)
        optimizer.step(lambda: nn.functional.cross_entropy(model(x), labels))
        assert optimizer.last_step.accepted
        assert optimizer.last_step.preconditioner == kind.name


@pytest.mark.parametrize("kind", [Nystrom(rank=4), Diagonal()])
def test_a_sketch_that_a_save_has_rounded_still_serves(kind):
    model, x = nn.Linear(6, 3).bfloat16(), torch.randn(30, 6).bfloat16()
    optimizer = NaturalCG(model.parameters(), preconditioner=kind)
    for _ in range(2):
        optimizer.step(lambda: nn.functional.cross_entropy(model(x).float(), torch.arange(30) % 3))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.last_step.preconditioner == kind.name


def test_nystrom_of_no_curvature_is_the_identity():
    sketch = Nystrom(rank=3).draw(lambda v: 0 * v, N, shift_of(0.0), None, seeded())
    r = torch.randn(N, dtype=torch.float64)
    assert_near(Nystrom().solve(sketch, shift_of(0.0))(r), r, 1e-12)
