"""The optimizer's state and vectors in parts, under DistributedDataParallel: the steps and decisions of whole ones."""

import io
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from helpers.problems import assert_near
from helpers.ranks import mark_slow, on_ranks, scenarios_on_two_ranks
from helpers.sharded import (
    CLASSES,
    SOLVED,
    data_of,
    join,
    make_mlp,
    make_tied,
    train,
    with_backward,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ngd_optim import KFAC, NaturalCG, Nystrom
from ngd_optim.distributed.parts import GATHER, SCATTER


class WithNumbers(nn.Module):
    """A model with parameters that have no rows, and with one that is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_mlp()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.turn = nn.Parameter(torch.tensor(1 + 0.5j, dtype=torch.complex128))
        self.weights = nn.Parameter(torch.full((3, CLASSES), 0.3 - 0.4j, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        waves = (self.turn * self.weights).sum(0)
        return self.scale * self.model(x) + (self.model(x).detach() * waves).real + waves.imag


SAME_STEPS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "tied": {"make": make_tied},
    "numbers": {"make": WithNumbers, "preconditioner": "auto"},
    "kfac": {"preconditioner": "kfac"},
    "nystrom": {"preconditioner": Nystrom(rank=4)},
    "momentum": {"momentum": 0.5, "weight_decay": 0.01, "lr": 0.7},
    "group": {"ddp": False},
}
"""Options of the model and of the optimizer."""


def same_steps(
    rank: int, make: Callable[[], nn.Module] = make_mlp, ddp: bool = True, **options: Any
) -> Any:
    x, y = data_of(make)
    options |= {} if ddp else {"process_group": dist.group.WORLD}
    model = DistributedDataParallel(make()) if ddp else make()
    whole = train(model, x[rank::2], y[rank::2], **options)
    model = DistributedDataParallel(make()) if ddp else make()
    return whole, train(model, x[rank::2], y[rank::2], shard_state=True, **options)


def training_of(rank: int, **options: Any) -> tuple[nn.Module, NaturalCG, Callable[[], Tensor]]:
    """A model, its optimizer and a closure on this rank's data."""
    x, y = data_of(make_mlp)
    size = dist.get_world_size()
    model = DistributedDataParallel(make_mlp())
    optimizer = NaturalCG(model.parameters(), **{**SOLVED, "shard_state": True, **options})
    return model, optimizer, with_backward(model, optimizer, x[rank::size], y[rank::size])


def between_steps(rank: int) -> dict[str, Any]:
    model, optimizer, closure = training_of(rank)
    optimizer.step(closure)
    found = {}
    for name in ("solution", "left", "right", "diagonal"):
        entries = [entry[name] for entry in optimizer.state.values() if name in entry]
        found[name] = {type(t) for t in entries}
        found[f"{name} of all"] = (
            sum(t.to_local().numel() for t in entries),
            sum(t.numel() for t in entries),
        )
    found["gradients"] = all(type(p.grad) is Tensor for p in model.parameters())
    return found


def error_on_one_rank(rank: int) -> tuple[str, bool, str]:
    model, optimizer, inner = training_of(rank)
    runs = 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        if rank == 1 and runs == 2:
            raise KeyError("no such batch")
        return inner()

    optimizer.step(closure)
    before, message = join(list(model.parameters())), "nothing was raised"
    try:
        optimizer.step(closure)
    except Exception as error:
        message = repr(error)
    unmoved = torch.equal(before, join(list(model.parameters())))
    optimizer.step(closure)
    assert optimizer.last_step is not None
    return message, unmoved, optimizer.last_step.reason


def hook_on_one_rank(rank: int) -> list[Tensor]:
    """Whole gradients; the other rank takes part in gathering them."""
    model, optimizer, closure = training_of(rank)
    seen: list[Tensor] = []
    if rank == 1:
        optimizer.register_gradient_hook(
            lambda _: seen.append(join([p.grad for p in model.parameters()]))  # pyright: ignore
        )
    optimizer.step(closure)
    return [*seen, join([p.grad for p in model.parameters()])]  # pyright: ignore


# KFAC


class Tokens(nn.Module):
    """With a table, a convolution, and a parameter in no layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 4)
        self.convolution = nn.Conv1d(4, 6, 2, groups=groups)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.convolution(self.table(x).mT).mT.tanh()).mean(1))


def make_tokens(groups: int = 1) -> nn.Module:
    return Tokens(groups).double()


STREAMS: dict[str, dict[str, Any]] = {
    "closure": {},
    "watch": {"watch": True},
    "group": {"ddp": False, "weight_decay": 1e-3},
    "tied": {"make": make_tied},
    "groups": {"make": partial(make_tokens, groups=2), "steps": 5},
    "new factors": {"renew_every": 1, "steps": 5},
}
"""How eight steps are taken, all but two of which renew the factors."""


def same_stream(rank: int, **options: Any) -> Any:
    whole = stream(rank, shard_state=False, **options)
    return whole[:2], stream(rank, shard_state=True, **options)[:2]


def stream(
    rank: int,
    make: Callable[[], nn.Module] = make_tokens,
    ddp: bool = True,
    watch: bool = False,
    steps: int = 8,
    **options: Any,
) -> tuple[Tensor, list[Any], KFAC]:
    x, y = data_of(make_tied)
    options |= {} if ddp else {"process_group": dist.group.WORLD}
    model = DistributedDataParallel(make()) if ddp else make()
    optimizer = KFAC(model.parameters(), **options)
    reports = []
    for _ in range(steps):
        stream_step(model, optimizer, x[rank::2], y[rank::2], watch)
        reports.append(optimizer.last_step)
    return join(list(model.parameters())), reports, optimizer


def stream_step(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor, watch: bool) -> None:
    if not watch:
        optimizer.step(with_backward(model, optimizer, x, y))
        return
    with optimizer.watch():
        loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def state_of_stream(rank: int) -> dict[str, tuple[int, int]]:
    """How many elements of each entry this rank has, and how many there are."""
    _, _, optimizer = stream(rank, shard_state=True, steps=2)
    found: dict[str, tuple[int, int]] = {}
    for entry in optimizer.state.values():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                mine, all_of_them = found.get(name, (0, 0))
                found[name] = mine + value.to_local().numel(), all_of_them + value.numel()  # pyright: ignore
    return found


def stream_checkpoint(rank: int) -> dict[str, Any]:
    """Into a new optimizer, which has seen no loss; sharded as before, and whole."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    x, y = data_of(make_tied)
    model = DistributedDataParallel(make_tokens())
    optimizer = KFAC(model.parameters(), shard_state=True)
    for _ in range(5):
        stream_step(model, optimizer, x[rank::2], y[rank::2], False)
    dcp.save(contents(model, optimizer, False), checkpoint_id=folder[0])
    for _ in range(4):
        stream_step(model, optimizer, x[rank::2], y[rank::2], False)
    results: dict[str, Any] = {"after": join(list(model.parameters()))}
    for name, shards in (("parts", True), ("whole", False)):
        model = DistributedDataParallel(make_tokens())
        optimizer = KFAC(model.parameters(), shard_state=shards)
        found = contents(model, optimizer, False)
        dcp.load(found, checkpoint_id=folder[0])
        set_model_state_dict(model, found["model"])
        set_optimizer_state_dict(model, optimizer, found["optimizer"])
        optimizer.param_groups[0]["shard_state"] = shards
        for _ in range(4):
            stream_step(model, optimizer, x[rank::2], y[rank::2], False)
        results[name] = join(list(model.parameters()))
    return results


def exchanges(rank: int, kind: str) -> tuple[Counter, Any]:
    """How often a step without new factors has the ranks exchange what, and its report."""
    model = DistributedDataParallel(make_mlp())
    x, y = data_of(make_mlp)
    options: dict[str, Any] = {"shard_state": True}
    if kind == "NaturalCG":
        optimizer: Any = NaturalCG(model.parameters(), preconditioner="kfac", **SOLVED, **options)
    else:
        optimizer = KFAC(model.parameters(), **options)
    closure = with_backward(model, optimizer, x[rank::2], y[rank::2])
    steps = 5 if kind == "KFAC" else 1  # factors are not due at the next one
    for _ in range(steps):
        optimizer.step(closure)
    if kind == "NaturalCG":
        optimizer.state[next(iter(model.parameters()))]["products"] = 0
    counted: Counter = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "broadcast", "all_to_all_single", GATHER, SCATTER):
            function = getattr(dist, name)

            def count(tensor: Tensor, *args: Any, name=name, function=function, **kwargs: Any):
                counted[name] += 1
                return function(tensor, *args, **kwargs)

            patch.setattr(dist, name, count)
        optimizer.step(closure)
    return counted, optimizer.last_step


# What is refused, on each rank in one sentence.


def no_module(rank: int) -> None:
    model = make_mlp()
    x, y = data_of(make_mlp)
    optimizer = NaturalCG(model.parameters(), shard_state=True)
    optimizer.step(with_backward(model, optimizer, x, y))


def file_of_rank_0(rank: int) -> None:
    _, optimizer, closure = training_of(rank)
    optimizer.step(closure)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    files = [buffer.getvalue()]
    dist.broadcast_object_list(files)
    optimizer.load_state_dict(torch.load(io.BytesIO(files[0]), weights_only=False))


REFUSED = {
    no_module: ("give process_group=",) * 2,
    file_of_rank_0: ("nothing was raised", "save and load by torch.distributed.checkpoint"),
}


def sentence_of(rank: int, attempt: Callable[[int], Any]) -> str:
    try:
        attempt(rank)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# Checkpoints.

FLAT = {flat: StateDictOptions(flatten_optimizer_state_dict=flat) for flat in (False, True)}


def contents(model: nn.Module, optimizer: NaturalCG | KFAC, flat: bool) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=FLAT[flat]),
    }


def load_and_go_on(rank: int, folder: Path, flat: bool, **options: Any) -> Tensor:
    """The parameters after two more steps, by as many ranks as there are."""
    model, optimizer, closure = training_of(rank, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    found = contents(model, optimizer, flat)
    dcp.load(found, checkpoint_id=folder / f"flat {flat}")
    set_model_state_dict(model, found["model"])
    set_optimizer_state_dict(model, optimizer, found["optimizer"], options=FLAT[flat])
    # It has been saved as well.
    optimizer.param_groups[0]["shard_state"] = options.get("shard_state", True)
    for _ in range(2):
        optimizer.step(closure)
    return join(list(model.parameters()))


def checkpoints(rank: int) -> dict[str, Any]:
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    model, optimizer, closure = training_of(rank)
    for _ in range(2):
        optimizer.step(closure)
    for flat in FLAT:
        dcp.save(contents(model, optimizer, flat), checkpoint_id=f"{folder[0]}/flat {flat}")
    for _ in range(2):
        optimizer.step(closure)
    after = join(list(model.parameters()))
    resumed = {flat: load_and_go_on(rank, Path(folder[0]), flat) for flat in FLAT}
    whole = load_and_go_on(rank, Path(folder[0]), False, shard_state=False)
    return {"folder": folder[0], "after": after, "resumed": resumed, "whole": whole}


SCENARIOS: dict[str, Callable[[int], Any]] = {
    **{f"same {name}": partial(same_steps, **options) for name, options in SAME_STEPS.items()},
    **{f"stream {name}": partial(same_stream, **options) for name, options in STREAMS.items()},
    **{f.__name__: partial(sentence_of, attempt=f) for f in REFUSED},
    **{
        f.__name__: f
        for f in (
            between_steps,
            error_on_one_rank,
            hook_on_one_rank,
            checkpoints,
            state_of_stream,
            stream_checkpoint,
        )
    },
    **{f"exchanges {kind}": partial(exchanges, kind=kind) for kind in ("NaturalCG", "KFAC")},
}


QUICK = ("same mlp", "same kfac", "stream closure", "between_steps", "error_on_one_rank")
QUICK += ("hook_on_one_rank", "state_of_stream", "exchanges NaturalCG", "exchanges KFAC")
QUICK += tuple(f.__name__ for f in REFUSED)
"""Slow tests look at the others, in processes of their own."""


def scenario(name: str, rank: int) -> Any:
    return SCENARIOS[name](rank)


@pytest.fixture
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Any]]:
    """What each rank returned in a scenario."""
    return scenarios_on_two_ranks(
        "sharded state", scenario, SCENARIOS, QUICK, request, tmp_path_factory
    )


@pytest.mark.parametrize("name", mark_slow(SAME_STEPS, QUICK, "same "))
def test_the_steps_are_those_of_whole_vectors(ranks: Any, name: str):
    (whole, found), (_, other) = ranks(f"same {name}")
    assert_near(found[0], whole[0], rtol=1e-10)
    assert_near(found[1], whole[1], rtol=1e-8)
    assert torch.equal(found[0], other[0])
    assert torch.equal(found[1], other[1])
    for mine, theirs, expected in zip(found[2], other[2], whole[2], strict=True):
        assert repr(mine) == repr(theirs)  # NaN is NaN
        assert mine.reason == expected.reason
        assert mine.preconditioner == expected.preconditioner
        assert mine.backtracks == expected.backtracks
        assert mine.damping == pytest.approx(expected.damping, rel=1e-10)
        assert mine.new_loss == pytest.approx(expected.new_loss, rel=1e-10)


def test_between_steps_each_rank_has_its_part_of_the_state(ranks: Any):
    for found in ranks("between_steps"):
        assert found["gradients"]
        for name in ("solution", "left", "right", "diagonal"):
            assert found[name] == {DTensor}
            mine, all_of_them = found[f"{name} of all"]
            assert mine < 0.7 * all_of_them


@pytest.mark.parametrize("name", mark_slow(STREAMS, QUICK, "stream "))
def test_kfac_takes_the_steps_of_whole_vectors(ranks: Any, name: str):
    (whole, found), (_, other) = ranks(f"stream {name}")
    assert_near(found[0], whole[0], rtol=1e-10)
    assert torch.equal(found[0], other[0])
    for mine, theirs, expected in zip(found[1], other[1], whole[1], strict=True):
        assert mine.accepted
        assert mine.renewed == expected.renewed
        assert mine.radius == theirs.radius == pytest.approx(expected.radius, rel=1e-9)
        assert mine.step_norm == theirs.step_norm == pytest.approx(expected.step_norm, rel=1e-9)


def test_of_kfac_each_rank_has_its_part_of_the_state(ranks: Any):
    for found in ranks("state_of_stream"):
        assert found.keys() >= {"momentum", "last_step", "left", "right", "diagonal", "table"}
        assert all(mine < 0.65 * all_of_them for mine, all_of_them in found.values())


@pytest.mark.slow
def test_kfac_goes_on_from_a_checkpoint_that_a_new_one_loads(ranks: Any):
    for found in ranks("stream_checkpoint"):
        assert torch.equal(found["parts"], found["after"])
        assert_near(found["whole"], found["after"], rtol=1e-10)


def test_a_preconditioned_product_takes_four_exchanges_of_a_part(ranks: Any):
    for counted, report in ranks("exchanges NaturalCG"):
        assert counted["broadcast"] == 0
        # To the owners and back; before that the factors, and what the system adds to the curvature.
        assert counted["all_to_all_single"] == 2 * report.cg_iters + 2
        assert counted[SCATTER] == report.n_product + 1  # and the gradient
        trials = report.n_forward - 1
        # Where the way of the products is chosen, and what is left in .grad.
        assert counted[GATHER] == report.n_product + trials + 2


def test_a_step_of_kfac_takes_three_exchanges_and_five_numbers(ranks: Any):
    for counted, report in ranks("exchanges KFAC"):
        assert not report.renewed
        assert counted == {"all_to_all_single": 2, GATHER: 1, "all_reduce": 5}


def test_an_error_on_one_rank_stops_all(ranks: Any):
    (message, unmoved, reason), (message_there, unmoved_there, _) = ranks("error_on_one_rank")
    assert "rank 1 raised an exception" in message
    assert "no such batch" in message_there
    assert unmoved
    assert unmoved_there
    assert reason == "accepted"


def test_a_hook_on_one_rank_sees_the_whole_gradient(ranks: Any):
    (left,), (seen, there) = ranks("hook_on_one_rank")
    assert torch.equal(left, there)
    assert torch.equal(seen, there)


@pytest.mark.parametrize("attempt", REFUSED, ids=lambda f: f.__name__)
def test_what_cannot_work_is_told_in_one_sentence(ranks: Any, attempt: Any):
    for said, expected in zip(ranks(attempt.__name__), REFUSED[attempt], strict=True):
        assert expected in said


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True])
def test_a_run_goes_on_from_a_checkpoint(ranks: Any, flat: bool):
    for found in ranks("checkpoints"):
        assert torch.equal(found["resumed"][flat], found["after"])


@pytest.mark.slow
def test_a_checkpoint_of_parts_is_loaded_whole(ranks: Any):
    for found in ranks("checkpoints"):
        assert_near(found["whole"], found["after"], rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_a_checkpoint_of_two_ranks_is_loaded_by_others(ranks: Any, size: int, tmp_path: Path):
    found = ranks("checkpoints")[0]
    load = partial(load_and_go_on, folder=Path(found["folder"]), flat=False)
    on_ranks(size, load, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert_near(results[0], found["after"], rtol=1e-10)
