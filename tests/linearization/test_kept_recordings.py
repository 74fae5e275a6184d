"""Products that are renewed from step to step are, bit for bit, those that each step would record."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence, register_kl

from ngd_optim import NaturalCG, least_squares
from ngd_optim.recording import KeptRecordings

STEPS = 7
DATA = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).double()
TARGETS = torch.randn(20, 3, generator=torch.Generator().manual_seed(3)).double()
LABELS = torch.arange(60) % 3
IMAGES = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(2)).double()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


class Case(NamedTuple):
    """A model, ``(model, step) ↦`` what its closure returns, and how many of the steps record."""

    closure: Callable[[Any, int], Any]
    recorded: int
    make: Callable[[], nn.Module] = mlp
    settings: Mapping[str, Any] = MappingProxyType({})


def batch(step: int) -> slice:
    return slice(5 * step, 5 * step + 20)


def normal(model: Any, step: int, scale: Any = 0.7) -> Normal:
    return Normal(model(DATA[batch(step)]), torch.tensor(scale).double())


def with_loss_of(distribution: Any) -> Any:
    return -distribution.log_prob(TARGETS).mean(), distribution


class Warm(Normal):
    """A distribution whose divergence depends on a number that no operation of the closure shows."""

    def __init__(self, loc: Any, scale: Any, heat: float = 1.0, validate_args: Any = None) -> None:
        self.heat = heat
        super().__init__(loc, scale, validate_args=validate_args)


@register_kl(Warm, Warm)
def _kl_of_warm(p: Warm, q: Warm) -> torch.Tensor:
    return kl_divergence(Normal(p.loc, p.scale), Normal(q.loc, q.scale)) * HEAT[0]


HEAT = [1.0]


class Doubled(torch.autograd.Function):
    """Its derivative is another at each step."""

    factor = 1.0

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        return grad_outputs[0] * Doubled.factor


def by_function(model: Any, step: int) -> Any:
    Doubled.factor = 1.0 + 0.1 * step
    return F.mse_loss(Doubled.apply(model(DATA)), TARGETS.repeat(3, 1))


def by_hook(model: Any, step: int) -> Any:
    z = model(DATA)
    z.register_hook(lambda g: g * (1 + 0.1 * step))
    return F.mse_loss(z, TARGETS.repeat(3, 1))


def pinn(model: Any, step: int) -> Any:
    x = DATA[batch(step)].clone().requires_grad_()
    u = model(x)
    (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return least_squares(g.sum(-1) - TARGETS[:, 0], u[:, 0], weights=(1.0, 2.0))


def pinn_by_transforms(model: Any, step: int) -> Any:
    def u(p: torch.Tensor) -> torch.Tensor:
        return model(p)[0]

    traces = torch.func.vmap(lambda p: torch.func.hessian(u)(p).trace())(DATA[batch(step)])
    return least_squares(traces - TARGETS[:, 0])


def one_tensor_then_two(model: Any, step: int) -> Any:
    first = DATA[:20]
    second = first if step < 3 else DATA[20:40]
    return F.mse_loss(model(first) * model(second), TARGETS)


def frozen_for_a_while(model: Any, step: int) -> Any:
    with torch.set_grad_enabled(step % 4 < 2):
        gate = model[0](DATA[:20]).sigmoid().mean()
    return F.mse_loss(gate * model(DATA[:20]), TARGETS)


def by_branch(model: Any, step: int) -> Any:
    z = model(DATA[batch(step)])
    return F.mse_loss(z if step % 2 else 2 * z, TARGETS)


CNN = lambda: nn.Sequential(  # noqa: E731
    nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 3)
)
RENEWED = 3
"""The first step checks, the second one records, and so does the third, to compare."""

CASES = {
    "same data": Case(lambda m, s: F.cross_entropy(m(DATA), LABELS), RENEWED),
    "batches by slices": Case(lambda m, s: F.cross_entropy(m(DATA[batch(s)]), LABELS[:20]), RENEWED),
    "batches by copies": Case(
        lambda m, s: F.cross_entropy(m(DATA[batch(s)].clone()), LABELS[batch(s)].clone()), RENEWED
    ),
    "a Gaussian": Case(lambda m, s: with_loss_of(normal(m, s)), RENEWED),
    "a Gaussian of rows": Case(lambda m, s: with_loss_of(Independent(normal(m, s), 1)), RENEWED),
    "classes": Case(
        lambda m, s: (lambda d: (-d.log_prob(LABELS[:20]).mean(), d))(
            Categorical(logits=m(DATA[batch(s)]))
        ),
        RENEWED,
    ),
    "a Hessian": Case(lambda m, s: m(DATA[batch(s)]).pow(4).sum(), RENEWED),
    "a penalty beside it": Case(
        lambda m, s: F.mse_loss(m(DATA), DATA[:, :3]) + sum(p.square().sum() for p in m.parameters()),
        RENEWED,
    ),
    "derivatives": Case(pinn, RENEWED, settings={"solver": "cg"}),
    "derivatives by transforms": Case(
        pinn_by_transforms, RENEWED, settings={"solver": "cg"}
    ),
    "forward mode": Case(
        lambda m, s: F.mse_loss(m(DATA), DATA[:, :3]), RENEWED, settings={"backend": "torch.func"}
    ),
    "convolutions, statistics, in place": Case(
        lambda m, s: F.cross_entropy(m(IMAGES * (1 + s)), LABELS[:6]), RENEWED, CNN
    ),
    "a preconditioner from the graph": Case(
        lambda m, s: F.cross_entropy(m(DATA), LABELS), RENEWED, settings={"preconditioner": "kfac"}
    ),
    "a number that changes": Case(
        lambda m, s: (1 + s) * F.mse_loss(m(DATA), DATA[:, :3]), STEPS
    ),
    "a number that changes once": Case(
        lambda m, s: (1 if s < 4 else 2) * F.mse_loss(m(DATA), DATA[:, :3]), RENEWED + 2
    ),
    "a setting of the loss that changes": Case(
        lambda m, s: F.cross_entropy(m(DATA), LABELS, label_smoothing=0.01 * s), STEPS
    ),
    "a batch of another size": Case(
        lambda m, s: F.mse_loss(m(DATA[: 20 + s % 2]), DATA[: 20 + s % 2, :3]), RENEWED + 2
    ),
    "another event shape": Case(
        lambda m, s: with_loss_of(normal(m, s) if s < 4 else Independent(normal(m, s), 1)), RENEWED + 3
    ),
    "one tensor, then two": Case(one_tensor_then_two, RENEWED + 2),
    "a part without gradients": Case(frozen_for_a_while, STEPS - 1),
    "another way at each step": Case(by_branch, STEPS - 1),
    "a mask that is drawn": Case(
        lambda m, s: F.mse_loss(F.dropout(m(DATA), 0.3), DATA[:, :3]), RENEWED
    ),
    "a Function": Case(by_function, STEPS),
    "a hook": Case(by_hook, STEPS),
    "a kink": Case(lambda m, s: F.l1_loss(m(DATA), DATA[:, :3]), STEPS),
}  # fmt: skip


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each product that was formed since, whether it was recorded anew."""
    found: list[bool] = []
    form = KeptRecordings.form

    def watched(self: KeptRecordings, *args: Any, **kwargs: Any) -> Any:
        before = [kept.plan for kept in self._kept]
        image, recording = form(self, *args, **kwargs)
        found.append(not any(recording.plan is plan for plan in before))
        return image, recording

    monkeypatch.setattr(KeptRecordings, "form", watched)
    return found


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_that_record(name: str, recorded: list[bool]) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make().double()
    twin = copy.deepcopy(model)
    settings = {"max_cg_iters": 6, "preconditioner": None, **case.settings}
    optimizer = NaturalCG(model.parameters(), **settings)
    other = NaturalCG(twin.parameters(), **settings)
    for step in range(STEPS):
        state = torch.get_rng_state()
        optimizer.step(partial(case.closure, model, step))
        torch.set_rng_state(state)
        for checked in other._experiences.values():
            checked.recordings.__init__()
        other.step(partial(case.closure, twin, step))
        assert optimizer.last_step is not None
        assert optimizer.last_step.accepted
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs), step
    assert sum(recorded[::2]) == case.recorded
    assert sum(recorded[1::2]) == STEPS


def test_nothing_of_a_run_is_held_after_its_step() -> None:
    model = mlp().double()
    optimizer = NaturalCG(model.parameters(), max_cg_iters=5)
    for step in range(5):
        optimizer.step(lambda: F.cross_entropy(model(DATA[batch(step)]), LABELS[:20]))  # noqa: B023
    (checked,) = optimizer._experiences.values()
    (kept,) = checked.recordings._kept
    operations = [*kept.plan.views, *kept.plan.program, *kept.renewal._program]
    arguments = [value for op in operations for value in [*op.args, *op.kwargs.values()]]
    nested = [part for a in arguments for part in (a if isinstance(a, list) else [a])]
    assert kept.is_right
    assert not any(isinstance(value, torch.Tensor) for value in nested)


def test_a_recording_that_was_not_right_is_given_up(recorded: list[bool]) -> None:
    """What no operation shows is seen where the second recording is compared with the first one."""
    model = mlp().double()
    optimizer = NaturalCG(model.parameters(), max_cg_iters=3)

    def closure() -> Any:
        distribution = Warm(model(DATA), torch.ones(60, 3).double())
        return -distribution.log_prob(DATA[:, :3]).mean(), distribution

    for step in range(STEPS):
        HEAT[0] = 1.0 + 0.1 * step
        optimizer.step(closure)
    HEAT[0] = 1.0
    assert all(recorded)
