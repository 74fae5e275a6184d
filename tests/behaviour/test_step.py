"""One whole step of NaturalCG against dense linear algebra."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import StepProblem, assert_near, dense_gauss_newton, flat_function, flatten
from torch import nn

from ngd_optim import NaturalCG
from ngd_optim.linearization.product import ClosureProduct

FORMS = ["fisher", "kl", "ggn"]
EXACT = {"max_kl": 0.01, "cg_tol": 1e-13, "cg_progress_tol": 0.0, "warm_start": 0.0, "damping": 0.1}


@pytest.fixture
def products(monkeypatch):
    """Every vector that the curvature is multiplied by."""
    vectors = []
    product = ClosureProduct.__call__

    def counted(self, v):
        vectors.append(v.clone())
        return product(self, v)

    monkeypatch.setattr(ClosureProduct, "__call__", counted)
    return vectors


def close(true, rtol=1e-8):
    return pytest.approx(true.item() if isinstance(true, torch.Tensor) else true, rel=rtol)


class DenseStep:
    """What one step must be: the solution of (F + W + λI) x = −g, scaled."""

    def __init__(
        self,
        problem,
        *,
        lr=1.0,
        damping=0.1,
        weight_decay=0.0,
        max_kl=0.01,
        trust_region="clip",
        **_,
    ):
        self.problem, self.decay = problem, weight_decay * torch.ones_like(problem.theta)
        self.F = problem.curvature
        self.g = problem.gradient + self.decay * problem.theta
        A = self.F + (self.decay + damping * torch.ones_like(self.g)).diag()
        x = -torch.linalg.solve(A, self.g)
        metric = A if trust_region == "damped" else self.F
        to_boundary = math.inf if max_kl is None else (2 * max_kl / (x @ metric @ x)).sqrt().item()
        self.scale = min(1.0, to_boundary) if trust_region == "clip" else to_boundary
        self.is_linear = trust_region != "clip" and problem.form != "ggn"
        self.d = lr * self.scale * x

    def objective(self, fraction):
        theta = self.problem.theta + fraction * self.d
        return (self.problem.loss(theta) + 0.5 * theta @ (self.decay * theta)).item()

    def kl(self, fraction):
        return self.problem.kl(self.problem.theta + fraction * self.d)

    def model_decrease(self, fraction):
        d = fraction * self.d
        bend = 0.0 * d if self.is_linear else self.F @ d
        return -(self.g @ d + 0.5 * d @ (bend + self.decay * d)).item()

    def good_enough(self, fraction, max_kl):
        falls = (
            self.objective(fraction)
            <= self.objective(0) + 1e-4 * fraction * (self.g @ self.d).item()
        )
        return falls and (
            max_kl is None or self.kl(fraction) is None or self.kl(fraction) <= max_kl
        )

    def assert_report(self, report, fraction):
        """All that is measured in the report; the fraction is that of the accepted point."""
        problem, d = self.problem, fraction * self.d
        assert report.accepted
        assert report.loss == close(problem.loss(problem.theta))
        assert report.new_loss == close(problem.loss(problem.theta + d))
        assert report.grad_norm == close(self.g.norm())
        assert report.step_norm == close(d.norm())
        assert report.kl == close(
            0.5 * d @ self.F @ d if problem.form == "ggn" else self.kl(fraction), 1e-7
        )
        assert report.predicted_decrease == close(self.model_decrease(fraction))
        ratio = (self.objective(0) - self.objective(fraction)) / self.model_decrease(fraction)
        assert report.reduction_ratio == close(ratio, 1e-7)
        assert report.step_scale == close(fraction * self.scale)


def groups_of(model, **settings):
    """The first layer in one group, the last in another, with a setting for each."""
    parts = [list(model[0].parameters()), list(model[2].parameters())]
    return [
        {"params": part, **{k: v[i] for k, v in settings.items()}} for i, part in enumerate(parts)
    ]


def spread(model, values):
    sizes = [sum(p.numel() for p in model[i].parameters()) for i in (0, 2)]
    return torch.cat(
        [torch.full((n,), v, dtype=torch.float64) for n, v in zip(sizes, values, strict=True)]
    )


SETTINGS = {
    "boundary": {"trust_region": "boundary", "max_kl": 1e-3},
    "boundary_lr": {"trust_region": "boundary", "max_kl": 1e-3, "lr": 0.5},
    "boundary_outside": {"trust_region": "boundary", "max_kl": 0.5},
    "damped": {"trust_region": "damped", "max_kl": 1e-3},
    "damped_weight_decay": {
        "trust_region": "damped",
        "max_kl": 0.5,
        "weight_decay": 0.2,
        "lr": 0.5,
    },
    "clip_scaled": {"max_kl": 1e-4},
    "clip_scaled_lr": {"max_kl": 1e-4, "lr": 0.3},
    "clip_inside": {"max_kl": 100.0},
    "no_region": {"max_kl": None},
    "weight_decay": {"max_kl": 1e-3, "weight_decay": 0.2},
    "weight_decay_boundary": {
        "max_kl": 1e-3,
        "weight_decay": 0.2,
        "trust_region": "boundary",
        "lr": 0.7,
    },
    "no_curvature_left": {"max_kl": None, "damping": 1e4},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SETTINGS)
def test_scaled_step_is_the_dense_one(form, name, products):
    problem = StepProblem(form)
    settings = EXACT | SETTINGS[name]
    optimizer = NaturalCG(problem.model.parameters(), max_backtracks=0, **settings)
    loss = optimizer.step(problem.closure)
    report = optimizer.last_step
    dense = DenseStep(problem, **settings)
    assert_near(problem.moved - problem.theta, dense.d)
    dense.assert_report(report, 1.0)
    if "clip" in name:
        assert (dense.scale == 1.0) == (name == "clip_inside")
    assert (loss.shape, loss.requires_grad, loss.item()) == (
        (),
        False,
        close(problem.loss(problem.theta)),
    )
    assert report.damping == settings["damping"]
    assert (report.backtracks, report.reason) == (0, "accepted")
    assert report.cg_stop == "tolerance"
    assert report.cg_residual <= 1e-13
    assert report.n_product == report.cg_iters == len(products)
    assert 1 <= report.cg_iters <= len(problem.theta) + 10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trust_region", ["clip", "boundary", "damped"])
@pytest.mark.parametrize(
    "per_group",
    [
        {"lr": (1.0, 0.3)},
        {"damping": (0.3, 0.01)},
        {"weight_decay": (0.5, 0.0)},
        {"lr": (0.2, 1.0), "damping": (0.03, 0.5), "weight_decay": (0.0, 0.3)},
        {"lr": (0.0, 1.0)},
    ],
)
def test_groups_with_their_own_settings(form, trust_region, per_group, products):
    problem = StepProblem(form)
    settings = EXACT | {"max_kl": 1e-3, "trust_region": trust_region}
    optimizer = NaturalCG(groups_of(problem.model, **per_group), max_backtracks=0, **settings)
    optimizer.step(problem.closure)
    values = {name: spread(problem.model, pair) for name, pair in per_group.items()}
    dense = DenseStep(problem, **(settings | values))
    assert_near(problem.moved - problem.theta, dense.d)
    dense.assert_report(optimizer.last_step, 1.0)
    assert optimizer.last_step.damping == max(per_group.get("damping", [0.1]))
    assert optimizer.last_step.n_product == len(products)


@pytest.mark.parametrize("form", FORMS)
def test_groups_with_equal_settings_are_one(form):
    problem = StepProblem(form)
    NaturalCG(groups_of(problem.model), max_backtracks=0, **EXACT).step(problem.closure)
    assert_near(problem.moved - problem.theta, DenseStep(problem).d)


@pytest.mark.parametrize("form", ["fisher", "ggn"])
@pytest.mark.parametrize("lr", [0.5, 20.0])
def test_runs_of_the_closure_and_products_are_counted(form, lr, products):
    problem = StepProblem(form)
    optimizer = NaturalCG(problem.model.parameters(), lr=lr, weight_decay=0.5, max_kl=None)
    for step in range(3):
        problem.calls = 0
        products.clear()
        optimizer.step(problem.closure)
        report = optimizer.last_step
        assert report.n_product == len(products) == report.cg_iters + (step > 0)
        # Trial points replay what was recorded. The first step with a closure may run it to check.
        assert problem.calls == 1 or step == 0
        assert report.n_forward >= 1 + report.backtracks
        assert (report.backtracks > 0) == (lr > 1) or step > 0


LINE_SEARCHES = [
    # form, settings, what turns the full step down
    ("fisher", {"trust_region": "boundary", "max_kl": 0.1, "lr": 3.0}, "kl"),
    ("kl", {"trust_region": "boundary", "max_kl": 0.1, "lr": 3.0}, "kl"),
    ("fisher", {"max_kl": 0.01, "lr": 2.0, "backtrack_ratio": 0.6}, "kl"),
    ("fisher", {"trust_region": "boundary", "max_kl": 0.05, "lr": 3.0, "weight_decay": 0.1}, "kl"),
    ("fisher", {"max_kl": None, "lr": 20.0, "weight_decay": 0.5}, "loss"),
    ("kl", {"max_kl": None, "lr": 20.0, "weight_decay": 0.5}, "loss"),
    ("ggn", {"max_kl": None, "lr": 20.0}, "loss"),
    ("ggn", {"max_kl": 0.1, "lr": 20.0, "weight_decay": 0.1}, "loss"),
]


@pytest.mark.parametrize(("form", "changed", "binding"), LINE_SEARCHES)
def test_line_search_takes_the_first_point_that_is_good_enough(form, changed, binding):
    problem = StepProblem(form)
    settings = EXACT | {"max_kl": 0.01, "backtrack_ratio": 0.8, "max_backtracks": 30} | changed
    optimizer = NaturalCG(problem.model.parameters(), **settings)
    optimizer.step(problem.closure)
    dense, max_kl = DenseStep(problem, **settings), settings["max_kl"]
    if binding == "kl":
        assert dense.kl(1.0) > max_kl
    else:
        assert dense.objective(1.0) > dense.objective(0.0)
    fractions = [settings["backtrack_ratio"] ** i for i in range(31)]
    backtracks = next(i for i, f in enumerate(fractions) if dense.good_enough(f, max_kl))
    report, fraction = optimizer.last_step, fractions[backtracks]
    assert report.backtracks == backtracks > 0
    assert report.reason == f"accepted after {backtracks} backtrack" + "s" * (backtracks > 1)
    assert_near(problem.moved - problem.theta, fraction * dense.d)
    dense.assert_report(report, fraction)
    assert report.new_loss < report.loss or settings.get("weight_decay")
    if max_kl and form != "ggn":
        assert problem.kl(problem.moved) <= max_kl


@pytest.mark.parametrize("form", FORMS)
def test_step_that_no_point_passes_is_undone(form):
    problem = StepProblem(form)
    closure = problem.closure

    def rising():
        returned = closure()
        extra = 0.0 if torch.equal(problem.model[0].bias.detach(), problem.theta[12:16]) else 1e3
        return (
            (returned[0] + extra, returned[1]) if isinstance(returned, tuple) else returned + extra
        )

    optimizer = NaturalCG(problem.model.parameters(), max_backtracks=4, **EXACT)
    loss = optimizer.step(rising)
    report = optimizer.last_step
    assert torch.equal(problem.moved, problem.theta)
    dense = DenseStep(problem)
    assert (report.accepted, report.backtracks, report.step_norm, report.step_scale) == (
        False,
        5,
        0.0,
        0.0,
    )
    assert report.new_loss == report.loss == loss.item() == close(problem.loss(problem.theta))
    assert report.predicted_decrease == close(dense.model_decrease(0.8**4))
    found = dense.objective(0) - dense.objective(0.8**4) - 1e3
    assert report.reduction_ratio == close(found / dense.model_decrease(0.8**4), 1e-7)
    assert report.reason.startswith("rejected after 5 trial points, the last one because its loss ")


@pytest.mark.parametrize("form", FORMS)
def test_truncated_solve_is_that_of_conjugate_gradients(form, products):
    """After k iterations x minimises the quadratic model on the Krylov space of k products."""
    problem = StepProblem(form)
    settings = {
        "max_cg_iters": 4,
        "warm_start": 0.0,
        "damping": 0.1,
        "max_kl": 1e-3,
        "trust_region": "boundary",
    }
    settings |= {"preconditioner": None, "cg_progress_tol": 0.0}
    optimizer = NaturalCG(problem.model.parameters(), max_backtracks=0, **settings)
    optimizer.step(problem.closure)
    report = optimizer.last_step
    assert (report.cg_iters, report.n_product, report.cg_stop) == (4, 4, "max_iters")
    dense = DenseStep(problem)
    A = dense.F + 0.1 * torch.eye(len(dense.g), dtype=torch.float64)
    V = torch.linalg.qr(
        torch.stack([torch.linalg.matrix_power(A, i) @ dense.g for i in range(4)], 1)
    )[0]
    x = -V @ torch.linalg.solve(V.T @ A @ V, V.T @ dense.g)
    assert_near(problem.moved - problem.theta, (2e-3 / (x @ dense.F @ x)).sqrt() * x)
    assert report.cg_residual == close((dense.g + A @ x).norm() / dense.g.norm())


def test_warm_start_is_part_of_the_last_solution(products):
    problem = StepProblem("ggn")
    settings = {
        "max_cg_iters": 2,
        "warm_start": 0.5,
        "damping": 0.1,
        "max_kl": None,
        "adapt_damping": False,
    }
    settings |= {"preconditioner": None}
    optimizer = NaturalCG(problem.model.parameters(), max_backtracks=0, **settings)
    optimizer.step(problem.closure)
    first = problem.moved - problem.theta
    assert (optimizer.last_step.n_product, len(products)) == (2, 2)
    problem.theta = problem.moved
    optimizer.step(problem.closure)
    assert (optimizer.last_step.n_product, optimizer.last_step.cg_iters, len(products)) == (3, 2, 5)
    assert_near(products[2], 0.5 * first)
    # After two iterations from x₀, x minimises the model on x₀ + span{r₀, A r₀}.
    A = problem.curvature + 0.1 * torch.eye(len(first), dtype=torch.float64)
    start = min(0.5, -(problem.gradient @ first) / (first @ A @ first)) * first
    r = -problem.gradient - A @ start
    V = torch.linalg.qr(torch.stack([r, A @ r], 1))[0]
    assert_near(problem.moved - problem.theta, start + V @ torch.linalg.solve(V.T @ A @ V, V.T @ r))


def test_warm_start_that_would_climb_is_left(products):
    problem = StepProblem("ggn")
    settings = EXACT | {"warm_start": 1.0, "max_kl": None, "adapt_damping": False}
    optimizer = NaturalCG(problem.model.parameters(), max_backtracks=0, **settings)
    optimizer.step(problem.closure)
    for p in problem.model.parameters():
        optimizer.state[p]["solution"].neg_()
    problem.theta = problem.moved
    optimizer.step(problem.closure)
    assert optimizer.last_step.n_product == optimizer.last_step.cg_iters + 1
    assert_near(problem.moved - problem.theta, DenseStep(problem, max_kl=None).d)


def test_products_stop_early_when_the_model_gains_little(products):
    problem = StepProblem("ggn")
    optimizer = NaturalCG(
        problem.model.parameters(), damping=1e-8, cg_tol=0.0, cg_progress_tol=0.5, warm_start=0.0
    )
    optimizer.step(problem.closure)
    assert optimizer.last_step.cg_stop == "progress"
    assert 3 <= optimizer.last_step.cg_iters == len(products) < len(problem.theta)


def test_linear_least_squares_is_solved_in_one_step():
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    optimizer = NaturalCG(model.parameters(), **(EXACT | {"max_kl": None, "damping": 0.0}))
    optimizer.step(lambda: F.mse_loss(model(x), y))
    assert_near(model.weight.detach().T, torch.linalg.lstsq(x, y).solution)
    assert optimizer.last_step.reduction_ratio == close(1)
    assert optimizer.last_step.cg_iters <= 4


def test_rosenbrock_by_gauss_newton():
    theta = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))

    def closure():
        return F.mse_loss(
            torch.stack([10 * (theta[1] - theta[0] ** 2), 1 - theta[0]]),
            torch.zeros(2, dtype=torch.float64),
        )

    optimizer = NaturalCG([theta], max_kl=None)
    losses = [optimizer.step(closure).item() for _ in range(50)]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert (theta.detach() - 1).abs().max() < 1e-8


def test_fisher_and_gauss_newton_agree_for_a_likelihood():
    """The generalised Gauss-Newton matrix of a softmax cross entropy is its Fisher matrix."""
    problem = StepProblem("ggn")
    NaturalCG(problem.model.parameters(), max_backtracks=0, **EXACT).step(problem.closure)
    torch.manual_seed(0)
    twin = StepProblem("ggn")
    assert torch.equal(twin.theta, problem.theta)

    def closure():
        loss = twin.closure()
        return loss, torch.distributions.Categorical(logits=twin.model(twin.x))

    NaturalCG(twin.model.parameters(), max_backtracks=0, **EXACT).step(closure)
    assert_near(twin.moved, problem.moved, 1e-10)


class MaskedNet(nn.Module):
    """A network with noise that it draws from a generator, or is given."""

    def __init__(self, generator=None):
        super().__init__()
        self.below, self.above = (
            nn.Linear(3, 4, dtype=torch.float64),
            nn.Linear(4, 3, dtype=torch.float64),
        )
        self.generator, self.masks, self.fixed = generator, [], None

    def draw(self):
        return (torch.rand(5, 4, dtype=torch.float64, generator=self.generator) < 0.5).double()

    def forward(self, x):
        mask = self.draw() if self.fixed is None else self.fixed
        self.masks.append(mask)
        return self.above(self.below(x).tanh() * mask)


@pytest.mark.parametrize("own_generator", [False, True])
def test_masks_agree_within_a_step_and_are_fresh_in_the_next(own_generator):
    generator = torch.Generator().manual_seed(5) if own_generator else None
    source, model = generator or torch.default_generator, MaskedNet(generator)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    optimizer = NaturalCG(model.parameters(), **EXACT)

    def loss(z):
        return F.mse_loss(z, y)

    output, used = flat_function(model, x), []
    for _ in range(3):
        before, untouched = source.get_state(), torch.get_rng_state()
        mask = model.draw()
        after = source.get_state()
        source.set_state(before)
        model.masks.clear()
        theta = flatten(model.parameters())

        optimizer.step(lambda: loss(model(x)))
        report = optimizer.last_step
        assert report.accepted
        assert report.n_forward > len(model.masks) == 1
        assert torch.equal(model.masks[0], mask)
        assert torch.equal(source.get_state(), after)
        assert torch.equal(torch.get_rng_state(), untouched) == own_generator
        assert not any(torch.equal(mask, earlier) for earlier in used)
        used.append(mask)

        model.fixed = mask
        A = dense_gauss_newton(output, theta, loss) + report.damping * torch.eye(
            len(theta), dtype=theta.dtype
        )
        x_dense = -torch.linalg.solve(A, torch.func.grad(lambda t: loss(output(t)))(theta))
        assert_near(flatten(model.parameters()) - theta, report.step_scale * x_dense)
        assert report.new_loss == close(loss(model(x)))
        model.fixed = None


def test_dropout_module_keeps_its_mask():
    model = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 1)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    optimizer = NaturalCG(model.parameters())
    for _ in range(3):
        state = torch.get_rng_state()
        expected = F.mse_loss(model(x), y).item()
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        assert optimizer.step(lambda: F.mse_loss(model(x), y)).item() == expected
        assert torch.equal(torch.get_rng_state(), after)
        torch.set_rng_state(state)
        assert optimizer.last_step.new_loss == close(F.mse_loss(model(x), y), 1e-12)
        assert optimizer.last_step.accepted


class TestDefaultTrustRegion:
    @pytest.mark.parametrize("form", ["fisher", "kl"])
    def test_is_in_nats_where_the_kl_is_known(self, form):
        problem = StepProblem(form)
        start, ends = copy.deepcopy(problem.model.state_dict()), []
        for max_kl in (0.01, "auto"):
            problem.model.load_state_dict(start)
            NaturalCG(problem.model.parameters(), **(EXACT | {"max_kl": max_kl})).step(
                problem.closure
            )
            ends.append(problem.moved)
        assert torch.equal(*ends)

    def test_is_none_where_the_loss_is_the_metric(self):
        problem = StepProblem("ggn")
        NaturalCG(
            problem.model.parameters(), max_backtracks=0, **(EXACT | {"max_kl": "auto"})
        ).step(problem.closure)
        assert_near(problem.moved - problem.theta, DenseStep(problem, max_kl=None).d)

    @pytest.mark.parametrize("trust_region", ["boundary", "damped"])
    def test_has_no_boundary_in_the_unit_of_a_loss(self, trust_region):
        problem = StepProblem("ggn")
        with pytest.raises(
            ValueError, match=f"trust_region='{trust_region}' needs a number for max_kl"
        ):
            NaturalCG(problem.model.parameters(), trust_region=trust_region).step(problem.closure)


SMALL_AND_LARGE = [1e-30, 1e-12, 1e-6, 1.0, 1e12]


@pytest.mark.parametrize(
    ("solver", "loss"),  # a loss by hand has no outputs for a direct solver
    [(s, loss) for s in ("cg", "dense") for loss in ("cross_entropy", "mse_loss")]
    + [("cg", "by_hand")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SMALL_AND_LARGE)
def test_a_scaled_loss_makes_progress_or_says_why_not(scale, dtype, loss, solver, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(32, 5, dtype=dtype), torch.arange(32) % 3
    functions = {
        "cross_entropy": lambda z: F.cross_entropy(z, y),
        "mse_loss": lambda z: F.mse_loss(z, F.one_hot(y, 3).to(dtype)),
        "by_hand": lambda z: -z.log_softmax(-1)[torch.arange(32), y].mean(),
    }

    def closure():
        return scale * functions[loss](model(x))

    optimizer = NaturalCG(model.parameters(), solver=solver)
    start, reports = closure().item(), []
    for _ in range(15):
        optimizer.step(closure)
        reports.append(optimizer.last_step)
    falls = reports[-1].new_loss < 0.999 * start
    says = "damping=0.1 outweighs the curvature" in caplog.text
    is_refused = all(not r.accepted and "its loss" in r.reason for r in reports)
    # The damping is on its way to the loss's scale, by half at each step.
    is_adapting = reports[-1].damping < 1e-3 * reports[0].damping
    assert falls or says or is_refused or is_adapting
    assert not (falls and says)
    assert falls or scale != 1.0
    assert caplog.text.count("outweighs the curvature") == says  # once


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damping_is_not_blamed_at_a_minimum(dtype, caplog):
    torch.manual_seed(0)
    x, y = torch.randn(64, 4, dtype=dtype), torch.randn(64, 1, dtype=dtype)
    model = nn.Linear(4, 1).to(dtype)
    optimizer = NaturalCG(model.parameters())
    for _ in range(30):
        optimizer.step(lambda: F.mse_loss(model(x), y))
    assert math.isnan(optimizer.last_step.reduction_ratio)
    assert "outweighs the curvature" not in caplog.text
