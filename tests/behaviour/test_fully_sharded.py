"""Models that ``fully_shard`` (FSDP2) has spread over two processes: the steps of one process with all data."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
from helpers.scripts import EXAMPLES, run_python
from helpers.sharded import (
    SOLVED,
    data_of,
    join,
    make_complex,
    make_mlp,
    make_tied,
    shard,
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

import ngd_optim.start
from ngd_optim import KFAC, NaturalCG, Nystrom, StepReport, linearize
from ngd_optim.distributed.parts import GATHER, SCATTER, Division


def clears_the_module(
    model: nn.Module, optimizer: Any, x: Tensor, y: Tensor
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


SAME_STEPS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "tied": {"make": make_tied},
    "complex": {"make": make_complex},
    "complex in parts": {"make": make_complex, "parts": True},
    "kept after forward": {"shard": {"reshard_after_forward": False}},
    "cleared by the module": {"closure": clears_the_module},
    "kfac": {"preconditioner": "kfac"},
    "dense": {"solver": "dense"},
    "nystrom": {"preconditioner": Nystrom(rank=4)},
    "momentum": {"momentum": 0.5, "preconditioner": "diagonal", "weight_decay": 0.01},
    "replicas": {"mesh": (2, 1)},
    "tied in parts": {"make": make_tied, "parts": True},
    "kfac in parts": {"preconditioner": "kfac", "parts": True},
    "nystrom in parts": {"preconditioner": Nystrom(rank=4), "parts": True},
    "momentum in parts": {"momentum": 0.5, "weight_decay": 0.01, "lr": 0.7, "parts": True},
    "replicas in parts": {"mesh": (2, 1), "parts": True},
}
"""Options of the model, of ``fully_shard`` and of the optimizer."""


def same_steps(
    rank: int,
    make: Callable[[], nn.Module] = make_mlp,
    shard: Any = None,
    mesh: Any = None,
    parts: bool = False,
    **options: Any,
) -> Any:
    x, y = data_of(make)
    mesh = None if mesh is None else init_device_mesh("cpu", mesh, mesh_dim_names=("copy", "part"))
    model = spread(make(), mesh, **(shard or {}))
    one = train(make(), x, y, **options)
    with in_parts() if parts else nullcontext():
        return one, train(model, x[rank::2], y[rank::2], **options)


@contextmanager
def in_parts() -> Iterator[None]:
    """As if the parameters were many, so that each rank has a part of each of the step's vectors."""
    before, ngd_optim.start.MANY = ngd_optim.start.MANY, 0
    try:
        yield
    finally:
        ngd_optim.start.MANY = before


spread = shard


def parts_of(rank: int) -> tuple[nn.Module, NaturalCG, Callable[[], Tensor]]:
    """A model, its optimizer and a closure on this rank's data."""
    x, y = data_of(make_mlp)
    size = dist.get_world_size()
    model = shard(make_mlp())
    optimizer = NaturalCG(model.parameters(), **SOLVED)
    return model, optimizer, with_backward(model, optimizer, x[rank::size], y[rank::size])


def between_steps(rank: int) -> dict[str, Any]:
    """What there is between two steps: parts, and a model that can be evaluated and trained otherwise."""
    model, optimizer, closure = parts_of(rank)
    optimizer.step(closure)
    kinds = {
        name: {type(entry[name]) for entry in optimizer.state.values() if name in entry}
        for name in ("solution", "left")
    }
    parameters = all(
        isinstance(p, DTensor) and isinstance(p.grad, DTensor) for p in model.parameters()
    )
    x, y = data_of(make_mlp)
    whole = make_mlp()
    values = [p.detach().full_tensor() for p in model.parameters()]
    with torch.no_grad():
        for p, value in zip(whole.parameters(), values, strict=True):
            p.copy_(value)
        same_output = torch.allclose(model(x), whole(x), rtol=0, atol=1e-14)
    optimizer.zero_grad()
    F.cross_entropy(model(x[rank::2]), y[rank::2]).backward()  # FSDP2 averages by itself again
    F.cross_entropy(whole(x), y).backward()
    same_gradient = torch.allclose(
        join([p.grad for p in model.parameters()]), join([p.grad for p in whole.parameters()])
    )
    return {
        "kinds": kinds,
        "parameters": parameters,
        "output": same_output,
        "gradient": same_gradient,
    }


def in_bfloat16(rank: int) -> tuple[list[float], set[torch.dtype], Tensor]:
    x, y = data_of(make_mlp)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = shard(make_mlp().float(), mp_policy=policy)
    optimizer = NaturalCG(model.parameters())
    losses = []
    for _ in range(6):
        losses.append(
            optimizer.step(lambda: F.cross_entropy(model(x.float()[rank::2]), y[rank::2])).item()
        )
    dtypes = {p.dtype for p in model.parameters()}
    dtypes |= {optimizer.state[p]["solution"].dtype for p in model.parameters()}
    return losses, dtypes, join(list(model.parameters()))


def stream_in_bfloat16(rank: int) -> tuple[list[float], set[torch.dtype], Tensor]:
    x, y = data_of(make_mlp)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = shard(make_stream_model().float(), mp_policy=policy)
    optimizer = KFAC(model.parameters(), radius=3e-3)
    losses = []
    for _ in range(12):
        with optimizer.watch():
            loss = F.mse_loss(model(x.float()[rank::2]).float(), y.float()[rank::2, None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    dtypes = {p.dtype for p in model.parameters()}
    dtypes |= {optimizer.state[p]["momentum"].dtype for p in model.parameters()}
    return losses, dtypes, join(list(model.parameters()))


def error_on_one_rank(rank: int, fails_at: int) -> tuple[str, bool, str]:
    model, optimizer, inner = parts_of(rank)
    runs = 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        if rank == 1 and runs == fails_at:
            raise KeyError("no such batch")
        return inner()

    message, before = "nothing was raised", join(list(model.parameters()))
    while runs < fails_at and message == "nothing was raised":
        before = join(list(model.parameters()))
        try:
            optimizer.step(closure)
        except Exception as error:
            message = repr(error)
    unmoved = torch.equal(before, join(list(model.parameters())))
    optimizer.step(closure)
    assert optimizer.last_step is not None
    return message, unmoved, optimizer.last_step.reason


def error_in_parts(rank: int) -> tuple[str, bool, str]:
    with in_parts():
        return error_on_one_rank(rank, fails_at=3)


def arithmetic_of_parts(rank: int) -> dict[str, float]:
    """What parts say of vectors, beside the vectors themselves."""
    params = list(shard(make_mlp()).parameters())
    division = Division(params, dist.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    n = sum(p.numel() for p in params)
    a, b = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    part, other = division.part(a), division.part(b)
    broken = division.part(a / (a != a[-1]))  # on one rank alone
    shards = division.to_rows(part)
    pairs = {
        "whole": (division.whole(part), a),
        "dot": (torch.dot(part, other), torch.dot(a, b)),
        "norm": (part.norm(), a.norm()),
        "max": (part.max(), a.max()),
        "sum": (division.whole((2 * part).add_(other, alpha=0.5) - other / 3), 2 * a + b / 6),
        "where": (division.whole(torch.where(part > 0, part, 0.0)), a.clamp(min=0)),
        "finite": (broken.isfinite().all().double(), torch.tensor(0.0)),
        "any": ((part > a.max() - 1e-9).any().double(), torch.tensor(1.0)),
        "mean": (division.whole(division.mean(a * (rank + 1))), 1.5 * a),
        "shards": (join(shards), a),
        "from shards": (division.whole(division.from_tensors(shards, a)), a),
    }
    errors = {
        name: (x - y).abs().max().item() / y.abs().max().clamp(min=1).item()
        for name, (x, y) in pairs.items()
    }
    for name, refused in REFUSED_OF_PARTS.items():
        try:
            refused(part)
        except TypeError:
            errors[name] = 0.0
        else:
            errors[name] = 1.0
    return errors


REFUSED_OF_PARTS: dict[str, Callable[[Any], Any]] = {
    "item": lambda v: v[0],
    "flip": lambda v: v.flip(0),
    "cumsum": lambda v: v.cumsum(0),
    "p-norm": lambda v: v.norm(1),
    "list": lambda v: v.tolist(),
    "cat": lambda v: torch.cat([v, v]),
}
"""Questions that a part cannot answer."""


def exchanges(rank: int, parts: bool) -> tuple[Counter, StepReport, int]:
    """How often the third step of a run has the ranks exchange how many bytes, and how many a vector has."""
    model, _, _ = parts_of(rank)
    optimizer = NaturalCG(model.parameters(), **SOLVED, preconditioner=None)
    x, y = data_of(make_mlp)
    closure = with_backward(model, optimizer, x[rank::2], y[rank::2])
    counted: Counter = Counter()
    names = ("all_reduce", GATHER, SCATTER)
    with in_parts() if parts else nullcontext(), pytest.MonkeyPatch.context() as patch:
        for _ in range(2):
            optimizer.step(closure)
        for name in names:
            function = getattr(dist, name)

            def count(tensor: Tensor, *args: Any, name=name, function=function, **kwargs: Any):
                counted[name, tensor.nbytes] += 1
                return function(tensor, *args, **kwargs)

            patch.setattr(dist, name, count)
        optimizer.step(closure)
    assert optimizer.last_step is not None
    return counted, optimizer.last_step, sum(8 * p.numel() for p in model.parameters())


def sentence_of(rank: int, attempt: Callable[[int], Any]) -> str:
    try:
        attempt(rank)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def no_closure_on_one_rank(rank: int) -> None:
    _, optimizer, closure = parts_of(rank)
    optimizer.step(closure if rank else 3)  # pyright: ignore[reportArgumentType]


def offloaded(rank: int) -> None:
    model = shard(make_mlp(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    NaturalCG(model.parameters()).step(lambda: model(torch.ones(2, 4)).sum())


def on_two_meshes(rank: int) -> None:
    groups = [dist.new_group([r]) for r in range(2)]
    alone = DeviceMesh.from_group(groups[rank], "cpu")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model[1], mesh=alone)
    NaturalCG(model.parameters()).step(lambda: model(torch.ones(2, 4)).sum())


def another_model(rank: int) -> None:
    model, other = shard(make_mlp()), shard(make_mlp())
    optimizer = NaturalCG(model.parameters())
    x, y = data_of(make_mlp)
    optimizer.step(lambda: F.cross_entropy(other(x), y))


def another_group(rank: int) -> None:
    group = dist.new_group([0, 1])
    model, _, _ = parts_of(rank)
    optimizer = NaturalCG(model.parameters(), process_group=group)
    x, y = data_of(make_mlp)
    optimizer.step(lambda: F.cross_entropy(model(x), y))


def clipping_hook(rank: int) -> None:
    model, optimizer, closure = parts_of(rank)
    optimizer.register_gradient_hook(
        lambda _: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) if rank == 0 else None
    )
    optimizer.step(closure)


def linearized(rank: int) -> None:
    model, _, closure = parts_of(rank)
    linearize(closure, model.parameters())


class Older(FullyShardedDataParallel):
    """It wants an accelerator, so it is made without its constructor."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.inner = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    __getattr__ = nn.Module.__getattr__


def older_engine(rank: int) -> None:
    model = Older()
    optimizer = NaturalCG(model.inner.parameters(), process_group=dist.group.WORLD)
    optimizer.step(lambda: model(torch.ones(3, 2)).square().mean())


REFUSED = {
    older_engine: ("use torch.distributed.fsdp.fully_shard",) * 2,
    no_closure_on_one_rank: ("needs a closure", "rank 0 raised an exception"),
    offloaded: ("call fully_shard without CPUOffloadPolicy",) * 2,
    on_two_meshes: ("call fully_shard with the same mesh",) * 2,
    another_model: ("depends on none of the optimizer's parameters",) * 2,
    another_group: ("leave it out, and it is found",) * 2,
    clipping_hook: ("set max_kl", "rank 0 raised an exception"),
    linearized: ("on parameters that are whole",) * 2,
}


# Checkpoints: what each of some processes saves, and others load.

OPTIONS = {flat: StateDictOptions(flatten_optimizer_state_dict=flat) for flat in (False, True)}


def contents(model: nn.Module, optimizer: torch.optim.Optimizer, flat: bool) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=OPTIONS[flat]),
    }


def save_and_go_on(rank: int, folder: Path) -> Tensor:
    """Save after three steps; where the fourth leads to."""
    model, optimizer, closure = parts_of(rank)
    for _ in range(3):
        optimizer.step(closure)
    for flat in (False, True):
        dcp.save(contents(model, optimizer, flat), checkpoint_id=folder / f"flat {flat}")
    optimizer.step(closure)
    return join(list(model.parameters()))


def load_and_go_on(rank: int, folder: Path, flat: bool) -> Tensor:
    """Where the fourth step leads to, with as many parts of the data as there are ranks."""
    model, optimizer, closure = parts_of(rank)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    found = contents(model, optimizer, flat)
    dcp.load(found, checkpoint_id=folder / f"flat {flat}")
    set_model_state_dict(model, found["model"])
    set_optimizer_state_dict(model, optimizer, found["optimizer"], options=OPTIONS[flat])
    optimizer.step(closure)
    return join(list(model.parameters()))


def checkpoints(rank: int) -> dict[str, Tensor]:
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    after = save_and_go_on(rank, Path(folder[0]))
    resumed = {flat: load_and_go_on(rank, Path(folder[0]), flat) for flat in (False, True)}
    return {"folder": folder[0], "after": after, "resumed": resumed}


# KFAC: one output, so that signs of draws do not matter, and layers that are wide enough for all rows to count.


def make_stream_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 1)).double()


def take_step(how: str, optimizer: KFAC, model: nn.Module, x: Tensor, y: Tensor) -> None:
    def loss_of() -> Tensor:
        return F.mse_loss(model(x), y.double()[:, None])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    if how == "watch":
        optimizer.zero_grad()
        with optimizer.watch():
            loss = loss_of()
        loss.backward()
        optimizer.step()
    else:
        optimizer.step({"backward": closure, "loss": loss_of, "list": [loss_of, loss_of]}[how])


def stream(rank: int) -> dict[str, Any]:
    """Where twelve steps lead to, two renewals of the factors among them."""
    x, y = data_of(make_mlp)
    model = make_stream_model()
    optimizer = KFAC(model.parameters())
    for _ in range(12):
        take_step("backward", optimizer, model, x, y)
    results: dict[str, Any] = {"one": join(list(model.parameters()))}
    for how in STREAM:
        model = shard(make_stream_model(), reshard_after_forward=how != "list")
        optimizer = KFAC(model.parameters())
        for step in range(12):
            if how == "loss" and step == 9:
                model, optimizer = resumed_stream(model, optimizer, x[rank::2], y[rank::2])
            take_step(how, optimizer, model, x[rank::2], y[rank::2])
        results[how] = join(list(model.parameters()))
    return results


STREAM = ("backward", "loss", "list", "watch")


def resumed_stream(
    model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor
) -> tuple[nn.Module, KFAC]:
    """Another model and optimizer that go on from a checkpoint."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    dcp.save(contents(model, optimizer, False), checkpoint_id=folder[0])
    other = shard(make_stream_model())
    new = KFAC(other.parameters())
    found = contents(other, new, False)
    dcp.load(found, checkpoint_id=folder[0])
    set_model_state_dict(other, found["model"])
    set_optimizer_state_dict(other, new, found["optimizer"])
    return other, new


SCENARIOS: dict[str, Callable[[int], Any]] = {
    **{f"same {name}": partial(same_steps, **options) for name, options in SAME_STEPS.items()},
    **{f"error {n}": partial(error_on_one_rank, fails_at=n) for n in (1, 3)},
    **{f"exchanges {parts}": partial(exchanges, parts=parts) for parts in (False, True)},
    **{f.__name__: partial(sentence_of, attempt=f) for f in REFUSED},
    **{
        f.__name__: f
        for f in (
            stream,
            stream_in_bfloat16,
            between_steps,
            in_bfloat16,
            checkpoints,
            error_in_parts,
            arithmetic_of_parts,
        )
    },
}


QUICK = ("same mlp", "same tied", "same tied in parts", "error 1", "error_in_parts")
QUICK += (
    "between_steps",
    "checkpoints",
    "arithmetic_of_parts",
    "exchanges False",
    "exchanges True",
)
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
        "fully sharded", scenario, SCENARIOS, QUICK, request, tmp_path_factory
    )


@pytest.mark.parametrize("name", mark_slow(SAME_STEPS, QUICK, "same "))
def test_the_steps_are_those_of_one_process_with_all_data(ranks: Any, name: str):
    (one, found), (_, other) = ranks(f"same {name}")
    assert_near(found[0], one[0], rtol=1e-10)
    assert_near(found[1], one[1], rtol=1e-8)
    assert torch.equal(found[0], other[0])
    for mine, theirs, alone in zip(found[2], other[2], one[2], strict=True):
        assert repr(mine) == repr(theirs)  # NaN is NaN
        assert mine.reason == alone.reason
        assert mine.damping == pytest.approx(alone.damping, rel=1e-10)
        assert mine.backtracks == alone.backtracks
        assert mine.loss == pytest.approx(alone.loss, rel=1e-10)
        assert mine.new_loss == pytest.approx(alone.new_loss, rel=1e-10)


def test_parts_say_of_vectors_what_these_say_or_refuse(ranks: Any):
    for errors in ranks("arithmetic_of_parts"):
        assert {name: error for name, error in errors.items() if not error < 1e-14} == {}


@pytest.mark.slow
@pytest.mark.parametrize("how", STREAM)
def test_kfac_takes_the_steps_of_one_process(ranks: Any, how: str):
    found, other = ranks("stream")
    assert_near(found[how], found["one"], rtol=1e-10)
    assert torch.equal(found[how], other[how])


def test_a_product_takes_one_exchange_of_a_whole_vector(ranks: Any):
    for counted, report, size in ranks("exchanges False"):
        large = {name: n for (name, bytes), n in counted.items() if bytes >= size}
        assert large == {"all_reduce": report.n_product + 1}  # and the gradient


def test_a_product_takes_two_exchanges_of_half_of_that_in_parts(ranks: Any):
    for counted, report, size in ranks("exchanges True"):
        ((_, half),) = (key for key in counted if key[0] == SCATTER)
        large = {key: n for key, n in counted.items() if key[1] in (half, 2 * half)}
        assert size / 2 <= half < 0.7 * size  # padded
        trials = report.n_forward - 1
        assert large == {
            (SCATTER, half): report.n_product + 1,
            # Once more where the way of the products is chosen.
            (GATHER, 2 * half): report.n_product + trials + 1,
        }
        small = sum(counted.values()) - sum(large.values())
        assert small <= 3 * report.n_product + 30


def test_between_steps_there_are_parts_and_a_model_as_before(ranks: Any):
    for found in ranks("between_steps"):
        assert found["kinds"] == {"solution": {DTensor}, "left": {Tensor}}
        assert found["parameters"]
        assert found["output"]
        assert found["gradient"]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["in_bfloat16", "stream_in_bfloat16"])
def test_mixed_precision_keeps_exact_parameters(ranks: Any, scenario: str):
    (losses, dtypes, theta), (_, _, other) = ranks(scenario)
    assert losses[-1] < 0.99 * losses[0]
    assert dtypes == {torch.float32}
    assert torch.equal(theta, other)
    assert not torch.equal(theta, theta.bfloat16().float())


@pytest.mark.parametrize("scenario", mark_slow(("error 1", "error 3", "error_in_parts"), QUICK))
def test_an_error_on_one_rank_stops_all(ranks: Any, scenario: str):
    (message, unmoved, reason), (message_there, unmoved_there, _) = ranks(scenario)
    assert "rank 1 raised an exception" in message
    assert "no such batch" in message_there
    assert unmoved
    assert unmoved_there
    assert reason == "accepted"


@pytest.mark.parametrize("attempt", REFUSED, ids=lambda f: f.__name__)
def test_what_cannot_work_is_told_in_one_sentence(ranks: Any, attempt: Any):
    for said, expected in zip(ranks(attempt.__name__), REFUSED[attempt], strict=True):
        assert expected in said


@pytest.mark.parametrize("flat", [False, True])
def test_a_run_goes_on_from_a_checkpoint(ranks: Any, flat: bool):
    for found in ranks("checkpoints"):
        assert torch.equal(found["resumed"][flat], found["after"])


@pytest.mark.parametrize("size", [1, 3])
def test_a_checkpoint_of_two_ranks_is_loaded_by_others(ranks: Any, size: int, tmp_path: Path):
    found = ranks("checkpoints")[0]
    load = partial(load_and_go_on, folder=Path(found["folder"]), flat=False)
    on_ranks(size, load, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert_near(results[0], found["after"], rtol=1e-10)


@pytest.mark.slow
def test_the_example_goes_on_where_it_was_killed(tmp_path: Path):
    picture = tmp_path / "picture.png"
    printed = run_python(EXAMPLES / "fsdp.py", "--steps", "3", "--output", picture)
    assert "all processes were killed" in printed
    assert "goes on after step 1" in printed
    assert "bit for bit: True" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
