"""NaturalCG under Lightning Fabric, which knows nothing of it: ``fabric.setup`` and ``fabric.backward`` are enough."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.lightning_modules import loader
from lightning.fabric import Fabric
from torch import Tensor, nn

from ngd_optim import NaturalCG

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def set_up(precision: Any = "32-true", **settings: Any) -> tuple[Fabric, Any, Any, Any]:
    fabric = Fabric(accelerator="cpu", precision=precision)
    model = network()
    model, optimizer = fabric.setup(model, NaturalCG(model.parameters(), **settings))
    return fabric, model, optimizer, fabric.setup_dataloaders(loader())


def closure_of(fabric: Fabric, model: Any, optimizer: Any, batch: Any, *, goes_back: bool) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        if goes_back:
            fabric.backward(loss)
        return loss

    return closure


def train(fabric: Fabric, model: Any, optimizer: Any, data: Any, **options: Any) -> list[Any]:
    reports = []
    for batch in data:
        optimizer.step(closure_of(fabric, model, optimizer, batch, **options))
        reports.append(optimizer.last_step)
    return reports


@pytest.mark.parametrize("backend", ["auto", "double-backward", "torch.func"])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_steps_are_those_of_a_plain_loop(precision: Any, backend: Any) -> None:
    fabric, model, optimizer, data = set_up(precision, backend=backend)
    reports = train(fabric, model, optimizer, data, goes_back=True)
    assert all(report.accepted for report in reports)
    plain = network()
    plain = plain.double() if precision == "64-true" else plain
    # Fabric registers hooks on the outputs, and forward mode is taken where there are some.
    other = NaturalCG(plain.parameters(), backend="torch.func" if backend == "auto" else backend)
    for x, y in loader():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                z = plain(x.double() if precision == "64-true" else x)
            return F.cross_entropy(z.float(), y)  # Fabric casts outputs to torch's default dtype

        other.step(closure)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_list_of_closures(precision: Any) -> None:
    fabric, model, optimizer, data = set_up(precision)
    closures = [closure_of(fabric, model, optimizer, batch, goes_back=True) for batch in data]
    losses = [float(optimizer.step(closures)) for _ in range(5)]
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.last_step.accepted


def test_what_the_wrapper_shows_is_the_optimizers(tmp_path: Any) -> None:
    fabric, model, optimizer, data = set_up()
    assert optimizer.last_step is None
    assert optimizer.process_group is None
    assert optimizer.generator is None
    seen = []
    handle = optimizer.register_gradient_hook(
        lambda _: seen.append(all(p.grad is not None for p in model.parameters()))
    )
    train(fabric, model, optimizer, data, goes_back=True)
    handle.remove()
    assert seen == [True] * 3
    assert optimizer.last_step is optimizer.optimizer.last_step is not None
    fabric.save(tmp_path / "state.pt", {"model": model, "optimizer": optimizer})
    other_fabric, other, other_optimizer, _ = set_up()
    other_fabric.load(tmp_path / "state.pt", {"model": other, "optimizer": other_optimizer})
    for run in ((fabric, model, optimizer), (other_fabric, other, other_optimizer)):
        train(*run, data, goes_back=True)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_plain_backward_is_refused_by_fabric() -> None:
    _, model, optimizer, data = set_up("bf16-mixed")
    x, y = next(iter(data))

    def closure() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"fabric\.backward"):
        optimizer.step(closure)


def test_a_step_without_a_closure_says_what_to_write() -> None:
    _, _, optimizer, _ = set_up()
    with pytest.raises(TypeError, match=r"optimizer\.step\(lambda: "):
        optimizer.step()
