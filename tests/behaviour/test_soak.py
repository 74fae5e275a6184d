"""Long runs: memory and caches stay as they are, and many small parameters cost little."""

import gc
import itertools
import statistics
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical

from ngd_optim import NaturalCG, least_squares
from ngd_optim.linearization import point
from ngd_optim.recording import ForwardRecorder


def count_tensors() -> tuple[int, int]:
    """How many are alive, and their bytes."""
    gc.collect()
    alive = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    return len(alive), sum(t.numel() * t.element_size() for t in alive)


class Changing:
    """A step with another batch, length, loss and class of closure each time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.cell, self.head = nn.RNNCell(3, 4), nn.Linear(4, 2)
        self.optimizer = NaturalCG(
            [*self.cell.parameters(), *self.head.parameters()], max_cg_iters=3, max_backtracks=1
        )
        self.numbers = itertools.count()

    def step(self) -> weakref.ref[torch.Tensor]:
        i = next(self.numbers)
        length, batch = 1 + i % 5, 2 + i % 7
        x, y = torch.randn(batch, length, 3), torch.randint(0, 2, (batch,))
        cell, head = self.cell, self.head
        handle = cell.weight_hh.register_hook(lambda g: g) if i % 4 == 0 else None

        class Closure:  # holds the batch in the cells of its method
            def __call__(self):
                h = torch.zeros(batch, 4)
                for t in range(length):
                    h = cell(x[:, t], h)
                z = head(h)
                match i % 3:
                    case 0:
                        return F.cross_entropy(z, y)
                    case 1:
                        return least_squares(z - F.one_hot(y, 2))
                    case _:
                        prediction = Categorical(logits=z)
                        return -prediction.log_prob(y).mean(), prediction

        self.optimizer.step(Closure())
        if handle is not None:
            handle.remove()
        return weakref.ref(x)


def test_batches_and_tensors_are_let_go():
    run = Changing()
    batches = [run.step() for _ in range(10)]
    count, size = count_tensors()
    batches += [run.step() for _ in range(10)]
    later, later_size = count_tensors()
    assert later <= count + 4
    assert later_size <= size + 4096
    assert sum(batch() is not None for batch in batches) == 0


def test_what_is_learnt_is_bounded(monkeypatch):
    monkeypatch.setattr(point, "_MOST", 5)
    run = Changing()
    for _ in range(40):
        run.step()
    assert len(run.optimizer._experiences) <= 5


@pytest.mark.slow
def test_two_thousand_steps():
    run = Changing()
    for _ in range(400):
        run.step()
    count, size = count_tensors()
    objects = len(gc.get_objects())
    for _ in range(1600):
        run.step()
    later, later_size = count_tensors()
    assert later <= count + 4
    assert later_size <= size + 4096
    assert len(gc.get_objects()) <= objects + 20_000  # what is learnt of hooks, up to its bound
    assert len(run.optimizer._experiences) <= 256


def test_a_recorded_run_makes_few_objects(monkeypatch):
    """The garbage collector looks at each, and then at all others of the process."""
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(200)]
    optimizer = NaturalCG(parameters)
    made: list[int] = []
    program = ForwardRecorder.program

    def measured(self, *args, **options):
        made.append(len(gc.get_objects()))
        return program(self, *args, **options)

    def closure():
        made.append(len(gc.get_objects()))
        return sum(((p - 2) ** 2).sum() for p in parameters)

    optimizer.step(closure)
    made.clear()
    monkeypatch.setattr(ForwardRecorder, "program", measured)
    gc.collect()
    gc.disable()
    try:
        optimizer.step(closure)
    finally:
        gc.enable()
    operations = 4 * len(parameters)
    # Eight of the operation and its graph, two of where its result lies, by which products are renewed.
    assert made[1] - made[0] < 11 * operations


@pytest.mark.slow
@pytest.mark.parametrize("count", [500, 2000])
def test_many_small_parameters(count):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(2)) for _ in range(count)]
    targets = torch.randn(count, 2)

    def closure():
        return sum(((p - t) ** 2).sum() for p, t in zip(parameters, targets, strict=True))

    def differentiate() -> None:
        for p in parameters:
            p.grad = None
        closure().backward()

    optimizer = NaturalCG(parameters)
    optimizer.step(closure)
    ratios = []
    for _ in range(5):
        times = []
        for work in (differentiate, lambda: optimizer.step(closure)):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        ratios.append(times[1] / times[0])
    # Two products of two gradients each, and a run of the closure that is recorded: that is 4.
    assert statistics.median(ratios) < 14
