"""A list of closures is one closure, with the memory of its largest part."""

import pytest
import torch
import torch.nn.functional as F
from helpers.batches import cross_entropy, data, make_model, policy_gradient
from torch import nn

from ngd_optim import NaturalCG
from ngd_optim.distributed import ALONE
from ngd_optim.linearization import linearize_mean
from ngd_optim.parameters import FlatParameters
from ngd_optim.tracing.closure import TracedClosure


@pytest.mark.parametrize("form", [cross_entropy, policy_gradient])
def test_micro_batches_make_the_step_of_the_whole_batch(form):
    x, y = data()
    whole, parts = make_model(), make_model()
    one, many = (
        NaturalCG(model.parameters(), damping=0.1, preconditioner=None) for model in (whole, parts)
    )
    for _ in range(3):
        one.step(form(whole, x, y))
        many.step([form(parts, x[i : i + 3], y[i : i + 3]) for i in range(0, 12, 3)])
        a, b = one.last_step, many.last_step
        assert (a.accepted, a.backtracks) == (b.accepted, b.backtracks)
        for field in ("loss", "new_loss", "kl", "grad_norm", "step_norm", "reduction_ratio"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-8)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-10)


def test_micro_batches_hold_one_graph_at_a_time():
    """The graphs of the others are gone when one is traced."""
    x, y = data()
    model = make_model()
    alive, peak = 0, 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            nonlocal alive, peak
            alive += 1
            peak = max(peak, alive)
            ctx.token = Token()
            return z.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    class Token:
        def __del__(self):
            nonlocal alive
            alive -= 1

    def closure(part):
        return lambda: F.cross_entropy(Counted.apply(model(x[part])), y[part])

    closures = [closure(slice(i, i + 2)) for i in range(0, 12, 2)]
    params = list(model.parameters())
    learnt = {}

    def form_a_product():
        parameters = FlatParameters([{"params": params}])
        runs = [TracedClosure(function, parameters) for function in closures]
        point = linearize_mean(parameters, "ggn", "double-backward", learnt, ALONE, runs)
        point.product(point.gradient)

    form_a_product()
    assert learnt  # the checks of the first time hold a second graph
    peak = 0
    form_a_product()
    assert peak == 1


def test_buffers_and_random_numbers_move_as_in_one_pass():
    x, y = data()
    model, reference = (make_model(nn.BatchNorm1d(6), nn.Dropout(0.5)) for _ in range(2))
    torch.manual_seed(5)
    with torch.no_grad():
        for i in range(0, 12, 4):
            reference(x[i : i + 4])
    expected = torch.rand(3)
    torch.manual_seed(5)
    NaturalCG(model.parameters()).step(
        [cross_entropy(model, x[i : i + 4], y[i : i + 4]) for i in range(0, 12, 4)]
    )
    assert torch.equal(torch.rand(3), expected)
    for mine, plain in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(mine, plain)


def test_gradients_are_the_mean():
    x, y = data()
    model = make_model()
    optimizer = NaturalCG(model.parameters(), max_backtracks=0)
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))

    def closure(part):
        def run():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[part]), y[part])
            loss.backward()
            return loss

        return run

    optimizer.step([closure(slice(0, 6)), closure(slice(6, 12))])
    for p, g in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("writes", ["one buffer for all", "its batch", "a mean", "into its output"])
@pytest.mark.parametrize("curvature", ["list", "curvature closure"])
def test_closures_that_write_in_place(writes, curvature):
    """Each runs again after the others have written, and is the function that it was."""

    def forms(model, x, y, *, in_place):
        buffer, mean = torch.empty(6, 3), torch.zeros(3)

        def closure(i):
            batch, target = x[i].clone(), y[i]

            def run():
                match writes if in_place else "":
                    case "one buffer for all":
                        return F.cross_entropy(model(buffer.copy_(batch)), target)
                    case "its batch":
                        return F.cross_entropy(model(batch.sub_(batch.mean())), target)
                    case "a mean":
                        mean.copy_(batch.mean(0))
                        return F.cross_entropy(model(batch - mean), target)
                    case "into its output":
                        return F.cross_entropy(model(batch).mul_(2), target)
                shifted = {
                    "one buffer for all": batch,
                    "its batch": batch - batch.mean(),
                    "a mean": batch - batch.mean(0),
                }
                z = model(shifted.get(writes, batch))
                return F.cross_entropy(2 * z if writes == "into its output" else z, target)

            return run

        return [closure(i) for i in range(3)]

    x, y = torch.randn(3, 6, 3), torch.randint(0, 2, (3, 6))
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [NaturalCG(model.parameters()) for model in models]
    for _ in range(3):
        for in_place, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            own = forms(model, x, y, in_place=bool(in_place))
            if curvature == "list":
                optimizer.step(own)
            else:
                optimizer.step(own[0], curvature_closure=own[1:])
            assert optimizer.last_step.accepted
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)
