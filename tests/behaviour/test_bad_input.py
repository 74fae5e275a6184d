"""What is refused, what is undone, and that nothing is left behind."""

import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import flatten, make_model
from torch import nn
from torch.distributions import Categorical, Normal, kl_divergence

from ngd_optim import Diagonal, NaturalCG, Nystrom, least_squares, linearize, plot_history

SETTINGS = [
    ({"cuda_graphs": "yes"}, "cuda_graphs must be True or False, got 'yes'"),
    ({"lr": -0.1}, "lr must be a finite number, at least 0, got -0.1"),
    ({"lr": math.inf}, "lr must be a finite number, at least 0, got inf"),
    ({"lr": math.nan}, "lr must be a finite number, at least 0, got nan"),
    ({"lr": "fast"}, "lr must be a finite number, at least 0, got 'fast'"),
    ({"lr": True}, "lr must be a finite number, at least 0, got True"),
    ({"max_kl": 0.0}, "max_kl must be a finite number above 0, None or 'auto', got 0.0"),
    ({"max_kl": -1}, "max_kl must be a finite number above 0, None or 'auto', got -1"),
    ({"max_kl": math.inf}, "max_kl must be a finite number above 0, None or 'auto', got inf"),
    ({"max_kl": math.nan}, "max_kl must be a finite number above 0, None or 'auto', got nan"),
    (
        {"max_kl": None, "trust_region": "boundary"},
        "trust_region='boundary' needs a max_kl .* got max_kl=None",
    ),
    (
        {"max_kl": None, "trust_region": "damped"},
        "trust_region='damped' needs a max_kl .* got max_kl=None",
    ),
    (
        {"trust_region": "ball"},
        "trust_region must be one of 'clip', 'boundary', 'damped', got 'ball'",
    ),
    ({"damping": -1e-3}, "damping must be a finite number, at least 0, got -0.001"),
    ({"damping": None}, "damping must be a finite number, at least 0, got None"),
    ({"adapt_damping": 1}, "adapt_damping must be True or False, got 1"),
    ({"min_damping": -1.0}, "min_damping must be a finite number, at least 0, or 'auto', got -1.0"),
    ({"max_damping": -1.0}, "max_damping must be a number, at least 0, or 'auto', got -1.0"),
    (
        {"min_damping": 2.0, "max_damping": 1.0},
        "min_damping must be at most max_damping, got 2.0 > 1.0",
    ),
    ({"max_cg_iters": 0}, "max_cg_iters must be an integer, at least 1, got 0"),
    ({"max_cg_iters": 2.5}, "max_cg_iters must be an integer, at least 1, got 2.5"),
    ({"cg_tol": -1e-6}, "cg_tol must be a finite number, at least 0, got -1e-06"),
    ({"cg_progress_tol": -1e-6}, "cg_progress_tol must be a finite number, at least 0, got -1e-06"),
    ({"warm_start": 1.5}, r"warm_start must be a number in \[0, 1\], got 1.5"),
    ({"max_backtracks": -1}, "max_backtracks must be an integer, at least 0, got -1"),
    ({"max_backtracks": True}, "max_backtracks must be an integer, at least 0, got True"),
    ({"backtrack_ratio": 1.0}, r"backtrack_ratio must be a number in \(0, 1\), got 1.0"),
    ({"backtrack_ratio": 0}, r"backtrack_ratio must be a number in \(0, 1\), got 0"),
    ({"weight_decay": -0.1}, "weight_decay must be a finite number, at least 0, got -0.1"),
    ({"curvature": "empirical"}, "curvature must be one of 'auto', .*got 'empirical'"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        NaturalCG(make_model("linear", 2)[0].parameters(), **settings)


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_of_a_new_group_out_of_range(settings, message):
    model, x = make_model("mlp", 2)
    optimizer = NaturalCG(model[0].parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": model[2].parameters(), **settings})
    assert len(optimizer.param_groups) == 1
    optimizer.step(lambda: F.mse_loss(model(x), torch.zeros(5, 2, dtype=torch.float64)))
    assert optimizer.last_step.accepted


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_kl", 0.5), ("trust_region", "boundary"), ("max_cg_iters", 7), ("curvature", "ggn")],
)
def test_groups_that_disagree(name, value):
    model, x = make_model("mlp", 2)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), name: value}]
    with pytest.raises(ValueError, match=rf"{name} holds for the whole step.*{value}.*may differ"):
        NaturalCG(groups)
    optimizer = NaturalCG([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    optimizer.param_groups[1][name] = value
    before = flatten(model.parameters())
    with pytest.raises(ValueError, match=rf"{name} holds for the whole step"):
        optimizer.step(lambda: F.mse_loss(model(x), torch.zeros(5, 2, dtype=torch.float64)))
    assert torch.equal(flatten(model.parameters()), before)


@pytest.mark.parametrize("closure", [None, 3.0, torch.zeros(())])
def test_step_needs_a_closure(closure):
    optimizer = NaturalCG(make_model("linear", 2)[0].parameters())
    with pytest.raises(TypeError, match=r"step\(\) needs a closure that computes the loss.* got "):
        optimizer.step(closure)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()


def test_frozen_parameters():
    with pytest.raises(
        ValueError, match="nothing to optimize: no parameter has requires_grad=True"
    ):
        NaturalCG([nn.Parameter(torch.zeros(2), requires_grad=False)]).step(lambda: torch.zeros(()))


def no_grad_loss(model, x):
    with torch.no_grad():
        return F.mse_loss(model(x), x[:, :2])


NO_LOSS = {
    # name: (closure body, error, message)
    "none": (lambda m, x: None, TypeError, "as a tensor, got NoneType; add `return loss`"),
    "number": (lambda m, x: 1.5, TypeError, "as a tensor, got float; return the tensor itself"),
    "list": (lambda m, x: [m(x).sum()], TypeError, r"got list; .*least_squares"),
    "outputs of a model": (
        lambda m, x: SimpleNamespace(loss=m(x).sum(), logits=m(x)),
        TypeError,
        "got SimpleNamespace; return its loss, outputs.loss",
    ),
    "a dict": (lambda m, x: {"loss": m(x).sum()}, TypeError, r"return its loss, outputs\['loss'\]"),
    "logits as a metric": (
        lambda m, x: (m(x).sum(), m(x)),
        ValueError,
        r"a scalar KL, got shape .*Categorical\(logits=",
    ),
    "triple": (
        lambda m, x: (m(x).sum(), None, None),
        TypeError,
        r"must return a loss or \(loss, metric\), got a tuple of 3",
    ),
    "single": (
        lambda m, x: (m(x).sum(),),
        TypeError,
        r"must return a loss or \(loss, metric\), got a tuple of 1",
    ),
    "vector": (
        lambda m, x: m(x).sum(1),
        ValueError,
        r"must return a scalar loss, got shape \(5,\)",
    ),
    "swapped": (
        lambda m, x: (Normal(m(x), 1.0), m(x).sum()),
        TypeError,
        r"must return the loss first, then the distribution",
    ),
    "only_distribution": (lambda m, x: Normal(m(x), 1.0), TypeError, "must return the loss first"),
    "no_grad": (no_grad_loss, ValueError, "the loss has no graph to differentiate"),
    "detached": (
        lambda m, x: F.mse_loss(m(x), x[:, :2]).detach(),
        ValueError,
        "the loss has no graph",
    ),
    "constant": (lambda m, x: torch.ones(()), ValueError, "the loss has no graph to differentiate"),
    "detached_metric": (
        lambda m, x: (F.mse_loss(m(x), x[:, :2]), Categorical(logits=m(x).detach())),
        ValueError,
        "parameters of the returned Categorical are detached",
    ),
    "detached_kl": (
        lambda m, x: (m(x).sum(), m(x).sum().detach() * 0),
        ValueError,
        "kl has no graph to differentiate",
    ),
    "large_kl": (
        lambda m, x: (m(x).sum(), m(x).square().sum()),
        ValueError,
        "kl must be zero at the current parameters",
    ),
    "text_metric": (
        lambda m, x: (m(x).sum(), "kl"),
        TypeError,
        "must be a torch.distributions.Distribution.*got str",
    ),
}


@pytest.mark.parametrize("use", ["step", "linearize"])
@pytest.mark.parametrize("name", NO_LOSS)
def test_closures_that_return_no_loss(name, use):
    body, error, message = NO_LOSS[name]
    model, x = make_model("linear", 2)
    optimizer, before = NaturalCG(model.parameters()), flatten(model.parameters())
    with pytest.raises(error, match=message):
        optimizer.step(lambda: body(model, x)) if use == "step" else linearize(
            lambda: body(model, x), model.parameters()
        )
    assert torch.equal(flatten(model.parameters()), before)
    assert not any(optimizer.state.values())
    assert optimizer.last_step is None


def test_backward_needs_a_scalar():
    model, x = make_model("linear", 2)
    with pytest.raises(RuntimeError, match=r"scalar loss, got one of shape \(5, 2\)"):
        NaturalCG(model.parameters()).step(lambda: model(x).backward())


def test_sparse_gradients():
    table = nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
    before = flatten(table.parameters())
    with pytest.raises(
        ValueError, match=r"shape \(4, 2\) has a sparse gradient.*Embedding\(sparse=False\)"
    ):
        NaturalCG(table.parameters()).step(
            lambda: F.mse_loss(table(torch.arange(3)), torch.ones(3, 2).double())
        )
    assert torch.equal(flatten(table.parameters()), before)


class Spoilt:
    """A regression whose closure can be spoilt for a while."""

    def __init__(self):
        self.model, self.x = make_model("mlp", 2)
        self.y = torch.randn(5, 2, dtype=torch.float64)
        self.start = flatten(self.model.parameters())

    @property
    def moved(self):
        return not torch.equal(flatten(self.model.parameters()), self.start)

    def loss(self):
        return F.mse_loss(self.model(self.x), self.y)


def nan_curvature(z):
    """A zero with zero gradient whose second derivative at z = z₀ is NaN."""
    distance = (z - z.detach()).abs()
    return (distance * distance.sqrt()).sum()


def spoil_gradient(spoilt, poison):
    """Finite loss, poisoned gradient: √0 has an infinite derivative."""
    zero = (spoilt.model[0].weight - spoilt.model[0].weight.detach()).abs().sum()
    return spoilt.loss() + zero.sqrt() * (0.0 if math.isnan(poison) else 1.0)


SPOILERS = {
    "loss_nan": lambda s: s.loss() * math.nan,
    "loss_inf": lambda s: s.loss() * math.inf,
    "loss_nan_beside_a_finite_gradient": lambda s: s.loss() + math.nan,
    "loss_inf_beside_a_finite_gradient": lambda s: s.loss() + math.inf,
    "loss_minus_inf": lambda s: s.loss() - math.inf,
    "gradient_nan": lambda s: spoil_gradient(s, math.nan),
    "gradient_inf": lambda s: spoil_gradient(s, math.inf),
    "product_nan_of_a_kl": lambda s: (s.loss(), nan_curvature(s.model(s.x))),
    "product_inf_of_a_distribution": lambda s: (s.loss(), Normal(s.model(s.x), 1e-200)),
    "product_nan_of_a_distribution": lambda s: (
        s.loss(),
        Normal(s.model(s.x) * math.nan, 1.0, validate_args=False),
    ),
    "trial_nan": lambda s: s.loss() + (math.nan if s.moved else 0.0),
    "trial_inf": lambda s: s.loss() + (math.inf if s.moved else 0.0),
    "trial_minus_inf": lambda s: s.loss() - (math.inf if s.moved else 0.0),
    "trial_kl_nan": lambda s: (
        s.loss(),
        Normal(s.model(s.x) * (math.nan if s.moved else 1.0), 1.0, validate_args=False),
    ),
}


def assert_same(state, other):
    """Two states of an optimizer, bit for bit."""
    if isinstance(state, dict):
        assert state.keys() == other.keys()
        for key in state:
            assert_same(state[key], other[key])
    elif isinstance(state, torch.Tensor):
        assert torch.equal(state, other)
    else:
        assert state == other


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_backtracks": 0, "max_kl": 0.01, "trust_region": "boundary"}, {"weight_decay": 0.1}],
)
@pytest.mark.parametrize("name", SPOILERS)
def test_what_is_not_finite_is_rejected_and_forgotten(name, settings, warm):
    spoilt = Spoilt()
    optimizer = NaturalCG(spoilt.model.parameters(), damping=0.1, **settings)
    if warm:
        optimizer.step(spoilt.loss)
        spoilt.start = flatten(spoilt.model.parameters())
    damping, parameters = optimizer.param_groups[0]["damping"], list(spoilt.model.parameters())
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.step(lambda: SPOILERS[name](spoilt))
    report = optimizer.last_step
    assert torch.equal(flatten(spoilt.model.parameters()), spoilt.start)
    assert not report.accepted
    assert report.reason.startswith("rejected")
    assert (report.step_norm, report.step_scale) == (0.0, 0.0)
    assert report.new_loss == report.loss or math.isnan(report.loss)
    if name.startswith("trial"):
        assert optimizer.param_groups[0]["damping"] == pytest.approx(4 * damping)
    else:  # its data are as if they had not been there
        assert_same(optimizer.state_dict(), state)
    assert all(
        torch.as_tensor(x).isfinite().all()
        for entry in optimizer.state.values()
        for x in entry.values()
    )
    assert [p is q for p, q in zip(parameters, spoilt.model.parameters(), strict=True)] == [
        True
    ] * 4

    before = spoilt.loss().item()
    optimizer.step(spoilt.loss)
    assert optimizer.last_step.accepted
    assert spoilt.loss().item() < before


def test_reason_says_what_was_not_finite():
    reasons = {}
    for name, spoil in SPOILERS.items():
        spoilt = Spoilt()
        optimizer = NaturalCG(spoilt.model.parameters(), max_backtracks=2)
        optimizer.step(lambda spoil=spoil, spoilt=spoilt: spoil(spoilt))
        reasons[name] = optimizer.last_step.reason
    assert reasons["loss_nan_beside_a_finite_gradient"] == "rejected: the loss is nan"
    assert reasons["loss_inf_beside_a_finite_gradient"] == "rejected: the loss is inf"
    for name in ("gradient_nan", "gradient_inf"):
        assert reasons[name] == "rejected: the gradient is not finite"
    for name in ("product_nan_of_a_kl", "product_inf_of_a_distribution"):
        assert reasons[name] == "rejected: a curvature product is not finite"
    assert (
        reasons["trial_nan"]
        == "rejected after 3 trial points, the last one because its loss is nan"
    )
    assert (
        reasons["trial_minus_inf"]
        == "rejected after 3 trial points, the last one because its loss is -inf"
    )
    assert (
        reasons["trial_kl_nan"]
        == "rejected after 3 trial points, the last one because its KL is nan"
    )


REASONS = {
    # name: (settings, closure of a parameter w and its start, reason)
    "a preconditioner": (
        {"preconditioner": lambda r: r * math.nan},
        lambda w: w.square().sum(),
        "what the preconditioner returns is not finite; use preconditioner=None",
    ),
    "a gradient too large": (
        {},
        lambda w: F.l1_loss(1e25 * w, torch.zeros(3)),
        "the gradient is too large for its dtype",
    ),
    "an empty batch": (
        {},
        lambda w: F.mse_loss(w * torch.zeros(0, 3), torch.zeros(0, 3)),
        "the loss is nan, and tensors without elements went into it: the batch is empty",
    ),
    "an empty batch of any loss": (
        {},
        lambda w: (w * torch.zeros(0, 3)).square().mean(),
        "the loss is nan, and tensors without elements went into it: the batch is empty",
    ),
    "labels that are all ignored": (
        {},
        lambda w: F.cross_entropy(w.expand(4, 3), torch.full((4,), -100)),
        "the loss is nan",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_blames_what_is_to_blame(name):
    settings, loss, reason = REASONS[name]
    w = nn.Parameter(torch.ones(3))
    optimizer = NaturalCG([w], **settings)
    optimizer.step(lambda: loss(w))
    assert optimizer.last_step.reason.startswith(f"rejected: {reason}")
    assert torch.equal(w, torch.ones(3))


def closure_with(w, *batches):
    batches = iter(batches)
    return lambda: (w * next(batches)).square().mean()


EMPTY, FULL, NAN = torch.zeros(0, 3), torch.ones(2, 3), torch.full((2, 3), math.nan)


@pytest.mark.parametrize(
    ("batch", "of_curvature", "blames_batch"),
    [(EMPTY, FULL, True), (EMPTY, EMPTY, True), (NAN, EMPTY, False)],
)
def test_the_batch_of_the_loss_is_blamed_and_no_other_is_drawn(batch, of_curvature, blames_batch):
    w = nn.Parameter(torch.ones(3))
    optimizer = NaturalCG([w])
    optimizer.step(
        closure_with(w, batch), curvature_closure=closure_with(w, of_curvature, of_curvature)
    )
    assert ("the batch is empty" in optimizer.last_step.reason) == blames_batch


def test_an_empty_batch_of_one_closure_of_a_list_is_blamed():
    w = nn.Parameter(torch.ones(3))
    optimizer = NaturalCG([w])
    optimizer.step([closure_with(w, *3 * [FULL]), closure_with(w, *3 * [EMPTY])])
    assert "the batch is empty" in optimizer.last_step.reason


@pytest.mark.parametrize(
    "settings", [{}, {"momentum": 0.9}, {"preconditioner": "kfac"}, {"solver": "dense"}]
)
@pytest.mark.parametrize("name", ["nan", "ignored", "empty", "nan curvature"])
def test_training_goes_on_as_if_bad_batches_had_not_been_there(name, settings):
    bad = {
        "nan": lambda m, x, y: F.cross_entropy(m(x * math.nan), y),
        "ignored": lambda m, x, y: F.cross_entropy(m(x), torch.full_like(y, -100)),
        "empty": lambda m, x, y: F.cross_entropy(m(x[:0]), y[:0]),
        "nan curvature": lambda m, x, y: (m(x).square().mean(), Normal(m(x), 1e-200)),
    }[name]
    losses = []
    for batches in (0, 7):
        torch.manual_seed(0)
        model, x = make_model("mlp", 3)
        labels, optimizer = torch.arange(5) % 3, NaturalCG(model.parameters(), **settings)
        for step in range(6):
            optimizer.step(lambda m=model, x=x, y=labels: F.cross_entropy(m(x), y))
            for _ in range(batches if step in (1, 3) else 0):
                optimizer.step(lambda m=model, x=x, y=labels: bad(m, x, y))
                assert not optimizer.last_step.accepted
        losses.append(F.cross_entropy(model(x), labels).item())
    assert losses[0] == losses[1]


LARGE = {
    "tensor": torch.arange(235.0),
    "parameter": nn.Parameter(torch.zeros(235)),
    "array": np.arange(235.0),
    "list": list(range(235)),
    "text": "auto " * 100,
    "module": nn.Sequential(*(nn.Linear(3, 3) for _ in range(20))),
}
ARGUMENTS = {
    **{
        name: lambda v, n=name: NaturalCG([nn.Parameter(torch.ones(2))], **{n: v})
        for name in NaturalCG([nn.Parameter(torch.ones(2))]).param_groups[0]
        if name not in ("params", "preconditioner")
    },
    "generator": lambda v: NaturalCG([nn.Parameter(torch.ones(2))], generator=v),
    "rank": lambda v: Nystrom(rank=v),
    "refresh": lambda v: Diagonal(refresh=v),
    "backend": lambda v: linearize(lambda: None, [nn.Parameter(torch.ones(2))], backend=v),
    "weights": lambda v: least_squares(torch.ones(3), weights=[v]),
    "plot_history": lambda v: plot_history([v]),
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_was_given_is_shown_in_a_few_words(name, kind):
    with pytest.raises((TypeError, ValueError)) as refusal:
        ARGUMENTS[name](LARGE[kind])
    message = str(refusal.value)
    assert name in message
    assert "got " in message
    assert len(message) < 300


@pytest.mark.parametrize("closure", [one for one in LARGE.values() if not callable(one)])
def test_what_is_no_closure_is_shown_in_a_few_words(closure):
    with pytest.raises(TypeError, match="needs a closure") as refusal:
        NaturalCG([nn.Parameter(torch.ones(2))]).step(closure)
    assert len(str(refusal.value)) < 300


def test_no_reason_has_a_bound_that_says_nothing():
    """A steep slope asks for a decrease far beyond the loss."""
    w = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = NaturalCG([w], curvature="hessian", max_kl=None, max_backtracks=1, damping=1e-20)
    optimizer.step(lambda: 1e3 * (1 + 1e-6 * (1e9 * (w - 1)).sin()))
    reason = optimizer.last_step.reason
    assert not optimizer.last_step.accepted
    assert "e+" not in reason
    assert "its loss falls by" in reason or "is above 1000" in reason


def test_backtracks_out_of_a_region_that_is_not_finite():
    spoilt = Spoilt()

    def far():
        return (flatten(spoilt.model.parameters()) - spoilt.start).norm() > 0.1

    optimizer = NaturalCG(spoilt.model.parameters(), max_kl=None, max_backtracks=30)
    optimizer.step(lambda: spoilt.loss() + (math.nan if far() else 0.0))
    assert optimizer.last_step.accepted
    assert optimizer.last_step.backtracks > 0
    assert 0.08 <= optimizer.last_step.step_norm <= 0.1


class StopHereError(Exception):
    pass


class Noisy:
    """A task in several forms, with dropout, that may raise when it runs for the k-th time.

    The form "unrecorded" draws in a way that cannot be replayed, and runs at each trial point.
    """

    def __init__(self, form, raises=StopHereError):
        self.model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.3), nn.Linear(6, 3)).double()
        self.x = torch.randn(5, 3, dtype=torch.float64)
        self.form, self.raises, self.runs, self.fatal = form, raises, 0, None
        self.optimizer = NaturalCG(
            self.model.parameters(),
            damping=0.1,
            max_cg_iters=3,
            lr=8.0,
            max_kl=None,
            max_backtracks=30,
        )

    def closure(self):
        self.runs += 1
        if self.form == "backward":
            self.optimizer.zero_grad()
        z = self.model(self.x)
        if self.form == "unrecorded":
            z = F.rrelu(z, training=True)
        loss = F.mse_loss(z, torch.ones_like(z))
        if self.form == "backward":
            loss.backward()
        if self.runs == self.fatal:
            raise self.raises("stop here")
        if self.form == "fisher":
            return loss, Categorical(logits=z)
        if self.form == "kl":
            return loss, kl_divergence(Normal(z.detach(), 1.0), Normal(z, 1.0)).mean()
        return loss


def random_states():
    return [torch.get_rng_state(), torch.tensor(random.getstate()[1])]


@pytest.mark.parametrize("form", ["ggn", "backward", "fisher", "kl", "unrecorded"])
def test_exception_at_every_run_leaves_everything_as_it_was(form):
    raises = KeyboardInterrupt
    torch.manual_seed(3)
    counted = Noisy(form)
    counted.optimizer.step(counted.closure)
    total = counted.runs
    assert counted.optimizer.last_step.n_forward > 2
    assert total > 4 or form != "unrecorded"
    assert counted.optimizer.last_step.accepted
    assert counted.optimizer.last_step.backtracks > 0
    after_success = flatten(counted.model.parameters())
    for k in range(1, total + 1):
        torch.manual_seed(3)
        task = Noisy(form, raises)
        task.fatal = k
        before, gradients = (
            flatten(task.model.parameters()),
            [torch.full_like(p, 7.0) for p in task.model.parameters()],
        )
        for p, gradient in zip(task.model.parameters(), gradients, strict=True):
            p.grad = gradient
        states = random_states()
        with pytest.raises(raises, match="stop here"):
            task.optimizer.step(task.closure)
        assert task.runs == k
        assert torch.equal(flatten(task.model.parameters()), before)
        assert all(torch.equal(a, b) for a, b in zip(random_states(), states, strict=True))
        for p, gradient in zip(task.model.parameters(), gradients, strict=True):
            assert p.requires_grad
            assert p.is_leaf
            assert p.grad is gradient
            assert torch.equal(gradient, torch.full_like(p, 7.0))
        assert not any(task.optimizer.state.values())
        assert task.optimizer.last_step is None
        assert task.optimizer.param_groups[0]["damping"] == 0.1
        assert torch.is_grad_enabled()
        # As if nothing had happened: the step after it is the one that would have been.
        task.optimizer.step(task.closure)
        assert torch.equal(flatten(task.model.parameters()), after_success)


def test_exception_after_zeroing_gradients_in_place_brings_them_back():
    model, x = make_model("linear", 2)
    optimizer = NaturalCG(model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)

    def closure():
        optimizer.zero_grad(set_to_none=False)
        F.mse_loss(model(x), torch.zeros(5, 2, dtype=torch.float64)).backward()
        raise StopHereError

    with pytest.raises(StopHereError):
        optimizer.step(closure)
    assert all((p.grad == 7).all() for p in model.parameters())


def test_exception_while_a_parameter_is_frozen_thaws_it():
    model, _x = make_model("mlp", 2)

    def closure():
        model[0].weight.requires_grad_(False)
        raise StopHereError

    with pytest.raises(StopHereError):
        NaturalCG(model.parameters()).step(closure)
    assert all(p.requires_grad for p in model.parameters())


def test_exception_in_a_bfloat16_model_restores_every_bit():
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    log_scale = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    x, runs = torch.randn(5, 3, dtype=torch.bfloat16), []
    before = [p.clone() for p in model.parameters()]

    def closure():
        runs.append(1)
        if any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)):
            raise KeyboardInterrupt  # a trial point, to which the question sends the closure
        return (
            F.mse_loss(model(x).double(), torch.zeros(5, 2, dtype=torch.float64)) * log_scale.exp()
        )

    with pytest.raises(KeyboardInterrupt):
        NaturalCG([*model.parameters(), log_scale]).step(closure)
    assert len(runs) > 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert log_scale.item() == torch.tensor(0.1, dtype=torch.float64).item()


def linear(outputs=3, seed=0):
    torch.manual_seed(seed)
    model, x = nn.Linear(4, outputs).double(), torch.randn(12, 4, dtype=torch.float64)
    return model, x, torch.arange(12) % 3


def test_closures_of_a_list_must_return_the_same():
    """Else the bound on the KL would be lost without a word."""
    model, x, labels = linear()
    start = flatten(model.parameters())

    def with_distribution():
        logits = model(x)
        return F.cross_entropy(logits, labels), Categorical(logits=logits)

    def by_hand():
        return (model(x) - 1).pow(2).mean()

    for other in (lambda: F.cross_entropy(model(x), labels), by_hand):
        with pytest.raises(ValueError, match="closures of a list must all return the same"):
            NaturalCG(model.parameters()).step([with_distribution, other])
        assert torch.equal(flatten(model.parameters()), start)
    with pytest.raises(ValueError, match="'ggn' without a KL, 'hessian' without a KL"):
        NaturalCG(model.parameters()).step([lambda: F.cross_entropy(model(x), labels), by_hand])


def test_a_loss_of_another_model_is_refused():
    model, x, labels = linear()
    twin = copy.deepcopy(model)

    def own():
        return F.cross_entropy(model(x), labels)

    with pytest.raises(ValueError, match="the loss depends on none of the optimizer's parameters"):
        NaturalCG(twin.parameters()).step(own)
    with pytest.raises(
        ValueError, match="the curvature closure depends on none of the optimizer's parameters"
    ):
        NaturalCG(twin.parameters()).step(
            lambda: F.cross_entropy(twin(x), labels), curvature_closure=own
        )
    assert torch.equal(flatten(twin.parameters()), flatten(model.parameters()))


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.huber_loss])
def test_targets_may_be_integers(loss):
    model, x, _ = linear()
    targets = torch.arange(36).view(12, 3) % 2
    optimizer = NaturalCG(model.parameters())
    try:
        loss(model(x), targets).backward()
    except RuntimeError:  # torch itself asks for it: always, or in older releases
        targets = targets.double()
    model.zero_grad()
    optimizer.step(lambda: loss(model(x), targets))
    assert optimizer.last_step.accepted
    assert optimizer.last_step.curvature == "ggn"


def test_a_step_without_a_closure_says_what_it_needs():
    model, x, labels = linear()
    optimizer = NaturalCG(model.parameters())
    F.cross_entropy(model(x), labels).backward()
    with pytest.raises(TypeError, match="needs a closure that computes the loss"):
        optimizer.step()


@pytest.mark.parametrize("kind", [Diagonal, Nystrom])
def test_a_class_is_no_preconditioner(kind):
    with pytest.raises(
        ValueError, match=r"preconditioner must be .* a Diagonal, a Nystrom or a function"
    ):
        NaturalCG([nn.Parameter(torch.ones(2))], preconditioner=kind)


def test_a_seed_is_no_generator():
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got 0"):
        NaturalCG([nn.Parameter(torch.ones(2))], generator=0)


@pytest.mark.parametrize(
    "limits", [{"max_damping": 1e-10}, {"min_damping": 1e7}, {"min_damping": 1e20}]
)
@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_one_limit_of_the_damping_may_be_beyond_the_others_default(limits, solver):
    model, x, labels = linear()
    optimizer = NaturalCG(model.parameters(), solver=solver, **limits)
    optimizer.step(lambda: F.cross_entropy(model(x), labels))
    assert optimizer.param_groups[0]["damping"] == next(iter(limits.values()))


@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_a_nan_is_not_taken_for_a_lack_of_a_diagonal(solver):
    w = nn.Parameter(torch.ones(3))
    optimizer = NaturalCG([w], solver=solver, damping_scale="diagonal")
    optimizer.step(lambda: w.pow(4).sum() * math.nan)
    assert optimizer.last_step.reason == "rejected: the loss is nan"


def test_the_state_of_another_optimizer_is_refused_and_nothing_is_lost():
    model, x, labels = linear()
    optimizer = NaturalCG(model.parameters(), damping=0.3)
    optimizer.step(lambda: F.cross_entropy(model(x), labels))
    before = copy.deepcopy(optimizer.state_dict())
    adam = torch.optim.Adam(model.parameters())
    adam.step()
    with pytest.raises(ValueError, match="not the state of a NaturalCG: its groups have no max_kl"):
        optimizer.load_state_dict(adam.state_dict())
    other = NaturalCG(linear(2)[0].parameters())
    model_of_other = nn.ParameterList(other.param_groups[0]["params"])
    other.step(lambda: F.mse_loss(F.linear(x, *model_of_other), x[:, :2]))
    with pytest.raises(
        ValueError, match=r"saved of other parameters: one of shape \(3, 4\) had \(2, 4\)"
    ):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for entry, same in zip(after["state"].values(), before["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(entry[k]), torch.as_tensor(same[k])) for k in same)
    optimizer.step(lambda: F.cross_entropy(model(x), labels))
    assert optimizer.last_step.accepted


@pytest.mark.parametrize("kind", [Diagonal(probes=3), Nystrom(rank=3), "kfac"])
def test_a_saved_state_loads_as_torch_loads_by_default(kind, tmp_path):
    model, x, labels = linear()
    optimizer = NaturalCG(model.parameters(), preconditioner=kind)
    optimizer.step(lambda: F.cross_entropy(model(x), labels))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["param_groups"][0]["preconditioner"] == kind
    NaturalCG(model.parameters()).load_state_dict(loaded)


def test_a_state_with_settings_that_are_not_allowed_is_refused():
    model, *_ = linear()
    optimizer = NaturalCG(model.parameters())
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["damping"] = -1.0
    with pytest.raises(ValueError, match="damping must be a finite number, at least 0"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["damping"] == 0.1


def test_numbers_of_numpy_are_settings_that_can_be_saved(tmp_path):
    model, x, labels = linear()
    optimizer = NaturalCG(
        model.parameters(), lr=np.float32(0.5), max_kl=np.float64(0.1), max_cg_iters=np.int64(7)
    )
    optimizer.step(lambda: (F.cross_entropy(model(x), labels), Categorical(logits=model(x))))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    group = torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"][0]
    assert (group["lr"], group["max_kl"], group["max_cg_iters"]) == (0.5, 0.1, 7)
    assert all(type(v) in (int, float, bool, str) for v in optimizer.last_step.as_dict().values())


def test_a_weight_without_rows_does_no_harm():
    model, empty = nn.Linear(4, 3), nn.Linear(4, 0)
    x, labels = torch.randn(12, 4), torch.arange(12) % 3
    optimizer = NaturalCG([*model.parameters(), *empty.parameters()], preconditioner="kfac")
    optimizer.step(lambda: F.cross_entropy(torch.cat([model(x), empty(x)], 1), labels))
    assert optimizer.last_step.accepted
