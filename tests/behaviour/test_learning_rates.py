"""Learning rates, and all of torch's schedulers that set them, beside SGD under the same scheduler."""

import copy
import inspect
import warnings

import pytest
import torch
from helpers.regression import Task, have_equal_parameters, train
from torch import nn
from torch.optim import SGD, lr_scheduler
from torch.optim.swa_utils import SWALR

from ngd_optim import NaturalCG

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[1, 3], gamma=0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.8**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 1 - 0.1 * epoch),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6, power=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.2, 0.9, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=0.9, total_steps=6, cycle_momentum=False
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)],
        optimizer=o,
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SWALR": lambda o: SWALR(o, swa_lr=0.1, anneal_epochs=3),
}


def make_edge_optimizer(task, **settings):
    """Every step is the learning rate times one to the edge of the region."""
    return NaturalCG(
        task.model.parameters(),
        max_kl=1e-6,
        trust_region="boundary",
        max_backtracks=0,
        adapt_damping=False,
        **settings,
    )


def advance(scheduler):
    scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))


def test_the_table_has_every_scheduler():
    schedulers = inspect.getmembers(lr_scheduler, inspect.isclass)
    names = {
        n
        for n, kind in schedulers
        if issubclass(kind, lr_scheduler.LRScheduler) and not n.startswith("_")
    }
    assert SCHEDULERS.keys() - {"SWALR"} == names - {"LRScheduler"}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_scheduler_sets_the_learning_rate_of_the_step(name, as_tensor):
    task = Task()
    optimizer = make_edge_optimizer(
        task, lr=torch.tensor(0.8, dtype=torch.float64) if as_tensor else 0.8
    )
    reference = SGD([nn.Parameter(torch.ones(1))], lr=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as when a scheduler misses the step before it
        warnings.filterwarnings(
            "ignore", "The epoch parameter"
        )  # SequentialLR's own, in torch 2.8 and before
        scheduler, expected = SCHEDULERS[name](optimizer), SCHEDULERS[name](reference)
        used = []
        for _ in range(5):
            optimizer.step(task.closure)
            reference.step()
            used.append(reference.param_groups[0]["lr"])
            assert optimizer.param_groups[0]["lr"] == pytest.approx(used[-1], rel=1e-12)
            # Here the report's kl is ½ dᵀF d, for d = lr · (a step to the boundary).
            assert optimizer.last_step.kl == pytest.approx(used[-1] ** 2 * 1e-6, rel=1e-6)
            advance(scheduler)
            advance(expected)
    assert len(set(used)) > 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_saved_scheduler_goes_on_with_its_optimizer(name):
    rates = []
    task, twin = Task(), Task()
    optimizer = make_edge_optimizer(task, lr=0.8)
    scheduler = SCHEDULERS[name](optimizer)
    for _ in range(2):
        optimizer.step(task.closure)
        advance(scheduler)
    resumed = make_edge_optimizer(twin, lr=0.3)
    resumed_scheduler = SCHEDULERS[name](resumed)
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    twin.model.load_state_dict(task.model.state_dict())
    for _ in range(3):
        for t, o, s in ((task, optimizer, scheduler), (twin, resumed, resumed_scheduler)):
            o.step(t.closure)
            rates.append(o.param_groups[0]["lr"])
            advance(s)
    assert rates[::2] == rates[1::2]
    assert have_equal_parameters(task, twin)


CYCLES = {
    "CyclicLR": lambda o, **settings: lr_scheduler.CyclicLR(
        o, 0.2, 0.9, step_size_up=2, **settings
    ),
    "OneCycleLR": lambda o, **settings: lr_scheduler.OneCycleLR(
        o, max_lr=0.9, total_steps=6, **settings
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("origin", ["new", "copied", "loaded", "with a second group"])
@pytest.mark.parametrize("name", CYCLES)
def test_momentum_is_not_what_schedulers_cycle(name, origin):
    """SPRING's is another thing than that of heavy balls."""
    task = Task()
    optimizer = NaturalCG(task.model.parameters(), momentum=0.3)
    if origin == "copied":
        optimizer = copy.deepcopy(optimizer)
    elif origin == "loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif origin == "with a second group":
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match=r"must support momentum or beta1 with `cycle_momentum`"):
        CYCLES[name](optimizer)
    scheduler = CYCLES[name](optimizer, cycle_momentum=False)
    optimizer.param_groups[0]["lr"] = 0.5
    scheduler.step()
    assert [group["momentum"] for group in optimizer.param_groups] == [0.3] * len(
        optimizer.param_groups
    )


def test_learning_rate_may_be_a_tensor():
    number, tensor = Task(), Task()
    tensor.model.load_state_dict(number.model.state_dict())
    train(number, NaturalCG(number.model.parameters(), lr=0.5), 2)
    train(tensor, NaturalCG(tensor.model.parameters(), lr=torch.tensor(0.5)), 2)
    assert have_equal_parameters(number, tensor)
