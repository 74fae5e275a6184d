"""Two processes against one: the same steps, the same decisions, and no rank left waiting."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.ranks import scenarios_on_two_ranks
from helpers.scripts import EXAMPLES, run_python
from helpers.sharded import SOLVED, with_backward
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

from ngd_optim import NaturalCG, StepReport

STEPS = 3
FEATURES, HIDDEN, CLASSES = 4, 6, 3  # a full solve has one exchange an iteration, so few parameters

Result = tuple[Tensor, list[StepReport]]


def make_classifier(dtype: torch.dtype = torch.float64, *extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Linear(FEATURES, HIDDEN),
        *extra,
        nn.Tanh(),
        nn.LayerNorm(HIDDEN),
        nn.Linear(HIDDEN, CLASSES),
    ]
    return nn.Sequential(*layers).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, CLASSES, (64,), generator=generator)


def without_backward(
    model: nn.Module, optimizer: NaturalCG, x: Tensor, y: Tensor
) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(x), y)


def likelihood(
    model: nn.Module, optimizer: NaturalCG, x: Tensor, y: Tensor
) -> Callable[[], tuple[Tensor, Any]]:
    def closure() -> tuple[Tensor, Any]:
        distribution = Categorical(logits=model(x))
        return -distribution.log_prob(y).mean(), distribution

    return closure


def hessian(model: nn.Module, optimizer: NaturalCG, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: (model(x).logsumexp(-1) - model(x).gather(-1, y[:, None]).squeeze(-1)).mean()


CLOSURES = [with_backward, without_backward, likelihood, hessian]


def train(
    model: nn.Module, make_closure: Any, x: Tensor, y: Tensor, steps: int = STEPS, **options: Any
) -> Result:
    optimizer = NaturalCG(model.parameters(), **{**SOLVED, **options})
    closure = make_closure(model, optimizer, x, y)
    reports = []
    for _ in range(steps):
        optimizer.step(closure)
        assert optimizer.last_step is not None
        reports.append(optimizer.last_step)
    return parameters_to_vector(model.parameters()).detach(), reports


# What the ranks run; each returns something that the tests look at.


def joined_batch(rank: int, make_closure: Any, dtype: torch.dtype) -> Result:
    x, y = data(dtype)
    return train(
        DistributedDataParallel(make_classifier(dtype)), make_closure, x[rank::2], y[rank::2]
    )


def group_without_ddp(rank: int) -> Result:
    x, y = data()
    return train(
        make_classifier(), with_backward, x[rank::2], y[rank::2], process_group=dist.group.WORLD
    )


def uneven(rank: int) -> Result:
    x, y = data()
    part = slice(0, 10) if rank == 0 else slice(10, 64)
    return train(DistributedDataParallel(make_classifier()), with_backward, x[part], y[part])


def no_group(rank: int) -> Result:
    x, y = data()
    return train(make_classifier(), with_backward, x[rank::2], y[rank::2])


def several_closures(rank: int) -> Result:
    x, y = data()
    model = DistributedDataParallel(make_classifier())
    optimizer = NaturalCG(model.parameters(), **SOLVED)
    parts = [x[rank:32:2], x[32 + rank :: 2]], [y[rank:32:2], y[32 + rank :: 2]]
    closures = [with_backward(model, optimizer, a, b) for a, b in zip(*parts, strict=True)]
    for _ in range(STEPS):
        optimizer.step(closures, curvature_closure=closures[0])
    assert optimizer.last_step is not None
    return parameters_to_vector(model.parameters()).detach(), [optimizer.last_step]


def default_options(rank: int) -> Result:
    """Truncated solves, dropout that differs between the ranks, learning rates by group: all ranks decide alike."""
    x, y = data(torch.float32)
    model = DistributedDataParallel(make_classifier(torch.float32, nn.Dropout(0.2)))
    torch.manual_seed(rank)
    first, *rest = model.parameters()
    optimizer = NaturalCG([{"params": [first], "lr": 0.5}, {"params": rest}])
    closure = with_backward(model, optimizer, x[rank::2], y[rank::2])
    reports = []
    for _ in range(10):
        optimizer.step(closure)
        assert optimizer.last_step is not None
        reports.append(optimizer.last_step)
    return parameters_to_vector(model.parameters()).detach(), reports


def batch_norm(rank: int) -> tuple[Tensor, list[StepReport], list[Tensor]]:
    x, y = data()
    model = DistributedDataParallel(make_classifier(torch.float64, nn.BatchNorm1d(HIDDEN)))
    theta, reports = train(model, with_backward, x[rank::2], y[rank::2])
    return theta, reports, [buffer.clone() for buffer in model.buffers()]


def nan_on_one_rank(rank: int) -> tuple[Result, list[StepReport], Tensor]:
    x, y = data()
    model = DistributedDataParallel(make_classifier())
    start = parameters_to_vector(model.parameters()).detach()
    bad = x[rank::2] * (math.nan if rank == 1 else 1)
    theta, reports = train(model, with_backward, bad, y[rank::2], steps=2)
    assert torch.equal(theta, start)
    again = train(model, with_backward, x[rank::2], y[rank::2])
    return again, reports, theta


def error_on_one_rank(rank: int, fails_at: int) -> tuple[str, bool, list[StepReport]]:
    """Rank 1's closure raises in its run number ``fails_at``; afterwards training goes on."""
    x, y = data()
    model = DistributedDataParallel(make_classifier())
    optimizer = NaturalCG(model.parameters(), process_group=dist.group.WORLD)
    inner = with_backward(model, optimizer, x[rank::2], y[rank::2])
    runs = 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        loss = inner()
        if rank == 1 and runs == fails_at:
            raise KeyError("no such batch")
        return loss

    start = parameters_to_vector(model.parameters()).detach()
    message = "nothing was raised"
    try:
        while runs < fails_at:
            start = parameters_to_vector(model.parameters()).detach().clone()
            optimizer.step(closure)
    except Exception as error:
        message = repr(error)
    unmoved = torch.equal(start, parameters_to_vector(model.parameters()))
    runs = fails_at
    optimizer.step(closure)
    assert optimizer.last_step is not None
    return message, unmoved, [optimizer.last_step]


def hook_error_on_one_rank(rank: int) -> str:
    x, y = data()
    model = DistributedDataParallel(make_classifier())
    optimizer = NaturalCG(model.parameters())

    def hook(_: NaturalCG) -> None:
        if rank == 1:
            raise KeyError("no such gradient")

    optimizer.register_gradient_hook(hook)
    try:
        optimizer.step(with_backward(model, optimizer, x[rank::2], y[rank::2]))
    except Exception as error:
        return repr(error)
    return "nothing was raised"


def trial_error_on_one_rank(rank: int) -> list[StepReport]:
    """At points that are too far away rank 1 cannot compute its loss: the line search backs off on both."""
    x, y = data()
    model = DistributedDataParallel(make_classifier())
    optimizer = NaturalCG(model.parameters(), damping=0.3)
    start = parameters_to_vector(model.parameters()).detach().clone()
    inner = with_backward(model, optimizer, x[rank::2], y[rank::2])

    def closure() -> Tensor:
        if rank == 1 and (parameters_to_vector(model.parameters()) - start).norm() > 0.3:
            raise ValueError("this is too far")
        return inner()

    optimizer.step(closure)
    assert optimizer.last_step is not None
    assert (parameters_to_vector(model.parameters()) - start).norm() <= 0.3
    return [optimizer.last_step]


def unequal_start(rank: int) -> str:
    x, y = data()
    model = make_classifier()
    with torch.no_grad():
        next(model.parameters()).add_(rank)
    try:
        train(model, with_backward, x, y, process_group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


DDP_OPTIONS = {
    "find_unused_parameters": "auto",
    "gradient_as_bucket_view": "torch.func",
    "static_graph": "auto",
}


def ddp_options(rank: int, backend: str = "auto", **options: Any) -> Result | str:
    x, y = data()
    try:
        model = DistributedDataParallel(make_classifier(), **options)
        return train(model, with_backward, x[rank::2], y[rank::2], backend=backend)
    except RuntimeError as error:
        return str(error)


def preconditioned(rank: int) -> tuple[Tensor, list[StepReport], dict[str, Tensor]]:
    """Two steps by Kronecker factors, and the factors of the first."""
    x, y = data()
    model = DistributedDataParallel(make_classifier())
    optimizer = NaturalCG(model.parameters(), preconditioner="kfac", **SOLVED)
    closure = with_backward(model, optimizer, x[rank::2], y[rank::2])
    optimizer.step(closure)
    factors = {name: value.clone() for name, value in factors_in(optimizer).items()}
    optimizer.step(closure)
    assert optimizer.last_step is not None
    return parameters_to_vector(model.parameters()).detach(), [optimizer.last_step], factors


def factors_in(optimizer: NaturalCG) -> dict[str, Tensor]:
    return {
        f"{i} {name}": entry[name]
        for i, entry in enumerate(optimizer.state.values())
        for name in ("left", "right", "diagonal")
        if name in entry
    }


def other_layers_on_each_rank(rank: int) -> Result:
    """All ranks begin with the same layer, and go on each with its own, when factors are renewed."""
    x, y = data()
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)]).double()
    optimizer = NaturalCG(
        model.parameters(), max_cg_iters=3, preconditioner="kfac", process_group=dist.group.WORLD
    )
    reports = []
    for layer in (model[0], model[rank], model[rank]):
        optimizer.step(with_backward(layer, optimizer, x, y))
        optimizer.state[model[0].weight]["products"] = 10
        assert optimizer.last_step is not None
        reports.append(optimizer.last_step)
    return parameters_to_vector(model.parameters()).detach(), reports


def other_optimizer_afterwards(rank: int) -> Tensor:
    """DistributedDataParallel itself still averages gradients after steps of NaturalCG."""
    x, y = data()
    model = DistributedDataParallel(make_classifier())
    train(model, with_backward, x[rank::2], y[rank::2])
    model.zero_grad()
    F.cross_entropy(model(x[rank::2]), y[rank::2]).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


SCENARIOS: dict[str, Callable[[int], Any]] = {
    **{
        f"joined {closure.__name__} {dtype}": lambda rank, c=closure, d=dtype: joined_batch(
            rank, c, d
        )
        for closure in CLOSURES
        for dtype in (torch.float64, torch.float32)
    },
    **{
        option: lambda rank, o=option, b=backend: ddp_options(rank, b, **{o: True})
        for option, backend in DDP_OPTIONS.items()
    },
    **{f"error {n}": lambda rank, n=n: error_on_one_rank(rank, n) for n in (1, 3, 8)},
    **{
        function.__name__: function
        for function in (
            group_without_ddp,
            uneven,
            no_group,
            several_closures,
            default_options,
            batch_norm,
            nan_on_one_rank,
            hook_error_on_one_rank,
            trial_error_on_one_rank,
            unequal_start,
            preconditioned,
            other_layers_on_each_rank,
            other_optimizer_afterwards,
        )
    },
}


QUICK = (
    "joined with_backward torch.float64",
    "joined likelihood torch.float32",
    "group_without_ddp",
    "uneven",
    "default_options",
    "nan_on_one_rank",
    "error 3",
    "unequal_start",
    "preconditioned",
)
"""Slow tests look at the others, in processes of their own."""


def mark_slow(**scenarios: Any) -> Any:
    """Parameters of a test with the scenario that each of them looks at."""
    return [
        pytest.param(*values, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, values in scenarios.items()
    ]


def scenario(name: str, rank: int) -> Any:
    return SCENARIOS[name](rank)


@pytest.fixture
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Any]]:
    """What each rank returned in a scenario."""
    return scenarios_on_two_ranks(
        "distributed", scenario, SCENARIOS, QUICK, request, tmp_path_factory
    )


def same(a: StepReport, b: StepReport) -> bool:
    return all(
        x == y or (x != x and y != y)
        for x, y in zip(asdict(a).values(), asdict(b).values(), strict=True)
    )


def assert_identical(results: list[Any]) -> None:
    (theta, reports, *_), (other, other_reports, *_) = results
    assert torch.equal(theta, other)
    assert all(same(a, b) for a, b in zip(reports, other_reports, strict=True))


@pytest.mark.parametrize(
    ("make_closure", "dtype"),
    mark_slow(
        **{
            f"joined {c.__name__} {d}": (c, d)
            for c in CLOSURES
            for d in (torch.float64, torch.float32)
        }
    ),
)
def test_the_step_of_two_ranks_is_that_of_the_joined_batch(
    ranks: Any, make_closure: Any, dtype: torch.dtype
) -> None:
    results = ranks(f"joined {make_closure.__name__} {dtype}")
    assert_identical(results)
    theta, reports = results[0]
    expected, expected_reports = train(make_classifier(dtype), make_closure, *data(dtype))
    # Each of the three steps through negative curvature makes ten of one rounding error.
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3 if make_closure is hessian else 1e-6
    assert (theta - expected).norm() <= tolerance * expected.norm()
    for report, other in zip(reports, expected_reports, strict=True):
        assert report.accepted == other.accepted
        assert report.loss == pytest.approx(other.loss, rel=10 * tolerance)
        assert report.kl == pytest.approx(other.kl, rel=1e-3 if dtype == torch.float32 else 1e-8)


def test_a_process_group_without_ddp(ranks: Any) -> None:
    results = ranks("group_without_ddp")
    assert_identical(results)
    expected, _ = train(make_classifier(), with_backward, *data())
    torch.testing.assert_close(results[0][0], expected, rtol=0, atol=1e-10)


def test_uneven_batches_count_the_same(ranks: Any) -> None:
    results = ranks("uneven")
    assert_identical(results)
    x, y = data()
    model = make_classifier()
    optimizer = NaturalCG(model.parameters(), **SOLVED)
    closures = [
        with_backward(model, optimizer, x[part], y[part]) for part in (slice(0, 10), slice(10, 64))
    ]
    for _ in range(STEPS):
        optimizer.step(closures)  # the mean of two means
    torch.testing.assert_close(
        results[0][0], parameters_to_vector(model.parameters()).detach(), rtol=0, atol=1e-10
    )


@pytest.mark.slow
def test_no_group_and_no_ddp_module_means_no_communication(ranks: Any) -> None:
    x, y = data()
    for rank, (theta, _) in enumerate(ranks("no_group")):
        expected, _ = train(make_classifier(), with_backward, x[rank::2], y[rank::2])
        assert torch.equal(theta, expected)


@pytest.mark.slow
def test_several_closures_and_a_curvature_closure(ranks: Any) -> None:
    results = ranks("several_closures")
    assert_identical(results)
    x, y = data()
    model = make_classifier()
    optimizer = NaturalCG(model.parameters(), **SOLVED)
    whole, half = (
        with_backward(model, optimizer, x, y),
        with_backward(model, optimizer, x[:32], y[:32]),
    )
    for _ in range(STEPS):
        optimizer.step(whole, curvature_closure=half)
    torch.testing.assert_close(
        results[0][0], parameters_to_vector(model.parameters()).detach(), rtol=0, atol=1e-10
    )


def test_parameters_and_decisions_stay_bit_identical(ranks: Any) -> None:
    results = ranks("default_options")
    assert_identical(results)
    assert results[0][1][-1].loss < results[0][1][0].loss


@pytest.mark.slow
def test_batch_norm_trains_as_under_ddp(ranks: Any) -> None:
    results = ranks("batch_norm")
    assert_identical(results)
    assert results[0][1][-1].backend == "double-backward"
    for _, reports, (mean, _, count) in results:
        assert count == STEPS  # running statistics move once a step
        assert mean.isfinite().all()
        assert reports[-1].loss < reports[0].loss


def test_nan_on_one_rank_is_rejected_by_all(ranks: Any) -> None:
    results = ranks("nan_on_one_rank")
    for again, reports, _ in results:
        assert [report.accepted for report in reports] == [False, False]
        assert all(report.accepted for report in again[1])
    assert_identical([result[0] for result in results])
    assert all(same(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


# In the first run, at the checks of the first step, and later.
@pytest.mark.parametrize("fails_at", mark_slow(**{f"error {n}": (n,) for n in (1, 3, 8)}))
def test_an_exception_on_one_rank_ends_the_step_on_all(ranks: Any, fails_at: int) -> None:
    (message, unmoved, reports), (own_message, own_unmoved, own_reports) = ranks(
        f"error {fails_at}"
    )
    assert "rank 1 raised" in message
    assert "no such batch" in own_message
    assert unmoved
    assert own_unmoved
    assert reports[0].accepted
    assert same(reports[0], own_reports[0])


@pytest.mark.slow
def test_an_exception_in_a_hook_ends_the_step_on_all(ranks: Any) -> None:
    message, own_message = ranks("hook_error_on_one_rank")
    assert "rank 1 raised" in message
    assert "no such gradient" in own_message


@pytest.mark.slow
def test_a_trial_point_that_one_rank_cannot_compute_is_turned_down_by_all(ranks: Any) -> None:
    ((report,), (other,)) = ranks("trial_error_on_one_rank")
    assert same(report, other)
    assert report.accepted
    assert report.backtracks > 0


def test_ranks_must_start_from_the_same_parameters(ranks: Any) -> None:
    assert all(
        "parameters differ between the ranks" in message for message in ranks("unequal_start")
    )


@pytest.mark.parametrize(
    ("option", "backend"),
    [("find_unused_parameters", "double-backward"), ("gradient_as_bucket_view", "torch.func")],
)
@pytest.mark.slow
def test_options_of_ddp(ranks: Any, option: str, backend: str) -> None:
    results = ranks(option)
    assert_identical(results)
    theta, reports = results[0]
    assert reports[-1].backend == backend
    expected, _ = train(make_classifier(), with_backward, *data())
    torch.testing.assert_close(theta, expected, rtol=0, atol=1e-10)


def test_factors_are_means_over_the_ranks(ranks: Any) -> None:
    """And the steps that they speed up are those of one process."""
    results = ranks("preconditioned")
    assert_identical(results)
    theta, (report,), factors = results[0]
    assert report.preconditioner == "kfac"
    assert report.cg_stop == "tolerance"
    x, y = data()
    apart = []
    for rank in range(2):
        model = make_classifier()
        optimizer = NaturalCG(model.parameters(), preconditioner="kfac", **SOLVED)
        optimizer.step(with_backward(model, optimizer, x[rank::2], y[rank::2]))
        apart.append(factors_in(optimizer))
    assert factors.keys() == apart[0].keys() == results[1][2].keys()
    for name, value in factors.items():
        assert torch.equal(value, results[1][2][name])
        torch.testing.assert_close(
            value, (apart[0][name] + apart[1][name]) / 2, rtol=1e-12, atol=1e-15
        )
    expected, _ = train(make_classifier(), with_backward, x, y, steps=2, preconditioner=None)
    torch.testing.assert_close(theta, expected, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_ranks_that_use_other_layers_have_no_preconditioner(ranks: Any) -> None:
    results = ranks("other_layers_on_each_rank")
    assert_identical(results)
    assert [report.preconditioner for report in results[0][1]] == ["kfac", "none", "none"]
    assert all(report.accepted for report in results[0][1])


@pytest.mark.slow
def test_a_static_graph_is_refused(ranks: Any) -> None:
    assert all("use static_graph=False" in message for message in ranks("static_graph"))


@pytest.mark.slow
def test_ddp_still_averages_for_other_optimizers(ranks: Any) -> None:
    first, second = ranks("other_optimizer_afterwards")
    assert torch.equal(first, second)
    assert first.abs().sum() > 0


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        pytest.param((), ("--processes", "2"), id="python"),
        pytest.param(TORCHRUN, (), id="torchrun"),
    ],
)
@pytest.mark.slow
def test_the_example_runs(
    tmp_path: Path, launcher: tuple[str, ...], options: tuple[str, ...]
) -> None:
    picture = tmp_path / "curves.png"
    printed = run_python(
        *launcher, EXAMPLES / "distributed.py", *options, "--steps", "3", "--figure", picture
    )
    assert "bit-identical on all processes: True" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
