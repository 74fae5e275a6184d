"""A step that does not come to its end has changed nothing, and the next one is the one that would have been."""

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.states import assert_same_state
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ngd_optim import KFAC, NaturalCG, least_squares
from ngd_optim.parameters import FlatParameters


class Run:
    """A model with buffers and dropout, its optimizer and closure."""

    setting = "damping"

    def __init__(self, kind: str = "cross_entropy", steps: int = 0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3)
        )
        x, y, t = torch.randn(32, 5), torch.randint(0, 3, (32,)), torch.randn(32, 3)
        self.generator = torch.Generator().manual_seed(3)
        self.optimizer = NaturalCG(self.model.parameters(), generator=self.generator)

        def closure():
            self.optimizer.zero_grad()
            z = self.model(x)
            loss = least_squares(z - t) if kind == "least_squares" else F.cross_entropy(z, y)
            loss.backward()
            return loss

        self.closure = closure
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.optimizer.step(self.closure)

    def everything(self) -> dict[str, Any]:
        """All that a step may change, copied."""
        own = self.optimizer
        state = {i: dict(entry) for i, entry in own.state_dict()["state"].items()}
        report = own.last_step and {k: str(v) for k, v in own.last_step.as_dict().items()}
        return {
            "model": {k: v.clone() for k, v in self.model.state_dict().items()},
            "grad": [p.grad if p.grad is None else p.grad.clone() for p in self.model.parameters()],
            "random": [torch.get_rng_state(), self.generator.get_state()],
            "state": state,
            "adapted": [group[self.setting] for group in own.param_groups],
            "report": report,
            "group": own.process_group,
            "modes": [
                torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch._C._len_torch_dispatch_stack(),
                torch._C._len_torch_function_stack(),
            ],
        }


class StreamRun(Run):
    """The same by KFAC: ``step(closure)``, or a loop that has a block or a module watched."""

    setting = "radius"

    def __init__(self, kind: str = "closure", steps: int = 0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        self.x, self.y = torch.randn(32, 5), torch.randint(0, 3, (32,))
        self.generator = torch.Generator().manual_seed(3)
        self.optimizer = KFAC(self.model.parameters(), generator=self.generator, weight_decay=0.01)
        self.criterion = nn.CrossEntropyLoss()
        self.kind = kind
        if kind == "module":
            self.handle = self.optimizer.watch(self.criterion)
        for _ in range(steps):
            self.prepare()
            self.step()

    def prepare(self) -> None:
        """What the loop does before the step."""
        if self.kind == "closure":
            return
        self.optimizer.zero_grad()
        with self.optimizer.watch() if self.kind == "block" else nullcontext():
            loss = self.loss()
        loss.backward()

    def loss(self) -> torch.Tensor:
        return self.criterion(self.model(self.x), self.y)

    def step(self) -> None:
        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        self.optimizer.step(closure if self.kind == "closure" else None)


class AtOperation(TorchDispatchMode):
    """Raises at the nth torch operation."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


class AtLine:
    """Raises at the nth line of Python that is run in the package or in what it calls."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __enter__(self) -> None:
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame, event, arg) -> Any:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._trace


def count(bomb: Callable[[int], Any], **options: Any) -> tuple[int, dict[str, Any]]:
    """How many places a step has, and what it comes to."""
    run, counter = Run(**options), bomb(10**9)
    with counter:
        run.step()
    return 10**9 - counter.left, run.everything()


@pytest.mark.parametrize("kind", ["cross_entropy", "least_squares"])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("bomb", [AtOperation, AtLine])
def test_an_interrupt_anywhere_loses_nothing(kind, steps, bomb):
    Run(kind, 2)  # what is imported late
    length, truth = count(bomb, kind=kind, steps=steps)
    spread, interrupted = range(1, length, length // 6), 0
    for place in [*spread, *range(length - 60, length - 8, 7)]:
        run = Run(kind, steps)
        before = run.everything()
        try:
            with bomb(place):
                run.step()
        except KeyboardInterrupt:
            interrupted += 1
            assert_same_state(run.everything(), before)
            if place % 2 == 0:
                run.step()
                assert_same_state(run.everything(), truth)
    assert interrupted > 5


@pytest.mark.parametrize("kind", ["closure", "block", "module"])
@pytest.mark.parametrize("steps", [0, 5])  # at the sixth no factors are due
@pytest.mark.parametrize("bomb", [AtOperation, AtLine])
def test_an_interrupt_anywhere_in_a_step_of_kfac(kind, steps, bomb):
    StreamRun(kind, 2)
    run, counter = StreamRun(kind, steps), bomb(10**9)
    run.prepare()
    with counter:
        run.step()
    length, truth = 10**9 - counter.left, run.everything()
    interrupted, spread = 0, range(8, length, length // 8)  # the first lines are the test's
    for place in sorted({*spread, *range(max(8, length - 60), length - 8, 5)}):
        run = StreamRun(kind, steps)
        start = run.generator.get_state()
        run.prepare()
        before = run.everything()
        try:
            with bomb(place):
                run.step()
        except KeyboardInterrupt:
            interrupted += 1
            assert_same_state(run.everything(), before)
            assert run.optimizer._watch.take() is None
            # The loop has the batch once more.
            run.generator.set_state(start)
            run.prepare()
            run.step()
            assert_same_state(run.everything(), truth)
    assert interrupted > 5


@pytest.mark.parametrize("bomb", [AtOperation, AtLine])
def test_an_interrupt_while_a_loss_is_watched(bomb):
    truth, counter = StreamRun("block", 1), bomb(10**9)
    with counter:
        truth.prepare()
    length = 10**9 - counter.left
    truth.step()
    for place in range(1, length, length // 12):
        run = StreamRun("block", 1)
        before, start = run.everything(), run.generator.get_state()
        try:
            with bomb(place):
                run.prepare()
        except KeyboardInterrupt:
            assert run.everything()["modes"] == before["modes"]
            assert_same_state(run.everything()["state"], before["state"])
            run.generator.set_state(start)
            run.optimizer.step() if place % 2 and run.model[0].bias.grad is not None else None
            assert not run.optimizer._watch._is_open


def test_a_second_interrupt_while_the_first_is_undone(monkeypatch):
    length, _ = count(AtOperation, steps=1)
    run = Run(steps=1)
    before = run.everything()
    write, left = FlatParameters.write, [1]

    def interrupted(self, values):
        if left[0] and sys.exc_info()[0] is KeyboardInterrupt:
            left[0] -= 1
            raise SystemExit
        write(self, values)

    monkeypatch.setattr(FlatParameters, "write", interrupted)
    with pytest.raises(SystemExit), AtOperation(length - 5):
        run.step()
    assert left == [0]
    assert_same_state(run.everything(), before)


@pytest.mark.parametrize("where", ["pre", "post", "gradient"])
def test_an_error_in_a_hook(where):
    run = Run(steps=1)
    before = run.everything()

    def fail(*_):
        raise ZeroDivisionError

    register = {
        "pre": run.optimizer.register_step_pre_hook,
        "post": run.optimizer.register_step_post_hook,
        "gradient": run.optimizer.register_gradient_hook,
    }[where]
    handle = register(fail)
    with pytest.raises(ZeroDivisionError):
        run.step()
    assert_same_state(run.everything(), before)
    handle.remove()
    run.step()
    assert_same_state(run.everything(), Run(steps=2).everything())


def test_hooks_run_once_also_for_a_subclass():
    class Own(NaturalCG):
        def step(self, closure=None, **kwargs):
            return super().step(closure, **kwargs)

    x = nn.Parameter(torch.ones(2))
    for kind in (NaturalCG, Own):
        calls = []
        optimizer = kind([x])
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("post"))
        optimizer.step(lambda: x.square().sum())
        assert calls == ["pre", "post"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_a_handler_that_raises():
    def terminate(*_):
        raise SystemExit

    before_handler = signal.signal(signal.SIGALRM, terminate)
    try:
        for i in range(25):
            run = Run(steps=1)
            before = run.everything()
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0008 * i)
            is_over = False
            try:
                run.step()
                is_over = True
                signal.setitimer(signal.ITIMER_REAL, 0)
            except SystemExit:
                if not is_over:
                    assert_same_state(run.everything(), before)
    finally:
        signal.signal(signal.SIGALRM, before_handler)


def test_a_step_within_a_closure():
    inner = Run(steps=1)
    x = nn.Parameter(torch.ones(3))
    outer = NaturalCG([x])

    def closure():
        inner.step()
        return (x - 2).square().sum()

    outer.step(closure)
    assert outer._transaction is None
    assert outer.last_step is not None
    assert outer.last_step.accepted
    assert_same_state(
        inner.everything()["state"], Run(steps=inner_steps(inner)).everything()["state"]
    )


def inner_steps(run: Run) -> int:
    """How many steps it has taken: the outer closure may have run more than once."""
    truth = Run()
    for n in range(1, 6):
        truth.step()
        if torch.equal(truth.model[0].weight, run.model[0].weight):
            return n
    raise AssertionError("no number of steps leads there")


class TestRandomNumbers:
    def draws_beside(self, closure, optimizer, steps: int = 25) -> list[tuple[float, ...]]:
        seen, stop = [], threading.Event()

        def draw() -> None:
            while not stop.wait(0.0003):
                seen.append(tuple(torch.rand(4).tolist()))

        thread = threading.Thread(target=draw)
        thread.start()
        for _ in range(steps):
            optimizer.step(closure)
        stop.set()
        thread.join()
        return seen

    def test_of_another_thread_do_not_repeat(self):
        model, x, y = nn.Linear(5, 3), torch.randn(32, 5), torch.randint(0, 3, (32,))
        optimizer = NaturalCG(model.parameters())

        def closure():  # runs again at the first step
            loss = F.cross_entropy(model(x), y)
            return loss if loss.item() > 0 else 2 * loss

        seen = self.draws_beside(closure, optimizer)
        assert len(seen) == len(set(seen)) > 10

    def test_are_left_alone_by_an_error_in_a_closure_that_draws_none(self):
        model, x = nn.Linear(5, 3), torch.randn(32, 5)

        def closure():
            thread = threading.Thread(target=lambda: torch.rand(3))
            thread.start()
            thread.join()
            model(x)
            raise ZeroDivisionError

        before = torch.get_rng_state()
        with pytest.raises(ZeroDivisionError):
            NaturalCG(model.parameters()).step(closure)
        assert not torch.equal(torch.get_rng_state(), before)

    def test_are_put_back_for_a_closure_that_seeds_and_draws(self):
        model, x = nn.Linear(5, 3), torch.randn(32, 5)

        def closure():
            torch.manual_seed(7)
            model(x + torch.randn(5))
            raise ZeroDivisionError

        before = torch.get_rng_state()
        with pytest.raises(ZeroDivisionError):
            NaturalCG(model.parameters()).step(closure)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("draw", ["default", "own", "method"])
    def test_advance_as_by_one_run(self, draw):
        x, own = nn.Parameter(torch.ones(3)), torch.Generator().manual_seed(1)

        def closure():
            if draw == "method":
                noise = torch.empty(3).exponential_(generator=own)
            else:
                noise = torch.rand(3, generator=own if draw == "own" else None)
            return (x - noise).square().sum() * (1 if x.sum().item() > 0 else 2)

        torch.manual_seed(3)
        with torch.no_grad():
            closure()
        expected = torch.get_rng_state(), own.get_state()
        torch.manual_seed(3)
        own.manual_seed(1)
        NaturalCG([x]).step(closure)
        assert torch.equal(torch.get_rng_state(), expected[0])
        assert torch.equal(own.get_state(), expected[1])
