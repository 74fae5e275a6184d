"""What every torch optimizer promises, in the spirit of torch/testing/_internal/common_optimizers.py."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import assert_near, dense_gauss_newton, flat_function, flatten, make_model
from helpers.regression import Task, have_equal_parameters, train
from torch import nn
from torch.optim import SGD
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ngd_optim import NaturalCG


# How an optimizer and its model come back later.
def by_state_dict(task, optimizer):
    return load(task, optimizer.state_dict())


def by_saved_state_dict(task, optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return load(task, torch.load(buffer, weights_only=True))


def load(task, state_dict):
    """Into an optimizer that was made with other settings."""
    twin = Task(task.x.dtype)
    twin.model.load_state_dict(task.model.state_dict())
    optimizer = NaturalCG(
        twin.model.parameters(), lr=0.1, damping=7.0, max_kl=None, trust_region="clip"
    )
    optimizer.load_state_dict(state_dict)
    return twin, optimizer


def by_deepcopy(task, optimizer):
    return copy.deepcopy((task, optimizer))


def by_pickle(task, optimizer):
    return pickle.loads(pickle.dumps((task, optimizer)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_kl": 0.01, "trust_region": "boundary", "weight_decay": 0.1, "max_cg_iters": 5}],
)
@pytest.mark.parametrize("comes_back", [by_state_dict, by_saved_state_dict, by_deepcopy, by_pickle])
def test_resumed_run_is_bit_identical(comes_back, settings, dtype):
    task = Task(dtype)
    optimizer = NaturalCG(task.model.parameters(), lr=0.9, **settings)
    train(task, optimizer, 3)
    twin, resumed = comes_back(task, optimizer)
    keeps_report = comes_back in (by_deepcopy, by_pickle)
    assert repr(resumed.last_step) == repr(optimizer.last_step if keeps_report else None)
    assert resumed.param_groups[0]["damping"] == optimizer.param_groups[0]["damping"] != 1e-2
    before = task.theta
    assert train(task, optimizer, 3) == train(twin, resumed, 3)
    assert have_equal_parameters(task, twin)
    assert not torch.equal(task.theta, before)
    assert twin.model is not task.model


def test_resumed_run_needs_the_state():
    """The warm start and the adapted damping matter: without them the run is another one."""
    task = Task()
    optimizer = NaturalCG(task.model.parameters(), max_cg_iters=3)
    train(task, optimizer, 3)
    twin = Task()
    twin.model.load_state_dict(task.model.state_dict())
    train(task, optimizer, 1)
    train(twin, NaturalCG(twin.model.parameters(), max_cg_iters=3), 1)
    assert not have_equal_parameters(task, twin)


def test_state_dict_is_plain_and_its_own():
    task = Task()
    optimizer = NaturalCG(task.model.parameters())
    assert optimizer.state_dict()["state"] == {}
    train(task, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    assert [s["solution"].shape for s in saved["state"].values()] == [
        p.shape for p in task.model.parameters()
    ]
    twin, resumed = load(task, saved)
    train(twin, resumed, 2)
    for key, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(entry["solution"], saved["state"][key]["solution"])
    assert optimizer.state_dict()["param_groups"] == saved["param_groups"]
    assert NaturalCG(task.model.parameters()).last_step is None


def test_state_dict_of_other_groups_is_refused():
    task = Task()
    parts = [{"params": [p]} for p in task.model.parameters()]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        NaturalCG(parts).load_state_dict(NaturalCG(task.model.parameters()).state_dict())


@pytest.mark.parametrize("steps_before", [0, 2])
def test_add_param_group(steps_before):
    task = Task()
    optimizer = NaturalCG(task.model[2].parameters(), max_kl=None)
    first = flatten(task.model[0].parameters())
    train(task, optimizer, steps_before)
    assert torch.equal(flatten(task.model[0].parameters()), first)
    optimizer.add_param_group(
        {"params": task.model[0].parameters(), "lr": 0.5, "weight_decay": 0.1}
    )
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 0.5]
    assert optimizer.param_groups[1]["max_kl"] is None
    train(task, optimizer, 2)
    assert not torch.equal(flatten(task.model[0].parameters()), first)
    assert optimizer.last_step.accepted
    assert len(optimizer.state) == 4


def test_zero_learning_rate_moves_nothing():
    task = Task()
    before = task.theta
    train(task, NaturalCG(task.model.parameters(), lr=0.0), 2)
    assert torch.equal(task.theta, before)


def test_zero_gradient_moves_nothing():
    task = Task()
    task.y = task.model(task.x).detach()
    optimizer, before = NaturalCG(task.model.parameters()), task.theta
    train(task, optimizer, 2)
    assert torch.equal(task.theta, before)
    assert optimizer.last_step.grad_norm == optimizer.last_step.step_norm == 0


def test_step_hooks_run_in_order():
    task, events = Task(), []
    optimizer = NaturalCG(task.model.parameters())

    def note(event):
        return lambda o, args, kwargs: events.append((event, o is optimizer, args, kwargs))

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]
    try:
        optimizer.step(task.closure)
    finally:
        for handle in handles:
            handle.remove()
    assert [event for event, *_ in events] == ["global pre", "pre", "post", "global post"]
    assert all(mine for _, mine, *_ in events)
    optimizer.step(closure=task.closure)
    assert len(events) == 4


def test_pre_hook_may_change_the_closure():
    task = Task()
    optimizer = NaturalCG(task.model.parameters())
    optimizer.register_step_pre_hook(
        lambda o, args, kwargs: ((args[0], lambda: 3 * task.closure()), kwargs)
    )
    expected = 3 * task.closure().item()
    assert optimizer.step(task.closure).item() == pytest.approx(expected, rel=1e-12)


def test_state_dict_hooks_run():
    task, events = Task(), []
    optimizer = NaturalCG(task.model.parameters())
    optimizer.register_state_dict_pre_hook(lambda o: events.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda o: events.append("load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert events == ["save", "load"]


def test_state_dict_hooks_may_change_what_is_saved_and_loaded():
    task = Task()
    optimizer = NaturalCG(task.model.parameters(), damping=0.5)

    def save_more(o, state_dict):
        state_dict["epoch"] = 3

    def load_less(o, state_dict):
        assert state_dict.pop("epoch") == 3
        changed = copy.deepcopy(state_dict)
        changed["param_groups"][0]["damping"] *= 2
        return changed

    handles = [
        optimizer.register_state_dict_post_hook(save_more),
        optimizer.register_load_state_dict_pre_hook(load_less),
    ]
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert saved["param_groups"][0]["damping"] == 0.5
    assert optimizer.param_groups[0]["damping"] == 1.0
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["damping"] == 1.0
    assert "epoch" not in optimizer.state_dict()


def test_state_dict_hooks_run_in_order():
    events = []
    optimizer = NaturalCG(Task().model.parameters())
    for event, first in (("first", False), ("last", False), ("prepended", True)):
        optimizer.register_state_dict_pre_hook(lambda o, e=event: events.append(e), prepend=first)
        optimizer.register_load_state_dict_pre_hook(
            lambda o, s, e=event: events.append(e), prepend=first
        )
    optimizer.load_state_dict(optimizer.state_dict())
    assert events == 2 * ["prepended", "first", "last"]


@pytest.mark.parametrize("saves_names", [False, True])
@pytest.mark.parametrize("has_names", [False, True])
def test_names_of_parameters_are_loaded_as_torchs_optimizers_load_them(saves_names, has_names):
    def make(kind, names):
        model = Task().model
        return kind(model.named_parameters() if names else model.parameters(), lr=0.5)

    names = []
    for kind in (NaturalCG, SGD):
        optimizer = make(kind, has_names)
        optimizer.load_state_dict(make(kind, saves_names).state_dict())
        names.append(optimizer.param_groups[0].get("param_names"))
    assert names[0] == names[1]
    assert (names[0] is not None) == (has_names or saves_names)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_averaged_models_are_means_of_the_iterates(decay):
    task = Task()
    optimizer = NaturalCG(task.model.parameters())
    averaged = AveragedModel(task.model, multi_avg_fn=decay and get_ema_multi_avg_fn(decay))
    iterates = []
    for _ in range(4):
        train(task, optimizer, 1)
        averaged.update_parameters(task.model)
        iterates.append(task.theta)
    mean = sum(iterates) / 4
    if decay is not None:
        mean = iterates[0]
        for theta in iterates[1:]:
            mean = decay * mean + (1 - decay) * theta
    assert_near(flatten(averaged.module.parameters()), mean, rtol=1e-12)
    assert len({tuple(theta.tolist()) for theta in iterates}) == 4


def test_a_copied_model_needs_an_optimizer_of_its_own():
    task = Task()
    optimizer = NaturalCG(task.model.parameters())
    averaged = AveragedModel(task.model)
    with pytest.raises(
        ValueError, match="depends on none of the optimizer's parameters; was the model copied"
    ):
        optimizer.step(lambda: F.mse_loss(averaged(task.x), task.y))


def test_zero_grad_and_repr():
    task = Task()
    optimizer = NaturalCG(task.model.parameters(), max_kl=0.125)
    task.closure().backward()
    optimizer.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in task.model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in task.model.parameters())
    assert repr(optimizer).startswith("NaturalCG (")
    assert "max_kl: 0.125" in repr(optimizer)


def test_loss_is_the_detached_one_before_the_step():
    task = Task()
    expected = task.closure().item()
    loss = NaturalCG(task.model.parameters()).step(task.closure)
    assert (loss.item(), loss.shape, loss.requires_grad, loss.dtype) == (
        expected,
        (),
        False,
        torch.float64,
    )
    assert task.closure().item() < expected


@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("inside", [torch.enable_grad, lambda: lambda closure: closure])
def test_gradient_mode_around_the_step_does_not_matter(around, inside):
    task, plain = Task(), Task()
    plain.model.load_state_dict(task.model.state_dict())
    train(plain, NaturalCG(plain.model.parameters()), 1)
    with around():
        enabled = torch.is_grad_enabled()
        NaturalCG(task.model.parameters()).step(inside()(task.closure))
        assert torch.is_grad_enabled() == enabled
    assert have_equal_parameters(task, plain)
    assert all(p.requires_grad and p.grad_fn is None for p in task.model.parameters())


def test_frozen_parameters_are_left_alone():
    task = Task()
    task.model[0].weight.requires_grad_(False)
    task.model[2].bias.requires_grad_(False)
    optimizer = NaturalCG(task.model.parameters(), weight_decay=0.1)
    frozen = [task.model[0].weight.clone(), task.model[2].bias.clone()]
    train(task, optimizer, 3)
    assert torch.equal(frozen[0], task.model[0].weight)
    assert torch.equal(frozen[1], task.model[2].bias)
    assert not task.model[0].weight.requires_grad
    assert len(optimizer.state) == 2
    task.model[0].weight.requires_grad_(True)
    train(task, optimizer, 1)
    assert not torch.equal(frozen[0], task.model[0].weight)


@pytest.mark.parametrize("form", ["ggn", "fisher", "kl"])
def test_parameters_that_the_closure_does_not_use_are_left_alone(form):
    task = Task()
    heads = nn.ModuleList(nn.Linear(4, 2).double() for _ in range(2))

    def closure(head):
        z = heads[head](task.model[:2](task.x))
        normal = torch.distributions.Normal(z, 1.0)
        old = torch.distributions.Normal(old_mean, 1.0)
        metric = {
            "ggn": None,
            "fisher": normal,
            "kl": torch.distributions.kl_divergence(old, normal).mean(),
        }[form]
        return F.mse_loss(z, task.y), metric

    params = [*task.model[:2].parameters(), *heads.parameters()]
    optimizer = NaturalCG(params, weight_decay=0.2, max_cg_iters=4)
    for head in (0, 0, 1, 1, 0):
        idle = heads[1 - head]
        idle_before, busy_before = flatten(idle.parameters()), flatten(heads[head].parameters())
        old_mean = heads[head](task.model[:2](task.x)).detach()
        optimizer.step(lambda head=head: closure(head))
        assert optimizer.last_step.accepted
        assert torch.equal(flatten(idle.parameters()), idle_before)
        assert not torch.equal(flatten(heads[head].parameters()), busy_before)


def test_parameter_that_only_the_metric_uses_moves_by_weight_decay():
    scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
    task = Task()

    def closure():
        z = task.model(task.x)
        return F.mse_loss(z, task.y), torch.distributions.Normal(z, scale)

    NaturalCG([*task.model.parameters(), scale], weight_decay=0.2).step(closure)
    assert scale.item() < 1


class TestGradients:
    """``.grad`` after a step is what an ordinary backward pass leaves."""

    def check(self, closure_body, fill):
        task, plain = Task(), Task()
        plain.model.load_state_dict(task.model.state_dict())
        unused = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
        optimizer = NaturalCG([*task.model.parameters(), unused[0]])
        reference = SGD([*plain.model.parameters(), unused[1]], lr=0.1)
        if fill:
            for p in [*task.model.parameters(), *plain.model.parameters(), *unused]:
                p.grad = torch.ones_like(p)
        for _ in range(2):
            plain.model.load_state_dict(task.model.state_dict())
            optimizer.step(lambda: closure_body(task, optimizer))
            closure_body(plain, reference)
            for a, b in zip(
                [*task.model.parameters(), unused[0]],
                [*plain.model.parameters(), unused[1]],
                strict=True,
            ):
                assert (a.grad is None) == (b.grad is None)
                if b.grad is not None:
                    torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-15)
                    assert (a.grad.requires_grad, a.grad.dtype) == (False, a.dtype)
        return optimizer

    @pytest.mark.parametrize("fill", [False, True])
    @pytest.mark.parametrize("set_to_none", [False, True])
    def test_zero_grad_and_backward(self, fill, set_to_none):
        def body(task, optimizer):
            optimizer.zero_grad(set_to_none)
            loss = task.closure()
            loss.backward()
            return loss

        self.check(body, fill)

    @pytest.mark.parametrize("fill", [False, True])
    def test_accumulation(self, fill):
        def body(task, optimizer):
            for part in (slice(0, 5), slice(5, 12)):
                (F.mse_loss(task.model(task.x[part]), task.y[part]) / 2).backward()
            return torch.zeros(())

        self.check(body, fill)

    def test_rejected_step(self):
        def body(task, optimizer):
            optimizer.zero_grad()
            start = starts.setdefault(
                id(task), [p.detach().clone() for p in task.model.parameters()]
            )
            away = sum(
                ((p - p0).abs() - 1e-12).relu().sum()
                for p, p0 in zip(task.model.parameters(), start, strict=True)
            )
            loss = task.closure() + 1e9 * away
            loss.backward()
            return loss

        starts = {}
        assert not self.check(body, fill=True).last_step.accepted

    @pytest.mark.parametrize("fill", [False, True])
    def test_without_backward(self, fill):
        self.check(lambda task, optimizer: task.closure(), fill)


DTYPES = [torch.bfloat16, torch.float32, torch.float64]


class MixedTask(Task):
    """One layer in each precision."""

    def __init__(self, dtypes):
        super().__init__()
        self.dtypes = dtypes
        for layer, dtype in zip(self.model[::2], dtypes, strict=True):
            layer.to(dtype)

    def closure(self):
        first, last = self.dtypes
        z = self.model[2](self.model[0](self.x.to(first)).tanh().to(last))
        return F.mse_loss(z.double(), self.y)


@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("last", DTYPES)
def test_mixed_precision(first, last):
    exact, task = Task(), MixedTask((first, last))
    exact.model.load_state_dict(task.model.state_dict())
    start = exact.theta
    assert torch.equal(task.theta.double(), start)
    settings = {"damping": 0.1, "max_kl": None, "warm_start": 0.0, "max_backtracks": 0}
    settings |= {
        "cg_progress_tol": 0.0,
        "cg_tol": 1e-10,
    }  # rounding is compared, not where a solve stops
    optimizer = NaturalCG(task.model.parameters(), **settings)
    train(task, optimizer, 1)
    train(exact, NaturalCG(exact.model.parameters(), **settings), 1)
    # Parameters of size one are rounded after a step a little shorter than that, and every product is rounded.
    eps = max(torch.finfo(first).eps, torch.finfo(last).eps)
    assert_near(task.theta.double() - start, exact.theta - start, max(16 * eps, 1e-8))
    train(task, optimizer, 4)
    assert [p.dtype for p in task.model.parameters()] == [first, first, last, last]
    assert [optimizer.state[p]["solution"].dtype for p in task.model.parameters()] == [
        first,
        first,
        last,
        last,
    ]
    assert task.closure().item() < exact.closure().item()


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.bias = nn.Linear(3, 4, bias=False), nn.Parameter(torch.randn(3))
            self.head = nn.Linear(4, 3, bias=False)
            self.head.weight = nn.Parameter(self.embed.weight.T.contiguous())
            self.head.weight = self.embed.weight
            self.double()

        def forward(self, x):
            return F.linear(self.embed(x).tanh(), self.head.weight.T, self.bias)

    model, x = Tied(), torch.randn(5, 3, dtype=torch.float64)
    y = torch.randn(5, 3, dtype=torch.float64)
    assert len(list(model.parameters())) == 2
    output, theta, loss = (
        flat_function(model, x),
        flatten(model.parameters()),
        lambda z: F.mse_loss(z, y),
    )
    A = dense_gauss_newton(output, theta, loss) + 0.1 * torch.eye(len(theta), dtype=theta.dtype)
    d = -torch.linalg.solve(A, torch.func.grad(lambda t: loss(output(t)))(theta))
    NaturalCG(
        model.parameters(),
        damping=0.1,
        max_kl=None,
        max_backtracks=0,
        cg_tol=1e-13,
        cg_progress_tol=0,
    ).step(lambda: loss(model(x)))
    assert_near(flatten(model.parameters()) - theta, d)


WAYS_TO_PASS = {
    "generator": lambda m: (p for p in m.parameters()),
    "list": lambda m: list(m.parameters()),
    "named": lambda m: m.named_parameters(),
    "groups": lambda m: [{"params": m[0].parameters()}, {"params": list(m[2].parameters())}],
    "named_groups": lambda m: [
        {"params": m[0].named_parameters()},
        {"params": list(m[2].named_parameters())},
    ],
    "single_tensors": lambda m: [{"params": p} for p in m.parameters()],
}


@pytest.mark.parametrize("way", WAYS_TO_PASS)
def test_ways_to_pass_parameters(way):
    task, plain = Task(), Task()
    plain.model.load_state_dict(task.model.state_dict())
    optimizer = NaturalCG(WAYS_TO_PASS[way](task.model))
    train(task, optimizer, 2)
    train(plain, NaturalCG(plain.model.parameters()), 2)
    assert have_equal_parameters(task, plain)
    names = [
        name
        for group in optimizer.state_dict()["param_groups"]
        for name in group.get("param_names", [])
    ]
    expected = {
        "named": ["0.weight", "0.bias", "2.weight", "2.bias"],
        "named_groups": ["weight", "bias", "weight", "bias"],
    }
    assert names == expected.get(way, [])


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda m: [], ValueError, "empty parameter list"),
        (lambda m: m[0].weight, TypeError, "iterable of Tensors or dicts"),
        (lambda m: [m[0].weight * 2], ValueError, "non-leaf"),
        (
            lambda m: [{"params": [m[0].weight]}, {"params": [m[0].weight]}],
            ValueError,
            "more than one parameter group",
        ),
        (lambda m: [3], TypeError, "can only optimize Tensors"),
    ],
)
def test_parameters_that_torch_refuses(params, error, message):
    with pytest.raises(error, match=message):
        NaturalCG(params(make_model("mlp", 2)[0]))


def test_several_optimizers_do_not_meet():
    task, alone = Task(), Task()
    alone.model.load_state_dict(task.model.state_dict())
    other = Task()
    first, second = (
        NaturalCG(task.model.parameters()),
        NaturalCG(other.model.parameters(), damping=5.0),
    )
    for _ in range(3):
        first.step(task.closure)
        second.step(other.closure)
    train(alone, NaturalCG(alone.model.parameters()), 3)
    assert have_equal_parameters(task, alone)
    assert first.last_step != second.last_step


def test_a_profile_names_the_optimizer():
    task = Task()
    optimizer = NaturalCG(task.model.parameters())
    with torch.autograd.profiler.profile() as profile:
        optimizer.step(task.closure)
        optimizer.zero_grad()
    names = {event.name for event in profile.function_events}
    assert {"Optimizer.step#NaturalCG.step", "Optimizer.zero_grad#NaturalCG.zero_grad"} <= names


def transposed():
    return nn.Parameter(torch.randn(3, 5).t())


def every_other_column():
    return nn.Parameter(torch.randn(5, 6)[:, ::2])


def fortran_order_of_images():
    return nn.Parameter(torch.randn(5, 3, 1, 1).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("make", [transposed, every_other_column, fortran_order_of_images])
def test_parameters_that_are_not_contiguous(make):
    torch.manual_seed(0)
    w, x, y = make(), torch.randn(20, 3), torch.arange(20) % 5
    plain, stride = nn.Parameter(w.detach().clone().contiguous()), w.stride()
    for p in (w, plain):
        optimizer = NaturalCG([p], preconditioner=None)
        for _ in range(3):
            optimizer.step(lambda p=p: F.cross_entropy(x @ p.reshape(5, 3).t(), y))
    assert w.stride() == stride
    torch.testing.assert_close(w, plain, rtol=1e-4, atol=1e-5)
    optimizer.load_state_dict(optimizer.state_dict())


def test_groups_and_parameters_without_elements():
    w, nothing = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(0))
    optimizer = NaturalCG([{"params": []}, {"params": [nothing]}, {"params": [w]}])
    for _ in range(2):
        optimizer.step(lambda: w.square().sum() + nothing.sum())
        optimizer.load_state_dict(optimizer.state_dict())
    assert w.norm() < 0.1


def test_an_optimizer_is_freed_when_nobody_needs_it():
    task = Task()
    optimizer = NaturalCG(task.model.parameters())
    optimizer.step(task.closure)
    there = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert there() is None
    finally:
        gc.enable()


def test_wrappers_see_the_attributes_of_the_optimizer():
    """Lightning and Fabric make a subclass whose missing attributes are the optimizer's."""

    class Wrapper:
        def __init__(self, optimizer):
            self._optimizer = optimizer
            self.__class__ = type("Wrapped", (Wrapper, NaturalCG), {})

        def __getattr__(self, name):
            return getattr(self._optimizer, name)

    task = Task()
    optimizer = NaturalCG(task.model.parameters(), generator=torch.Generator())
    wrapper = Wrapper(optimizer)
    assert wrapper.last_step is None
    optimizer.step(task.closure)
    assert wrapper.last_step is optimizer.last_step is not None
    assert wrapper.generator is optimizer.generator
    assert wrapper.state_dict().keys() == optimizer.state_dict().keys()
