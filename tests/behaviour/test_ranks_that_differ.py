"""Two processes that do not do the same: one sentence on each of them, nothing moved, and nobody left waiting."""

import copy
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from helpers.ranks import on_two_ranks, outcomes_of, results_of, try_each
from helpers.states import assert_same_state
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

from ngd_optim import Diagonal, NaturalCG, Nystrom

FEATURES, HIDDEN, CLASSES, SAMPLES = 4, 6, 3, 20


class Training:
    """A classifier on this rank's part of the data."""

    def __init__(
        self, rank: int, *, ddp: bool = True, alone: bool = False, seed: int = 0, **settings: Any
    ) -> None:
        torch.manual_seed(seed)
        layers = nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)
        self.model: nn.Module = nn.Sequential(*layers).double()
        self.run: nn.Module = (
            DistributedDataParallel(self.model) if ddp and not alone else self.model
        )
        if not ddp and not alone:
            settings["process_group"] = dist.group.WORLD
        self.optimizer = NaturalCG(self.model.parameters(), **settings)
        generator = torch.Generator().manual_seed(rank)
        self.x = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
        self.y = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
        self.rank = rank

    @property
    def theta(self) -> Tensor:
        return parameters_to_vector(self.model.parameters()).detach().clone()

    def loss(self) -> Tensor:
        return F.cross_entropy(self.run(self.x), self.y)

    def half(self) -> Tensor:
        return F.cross_entropy(self.run(self.x[::2]), self.y[::2])


class Fault:
    """Raises on rank 1 in a call with this number, counted from when it is armed."""

    def __init__(self, rank: int, error: BaseException) -> None:
        self.rank, self.error, self.left = rank, error, 0

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0 and self.rank == 1:
            raise self.error


# Where an exception may come from: a function that makes of a training and a fault the arguments of a step.


def before_the_model(t: Training, fault: Fault) -> Any:
    def closure() -> Tensor:
        fault()
        return t.loss()

    return {"closure": closure}


def after_the_model(t: Training, fault: Fault) -> Any:
    def closure() -> Tensor:
        loss = t.loss()
        loss.backward()
        fault()
        return loss

    return {"closure": closure}


def reads_values(t: Training, fault: Fault) -> Any:
    """What it reads makes the first step's checks run it again."""

    def closure() -> Tensor:
        fault()
        loss = t.loss()
        return loss if loss.item() < 100 else 2 * loss

    return {"closure": closure}


def writes_parameters(t: Training, fault: Fault) -> Any:
    """Trial points run it."""

    def closure() -> Tensor:
        fault()
        for p in t.model.parameters():
            p.data.clamp_(-5, 5)
        return t.loss()

    return {"closure": closure}


def list_of_closures(t: Training, fault: Fault) -> Any:
    """Products run them."""

    def closure() -> Tensor:
        fault()
        return t.half()

    return {"closure": [t.loss, closure]}


def curvature_closure(t: Training, fault: Fault) -> Any:
    def closure() -> Tensor:
        fault()
        return t.half()

    return {"closure": t.loss, "curvature_closure": closure}


def preconditioner(t: Training, fault: Fault) -> Any:
    def halve(r: Tensor) -> Tensor:
        fault()
        return r / 2

    t.optimizer.param_groups[0]["preconditioner"] = halve
    return {"closure": t.loss}


def hook(t: Training, fault: Fault) -> Any:
    t.optimizer.register_gradient_hook(lambda _: fault())
    return {"closure": t.loss}


ERRORS: dict[str, tuple[Callable[..., Any], int, type[BaseException], int]] = {
    # The step that it comes in, and in which call of that step.
    "first run, before the model": (before_the_model, 0, KeyError, 1),
    "first run, interrupt before the model": (before_the_model, 0, KeyboardInterrupt, 1),
    "first run, after backward": (after_the_model, 0, RuntimeError, 1),
    "first run, exit": (after_the_model, 0, SystemExit, 1),
    "later run": (before_the_model, 2, KeyError, 1),
    "later run, interrupt": (after_the_model, 2, KeyboardInterrupt, 1),
    "checks": (reads_values, 0, KeyboardInterrupt, 2),
    "checks, second": (reads_values, 0, KeyboardInterrupt, 3),
    "checks, of the closure that writes": (writes_parameters, 0, KeyboardInterrupt, 2),
    "trial point, interrupt": (writes_parameters, 1, KeyboardInterrupt, 2),
    "second closure": (list_of_closures, 0, KeyError, 1),
    "product of closures": (list_of_closures, 1, KeyError, 3),
    "product of closures, interrupt": (list_of_closures, 1, KeyboardInterrupt, 4),
    "curvature closure": (curvature_closure, 0, KeyError, 1),
    "curvature closure, later": (curvature_closure, 1, KeyboardInterrupt, 1),
    "preconditioner": (preconditioner, 0, KeyError, 1),
    "preconditioner, later": (preconditioner, 1, KeyboardInterrupt, 2),
    "hook": (hook, 0, KeyboardInterrupt, 1),
}


def raise_on_one_rank(rank: int, name: str) -> tuple[str, bool, Tensor]:
    """What this rank saw, whether all was put back, and where it is after one more step."""
    make, step, kind, call = ERRORS[name]
    t, fault = Training(rank), Fault(rank, kind("no such batch"))
    arguments = make(t, fault)
    for _ in range(step):
        t.optimizer.step(**arguments)
    theta, state = t.theta, copy.deepcopy(t.optimizer.state_dict())
    fault.left = call
    said = "nothing was raised"
    try:
        t.optimizer.step(**arguments)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    is_back = torch.equal(t.theta, theta)
    if step:
        assert_same_state(t.optimizer.state_dict(), state)
    fault.left = 0
    t.optimizer.step(**arguments)
    assert t.optimizer.last_step is not None
    assert t.optimizer.last_step.accepted
    return said, is_back, t.theta


# What ranks may disagree in: changes rank 1 before its third step, and the words of the sentence.


def group_of(t: Training) -> dict[str, Any]:
    return t.optimizer.param_groups[0]


def first_state(t: Training) -> dict[str, Any]:
    return t.optimizer.state[group_of(t)["params"][0]]


def move(t: Training, index: int, amount: float) -> None:
    with torch.no_grad():
        group_of(t)["params"][index].view(-1)[-1] += amount


def swap(t: Training) -> None:
    """The same numbers in other places."""
    with torch.no_grad():
        p = group_of(t)["params"][0]
        p.copy_(p.flip(0))


def load_other(t: Training) -> None:
    other = copy.deepcopy(t.optimizer.state_dict())
    other["state"][1]["solution"][0] *= 1.5
    t.optimizer.load_state_dict(other)


DISAGREEMENTS: dict[str, tuple[Callable[[Training], Any], str]] = {
    "lr": (lambda t: group_of(t).update(lr=0.5), "settings differ"),
    "max_kl": (lambda t: group_of(t).update(max_kl=0.1), "settings differ"),
    "max_cg_iters": (lambda t: group_of(t).update(max_cg_iters=2), "settings differ"),
    "solver": (lambda t: group_of(t).update(solver="dense"), "settings differ"),
    "curvature": (lambda t: group_of(t).update(curvature="hessian"), "settings differ"),
    "backend": (lambda t: group_of(t).update(backend="torch.func"), "settings differ"),
    "momentum": (lambda t: group_of(t).update(momentum=0.5), "settings differ"),
    "scale": (lambda t: group_of(t).update(damping_scale="diagonal"), "settings differ"),
    "no preconditioner": (lambda t: group_of(t).update(preconditioner=None), "settings differ"),
    "nystrom": (lambda t: group_of(t).update(preconditioner=Nystrom(rank=3)), "settings differ"),
    "function": (lambda t: group_of(t).update(preconditioner=torch.clone), "settings differ"),
    "damping": (lambda t: group_of(t).update(damping=0.3), "damping differs"),
    "frozen": (lambda t: group_of(t)["params"][1].requires_grad_(False), "froze different ones"),
    "all frozen": (lambda t: t.model.requires_grad_(False), "rank 1 raised"),
    "value": (lambda t: move(t, 2, 1e-12), "parameters differ"),
    "values in other places": (swap, "parameters differ"),
    "NaN": (lambda t: move(t, 0, float("nan")), "parameters differ"),
    "slope": (lambda t: first_state(t).update(slope=-7.0), "state differs"),
    "draws": (lambda t: first_state(t).update(draws=7), "state differs"),
    "state lost": (lambda t: t.optimizer.state.clear(), "state differs"),
    "more closures": (lambda t: t.__dict__.update(closures=[t.loss, t.half]), "differently"),
    "curvature closure": (lambda t: t.__dict__.update(other=t.half), "differently"),
    "no closure": (lambda t: t.__dict__.update(closures=None), "rank 1 raised"),
    "setting out of range": (lambda t: group_of(t).update(lr="fast"), "rank 1 raised"),
    "kind of loss": (
        lambda t: t.__dict__.update(closures=lambda: t.run(t.x).logsumexp(-1).mean()),
        "different kinds",
    ),
}


def differ(rank: int, name: str, *, ddp: bool) -> tuple[str, bool, Tensor]:
    change, _ = DISAGREEMENTS[name]
    t = Training(rank, ddp=ddp)
    for _ in range(2):
        t.optimizer.step(t.loss)
    saved, theta = copy.deepcopy((t.optimizer.state_dict(), t.model.state_dict())), t.theta
    requires = [p.requires_grad for p in t.model.parameters()]
    if rank == 1:
        change(t)
        theta = t.theta
    closures, other = vars(t).get("closures", t.loss), vars(t).get("other")
    said = "nothing was raised"
    try:
        t.optimizer.step(closures, curvature_closure=other)
    except Exception as error:
        said = str(error)
    is_back = torch.equal(torch.nan_to_num(t.theta, 9.0), torch.nan_to_num(theta, 9.0))
    t.optimizer.load_state_dict(saved[0])
    t.model.load_state_dict(saved[1])
    for p, flag in zip(t.model.parameters(), requires, strict=True):
        p.requires_grad_(flag)
    t.optimizer.step(t.loss)
    assert t.optimizer.last_step is not None
    assert t.optimizer.last_step.accepted
    return said, is_back, t.theta


def differ_at_first_step(rank: int) -> dict[str, str]:
    said = {}
    other = {
        "seed": {"seed": rank},
        "damping": {"damping": 0.1 + rank},
        "lr": {"lr": torch.tensor(1.0 + rank)},
        "generators": {
            "preconditioner": Diagonal(probes=2),
            "generator": torch.Generator().manual_seed(rank),
        },
        "generators of means": {
            "preconditioner": "kfac",
            "generator": torch.Generator().manual_seed(rank),
        },
    }
    for name, settings in other.items():
        t = Training(rank, ddp=False, **settings)
        try:
            t.optimizer.step(t.loss)
            said[name] = "nothing was raised"
        except ValueError as error:
            said[name] = str(error)
    t = Training(rank, ddp=False)
    t.optimizer.step(t.loss)
    if rank:
        load_other(t)
    try:
        t.optimizer.step(t.loss)
    except ValueError as error:
        said["loaded"] = str(error)
    model = nn.Linear(FEATURES, CLASSES + rank, dtype=torch.float64)
    optimizer = NaturalCG(model.parameters(), process_group=dist.group.WORLD)
    try:
        optimizer.step(lambda: F.cross_entropy(model(t.x), t.y))
    except ValueError as error:
        said["shapes"] = str(error)
    return said


def count_collectives(rank: int) -> list[tuple[int, int, int]]:
    """In each step: how many there were, how many were of products, and how many trial points."""
    t = Training(rank, preconditioner=None)
    found, real, lengths = [], dist.all_reduce, []

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    n = len(t.theta)
    dist.all_reduce = counting
    try:
        for _ in range(4):
            lengths.clear()
            t.optimizer.step(t.loss)
            report = t.optimizer.last_step
            assert report is not None
            found.append((len(lengths), lengths.count(n), report.backtracks + 1))
    finally:
        dist.all_reduce = real
    return found


def checkpoint(rank: int, *, flat: bool) -> tuple[Tensor, Tensor, str]:
    """A run that goes on, one that was resumed from files, and where these are."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    t, twin = Training(rank), Training(rank, seed=1, lr=0.1)
    for _ in range(3):
        t.optimizer.step(t.loss)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    saved = get_optimizer_state_dict(t.run, t.optimizer, options=options)
    dcp.save({"optimizer": saved, "model": t.model.state_dict()}, checkpoint_id=folder[0])
    load_checkpoint(twin, folder[0], options)
    for _ in range(2):
        t.optimizer.step(t.loss)
        twin.optimizer.step(twin.loss)
    assert_same_state(t.optimizer.state_dict(), twin.optimizer.state_dict())
    return t.theta, twin.theta, folder[0]


def load_checkpoint(t: Training, folder: str, options: StateDictOptions) -> None:
    loaded: dict[str, Any] = {
        "optimizer": get_optimizer_state_dict(t.run, t.optimizer, options=options),
        "model": t.model.state_dict(),
    }
    dcp.load(loaded, checkpoint_id=folder)
    t.model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(t.run, t.optimizer, loaded["optimizer"], options=options)


SCENARIOS: dict[str, Callable[[int], Any]] = {
    **{f"error {name}": partial(raise_on_one_rank, name=name) for name in ERRORS},
    **{f"differ {name}": partial(differ, name=name, ddp=True) for name in DISAGREEMENTS},
    **{
        f"differ without ddp {name}": partial(differ, name=name, ddp=False)
        for name in ("value", "lr", "all frozen")
    },
    **{f"checkpoint {flat}": partial(checkpoint, flat=flat) for flat in (False, True)},
    "first step": differ_at_first_step,
    "collectives": count_collectives,
}


def scenario(name: str, rank: int) -> Any:
    return SCENARIOS[name](rank)


@pytest.fixture
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What each rank returned in a scenario; one pair of processes runs them all."""
    run = partial(on_two_ranks, partial(try_each, scenario=scenario, names=list(SCENARIOS)))
    results = results_of("ranks that differ", run, tmp_path_factory)

    return lambda name: outcomes_of(name, results)


@pytest.mark.slow
@pytest.mark.parametrize("name", ERRORS)
def test_whatever_one_rank_raises_reaches_all(ranks: Any, name: str) -> None:
    (said, is_back, theta), (own, own_is_back, own_theta) = ranks(f"error {name}")
    assert (
        said
        == "RuntimeError: rank 1 raised an exception in this step, so this rank did not move either"
    )
    assert own.startswith(ERRORS[name][2].__name__)
    assert "no such batch" in own
    assert is_back
    assert own_is_back
    assert torch.equal(theta, own_theta)  # training goes on


@pytest.mark.slow
@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_are_told_in_what(ranks: Any, name: str) -> None:
    check_disagreement(ranks(f"differ {name}"), DISAGREEMENTS[name][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["value", "lr", "all frozen"])
def test_ranks_that_disagree_are_told_so_without_ddp(ranks: Any, name: str) -> None:
    check_disagreement(ranks(f"differ without ddp {name}"), DISAGREEMENTS[name][1])


def check_disagreement(results: Any, words: str) -> None:
    (said, is_back, theta), (own, own_is_back, own_theta) = results
    assert words in said
    assert own == said or "rank 1 raised" in said
    assert is_back
    assert own_is_back
    assert torch.equal(theta, own_theta)  # once they agree again, training goes on


@pytest.mark.slow
def test_ranks_that_disagree_at_the_first_step(ranks: Any) -> None:
    said, other = ranks("first step")
    assert said == other
    words = {
        "seed": "parameters differ",
        "damping": "damping differs",
        "lr": "settings differ",
        "generators": "generators",
        "generators of means": "nothing was raised",
        "loaded": "state differs",
        "shapes": "different parameters",
    }
    assert said.keys() == words.keys()
    for name, some in words.items():
        assert some in said[name]


@pytest.mark.slow
def test_what_is_compared_travels_with_what_is_exchanged_anyway(ranks: Any) -> None:
    """Ten exchanges a step, two for each trial point, and one for each product and the gradient."""
    found, other = ranks("collectives")
    assert found == other
    for total, vectors, trials in found[1:]:
        assert total - vectors - 2 * trials <= 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_of_two_ranks(ranks: Any, flat: bool) -> None:
    """Resumed by both, bit for bit; and by one process, which has another part of the data."""
    results = ranks(f"checkpoint {flat}")
    folder = results[0][2]
    try:
        for theta, resumed, _ in results:
            assert torch.equal(theta, results[0][0])
            assert torch.equal(resumed, theta)
        t = Training(0, alone=True)
        load_checkpoint(t, folder, StateDictOptions(flatten_optimizer_state_dict=flat))
        state = t.optimizer.state[t.optimizer.param_groups[0]["params"][0]]
        assert state["solution"].any()
        assert state["slope"] < 0
        assert state["draws"] == 1
        t.optimizer.step(t.loss)
        assert t.optimizer.last_step is not None
        assert t.optimizer.last_step.accepted
    finally:
        shutil.rmtree(folder, ignore_errors=True)
