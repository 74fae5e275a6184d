"""Preconditioned steps: the same solution in fewer iterations, and state that outlives a step, a save and a change."""

import copy
import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import assert_near, flatten
from helpers.states import assert_same_state
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.utils.checkpoint import checkpoint

from ngd_optim import NaturalCG, least_squares
from ngd_optim.kronecker import saved as saved_form
from ngd_optim.kronecker.factors import unpack_factor
from ngd_optim.preconditioners import kfac

N, IN, HIDDEN, OUT = 24, 5, 6, 3
DTYPE = torch.float64

SOLVED = {
    "cg_tol": 1e-12,
    "cg_progress_tol": 0.0,
    "max_cg_iters": 2_000,
    "damping": 0.1,
    "adapt_damping": False,
}


def normed_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(IN, HIDDEN), nn.Tanh(), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, OUT)
    )


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, IN)), nn.Conv1d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 4, 2, groups=2), nn.Flatten(),
        nn.Linear(16, OUT),
    )  # fmt: skip


def labels() -> Tensor:
    return torch.arange(N) % OUT


class TwoDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)

    def to(self, dtype: torch.dtype) -> "TwoDtypes":
        self.first.to(dtype)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh().float())


class Task:
    """A model, its data and the closures that a step is taken with; the same for each one that is made alike."""

    def __init__(
        self,
        make: Callable[[], nn.Module] = normed_mlp,
        kind: str = "ggn",
        dtype: torch.dtype = DTYPE,
    ) -> None:
        torch.manual_seed(1)
        self.model = make().to(dtype)
        x, noise = torch.randn(N, IN, dtype=dtype), torch.randn(N, OUT, dtype=dtype)
        self.scale = nn.Parameter(torch.zeros(OUT, dtype=dtype))
        action = Categorical(logits=noise).sample()

        def on(part: slice) -> Callable[[], Any]:
            def closure() -> Any:
                z = self.model(x[part])
                if kind == "fisher":
                    distribution = Categorical(logits=z)
                    return -(
                        distribution.log_prob(action[part]).exp() * noise[part, 0]
                    ).mean(), distribution
                if kind == "two heads":
                    distribution = Normal(z, self.scale.exp())
                    return -(distribution.log_prob(noise[part]) * noise[part, :1]).mean(), [
                        distribution
                    ]
                if kind == "least squares":
                    return F.mse_loss(self.scale.exp() * z, noise[part])
                if kind == "hessian":
                    return (z - noise[part]).cosh().log().mean()
                return F.cross_entropy(z, labels()[part])

            return closure

        self.whole, self.parts = on(slice(0, N)), [on(slice(0, N // 3)), on(slice(N // 3, N))]
        self.params = [
            *self.model.parameters(),
            *([self.scale] if kind in ("two heads", "least squares") else []),
        ]

    @property
    def theta(self) -> Tensor:
        return flatten(self.params)


def stretched(r: Tensor) -> Tensor:
    return r * torch.linspace(1, 3, len(r), dtype=r.dtype)


ALL = {"auto": "auto", "kfac": "kfac", "callable": stretched}
NAMES = {"auto": "kfac", "kfac": "kfac", "callable": "callable"}


@pytest.fixture
def renewed_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfac, "RENEWED_AFTER", 1)


# The solution


def by_groups(task: Task) -> list[dict[str, Any]]:
    first, *rest = task.params
    return [{"params": [first], "damping": 0.1, "lr": 0.5}, {"params": rest, "weight_decay": 0.02}]


PROBLEMS: dict[
    str, tuple[Callable[[], Task], Callable[[Task], Any], Callable[[NaturalCG, Task], Any]]
] = {
    **{
        name: (make, lambda task: task.params, lambda optimizer, task: optimizer.step(task.whole))
        for name, make in {
            "mlp": Task,
            "conv": lambda: Task(conv),
            "fisher": lambda: Task(kind="fisher"),
            "two heads": lambda: Task(conv, kind="two heads"),
            "least squares": lambda: Task(kind="least squares"),
        }.items()
    },
    "groups": (Task, by_groups, lambda optimizer, task: optimizer.step(task.whole)),
    "curvature closure": (
        Task,
        lambda task: task.params,
        lambda optimizer, task: optimizer.step(task.whole, curvature_closure=task.parts[1]),
    ),
    "several closures": (
        Task,
        lambda task: task.params,
        lambda optimizer, task: optimizer.step(task.parts),
    ),
}


@pytest.mark.usefixtures("renewed_every_step")
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_solution_is_the_same_by_any_preconditioner(name):
    make, groups, step = PROBLEMS[name]
    steps: dict[str, list[Tensor]] = {}
    for kind, preconditioner in {"none": None, **ALL}.items():
        task = make()
        optimizer = NaturalCG(groups(task), preconditioner=preconditioner, **SOLVED)
        steps[kind] = []
        for _ in range(2):
            before = task.theta
            step(optimizer, task)
            report = optimizer.last_step
            assert report.accepted
            assert report.cg_stop == "tolerance"
            assert report.preconditioner == NAMES.get(kind, "none")
            steps[kind].append(task.theta - before)
    for kind in ALL:
        for found, expected in zip(steps[kind], steps["none"], strict=True):
            assert_near(found, expected, 1e-8)


class Product(torch.autograd.Function):
    """``x Wᵀ``, hidden from the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        return x @ W.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, W = ctx.saved_tensors
        return grads[0] @ W, grads[0].T @ x


def into_a_buffer(model: nn.Module, x: Tensor) -> Tensor:
    hidden = torch.zeros(N, HIDDEN, dtype=x.dtype)
    hidden[: N // 2] = model[0](x[: N // 2])
    hidden[N // 2 :] = model[0](x[N // 2 :])
    return model[3](hidden.tanh())


def with_linear_hooks(model: nn.Module, x: Tensor) -> Tensor:
    if not model[0].weight._backward_hooks:
        model[0].weight.register_hook(lambda gradient: 2 * gradient)
        model[0].bias.register_hook(lambda gradient: 0 * gradient)
    return model(x)


ODD: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "operations in place": lambda m, x: m[3](F.relu_(m[0](x).add_(0.5))),
    "a buffer written in place": into_a_buffer,
    "non-reentrant checkpoint": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "a custom function": lambda m, x: m[3](Product.apply(x, m[0].weight).tanh()),
    "hooks on parameters": with_linear_hooks,
    "a weight used elsewhere": lambda m, x: (
        m(x) + m[3].weight.sum(1) * F.linear(x, m[0].weight.flip(0)).mean()
    ),
    "a cut in the graph": lambda m, x: m[3](m[0](x).detach().tanh()) + m[0].bias.sum(),
    "a part without rows": lambda m, x: torch.cat([m(x), m[3](m[0](x[:0]))]),
    "one sample counts": lambda m, x: torch.cat([m(x[:1]), m(x[1:]).detach()]),
    "saturated": lambda m, x: 300 * m(x),
    "huge inputs": lambda m, x: m(1e15 * x),
    "tiny inputs": lambda m, x: m(1e-15 * x),
}


@pytest.mark.parametrize("name", ODD)
def test_the_solution_of_odd_models_is_the_same(name):
    thetas = []
    for preconditioner in (None, "kfac"):
        task = Task()
        optimizer = NaturalCG(task.params, preconditioner=preconditioner, **SOLVED)
        x = torch.randn(N, IN, dtype=DTYPE, generator=torch.Generator().manual_seed(1))
        optimizer.step(lambda task=task, x=x: F.cross_entropy(ODD[name](task.model, x), labels()))
        assert optimizer.last_step.cg_stop == "tolerance"
        thetas.append(task.theta)
    assert optimizer.last_step.preconditioner == "kfac"
    assert_near(thetas[1], thetas[0], 1e-9)


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e20])
@pytest.mark.parametrize("of", ["inputs", "loss"])
def test_scales_of_float32_raise_nothing(of, scale):
    task = Task(dtype=torch.float32)
    x = torch.randn(N, IN) * (scale if of == "inputs" else 1.0)
    optimizer, start = NaturalCG(task.params, preconditioner="kfac"), task.theta
    for _ in range(3):
        optimizer.step(
            lambda: F.cross_entropy(task.model(x), labels()) * (scale if of == "loss" else 1.0)
        )
        assert task.theta.isfinite().all()
    assert of == "loss" or not torch.equal(task.theta, start)


def autoencoder() -> nn.Module:
    sizes = (20, 16, 6, 16, 20)
    layers = [part for n, m in itertools.pairwise(sizes) for part in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_ill_conditioned_net_takes_far_fewer_iterations(dtype):
    iterations = {}
    for preconditioner in (None, "auto"):
        torch.manual_seed(2)
        model = autoencoder().to(dtype)
        x = torch.randn(200, 20, dtype=dtype) * torch.logspace(1, -1, 20, dtype=dtype)
        optimizer = NaturalCG(
            model.parameters(),
            preconditioner=preconditioner,
            damping=1e-6,
            adapt_damping=False,
            cg_tol=1e-2,
            cg_progress_tol=0.0,
        )
        iterations[preconditioner] = 0
        for _ in range(4):
            optimizer.step(lambda model=model, x=x: F.mse_loss(model(x), x))
            iterations[preconditioner] += optimizer.last_step.cg_iters
    assert iterations["auto"] <= iterations[None] / 3


# What outlives a step


def train(task: Task, optimizer: NaturalCG, steps: int) -> None:
    for _ in range(steps):
        optimizer.step(task.whole)


@pytest.mark.parametrize(
    ("make", "kind", "dtype", "preconditioner"),
    [
        (normed_mlp, "ggn", torch.float64, "auto"),
        (conv, "two heads", torch.float32, "kfac"),
        (TwoDtypes, "ggn", torch.float64, "auto"),
    ],
    ids=["mlp", "conv", "two dtypes"],
)
def test_a_resumed_run_is_bit_for_bit_the_same(make, kind, dtype, preconditioner):
    steps = 8
    task = Task(make, kind, dtype)
    optimizer = NaturalCG(task.params, preconditioner=preconditioner)
    saved, draws = [], []
    for _ in range(steps):
        file = io.BytesIO()
        torch.save((task.model.state_dict(), task.scale.detach(), optimizer.state_dict()), file)
        saved.append(file)
        train(task, optimizer, 1)
        assert optimizer.last_step.preconditioner == "kfac"
        draws.append(optimizer.state[task.params[0]]["draws"])
    assert draws[0] == 1
    assert draws[-1] > 2  # renewals are among the steps
    for start in (0, 1, draws.index(2), draws.index(2) + 1, steps - 1):
        twin = Task(make, kind, dtype)
        resumed = NaturalCG(twin.params)
        saved[start].seek(0)
        model, scale, state = torch.load(saved[start], weights_only=True)
        twin.model.load_state_dict(model)
        twin.scale.data.copy_(scale)
        resumed.load_state_dict(state)
        train(twin, resumed, steps - start)
        assert torch.equal(twin.theta, task.theta)
        assert_same_state(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def test_factors_that_a_save_has_rounded_still_serve():
    """Version 0.1.0 rounded to the parameters' dtype when it loaded, and rounded factors are indefinite."""
    task = Task(dtype=torch.bfloat16)
    settings = {"preconditioner": "kfac", "damping": 1e-8, "adapt_damping": False}
    optimizer = NaturalCG(task.params, **settings, generator=torch.Generator().manual_seed(4))
    optimizer.step(task.whole)
    resumed = NaturalCG(task.params, **settings)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        for name in {"left", "right"} & entry.keys():
            entry[name] = entry[name].bfloat16()
    resumed.load_state_dict(saved)
    factors = [
        unpack_factor(value)
        for (_, name), value in saved_form.load_factors(
            [resumed.state[p] for p in task.params], task.params
        )[1].items()
        if name != "diagonal"
    ]
    assert min(torch.linalg.eigvalsh(factor.double()).min() for factor in factors) < 0
    resumed.step(task.whole)
    assert resumed.last_step.preconditioner == "kfac"
    assert resumed.last_step.cg_stop != "not_finite"
    assert task.theta.isfinite().all()


def test_factors_serve_some_products_and_then_are_mixed_with_new_ones():
    task = Task()
    optimizer = NaturalCG(task.params, cg_progress_tol=0.0, max_cg_iters=4, cg_tol=0.0)
    first = task.params[0]
    served, draws, rights = 0, [], []
    for _ in range(6):
        due = served >= kfac.RENEWED_AFTER
        train(task, optimizer, 1)
        state = optimizer.state[first]
        served = (0 if due else served) + optimizer.last_step.cg_iters
        assert state["products"] == served
        draws.append(state["draws"])
        rights.append(state["right"].clone())
    assert draws == sorted(draws)
    assert draws[0] == 1 < draws[-1]
    for i in range(1, len(draws)):
        assert torch.equal(rights[i], rights[i - 1]) == (draws[i] == draws[i - 1])


def test_the_same_seed_gives_the_same_steps_and_the_global_generator_is_left_alone():
    thetas = []
    for seed in (1, 2):
        task = Task(conv)
        optimizer = NaturalCG(task.params)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        train(task, optimizer, 5)
        assert torch.equal(torch.get_rng_state(), state)
        thetas.append(task.theta)
    assert torch.equal(*thetas)


def test_a_generator_of_the_user_draws():
    thetas = []
    for seed in (3, 3, 4):
        task = Task()
        generator = torch.Generator().manual_seed(seed)
        optimizer = NaturalCG(task.params, generator=generator)
        before = generator.get_state()
        train(task, optimizer, 2)
        assert not torch.equal(generator.get_state(), before)
        thetas.append(task.theta)
    assert torch.equal(thetas[0], thetas[1])
    assert not torch.equal(thetas[0], thetas[2])


# What changes between steps


def freeze(*names: str) -> Callable[[Task, NaturalCG], None]:
    def change(task: Task, _: NaturalCG) -> None:
        for name, p in task.model.named_parameters():
            p.requires_grad_(name not in names)

    return change


def add(*names: str) -> Callable[[Task, NaturalCG], None]:
    return lambda task, optimizer: optimizer.add_param_group(
        {"params": [task.model.get_parameter(n) for n in names]}
    )


WEIGHTS = ("0.weight", "3.weight")
CHANGES: dict[str, tuple[tuple[str, ...] | None, list[Callable[[Task, NaturalCG], None]]]] = {
    "a bias is frozen": (None, [freeze("0.bias")]),
    "a bias is frozen for a step": (None, [freeze("3.bias"), freeze()]),
    "a weight is frozen": (None, [freeze("0.weight")]),
    "a weight is frozen for a step": (None, [freeze("3.weight"), freeze()]),
    "the first layer is frozen": (None, [freeze("0.weight", "0.bias")]),
    "all but the last layer are frozen": (
        None,
        [freeze("0.weight", "0.bias", "2.weight", "2.bias"), freeze()],
    ),
    "biases come": (WEIGHTS, [add("0.bias", "3.bias")]),
    "a norm comes": (WEIGHTS, [add("2.weight", "2.bias")]),
    "weights come": (("0.bias", "2.weight", "2.bias"), [add(*WEIGHTS)]),
    "a layer comes": (("0.weight", "0.bias"), [add("3.weight", "3.bias")]),
    "groups are sorted otherwise": (
        None,
        [lambda task, optimizer: optimizer.param_groups[0]["params"].reverse()],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_parameters_from_one_step_to_the_next(name):
    names, changes = CHANGES[name]
    thetas = []
    for kind in (None, "auto"):
        task = Task()
        params = task.params if names is None else [task.model.get_parameter(n) for n in names]
        optimizer = NaturalCG(params, preconditioner=kind, **SOLVED)
        train(task, optimizer, 1)
        for change in changes:
            change(task, optimizer)
            train(task, optimizer, 1)
            assert optimizer.last_step.accepted
            assert optimizer.last_step.cg_stop == "tolerance"
        thetas.append(task.theta)
    assert optimizer.last_step.preconditioner == "kfac"
    assert_near(thetas[1], thetas[0], 1e-8)


@pytest.mark.parametrize("second", ["hessian", "least squares", "fisher"])
def test_another_closure_from_one_step_to_the_next(second):
    thetas = []
    for preconditioner in (None, "auto"):
        task = Task(kind="ggn")
        other = Task(kind=second)
        other.model = task.model
        optimizer = NaturalCG(
            [*task.params, other.scale],
            preconditioner=preconditioner,
            max_kl=None,
            **{**SOLVED, "damping": 3.0},
        )
        for closure in (task.whole, other.whole, other.whole, task.whole):
            optimizer.step(closure)
            assert optimizer.last_step.cg_stop == "tolerance"
        thetas.append(flatten([*task.params, other.scale]))
    assert_near(thetas[1], thetas[0], 1e-8)


@pytest.mark.usefixtures("renewed_every_step")
def test_a_nan_leaves_the_factors_as_they_were():
    task, bad = Task(), [1.0]
    optimizer = NaturalCG(task.params, preconditioner="kfac")

    def closure() -> Tensor:
        return bad[0] * task.whole()

    optimizer.step(closure)
    before, theta = copy.deepcopy(optimizer.state_dict()["state"]), task.theta
    bad[0] = math.nan
    optimizer.step(closure)
    assert not optimizer.last_step.accepted
    assert torch.equal(task.theta, theta)
    for old, new in zip(before.values(), optimizer.state_dict()["state"].values(), strict=True):
        for name in ("left", "right", "diagonal"):
            assert (name in old) == (name in new)
            assert name not in old or torch.equal(old[name], new[name])
    bad[0] = 1.0
    optimizer.step(closure)
    assert optimizer.last_step.accepted


def test_a_nan_in_the_first_step_leaves_no_factors():
    task, bad = Task(), [math.nan]
    optimizer = NaturalCG(task.params)
    optimizer.step(lambda: bad[0] * task.whole())
    assert optimizer.last_step.preconditioner == "none"
    bad[0] = 1.0
    optimizer.step(lambda: bad[0] * task.whole())
    assert optimizer.last_step.preconditioner == "kfac"
    assert optimizer.last_step.accepted


def test_no_damping_at_all():
    """Parameters without any curvature are left where they are, as without a preconditioner."""
    torch.manual_seed(1)
    table, unused, y = (
        nn.Embedding(50, OUT).double(),
        nn.Parameter(torch.ones(2).double()),
        labels(),
    )
    index = torch.arange(N) % 7
    model = nn.Linear(OUT, OUT, bias=False).double()
    optimizer = NaturalCG(
        [*model.parameters(), *table.parameters(), unused],
        damping=0.0,
        adapt_damping=False,
        preconditioner="kfac",
    )
    start = table.weight.detach().clone()
    optimizer.step(lambda: F.mse_loss(model(table(index)), F.one_hot(y, OUT).double()))
    assert optimizer.last_step.accepted
    assert optimizer.last_step.preconditioner == "kfac"
    assert torch.equal(table.weight[7:], start[7:])
    assert not torch.equal(table.weight[:7], start[:7])
    assert torch.equal(unused, torch.ones(2).double())


# When there is one


def test_kfac_refuses_a_hessian():
    task = Task(kind="hessian")
    optimizer, theta = NaturalCG(task.params, preconditioner="kfac"), task.theta
    with pytest.raises(
        ValueError, match=r"^preconditioner='kfac' needs a metric .*; use preconditioner='auto'$"
    ):
        optimizer.step(task.whole)
    assert torch.equal(task.theta, theta)
    assert not optimizer.state


def table() -> nn.Module:
    return nn.Sequential(nn.Embedding(200, HIDDEN), nn.Linear(HIDDEN, OUT))


@pytest.mark.parametrize("case", ["hessian", "a large table", "one sample"])
def test_auto_chooses_none(case):
    torch.manual_seed(1)
    y = labels()
    if case == "hessian":
        task = Task(kind="hessian")
        closure, params = task.whole, task.params
    elif case == "one sample":
        model, x = nn.Linear(40, OUT), torch.randn(1, 40)
        closure, params = lambda: F.cross_entropy(model(x), y[:1]), list(model.parameters())
    else:
        model, index = table(), torch.arange(N)
        closure, params = lambda: F.cross_entropy(model(index), y), list(model.parameters())
    optimizer = NaturalCG(params)
    for _ in range(4):
        optimizer.step(closure)
        assert optimizer.last_step.preconditioner == "none"
    assert not any(
        entry[name].any()
        for entry in optimizer.state.values()
        for name in {"left", "right", "diagonal"} & entry.keys()
    )


@pytest.mark.parametrize("wrong", ["KFAC", "diag", "none", 1, True, ["kfac"]], ids=repr)
def test_wrong_settings(wrong):
    with pytest.raises(
        ValueError,
        match="preconditioner must be 'auto', 'kfac', 'diagonal', None, a Diagonal, a Nystrom or a function",
    ):
        NaturalCG(normed_mlp().parameters(), preconditioner=wrong)


def test_groups_must_agree():
    first, *rest = normed_mlp().parameters()
    groups = [{"params": [first], "preconditioner": "kfac"}, {"params": rest}]
    with pytest.raises(ValueError, match="preconditioner holds for the whole step"):
        NaturalCG(groups)


# Functions of the user


def scaled_in_place(r: Tensor) -> Tensor:
    return r.mul_(2)


def failing(r: Tensor) -> Tensor:
    raise KeyError("no such block")


@pytest.mark.parametrize("kind", ["auto", "kfac"])
def test_no_factors_are_estimated_where_the_closure_has_no_layer(kind, monkeypatch):
    """A product with a vector is none: it has one row only."""
    calls, estimate = [], kfac.estimate_factors
    monkeypatch.setattr(kfac, "estimate_factors", lambda *a: (calls.append(1), estimate(*a))[1])
    w, x, y = nn.Parameter(torch.randn(6, 8)), torch.randn(8), torch.randn(6)
    optimizer = NaturalCG([w], preconditioner=kind)
    for _ in range(12):
        optimizer.step(lambda: F.mse_loss(w.mv(x).tanh(), y))
        assert optimizer.last_step.preconditioner == "none"
    assert not calls
    kept = {"left", "right", "diagonal"} & optimizer.state[w].keys()
    assert not any(optimizer.state[w][name].any() for name in kept)


@pytest.mark.parametrize("solver", ["auto", "dense", "sample", "cg"])
def test_factors_are_estimated_for_conjugate_gradients_alone(solver, monkeypatch):
    calls, estimate = [], kfac.estimate_factors
    monkeypatch.setattr(kfac, "estimate_factors", lambda *a: (calls.append(1), estimate(*a))[1])
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 1)), torch.randn(30, 3)
    optimizer = NaturalCG(model.parameters(), solver=solver, preconditioner="kfac")
    for _ in range(2):
        optimizer.step(lambda: least_squares(model(x) - x.sum(1, keepdim=True)))
    assert bool(calls) == (optimizer.last_step.solver == "cg") == (solver == "cg")


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda r: r[:-1],
            ValueError,
            r"^the preconditioner must return a vector of shape \(\d+,\), got shape \(\d+,\)$",
        ),
        (
            lambda r: r[:, None],
            ValueError,
            r"must return a vector of shape \(\d+,\), got shape \(\d+, 1\)$",
        ),
        (lambda r: None, ValueError, r"must return a vector of shape \(\d+,\), got NoneType$"),
        (
            lambda r: -r,
            ValueError,
            r"^the preconditioner must be positive definite, and a vector r has rᵀM⁻¹r = -",
        ),
        (lambda r: 0 * r, ValueError, r"^the preconditioner must be positive definite"),
        (
            scaled_in_place,
            ValueError,
            r"^the preconditioner must return a new vector, and it changed its argument",
        ),
        (failing, KeyError, "no such block"),
    ],
    ids=["short", "matrix", "nothing", "negative", "zero", "in place", "raises"],
)
def test_functions_that_are_no_preconditioner(function, error, message):
    task = Task()
    theta = task.theta
    with pytest.raises(error, match=message):
        NaturalCG(task.params, preconditioner=function).step(task.whole)
    assert torch.equal(task.theta, theta)


@pytest.mark.parametrize(
    "function",
    [lambda r: r, lambda r: r.view_as(r), lambda r: r.double(), nn.Identity()],
    ids=["itself", "a view", "double", "module"],
)
def test_functions_that_do_nothing(function):
    thetas = []
    for preconditioner in (None, function):
        task = Task(dtype=torch.float32)
        train(task, NaturalCG(task.params, preconditioner=preconditioner), 3)
        thetas.append(task.theta)
    assert torch.equal(*thetas)


def test_a_function_that_is_not_finite_moves_nothing():
    task = Task()
    theta = task.theta
    optimizer = NaturalCG(task.params, preconditioner=lambda r: r * math.nan)
    optimizer.step(task.whole)
    assert not optimizer.last_step.accepted
    assert torch.equal(task.theta, theta)
