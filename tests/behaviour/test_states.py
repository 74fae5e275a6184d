"""What is saved of an optimizer: broken states are refused, and a run that is resumed is the run that went on."""

import copy
import io
import itertools
import logging
import math
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from helpers.states import assert_same_state
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ngd_optim import Diagonal, NaturalCG, Nystrom, least_squares
from ngd_optim.settings import SETTINGS

SAMPLES = 12


class Net(nn.Module):
    """Convolutions, one of them depthwise, a weight used as it is, one without a layer, and a table.

    With a bias the factors of the grouped convolution are longer than those of others of its shape.
    """

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2, bias=bias)
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Embedding(5, 2)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.grouped(self.depthwise(self.first(x).tanh()).tanh()).flatten(1)
        return self.last(self.norm(h @ self.weight)) + self.table(torch.tensor([3]))


class Run:
    """A model, its optimizer and a batch for each step."""

    def __init__(
        self,
        net: str = "mlp",
        loss: str = "ce",
        dtype: torch.dtype = torch.float64,
        **settings: Any,
    ) -> None:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
        self.model = (plain if net == "mlp" else Net(bias=net == "net")).to(dtype)
        self.net = net
        self.shape = (3,) if net == "mlp" else (1, 5, 5)
        self.loss = loss
        self.dtype = dtype
        self.optimizer = NaturalCG(self.model.parameters(), **settings)
        self.batches = itertools.count()

    def step(self, times: int = 1, *, same_data: bool = False) -> None:
        for _ in range(times):
            seed = 0 if same_data else next(self.batches)
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(SAMPLES, *self.shape, generator=generator).to(self.dtype)
            y = torch.randint(0, 2, (SAMPLES,), generator=generator)
            self.optimizer.step(lambda x=x, y=y: self.evaluate(x, y))

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.model(x)
        if self.loss == "ls":
            return least_squares(z - F.one_hot(y, 2))
        if self.loss == "hessian":
            return (z.logsumexp(-1) - z.gather(-1, y[:, None]).squeeze(-1)).mean()
        return F.cross_entropy(z, y)

    def twin(self, **settings: Any) -> "Run":
        """The same model and place in the data, with a new optimizer."""
        other = Run(self.net, self.loss, self.dtype)
        other.model.load_state_dict(self.model.state_dict())
        other.optimizer = NaturalCG(other.model.parameters(), **settings)
        other.batches = copy.copy(self.batches)
        return other


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_goes_on_alike(run: Run, twin: Run, steps: int = 3) -> None:
    assert_same_state(run.optimizer.state_dict(), twin.optimizer.state_dict())
    for _ in range(steps):
        run.step()
        twin.step()
        for p, q in zip(run.model.parameters(), twin.model.parameters(), strict=True):
            assert torch.equal(p, q)
        assert repr(run.optimizer.last_step) == repr(twin.optimizer.last_step)
        assert_same_state(run.optimizer.state_dict(), twin.optimizer.state_dict())


SOLVERS = {
    "cg": {},
    "cg, few iterations": {"max_cg_iters": 2, "max_kl": 0.01},
    "dense": {"solver": "dense"},
    "sample": {"solver": "sample"},
}
PRECONDITIONERS = {
    "auto": "auto",
    "kfac": "kfac",
    "none": None,
    "diagonal": Diagonal(probes=2, refresh=2),
    "nystrom": Nystrom(rank=2, refresh=2),
}
TABLE = [
    pytest.param(
        net,
        loss,
        {
            **SOLVERS[solver],
            "preconditioner": PRECONDITIONERS[p],
            "damping_scale": scale,
            "momentum": mu,
        },
        id=f"{net}-{loss}-{solver}-{p}-{scale}-{mu}",
    )
    for net, loss, solver, p, scale, mu in [
        *itertools.product(
            ["mlp"], ["ce"], SOLVERS, PRECONDITIONERS, ["identity", "diagonal"], [0.0, 0.5]
        ),
        *itertools.product(["net"], ["ce"], ["cg"], PRECONDITIONERS, ["auto"], [0.5]),
        *itertools.product(
            ["mlp", "net"], ["ls"], ["cg"], PRECONDITIONERS, ["auto", "identity"], [0.0]
        ),
        *itertools.product(
            ["mlp"], ["hessian"], ["cg", "dense"], ["auto", "none", "nystrom"], ["auto"], [0.5]
        ),
    ]
]


@pytest.mark.parametrize(("net", "loss", "settings"), TABLE)
def test_a_resumed_run_is_the_one_that_went_on(
    net: str, loss: str, settings: dict[str, Any]
) -> None:
    """Parameters, reports and all entries of the state, counters included; batches change at each step."""
    run = Run(net, loss, damping=0.01, **settings)
    run.step(3)
    twin = run.twin(damping=7.0)
    twin.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    assert_goes_on_alike(run, twin)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
@pytest.mark.parametrize("net", ["mlp", "net"])
@pytest.mark.parametrize("steps", [1, 4])
def test_it_is_so_in_low_precision(net: str, preconditioner: Any, steps: int) -> None:
    """Factors and sketches are wider than the parameters, and load_state_dict would round them."""
    run = Run(net, dtype=torch.bfloat16, preconditioner=preconditioner)
    run.step(steps)
    twin = run.twin()
    twin.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    assert_goes_on_alike(run, twin)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
def test_it_is_so_with_parameters_of_several_dtypes(preconditioner: Any) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = nn.Linear(3, 4, dtype=torch.bfloat16), nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(self.narrow(x.bfloat16()).tanh().double())

    run, twin = Run(), Run()
    run.model, twin.model = Mixed(), Mixed()
    run.optimizer = NaturalCG(run.model.parameters(), preconditioner=preconditioner)
    run.step(4)
    twin.model.load_state_dict(run.model.state_dict())
    twin.batches = copy.copy(run.batches)
    twin.optimizer = NaturalCG(twin.model.parameters())
    twin.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    assert_goes_on_alike(run, twin)


@pytest.mark.parametrize("copied", [True, False])
def test_it_is_so_where_closures_take_turns(copied: bool) -> None:
    """What is known of layers is saved with their factors, and not found anew in another closure."""
    run = Run("net", max_cg_iters=2)
    parts = [
        Run.evaluate,
        lambda self, x, y: self.model.weight.square().sum() + Run.evaluate(self, x, y) * 2,
    ]

    def take_turns(r: Run, index: int) -> None:
        r.evaluate = parts[index].__get__(r)  # type: ignore[method-assign]
        r.step()

    for i in range(3):
        take_turns(run, i % 2)
    twin = run.twin()
    saved = run.optimizer.state_dict()
    twin.optimizer.load_state_dict(copy.deepcopy(saved) if copied else saved)
    for i in range(3, 8):
        take_turns(run, i % 2)
        take_turns(twin, i % 2)
        assert_same_state(run.optimizer.state_dict(), twin.optimizer.state_dict())


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
def test_it_is_so_where_parameters_freeze_and_thaw(preconditioner: Any) -> None:
    run = Run("net", preconditioner=preconditioner)

    def freeze(r: Run, number: int) -> None:
        for i, p in enumerate(r.model.parameters()):
            p.requires_grad_(number == 0 or i % number > 0)

    numbers = [0, 2, 0, 3, 2, 2, 0]
    for start in range(1, len(numbers)):
        freeze(run, numbers[start - 1])
        run.step()
        twin = run.twin()
        twin.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        for r in (run, twin):
            freeze(r, numbers[start])
        assert_goes_on_alike(run, twin, 1)


def test_the_limits_of_the_damping_are_saved() -> None:
    """They are around the damping that the first optimizer was made with."""
    run = Run(damping=1e5, lr=1e9, max_backtracks=1)  # steps that are turned down
    run.step()
    twin = run.twin(damping=10.0)
    twin.optimizer.load_state_dict(run.optimizer.state_dict())
    for r in (run, twin):
        r.step(15, same_data=True)
    assert run.optimizer.param_groups[0]["damping"] > 10.0 * 1e7
    assert_same_state(run.optimizer.state_dict(), twin.optimizer.state_dict())


def test_the_names_and_shapes_of_a_state_do_not_depend_on_what_happened() -> None:
    """Steps that are rejected, factors that are not worthwhile, steps without a KL: the entries are the same."""

    def layout(run: Run) -> list[dict[str, Any]]:
        entries = run.optimizer.state_dict()["state"].values()
        return [
            {k: v.shape if isinstance(v, Tensor) else type(v) for k, v in entry.items()}
            for entry in entries
        ]

    layouts = []
    for loss in ("ce", "ls", "hessian"):
        for lr, kind in ((1.0, "auto"), (1e9, "kfac" if loss == "ce" else "auto")):
            run = Run(loss=loss, lr=lr, preconditioner=kind, damping_scale="auto")
            run.step()
            assert run.optimizer.last_step is not None
            assert run.optimizer.last_step.accepted == (lr == 1.0)
            layouts.append(layout(run))
    assert all(other == layouts[0] for other in layouts)


# Broken states.

BROKEN = {
    "a string": "x",
    "None in a list": [None],
    "a set": {1},
    "a list": ["a"] * 4,
    "a boolean": True,
    "a complex number": 1j,
    "an integer tensor": torch.ones(7, 7, 7, 7, dtype=torch.int64),
    "a tensor of another shape": torch.ones(7, 7, 7, 7),
    "sparse": torch.eye(4).to_sparse(),
    "bytes": b"12",
    "a parameter group": {"lr": 1},
}
KINDS = {
    "last step": ({}, ("solution", "slope", "new_loss", "lr")),
    "factors": ({}, ("left", "right", "diagonal")),
    "layers": ({}, ("layer_groups", "layer_flipped", "layer_bias")),
    "counters": ({}, ("products", "draws")),
    "curvature": ({"damping_scale": "diagonal"}, ("largest_curvature",)),
    "sketch": ({"preconditioner": Nystrom(rank=2)}, ("sketch", "sketch_values", "sketch_age")),
}
ENTRIES = {name: settings for settings, names in KINDS.values() for name in names}
INTEGERS = {*KINDS["layers"][1], *KINDS["counters"][1], "sketch_age"}
REALS = {name: settings for name, settings in ENTRIES.items() if name not in INTEGERS}


@pytest.mark.parametrize(("name", "settings"), ENTRIES.items(), ids=ENTRIES)
def test_an_entry_of_a_wrong_type_is_refused_and_nothing_is_lost(
    name: str, settings: dict[str, Any]
) -> None:
    run = Run(**settings)
    run.step(2)
    before = copy.deepcopy(run.optimizer.state_dict())
    index = next(i for i, entry in before["state"].items() if name in entry)
    for value in BROKEN.values():
        broken = copy.deepcopy(before)
        broken["state"][index][name] = value
        with pytest.raises(
            ValueError, match=f"this state cannot be loaded.*{name!r}, which must be"
        ):
            run.optimizer.load_state_dict(broken)
        assert_same_state(run.optimizer.state_dict(), before)
    run.step()


@pytest.mark.parametrize(
    ("name", "value"),
    [("products", -2), ("draws", 2**63), ("draws", 1.5), ("sketch_age", 0.5), ("layer_bias", "1")],
)
def test_numbers_out_of_range_are_refused(name: str, value: Any) -> None:
    run = Run()
    run.step()
    broken = copy.deepcopy(run.optimizer.state_dict())
    broken["state"][0][name] = value
    with pytest.raises(ValueError, match=f"this state cannot be loaded.*{name}.*integer"):
        run.optimizer.load_state_dict(broken)


@pytest.mark.parametrize("entry", [5, None, "x", [1]])
def test_the_state_of_a_parameter_must_be_a_dict(entry: Any) -> None:
    run = Run()
    run.step()
    broken = copy.deepcopy(run.optimizer.state_dict())
    broken["state"][1] = entry
    with pytest.raises((ValueError, TypeError), match=r"must be a dict|object is not|not iterable"):
        run.optimizer.load_state_dict(broken)


@pytest.mark.parametrize("layer", [(1, 0, 99), (5, 0, 1), (3, 1, 2), (10**9, 0, -1), (1, 7, 0)])
def test_layers_that_cannot_be_are_found_anew(layer: tuple[int, int, int]) -> None:
    run = Run("net", preconditioner="kfac")
    run.step(2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    groups, flipped, bias = layer
    saved["state"][0] |= {"layer_groups": groups, "layer_flipped": flipped, "layer_bias": bias}
    run.optimizer.load_state_dict(saved)
    run.step(2)
    assert run.optimizer.last_step is not None
    assert run.optimizer.last_step.preconditioner == "kfac"
    assert run.optimizer.last_step.accepted


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "settings"), REALS.items(), ids=REALS)
def test_what_is_not_finite_is_dropped(
    name: str, settings: dict[str, Any], bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(**settings)
    run.step(2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    entry = next(entry for entry in saved["state"].values() if name in entry)
    if isinstance(entry[name], Tensor):
        entry[name].view(-1)[0] = bad
    else:
        entry[name] = bad
    with caplog.at_level(logging.WARNING, logger="ngd_optim"):
        run.optimizer.load_state_dict(saved)
    assert "not finite" in caplog.text
    assert "is dropped" in caplog.text
    run.step(3)
    assert run.optimizer.last_step is not None
    assert run.optimizer.last_step.accepted
    for entry in run.optimizer.state_dict()["state"].values():
        for x in entry.values():
            assert torch.as_tensor(x).isfinite().all()


# What else may be in a state.


def test_what_users_keep_in_the_state_is_left_alone() -> None:
    """As torch's own tests do: keys that are no tensors, values that are no dicts, further entries."""
    run = Run(preconditioner=Nystrom(rank=2))
    state: Any = run.optimizer.state
    state["test"] = 1
    state["more"] = {"slope": "mine", "sketch": "mine"}
    run.step(2)
    first = run.optimizer.param_groups[0]["params"][0]
    state[first] |= {"mine": [1, 2], 3: 3.5, "none": None, "empty": {}}
    twin = run.twin()
    twin.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert_goes_on_alike(run, twin)
    for r in (run, copy.deepcopy(run)):
        state = r.optimizer.state
        assert state["test"] == 1
        assert state["more"] == {"slope": "mine", "sketch": "mine"}
        own = state[r.optimizer.param_groups[0]["params"][0]]
        assert (own["mine"], own[3], own["none"], own["empty"]) == ([1, 2], 3.5, None, {})


@pytest.mark.parametrize("name", SETTINGS)
def test_a_state_without_a_newer_setting_has_its_default(name: str) -> None:
    run = Run()
    run.step(2)
    old = copy.deepcopy(run.optimizer.state_dict())
    default = NaturalCG([nn.Parameter(torch.ones(1))]).param_groups[0][name]
    del old["param_groups"][0][name]
    twin = run.twin()
    twin.optimizer.load_state_dict(old)
    assert twin.optimizer.param_groups[0][name] == default
    twin.step()


@pytest.mark.parametrize("kind", ["Adam", "SGD", "LBFGS", "RMSprop", "Adagrad", "AdamW", "Rprop"])
def test_states_of_other_optimizers_are_refused(kind: str) -> None:
    run = Run()
    other = getattr(torch.optim, kind)(run.model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match="this is not the state of a NaturalCG: its groups have no max_kl"
    ):
        run.optimizer.load_state_dict(other.state_dict())
    run.step()


def test_a_group_that_is_added_after_loading_has_the_common_settings() -> None:
    run = Run(max_kl=0.01, max_cg_iters=7)
    run.step()
    twin = run.twin()
    twin.optimizer.load_state_dict(run.optimizer.state_dict())
    twin.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})
    assert twin.optimizer.param_groups[1]["max_kl"] == 0.01
    assert twin.optimizer.param_groups[1]["max_cg_iters"] == 7
    twin.step()


# torch.distributed.checkpoint, in one process.


def save_and_load(run: Run, twin: Run, folder: Any, options: StateDictOptions) -> None:
    """From memory, or through files if there is a folder."""
    saved = get_optimizer_state_dict(run.model, run.optimizer, options=options)
    if folder is None:
        loaded = copy.deepcopy(saved)
    else:
        dcp.save({"optimizer": saved}, checkpoint_id=folder)
        loaded = get_optimizer_state_dict(twin.model, twin.optimizer, options=options)
        dcp.load({"optimizer": loaded}, checkpoint_id=folder)
    set_optimizer_state_dict(twin.model, twin.optimizer, loaded, options=options)


CHECKPOINTED = {
    "default": {},
    "kfac": {"preconditioner": "kfac"},
    "no preconditioner": {"preconditioner": None},
    "diagonal": {"preconditioner": "diagonal"},
    "nystrom": {"preconditioner": Nystrom(rank=4, largest_rank=4)},
    "dense": {"solver": "dense", "damping_scale": "diagonal", "momentum": 0.5},
    "lr": {"lr": torch.tensor(0.5)},
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("settings", CHECKPOINTED.values(), ids=CHECKPOINTED)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("through_files", [False, True])
@pytest.mark.parametrize(("net", "loss"), [("mlp", "ce"), ("depthwise", "ce"), ("mlp", "ls")])
def test_distributed_checkpoints(
    tmp_path: Any, settings: dict[str, Any], net: str, loss: str, flat: bool, through_files: bool
) -> None:
    run = Run(net, loss, **copy.deepcopy(settings))
    run.step(3)
    twin = run.twin(**copy.deepcopy(settings))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    save_and_load(run, twin, tmp_path if through_files else None, options)
    run.step()
    twin.step()
    for p, q in zip(run.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q)
    run.step(2)
    twin.step(2)
    assert repr(run.optimizer.last_step) == repr(twin.optimizer.last_step)


def test_the_state_of_an_optimizer_that_has_not_stepped_can_be_saved() -> None:
    run = Run("net", lr=0.5)
    before = [p.detach().clone() for p in run.model.parameters()]
    saved = get_optimizer_state_dict(run.model, run.optimizer)
    assert len(saved["state"]) == len(before)
    twin = run.twin()
    set_optimizer_state_dict(twin.model, twin.optimizer, saved)
    assert twin.optimizer.param_groups[0]["lr"] == 0.5
    fresh = run.twin(lr=0.5)
    for r in (run, twin, fresh):
        assert all(torch.equal(p, q) for p, q in zip(r.model.parameters(), before, strict=True))
        r.step(2)
    for p, q, s in zip(*(r.model.parameters() for r in (run, twin, fresh)), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, s)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("case", ["steps taken", "gradients"])
def test_a_checkpoint_is_loaded_into_an_optimizer_that_was_used(
    tmp_path: Any, case: str, flat: bool
) -> None:
    """With empty entries of its own, or with gradients, where torch does not have it make a state."""
    run = Run("depthwise")
    run.step(3)
    twin = run.twin()
    if case == "steps taken":
        twin.step(2, same_data=True)
        twin.model.load_state_dict(run.model.state_dict())
    else:
        for p in twin.model.parameters():
            p.grad = torch.ones_like(p)
    save_and_load(run, twin, tmp_path, StateDictOptions(flatten_optimizer_state_dict=flat))
    run.step(2)
    twin.step(2)
    for p, q in zip(run.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_without_a_closure_is_refused_unless_nothing_can_move() -> None:
    run = Run(lr=0.0)
    run.step()
    theta = [p.detach().clone() for p in run.model.parameters()]
    state = copy.deepcopy(run.optimizer.state_dict())
    assert run.optimizer.step() == 0
    assert_same_state(run.optimizer.state_dict(), state)
    for p, q in zip(run.model.parameters(), theta, strict=True):
        assert torch.equal(p, q)
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="step\\(\\) needs a closure"):
        run.optimizer.step()
    run.optimizer.zero_grad()
    run.optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(TypeError, match="step\\(\\) needs a closure"):
        run.optimizer.step()


def test_an_optimizer_is_stateful(tmp_path: Any) -> None:
    """``dcp.save({"optimizer": optimizer})`` and load in one."""
    run = Run()
    run.step(3)
    dcp.save({"optimizer": run.optimizer}, checkpoint_id=tmp_path)
    twin = run.twin()
    get_optimizer_state_dict(twin.model, twin.optimizer)  # makes its state
    dcp.load({"optimizer": twin.optimizer}, checkpoint_id=tmp_path)
    assert_goes_on_alike(run, twin)
