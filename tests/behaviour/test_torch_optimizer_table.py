"""NaturalCG under the generic tests that torch runs over its table of optimizers.

LBFGS's entry in that table names the arguments to refuse and the schedulers to try.
"""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers.classics import rosenbrock
from helpers.states import assert_same_state
from helpers.torch_optimizer_table import load_optimizer_table
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ngd_optim import Diagonal, NaturalCG, Nystrom

TABLE = load_optimizer_table()
CONFIGURATIONS = {
    "default": {},
    "other lr": {"lr": 0.01},
    "tensor lr": {"lr": torch.tensor(0.001)},
    "weight decay": {"weight_decay": 0.1},
    "trust region": {"max_kl": 0.01},
    "boundary": {"max_kl": 0.01, "trust_region": "boundary"},
    "damped boundary": {"max_kl": 0.01, "trust_region": "damped"},
    "fixed damping": {"damping": 1.0, "adapt_damping": False},
    "range of damping": {"min_damping": 1e-3, "max_damping": 10.0},
    "Marquardt's scale": {"damping_scale": "diagonal"},
    "few iterations": {"max_cg_iters": 2, "cg_tol": 0.1, "cg_progress_tol": 0.0, "warm_start": 0.0},
    "no line search": {"max_backtracks": 0},
    "short backtracks": {"backtrack_ratio": 0.1},
    "momentum": {"momentum": 0.9},
    "no preconditioner": {"preconditioner": None},
    "Kronecker factors": {"preconditioner": "kfac"},
    "diagonal": {"preconditioner": Diagonal(probes=2)},
    "Nystrom": {"preconditioner": Nystrom(rank=2)},
    "own preconditioner": {"preconditioner": torch.clone},
    "Hessian": {"curvature": "hessian"},
    "dense solver": {"solver": "dense"},
}
EVERY_CONFIGURATION = pytest.mark.parametrize(
    "settings", CONFIGURATIONS.values(), ids=CONFIGURATIONS
)


class AffineProblem:
    """The mean square of an affine map's output, as in torch's generic tests."""

    def __init__(self, *, contiguous=True, dtype=torch.float32):
        generator = torch.Generator().manual_seed(2)

        def draw(*shape):
            wide = torch.randn(*shape, 2, generator=generator).to(dtype)[..., 0]
            return wide.contiguous() if contiguous else wide

        self.weight, self.bias = nn.Parameter(draw(10, 5)), nn.Parameter(draw(10))
        self.x = draw(5)
        assert contiguous == self.weight.is_contiguous() == self.bias.is_contiguous()

    @property
    def parameters(self):
        return [self.weight, self.bias]

    def loss(self):
        output = self.weight.mv(self.x) + self.bias
        return F.mse_loss(output, torch.zeros_like(output))

    def make_closure(self, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return closure


def take_steps(problem, optimizer, steps):
    for _ in range(steps):
        optimizer.step(problem.make_closure(optimizer))


def assert_same_parameters(a, b):
    for p, q in zip(a.parameters, b.parameters, strict=True):
        assert torch.equal(p, q)


@EVERY_CONFIGURATION
@pytest.mark.parametrize("contiguous", [True, False])
def test_steps_go_in_the_right_direction(settings, contiguous):
    problem = AffineProblem(contiguous=contiguous)
    optimizer = NaturalCG(problem.parameters, **settings)
    before = problem.loss().item()
    take_steps(problem, optimizer, 5)
    assert problem.loss().item() < before
    assert optimizer.last_step.accepted


CHAINS = [*TABLE["LBFGS"].scheduler_inputs, *TABLE["Adam"].scheduler_inputs]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("per_group", [False, True])
def test_steps_go_in_the_right_direction_under_schedulers(chain, per_group):
    problem = AffineProblem()
    groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}]
    optimizer = NaturalCG(groups if per_group else problem.parameters, lr=0.5)
    schedulers = [make(optimizer) for make in chain]
    before = problem.loss().item()
    for _ in range(20):
        take_steps(problem, optimizer, 1)
        for scheduler in schedulers:
            scheduler.step(*[problem.loss().detach()] * isinstance(scheduler, ReduceLROnPlateau))
    assert problem.loss().item() < before


def test_a_group_moves_by_its_own_learning_rate():
    problem, plain = AffineProblem(), AffineProblem()
    start = AffineProblem()
    groups = [{"params": [problem.weight], "lr": 0.5}, {"params": [problem.bias], "lr": 0.0}]
    settings = {"max_kl": None, "max_backtracks": 0}
    take_steps(problem, NaturalCG(groups, lr=7.0, **settings), 1)
    take_steps(plain, NaturalCG(plain.parameters, lr=1.0, **settings), 1)
    assert torch.equal(problem.bias, start.bias)
    torch.testing.assert_close(problem.weight - start.weight, 0.5 * (plain.weight - start.weight))
    assert not torch.equal(problem.weight, start.weight)


@EVERY_CONFIGURATION
def test_an_optimizer_that_loads_the_state_takes_the_same_steps(settings):
    problem, twin = AffineProblem(), AffineProblem()
    optimizer = NaturalCG(problem.parameters, **settings)
    take_steps(problem, optimizer, 3)
    for p, q in zip(problem.parameters, twin.parameters, strict=True):
        q.data.copy_(p)
    saved = copy.deepcopy(optimizer.state_dict())
    loaded = NaturalCG(twin.parameters, **settings)
    loaded.load_state_dict(saved)
    assert_same_state(saved, optimizer.state_dict())
    for _ in range(3):
        take_steps(problem, optimizer, 1)
        take_steps(twin, loaded, 1)
        assert_same_parameters(problem, twin)
        assert_same_state(optimizer.state_dict(), loaded.state_dict())


@EVERY_CONFIGURATION
def test_the_state_can_be_saved_with_weights_only_or_pickled(settings):
    if settings.get("preconditioner") is torch.clone:
        settings = settings | {"preconditioner": None}  # weights_only loads no functions
    problem = AffineProblem()
    optimizer = NaturalCG(problem.parameters, **settings)
    take_steps(problem, optimizer, 2)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    assert_same_state(torch.load(buffer, weights_only=True), optimizer.state_dict())
    assert_same_state(pickle.loads(pickle.dumps(optimizer)).state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("is_pickled", [False, True])
def test_a_copy_has_all_public_attributes(is_pickled):
    """A process group belongs to its process: it is kept by copies within it."""
    problem = AffineProblem()
    optimizer = NaturalCG(problem.parameters, generator=torch.Generator().manual_seed(7))
    take_steps(problem, optimizer, 1)
    optimizer.process_group = group = threading.Lock()  # can be neither copied nor pickled
    clone = (
        pickle.loads(pickle.dumps(optimizer)) if is_pickled else copy.deepcopy({1: optimizer})[1]
    )
    own, copied = (
        {name for name in vars(o) if not name.startswith("_")} for o in (optimizer, clone)
    )
    assert own == copied
    assert clone.process_group is (None if is_pickled else group)
    assert repr(clone.last_step) == repr(optimizer.last_step)
    assert clone.generator is not optimizer.generator
    assert torch.equal(clone.generator.get_state(), optimizer.generator.get_state())
    own_tensors, copies = ([*o.param_groups[0]["params"]] for o in (optimizer, clone))
    assert not {id(p) for p in own_tensors} & {id(p) for p in copies}
    assert_same_state(optimizer.state_dict(), clone.state_dict())


@EVERY_CONFIGURATION
def test_an_optimizer_prints_its_settings(settings):
    text = repr(NaturalCG(AffineProblem().parameters, **settings))
    for name, value in settings.items():
        assert f"{name}: {value}" in text


@EVERY_CONFIGURATION
def test_every_parameter_has_state_after_a_step(settings):
    problem = AffineProblem()
    optimizer = NaturalCG(problem.parameters, **settings)
    assert not optimizer.state
    take_steps(problem, optimizer, 1)
    for p in problem.parameters:
        tensors = [
            value for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)
        ]
        assert any(value.any() for value in tensors)


def test_a_state_is_loaded_in_the_dtype_of_the_parameters():
    problem, wide = AffineProblem(), AffineProblem(dtype=torch.float64)
    optimizer, loaded = NaturalCG(problem.parameters), NaturalCG(wide.parameters)
    take_steps(problem, optimizer, 1)
    loaded.load_state_dict(optimizer.state_dict())
    for p, q in zip(problem.parameters, wide.parameters, strict=True):
        assert loaded.state[q]["solution"].dtype == torch.float64
        assert torch.equal(loaded.state[q]["solution"], optimizer.state[p]["solution"].double())
    before = wide.loss().item()
    take_steps(wide, loaded, 1)
    assert wide.loss().item() < before


REFUSED = {
    case.optimizer_error_input.desc: case
    for case in TABLE["LBFGS"].optim_error_inputs_func(device="cpu", dtype=torch.float32)
}


@pytest.mark.parametrize("description", REFUSED)
def test_arguments_that_lbfgs_refuses(description):
    case = REFUSED[description]
    arguments = case.optimizer_error_input
    params = [nn.Parameter(torch.ones(1, 1))] if arguments.params is None else arguments.params
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            NaturalCG(params, **arguments.kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):
            NaturalCG(params, **arguments.kwargs)


def test_complex_parameters_move_as_their_real_parts():
    z = nn.Parameter(torch.tensor([1.5 + 1j, 1.5 - 1j]))
    parts = nn.Parameter(torch.view_as_real(z.detach()).clone())
    optimizer, other = NaturalCG([z]), NaturalCG([parts])
    losses = []
    for _ in range(5):
        losses.append(optimizer.step(lambda: rosenbrock(z).abs().square()).item())
        other.step(lambda: rosenbrock(torch.view_as_complex(parts)).abs().square())
        torch.testing.assert_close(torch.view_as_real(z.detach()), parts.detach())
    assert losses[-1] < 0.1 * losses[0]


def test_steps_go_down_the_rosenbrock_valley():
    point = nn.Parameter(torch.tensor([1.5, 1.5]))
    optimizer = NaturalCG([point])
    for _ in range(50):
        optimizer.step(lambda: rosenbrock(point))
    torch.testing.assert_close(point.detach(), torch.ones(2), rtol=0, atol=1e-2)
