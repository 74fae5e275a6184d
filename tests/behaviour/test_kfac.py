"""KFAC: three ways to take the same step, what it promises as a torch optimizer, and what it refuses."""

import copy
import io
import math
import pickle
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers.models import CASES, CLASSES
from helpers.problems import assert_near, flatten
from helpers.states import assert_same_state
from torch import nn
from torch.distributions import Categorical
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from ngd_optim import KFAC, NaturalCG, least_squares
from ngd_optim.kronecker import estimate

N, IN, OUT = 32, 6, 4


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Linear(IN, 10), nn.LayerNorm(10), nn.Tanh(), nn.Linear(10, OUT)]
    return nn.Sequential(*layers).to(dtype)


class Stream:
    """A model and batches that depend on the step's number alone."""

    def __init__(self, dtype=torch.float32, make=make_model):
        self.model = make(dtype)
        self.dtype = dtype

    def batch(self, step, n=N):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(n, IN, generator=generator).to(self.dtype)
        return x, x[:, :OUT].argmax(1)

    def loss(self, step, part=slice(None)):
        x, y = self.batch(step)
        return F.cross_entropy(self.model(x[part]), y[part])

    @property
    def theta(self):
        return flatten(self.model.parameters())


class WithLoss(nn.Module):
    """As models of transformers are called with labels."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return {"loss": F.cross_entropy(self.model(x), y)}


# Ways to take a step, all of them the same one.
def by_closure(stream, optimizer, step):
    def closure():
        optimizer.zero_grad()
        loss = stream.loss(step)
        loss.backward()
        return loss

    optimizer.step(closure)


def by_loss(stream, optimizer, step):
    optimizer.step(lambda: stream.loss(step))


def by_watch(stream, optimizer, step):
    with optimizer.watch():
        loss = stream.loss(step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def by_watch_around_backward(stream, optimizer, step):
    optimizer.zero_grad()
    with optimizer.watch():
        stream.loss(step).backward()
    optimizer.step()


def by_module(stream, optimizer, step):
    if step == 0:
        stream.whole = WithLoss(stream.model)
        optimizer.watch(stream.whole)
    optimizer.zero_grad()
    stream.whole(*stream.batch(step))["loss"].backward()
    optimizer.step()


def by_criterion(stream, optimizer, step):
    if step == 0:
        stream.criterion = nn.CrossEntropyLoss()
        optimizer.watch(stream.criterion)
    x, y = stream.batch(step)
    optimizer.zero_grad()
    stream.criterion(stream.model(x), y).backward()
    optimizer.step()


def by_halves(stream, optimizer, step):
    """The mean of two micro-batches."""
    optimizer.zero_grad()
    for part in (slice(0, N // 2), slice(N // 2, N)):
        with optimizer.watch():
            loss = stream.loss(step, part) / 2
        loss.backward()
    optimizer.step()


def by_list(stream, optimizer, step):
    parts = (slice(0, N // 2), slice(N // 2, N))
    optimizer.step([lambda part=part: stream.loss(step, part) for part in parts])


WAYS = [by_loss, by_watch, by_watch_around_backward, by_module, by_criterion]


def train(way, steps=8, dtype=torch.float32, **settings):
    stream = Stream(dtype)
    optimizer = KFAC(stream.model.parameters(), **settings)
    for step in range(steps):
        way(stream, optimizer, step)
    return stream, optimizer


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_all_ways_take_the_same_steps(way):
    stream, optimizer = train(by_closure)
    other, twin = train(way)
    assert torch.equal(stream.theta, other.theta)
    assert_same_state(optimizer.state_dict(), twin.state_dict())
    assert not torch.equal(stream.theta, Stream().theta)


def test_it_learns():
    stream, optimizer = train(by_loss, 60)
    assert stream.loss(1000).item() < 0.35 * Stream().loss(1000).item()
    assert optimizer.last_step.accepted


def test_micro_batches_are_a_list_of_closures():
    stream, _ = train(by_halves, 8, torch.float64)
    other, _ = train(by_list, 8, torch.float64)
    assert_near(other.theta, stream.theta, 1e-9)
    gradient = flatten(p.grad for p in stream.model.parameters())
    assert gradient.norm() > 0


def test_gradients_may_be_changed_before_the_step():
    """Clipping, and whatever else a loop does: the step takes what is there."""
    stream = Stream(torch.float64)
    optimizer = KFAC(stream.model.parameters(), momentum=0.0, adapt_radius=False)
    by_watch(stream, optimizer, 0)
    start, twin = stream.theta, copy.deepcopy((stream, optimizer))
    steps = []
    for (task, own), factor in zip(((stream, optimizer), twin), (1.0, 1e-3), strict=True):
        with own.watch():
            loss = task.loss(1)
        own.zero_grad()
        loss.backward()
        for p in task.model.parameters():
            p.grad *= factor
        own.step()
        assert own.last_step.grad_norm == pytest.approx(
            flatten(p.grad for p in task.model.parameters()).norm().item()
        )
        steps.append(task.theta - start)
    assert_near(steps[1], steps[0], 1e-6)  # its length is the radius's


@pytest.mark.parametrize("way", [by_loss, by_list], ids=lambda way: way.__name__)
def test_a_closure_without_backward_leaves_the_gradients_alone(way):
    stream = Stream()
    optimizer = KFAC(stream.model.parameters())
    marks = [torch.ones_like(p) for p in stream.model.parameters()]
    for p, mark in zip(stream.model.parameters(), marks, strict=True):
        p.grad = mark
    way(stream, optimizer, 0)
    for p, mark in zip(stream.model.parameters(), marks, strict=True):
        assert p.grad is mark
        assert (mark == 1).all()


def test_a_closure_that_does_nothing_is_none():
    stream, _ = train(by_watch)

    def by_empty_closure(stream, optimizer, step):
        optimizer.zero_grad()
        with optimizer.watch():
            stream.loss(step).backward()
            optimizer.step(lambda: None)

    other, optimizer = train(by_empty_closure)
    assert torch.equal(stream.theta, other.theta)
    assert math.isnan(optimizer.last_step.loss)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_clearing_gradients_is_no_backward(set_to_none):
    stream, optimizer = train(by_closure, 2)

    def closure():
        optimizer.zero_grad(set_to_none)
        return stream.loss(2)

    before = stream.theta
    optimizer.step(closure)
    assert optimizer.last_step.accepted
    assert not torch.equal(before, stream.theta)


def test_the_closure_runs_once_and_bare_where_nothing_is_due(monkeypatch):
    stream, optimizer = train(by_closure, 15)
    runs = []

    def closure():
        runs.append(torch.overrides._get_current_function_mode())
        optimizer.zero_grad()
        loss = stream.loss(15)
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
    assert len(runs) == 6
    assert sum(mode is not None for mode in runs) == 1  # at step 20


def test_the_graph_is_let_go():
    stream, optimizer = train(by_watch, 1)
    held = []
    with optimizer.watch():
        z = stream.model(stream.batch(1)[0])
        loss = F.cross_entropy(z, stream.batch(1)[1])
    held += [weakref.ref(z), weakref.ref(loss)]
    loss.backward()
    optimizer.step()
    del z, loss
    assert [reference() for reference in held] == [None, None]


# As torch's optimizers


def by_state_dict(stream, optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = Stream(stream.dtype)
    twin.model.load_state_dict(stream.model.state_dict())
    resumed = KFAC(twin.model.parameters(), lr=0.3, radius=7.0, momentum=0.1)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    return twin, resumed


def by_deepcopy(stream, optimizer):
    return copy.deepcopy((stream, optimizer))


def by_pickle(stream, optimizer):
    return pickle.loads(pickle.dumps((stream, optimizer)))


@pytest.mark.parametrize("comes_back", [by_state_dict, by_deepcopy, by_pickle])
@pytest.mark.parametrize("steps", [1, 3, 7, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_is_bit_identical(comes_back, steps, dtype):
    stream, optimizer = train(by_watch, steps, dtype, lr=0.9, weight_decay=0.01)
    twin, resumed = comes_back(stream, optimizer)
    for step in range(steps, steps + 7):
        by_watch(stream, optimizer, step)
        by_watch(twin, resumed, step)
    assert torch.equal(stream.theta, twin.theta)
    assert_same_state(optimizer.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    "comes_back", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
def test_copies_draw_from_a_generator_of_their_own(comes_back):
    stream, optimizer = train(by_watch, 2, generator=torch.Generator().manual_seed(3))
    twin, other = comes_back((stream, optimizer))
    assert other.last_step.step_norm == optimizer.last_step.step_norm
    for step in range(2, 6):
        by_watch(stream, optimizer, step)
        by_watch(twin, other, step)
    assert other.generator is not optimizer.generator
    assert torch.equal(stream.theta, twin.theta)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_goes_to_parameters_of_another_dtype(dtype):
    _, optimizer = train(by_watch, 5)
    twin = Stream(dtype)
    resumed = KFAC(twin.model.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    entry = resumed.state[twin.model[0].weight]
    assert {entry[name].dtype for name in ("momentum", "last_step")} == {dtype}
    assert entry["left"].dtype == torch.promote_types(dtype, torch.float32)
    for step in range(5, 12):
        by_watch(twin, resumed, step)
        assert resumed.last_step.accepted


@pytest.mark.parametrize("name", ["momentum", "last_step", "left", "diagonal"])
def test_loaded_numbers_that_are_not_finite_are_dropped(name, caplog):
    stream, optimizer = train(by_watch, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    next(e for e in saved["state"].values() if name in e)[name].fill_(math.nan)
    optimizer.load_state_dict(saved)
    part = "Kronecker factors" if name in ("left", "diagonal") else name
    assert f"not finite in its {part}, which is dropped" in caplog.text
    by_watch(stream, optimizer, 5)
    assert optimizer.last_step.accepted
    assert optimizer.last_step.renewed == (name in ("left", "diagonal"))


@pytest.mark.parametrize("name", ["steps", "weight", "layer_groups"])
def test_a_broken_state_is_refused(name):
    _, optimizer = train(by_watch, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][name] = "x"
    with pytest.raises(ValueError, match=f"it is broken: {name} must be a number"):
        optimizer.load_state_dict(saved)


def test_the_state_is_tensors_and_numbers():
    _, optimizer = train(by_watch, 2)
    kinds = {type(value) for entry in optimizer.state.values() for value in entry.values()}
    assert kinds <= {torch.Tensor, int, float}


def test_state_of_another_optimizer_is_refused():
    _, optimizer = train(by_watch, 1)
    other = torch.optim.Adam(Stream().model.parameters())
    with pytest.raises(ValueError, match="not the state of a KFAC: its groups have no momentum"):
        optimizer.load_state_dict(other.state_dict())
    wider = KFAC(nn.Sequential(nn.Linear(IN, 9), nn.LayerNorm(9), nn.Linear(9, OUT)).parameters())
    with pytest.raises(ValueError, match="saved of other parameters"):
        wider.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=12),
        lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.5**t),
        lambda o: lr_scheduler.ReduceLROnPlateau(o),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0),
    ],
    ids=["cosine", "one cycle", "lambda", "plateau", "cyclic"],
)
def test_schedulers(make):
    stream = Stream()
    optimizer = KFAC(stream.model.parameters())
    scheduler = make(optimizer)
    for step in range(8):
        by_watch(stream, optimizer, step)
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert optimizer.last_step.accepted


def test_the_rate_scales_the_step():
    steps = []
    for lr in (1.0, 0.25):
        stream, optimizer = train(by_watch, 1, torch.float64, lr=lr)
        steps.append(stream.theta - Stream(torch.float64).theta)
        assert optimizer.last_step.step_norm == pytest.approx(steps[-1].norm().item())
    assert_near(steps[1], 0.25 * steps[0], 1e-12)


def test_groups_have_their_own_rate_and_weight_decay():
    stream = Stream(torch.float64)
    first, *others = stream.model
    groups = [
        {"params": first.parameters(), "lr": 0.0},
        {"params": [p for m in others for p in m.parameters()], "weight_decay": 0.5},
    ]
    optimizer, before = KFAC(groups), copy.deepcopy(stream)
    by_watch(stream, optimizer, 0)
    plain = copy.deepcopy(before)
    optimizer = KFAC(
        [
            {**groups[0], "params": plain.model[0].parameters()},
            {"params": plain.model[1:].parameters()},
        ]
    )
    by_watch(plain, optimizer, 0)
    assert torch.equal(flatten(stream.model[0].parameters()), flatten(before.model[0].parameters()))
    shrunk, start, end = (flatten(s.model[3].parameters()) for s in (stream, before, plain))
    assert_near(shrunk, end - 0.5 * start, 1e-12)


def test_frozen_and_thawed_parameters():
    stream, optimizer = train(by_watch, 2)
    stream.model[0].requires_grad_(False)
    frozen = flatten(stream.model[0].parameters())
    for step in range(2, 5):
        by_watch(stream, optimizer, step)
        assert optimizer.last_step.accepted
    assert torch.equal(frozen, flatten(stream.model[0].parameters()))
    stream.model[0].requires_grad_(True)
    for step in range(5, 8):
        by_watch(stream, optimizer, step)
        assert optimizer.last_step.accepted
    assert not torch.equal(frozen, flatten(stream.model[0].parameters()))


def test_the_count_goes_on_where_the_first_parameter_is_frozen():
    stream, optimizer = train(by_watch, 12)
    stream.model[0].weight.requires_grad_(False)
    by_watch(stream, optimizer, 12)
    assert optimizer.state[stream.model[0].bias]["steps"] == 13
    assert math.isnan(optimizer.last_step.new_slope)  # the last step was one of other parameters
    stream.model[0].weight.requires_grad_(True)
    by_watch(stream, optimizer, 13)
    assert [entry["steps"] for entry in optimizer.state.values() if "steps" in entry] == [14]
    assert math.isnan(optimizer.last_step.new_slope)


@pytest.mark.parametrize("momenta", [(0.0, 0.95), (0.95, 0.5, 0.9)])
def test_the_average_of_gradients_is_one_whatever_the_momentum_was(momenta):
    """Of gradients that are all the same it is that gradient."""
    stream = Stream(torch.float64)
    optimizer = KFAC(stream.model.parameters(), lr=0.0)
    for momentum in momenta:
        optimizer.param_groups[0]["momentum"] = momentum
        by_watch(stream, optimizer, 0)
    first = next(iter(optimizer.state.values()))
    for p in stream.model.parameters():
        assert_near(optimizer.state[p]["momentum"] / first["weight"], p.grad, 1e-12)


def test_added_groups_have_the_settings_of_now():
    stream = Stream()
    first, *others = stream.model
    optimizer = KFAC(first.parameters())
    scheduler = lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=12)
    for step in range(3):
        by_watch(stream, optimizer, step)
        scheduler.step()
    optimizer.add_param_group({"params": [p for m in others for p in m.parameters()], "lr": 0.5})
    for name in ("momentum", "radius"):
        assert len({group[name] for group in optimizer.param_groups}) == 1
    by_watch(stream, optimizer, 3)
    assert optimizer.last_step.accepted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("momentum", 1.5),
        ("radius", -1.0),
        ("weight_decay", math.inf),
        ("renew_every", 0),
    ],
)
@pytest.mark.parametrize("way", [by_loss, by_watch], ids=lambda way: way.__name__)
def test_settings_that_were_changed_are_checked(name, value, way):
    stream, optimizer = train(way, 2)
    before = stream.theta
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name} must be"):
        way(stream, optimizer, 2)
    assert torch.equal(before, stream.theta)


def test_the_step_is_one_of_the_parameters_with_a_gradient():
    stream = Stream(torch.float64)
    optimizer = KFAC(stream.model.parameters())
    by_watch(stream, optimizer, 0)
    before, old = stream.theta, stream.model[0].weight.detach().clone()
    with optimizer.watch():
        loss = stream.loss(1)
    optimizer.zero_grad()
    loss.backward()
    stream.model[0].weight.grad = None
    optimizer.step()
    assert torch.equal(stream.model[0].weight, old)
    assert not optimizer.state[stream.model[0].weight]["last_step"].any()
    assert optimizer.last_step.step_norm == pytest.approx((stream.theta - before).norm().item())


def test_a_module_that_a_batch_does_not_use_keeps_its_factors():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.all = nn.ModuleList([nn.Linear(IN, OUT), nn.Linear(IN, OUT)])

        def forward(self, x):
            return self.all[int(x[0, 0] > 0)](x)

    stream = Stream(make=lambda dtype: Experts().to(dtype))
    optimizer = KFAC(stream.model.parameters(), renew_every=1)
    used = {int(stream.batch(step)[0][0, 0] > 0) for step in range(6)}
    for step in range(6):
        before = stream.theta
        by_watch(stream, optimizer, step)
        assert optimizer.last_step.accepted
        assert not torch.equal(before, stream.theta)
    assert used == {0, 1}
    assert all(optimizer.state[e.weight]["layer_groups"] == 1 for e in stream.model.all)


def test_copies_of_a_watched_module_are_not_watched():
    stream = Stream()
    optimizer = KFAC(stream.model.parameters())
    whole = WithLoss(stream.model)
    handle = optimizer.watch(whole)
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole)), AveragedModel(whole)):
        twin(*stream.batch(0))["loss"].backward()
    whole(*stream.batch(0))["loss"].backward()
    optimizer.step()
    assert optimizer.last_step.renewed
    handle.remove()
    optimizer.zero_grad()
    whole(*stream.batch(1))["loss"].backward()
    optimizer.step()
    assert not optimizer.last_step.renewed


class CallsItself(WithLoss):
    def forward(self, x, y, again=True):
        if again:
            self(x, y, again=False)
        return super().forward(x, y)


class Removes(WithLoss):
    def forward(self, x, y):
        self.handle.remove()
        return super().forward(x, y)


class Fails(WithLoss):
    def forward(self, x, y):
        raise KeyError("data")


@pytest.mark.parametrize("make", [WithLoss, CallsItself, Removes, Fails])
@pytest.mark.parametrize("times", [1, 2])
def test_a_watched_module_leaves_no_mode_behind(make, times):
    stream = Stream()
    optimizer = KFAC(stream.model.parameters())
    whole = make(stream.model)
    for _ in range(times):
        whole.handle = optimizer.watch(whole)
    with pytest.raises(KeyError) if make is Fails else nullcontext():
        whole(*stream.batch(0))["loss"].backward()
        optimizer.step()
    assert torch.overrides._get_current_function_mode() is None
    assert len(whole._forward_hooks) == len(whole._forward_pre_hooks) == times - (make is Removes)
    twin, other = train(by_watch, 1)
    assert make is Fails or torch.equal(stream.theta, twin.theta)
    assert make is Fails or optimizer.last_step.step_norm == other.last_step.step_norm


@pytest.mark.parametrize("change", [lambda m: m.requires_grad_(False), lambda m: m.half()])
def test_a_watched_module_can_be_evaluated_whatever_became_of_it(change):
    model = make_model()
    KFAC(model.parameters()).watch(model)
    change(model)
    with torch.no_grad():
        assert model(torch.zeros(2, IN, dtype=model[0].weight.dtype)).shape == (2, OUT)


def test_a_loop_that_watches_no_more_is_told_once(caplog):
    stream, optimizer = train(by_watch, 15)
    for step in range(15, 60):
        optimizer.zero_grad()
        stream.loss(step).backward()
        optimizer.step()
    (said,) = [record.message for record in caplog.records]
    assert "the factors in use are 30 steps old" in said
    assert "with optimizer.watch()" in said


@pytest.mark.parametrize("stream", ["fresh", "same", "least squares", "distribution"])
def test_naturalcg_says_once_that_kfac_is_for_streams(stream, caplog):
    task = Stream()
    optimizer = NaturalCG(task.model.parameters(), max_cg_iters=2)
    for step in range(45):
        x, y = task.batch(0 if stream == "same" else step, 8)

        def closure(x=x, y=y):
            z = task.model(x)
            if stream == "least squares":
                return least_squares(z - F.one_hot(y, OUT))
            loss = F.cross_entropy(z, y)
            return (loss, Categorical(logits=z)) if stream == "distribution" else loss

        optimizer.step(closure)
    said = [record for record in caplog.records if "ngd_optim.KFAC is made" in record.message]
    assert len(said) == (stream == "fresh")


# Models


@pytest.mark.parametrize("name", CASES)
def test_models(name):
    ends = []
    for way in ("closure", "watch"):
        torch.manual_seed(0)
        model, x = CASES[name].make(), CASES[name].data()
        y = torch.arange(len(x)) % CLASSES
        optimizer = KFAC([p for p in model.parameters() if p.requires_grad])
        losses = []
        for _ in range(16):
            optimizer.zero_grad()
            if way == "watch":
                with optimizer.watch():
                    loss = F.cross_entropy(model(x).reshape(-1, CLASSES)[: len(y)], y)
                loss.backward()
                optimizer.step()
            else:
                loss = optimizer.step(
                    lambda: F.cross_entropy(model(x).reshape(-1, CLASSES)[: len(y)], y)  # noqa: B023
                )
            losses.append(loss.item())
            assert optimizer.last_step.accepted
        ends.append(losses)
        params = optimizer.param_groups[0]["params"]
        assert sum(optimizer.state[p]["layer_groups"] > 0 for p in params) >= (
            name not in ("weight_norm", "spectral_norm", "scripted")
        )
    # TorchScript hides its operations from the third run on, of the class.
    assert ends[0] == ends[1] or name == "scripted"
    assert ends[0][-1] < 0.8 * ends[0][0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Embedding(5, 3, sparse=True), r"Embedding\(sparse=False\)"),
        (lambda: Reentrant(), "use_reentrant=False"),
    ],
    ids=["sparse", "reentrant"],
)
def test_models_that_are_refused(make, message):
    model = make()
    optimizer = KFAC(model.parameters())
    before = flatten(model.parameters())
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.step(lambda: F.cross_entropy(model(torch.arange(4)), torch.zeros(4).long()))
    assert torch.equal(before, flatten(model.parameters()))


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Embedding(5, 3), nn.Linear(3, 3)

    def forward(self, x):
        return checkpoint(self.second, self.first(x), use_reentrant=True)


# Several losses


@pytest.mark.parametrize("weights", [(1.0, 0.25), (0.0, 1.0)])
def test_losses_count_with_their_weights(weights, monkeypatch):
    """Those of two heads on one body: the sum, wherever it is made."""
    monkeypatch.setattr(estimate, "_MOST_SKIPPED", 1)  # all rows count

    def make(dtype):
        torch.manual_seed(0)
        heads = nn.ModuleDict({name: nn.Linear(5, 1) for name in ("a", "b")})
        return nn.ModuleDict({"body": nn.Linear(IN, 5), "heads": heads}).to(dtype)

    def losses(model, x):
        z = model["body"](x).tanh()
        return [F.mse_loss(head(z), x[:, :1], reduction="none") for head in model["heads"].values()]

    def within(task, optimizer, x):
        with optimizer.watch():
            a, b = losses(task.model, x)
            loss = (weights[0] * a + weights[1] * b).mean()
        loss.backward()

    def outside(task, optimizer, x):
        with optimizer.watch():
            a, b = losses(task.model, x)
        (weights[0] * a.mean() + weights[1] * b.sum() / len(b)).backward()

    def one_by_one(task, optimizer, x):
        for i in (0, 1):
            with optimizer.watch():
                loss = losses(task.model, x)[i].mean()
            (weights[i] * loss).backward()

    ends = []
    for way in (within, outside, one_by_one):
        task = Stream(torch.float64, make)
        optimizer = KFAC(task.model.parameters(), renew_every=1)
        for step in range(3):
            optimizer.zero_grad()
            way(task, optimizer, task.batch(step)[0])
            optimizer.step()
        ends.append(task.theta)
        assert optimizer.state[task.model["body"].weight]["layer_groups"] == 1
    assert_near(ends[1], ends[0], 1e-9)
    assert_near(ends[2], ends[0], 1e-9)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        ({"damping": math.nan}, "damping must be"),
        ({"radius": 0.0}, "radius must be a finite number above 0, got 0.0"),
        ({"renew_every": 0}, "renew_every must be an integer, at least 1, got 0"),
        ({"factor_decay": 2.0}, "factor_decay must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"adapt_radius": 1}, "adapt_radius must be True or False, got 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        KFAC(make_model().parameters(), **settings)


def test_groups_must_agree():
    model = make_model()
    optimizer = KFAC(model[0].parameters())
    with pytest.raises(
        ValueError, match=r"momentum holds for the whole step.*only lr, weight_decay"
    ):
        optimizer.add_param_group({"params": model[3].parameters(), "momentum": 0.5})
    assert len(optimizer.param_groups) == 1


def test_generator_must_be_one():
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got 3"):
        KFAC(make_model().parameters(), generator=3)


def test_a_loop_without_watch_is_told_what_to_write():
    stream = Stream()
    optimizer = KFAC(stream.model.parameters())
    stream.loss(0).backward()
    with pytest.raises(RuntimeError, match=r"with optimizer.watch\(\)"):
        optimizer.step()
    assert torch.equal(stream.theta, Stream().theta)
    assert not optimizer.state


def test_a_loss_of_other_parameters_is_none():
    stream, others = Stream(), make_model()
    optimizer = KFAC(stream.model.parameters())
    x, y = stream.batch(0)
    with optimizer.watch():
        loss = F.cross_entropy(others(x), y)
    (loss + stream.model(x).cosh().mean()).backward()
    with pytest.raises(RuntimeError, match="has seen no loss"):
        optimizer.step()
    assert torch.equal(stream.theta, Stream().theta)


def test_step_without_any_gradient():
    stream = Stream()
    with pytest.raises(ValueError, match=r"call loss.backward\(\) before step"):
        KFAC(stream.model.parameters()).step()


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda z: None, TypeError, "must return the loss as a tensor, or call backward, got None"),
        (lambda z: z, ValueError, "must return a scalar loss"),
        (lambda z: z.mean().detach(), ValueError, "the loss has no graph"),
        (lambda z: z.cosh().mean(), RuntimeError, "from a function of torch.nn.functional"),
    ],
    ids=["nothing", "vector", "detached", "unknown loss"],
)
def test_closures_that_give_no_loss(result, error, message):
    stream = Stream()
    optimizer = KFAC(stream.model.parameters())
    with pytest.raises(error, match=message):
        optimizer.step(lambda: result(stream.model(stream.batch(0)[0])))
    assert torch.equal(stream.theta, Stream().theta)
    assert not optimizer.state
    assert all(p.grad is None for p in stream.model.parameters())


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_batch_that_is_not_finite_is_skipped(steps):
    stream, optimizer = train(by_closure, steps)
    twin, other = copy.deepcopy((stream, optimizer))
    saved = copy.deepcopy(optimizer.state_dict())
    before = stream.theta
    optimizer.step(lambda: stream.loss(99) * math.nan)
    assert not optimizer.last_step.accepted
    assert optimizer.last_step.reason == "the gradient is not finite"
    assert torch.equal(before, stream.theta)
    assert_same_state(saved, optimizer.state_dict()) if steps else None
    for step in range(steps, steps + 3):
        by_closure(stream, optimizer, step)
        by_closure(twin, other, step)
    assert torch.equal(stream.theta, twin.theta)


@pytest.mark.parametrize("steps", [3, 5])  # factors are due, or not
def test_an_exception_in_the_closure_leaves_everything(steps):
    stream, optimizer = train(by_closure, steps)
    twin, other = copy.deepcopy((stream, optimizer))
    saved, before = copy.deepcopy(optimizer.state_dict()), stream.theta

    def closure():
        stream.loss(99).backward()
        raise KeyError("data")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert torch.equal(before, stream.theta)
    assert_same_state(saved, optimizer.state_dict())
    by_closure(stream, optimizer, steps)
    by_closure(twin, other, steps)
    assert torch.equal(stream.theta, twin.theta)


def test_grad_scaler_and_float16_are_refused_and_bfloat16_works():
    stream = Stream()
    optimizer = KFAC(stream.model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    with optimizer.watch():
        loss = stream.loss(0)
    scaler.scale(loss).backward()
    with pytest.raises(RuntimeError, match=r"no GradScaler.*bfloat16"):
        scaler.step(optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_closure(stream, optimizer, 0)
    assert optimizer.last_step.accepted
    with optimizer.watch():
        loss = F.mse_loss(stream.model(stream.batch(1)[0]).half(), torch.zeros(N, OUT).half())
    with pytest.raises(RuntimeError, match="float16, which has too little range"):
        loss.backward()
