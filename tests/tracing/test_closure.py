"""A closure runs once a step, as it would under any optimizer of torch."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import assert_near, real
from torch import nn

from ngd_optim import NaturalCG, linearize
from ngd_optim.tracing import mode


class Task:
    """A small regression, and the gradient that torch has of it."""

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
        self.x, self.y = torch.randn(12, 4).to(dtype), torch.randn(12, 2).to(dtype)
        self.params = list(self.model.parameters())
        self.optimizer = NaturalCG(self.model.parameters())

    def loss(self, x=None):
        return F.mse_loss(self.model(self.x if x is None else x), self.y)

    def true_gradient(self):
        return flat(torch.autograd.grad(self.loss(), self.params))

    def grads(self):
        return flat([p.grad for p in self.params])


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


# Backward is carried out.


def test_gradients_can_be_read_in_the_closure():
    task, seen = Task(), []

    def closure():
        task.optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        seen.append(task.grads())
        return loss

    for step in range(3):
        true = task.true_gradient()
        task.optimizer.step(closure)
        assert len(seen) == step + 1
        assert_near(seen[-1], true, 1e-14)
        assert_near(task.grads(), true, 1e-14)


def once(loss, task):
    loss.backward()


def in_halves(loss, task):
    (0.25 * loss).backward(retain_graph=True)
    (0.75 * task.loss()).backward()


def in_a_list(loss, task):
    torch.autograd.backward([0.25 * loss, 0.75 * loss])


def with_a_weight(loss, task):
    (2 * loss).backward(torch.tensor(0.5, dtype=torch.float64))


def of_a_vector(loss, task):
    errors = (task.model(task.x) - task.y).square().mean(1)
    errors.backward(torch.full((12,), 1 / 12, dtype=torch.float64))


BACKWARDS = [once, in_halves, in_a_list, with_a_weight, of_a_vector]


@pytest.mark.parametrize("clears", ["not", "before", "in the closure"])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_gradients_add_up_as_torch_adds_them(backward, clears):
    task, seen = Task(), []
    old = [torch.full_like(p, 3.0) for p in task.params]
    for p, g in zip(task.params, old, strict=True):
        p.grad = None if clears == "before" else g.clone()

    def closure():
        if clears == "in the closure":
            task.optimizer.zero_grad()
        loss = task.loss()
        backward(loss, task)
        seen.append(task.grads())
        return loss.item()

    true = task.true_gradient()
    before, start = task.loss().item(), [p.detach().clone() for p in task.params]
    returned = task.optimizer.step(closure)
    expected = true + flat(old) if clears == "not" else true
    assert len(seen) <= 3  # what it reads is looked into at its first step
    assert_near(seen[0], expected, 1e-12)
    assert_near(task.grads(), expected, 1e-12)
    assert float(returned) == pytest.approx(before, rel=1e-12)
    assert task.loss().item() < 0.7 * before
    # The step is that of the loss alone, if it has the same curvature.
    if backward in (in_halves, of_a_vector):
        return
    plain = Task()
    assert all(map(torch.equal, start, plain.params))
    plain.optimizer.step(plain.loss)
    assert_near(flat(task.params), flat(plain.params), 1e-6)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_is_cleared_after_backward_leaves_the_gradient_of_the_loss(set_to_none):
    task = Task()

    def closure():
        loss = task.loss()
        loss.backward()
        task.optimizer.zero_grad(set_to_none=set_to_none)
        return loss

    before = task.loss().item()
    task.optimizer.step(closure)
    assert task.loss().item() < before


@pytest.mark.parametrize("guard", ["requires_grad", "is_grad_enabled"])
def test_a_closure_as_for_lbfgs_is_guarded(guard):
    task, runs = Task(), []

    def closure():
        runs.append(1)
        if torch.is_grad_enabled():
            task.optimizer.zero_grad()
        loss = task.loss()
        if loss.requires_grad if guard == "requires_grad" else torch.is_grad_enabled():
            loss.backward()
        return loss

    losses = [float(task.optimizer.step(closure)) for _ in range(5)]
    assert losses[-1] < 0.5 * losses[0]
    assert len(runs) == 5
    assert task.optimizer.last_step.accepted


def test_gradients_of_inputs_can_be_read_in_the_closure():
    """Adversarial training by the fast gradient sign method, as its tutorial writes it."""

    def by_backward(task, set_to_none=True):
        x = task.x.clone().requires_grad_()
        task.loss(x).backward()
        task.optimizer.zero_grad(set_to_none=set_to_none)
        loss = task.loss((x + 0.1 * x.grad.sign()).detach())
        loss.backward()
        return loss

    def by_grad(task):
        x = task.x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(task.loss(x), x)
        return task.loss((x + 0.1 * slope.sign()).detach())

    ends = []
    for closure in (by_backward, partial(by_backward, set_to_none=False), by_grad):
        task = Task()
        for _ in range(4):
            task.optimizer.step(lambda task=task, closure=closure: closure(task))
            assert task.optimizer.last_step.accepted
        ends.append(flat(task.params).detach())
    assert_near(ends[0], ends[2], 1e-6)
    assert_near(ends[1], ends[2], 1e-6)


# Changed gradients.


def clip(params):
    nn.utils.clip_grad_norm_(params, 1e-3)


def clip_values(params):
    nn.utils.clip_grad_value_(params, 1e-3)


def scale(params):
    for p in params:
        p.grad.mul_(2)


def scale_one(params):
    params[1].grad.mul_(2)


def replace(params):
    params[0].grad = torch.zeros_like(params[0])


def scale_together(params):
    torch._foreach_mul_([p.grad for p in params], 0.5)


def scale_data(params):
    params[0].grad.data *= 0.5


def add_noise(params):
    for p in params:
        p.grad += 0.1 * torch.randn_like(p)


def through_numpy(params):
    params[0].grad.numpy()[:] = 0.0


CHANGES = [
    clip,
    clip_values,
    scale,
    scale_one,
    replace,
    scale_together,
    scale_data,
    add_noise,
    through_numpy,
]


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_gradients_are_refused_at_any_step(change, at):
    task, count = Task(), [0]

    def closure():
        task.optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        if count[0] == at:
            change(task.params)
        count[0] += 1
        return loss

    for _ in range(at):
        task.optimizer.step(closure)
    before = flat(task.params).detach().clone()
    with pytest.raises(RuntimeError, match="use max_kl, the trust region, in place of clipping"):
        task.optimizer.step(closure)
    assert torch.equal(flat(task.params), before)


def test_clipping_that_does_not_clip_is_let_pass():
    task = Task()

    def closure():
        loss = task.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(task.params, 1e6)
        return loss

    before = task.loss().item()
    task.optimizer.step(closure)
    assert task.loss().item() < before


# It runs once a step.


def from_an_iterator(task):
    batches = iter([(task.x[i::2], task.y[i::2]) for i in range(2)] * 10)

    def closure():
        x, y = next(batches)
        return F.mse_loss(task.model(x), y)

    return closure


def with_numpys_noise(task):
    generator = np.random.default_rng(0)
    return lambda: task.loss(task.x + 0.01 * torch.from_numpy(generator.normal(size=(12, 4))))


def with_torchs_noise(task):
    return lambda: task.loss(task.x + 0.01 * torch.randn_like(task.x))


def with_a_schedule_of_its_own(task):
    step = [0]

    def closure():
        step[0] += 1
        return task.loss() * (1 + 0.1 / step[0])

    return closure


def with_a_random_subset(task):
    generator = np.random.default_rng(0)

    def closure():
        rows = torch.from_numpy(generator.permutation(12)[:8])
        return F.mse_loss(task.model(task.x[rows]), task.y[rows])

    return closure


def with_a_condition(task):
    def closure():
        loss = task.loss()
        return loss if loss < 1e3 else 0 * loss

    return closure


ONCE = [
    from_an_iterator,
    with_numpys_noise,
    with_torchs_noise,
    with_a_schedule_of_its_own,
    with_a_random_subset,
]


@pytest.mark.parametrize("make", ONCE)
def test_a_closure_runs_once_a_step_and_trains(make, capsys):
    task = Task()
    task.optimizer = NaturalCG(task.params, damping=0.1)
    compute, runs = make(task), []

    def closure():
        runs.append(1)
        loss = compute()
        print("loss", loss.item())
        return loss

    before = task.loss().item()
    for step in range(8):
        task.optimizer.step(closure)
        # At the first step it is seen whether what is printed is all that is read from the parameters.
        assert len(runs) <= step + 3
    assert task.loss().item() < before
    assert capsys.readouterr().out.count("loss") == len(runs)


def test_a_closure_that_looks_at_its_gradients_can_be_run_again(caplog):
    """Here its loss reads a number, so that the first step runs it again to compare."""
    task, norms = Task(), []

    def closure():
        task.optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in task.params]).item())
        return loss + 0.0 * loss.item()

    true = task.true_gradient().norm().item()
    task.optimizer.step(closure)
    assert len(norms) > 1
    assert norms[-1] != norms[0] == pytest.approx(true)
    assert not caplog.records


def test_a_closure_with_a_condition_runs_once_a_step():
    task, runs = Task(), []
    compute = with_a_condition(task)

    def closure():
        runs.append(1)
        return compute()

    task.optimizer.step(closure)
    learnt = len(runs)
    for _ in range(4):
        task.optimizer.step(closure)
    assert len(runs) == learnt + 4
    assert learnt <= 3


def test_buffers_and_random_numbers_are_where_one_run_leaves_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1))
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    plain = copy.deepcopy(model)
    torch.manual_seed(5)
    F.mse_loss(plain(x), y)
    generator = torch.get_rng_state()
    torch.manual_seed(5)
    NaturalCG(model.parameters()).step(lambda: F.mse_loss(model(x), y))
    assert torch.equal(torch.get_rng_state(), generator)
    for found, true in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(found, true)


# Autocast around the step, and torch.func inside.


@pytest.mark.parametrize("around", [False, True])
def test_the_step_of_float32_is_that_of_float64_whatever_autocast_is_around(around):
    x, y, w = torch.randn(100, 6), torch.randn(100, 3), nn.Parameter(torch.randn(3, 6))
    start, inputs, targets = w.detach().double(), x.double(), y.double()
    hessian = 2 / 300 * inputs.T @ inputs + 0.01 * torch.eye(6).double()
    gradient = 2 / 300 * inputs.T @ (inputs @ start.T - targets)
    true = -torch.linalg.solve(hessian, gradient).T
    optimizer = NaturalCG(
        [w],
        damping=0.01,
        adapt_damping=False,
        cg_progress_tol=0,
        max_backtracks=0,
        preconditioner=None,
    )

    def closure():
        with torch.autocast("cpu", enabled=False):
            return F.mse_loss(x @ w.T, y)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
        optimizer.step(closure)
    assert_near(w.detach().double() - start, true, 1e-5)


def by_vmap(w, x, y):
    return torch.func.vmap(lambda x, y: F.mse_loss(x @ w, y))(x, y).mean()


def by_vmap_of_logits(w, x, y):
    losses = torch.func.vmap(lambda x, y: F.binary_cross_entropy_with_logits(x @ w, y.sigmoid()))
    return losses(x, y).mean()


def by_grad(w, x, y):
    """The loss after a step on one half, on the other."""
    slope = torch.func.grad(lambda w: F.mse_loss(x[:4] @ w, y[:4]))(w)
    return (x[4:] @ (w - 0.1 * slope) - y[4:]).square().mean()


def by_grad_and_value(w, x, y):
    slope, value = torch.func.grad_and_value(lambda w: F.mse_loss((x @ w).tanh(), y))(w)
    return value + slope.square().sum()


def by_forward_mode(w, x, y):
    value, slope = torch.func.jvp(lambda x: F.mse_loss(x @ w, y), (x,), (torch.ones_like(x),))
    return value + slope.square()


@pytest.mark.parametrize(
    "function", [by_vmap, by_vmap_of_logits, by_grad, by_grad_and_value, by_forward_mode]
)
def test_a_loss_inside_torch_func_has_the_right_hessian(function):
    w, x, y = nn.Parameter(real(4)), real(8, 4), real(8)
    point = linearize(lambda: function(w, x, y), [w])
    true = torch.autograd.functional.hessian(lambda w: function(w, x, y), w.detach())
    found = torch.stack([point.curvature(e) for e in torch.eye(4, dtype=torch.float64)])
    assert point.kind == "hessian"
    assert_near(found, true, 1e-8)


@pytest.mark.parametrize(
    "arguments", [{"create_graph": True}, {"inputs": [torch.zeros(1, requires_grad=True)]}]
)
def test_backward_of_several_tensors_refuses_what_backward_refuses(arguments):
    task = Task()

    def closure():
        loss = task.loss()
        torch.autograd.backward([loss], **arguments)
        return loss

    with pytest.raises(RuntimeError, match=r"use torch\.autograd\.grad"):
        task.optimizer.step(closure)


def test_a_compiled_model_is_told_of_once(monkeypatch, caplog):
    monkeypatch.setattr(mode, "_TOLD", set())
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    plain, whole, within = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
    NaturalCG(plain.parameters()).step(lambda: F.cross_entropy(plain(x), y))
    compiled = torch.compile(whole, backend="eager")
    compiled(x)
    NaturalCG(plain.parameters()).step(lambda: F.cross_entropy(plain(x), y))
    assert "torch.compile" not in caplog.text
    within.compile(backend="eager")
    for model in (compiled, within):
        optimizer = NaturalCG(model.parameters())
        for _ in range(2):
            optimizer.step(lambda model=model: F.cross_entropy(model(x + 1 - 1), y))
    assert caplog.text.count("torch.compile, and within step() that runs eagerly") == 1
