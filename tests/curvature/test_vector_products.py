"""Forward mode where something watches each operation: zeros without memory must not reach it.

The cases run in a process of their own, which such zeros would end.
"""

import pytest
from helpers.scripts import run_python

LOSSES = [
    "F.mse_loss(z, t, reduction=r)",
    "F.l1_loss(z, t, reduction=r)",
    "F.smooth_l1_loss(z, t, reduction=r)",
    "F.cross_entropy(z, y, reduction=r)",
    "F.cross_entropy(z, t.softmax(1), reduction=r)",
    "F.binary_cross_entropy_with_logits(z, b, reduction=r)",
    "F.binary_cross_entropy(z.sigmoid(), b, reduction=r)",
    "F.kl_div(z.log_softmax(1), t.softmax(1), reduction=r)",
    "F.poisson_nll_loss(z, b, reduction=r)",
    "F.gaussian_nll_loss(z, t, z.exp(), reduction=r)",
    "F.cosine_embedding_loss(z, t, b[:, 0] * 2 - 1, reduction=r)",
    "F.triplet_margin_loss(z, t, b, reduction=r)",
]

SCRIPT = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from ngd_optim import NaturalCG, linearize

class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {{}}))

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
x, t, y = torch.randn(6, 4), torch.randn(6, 3), torch.randint(0, 3, (6,))
b = torch.randint(0, 2, (6, 3)).double()
losses = [{losses}]
start = [p.detach().clone() for p in model.parameters()]

for loss in losses:
    for r in ("sum", "mean"):
        closure = lambda: loss(model(x), r)
        products = []
        for backend in ("double-backward", "torch.func"):
            with Watching():
                point = linearize(
                    closure, model.parameters(), curvature="hessian", backend=backend
                )
                v = torch.linspace(-1, 1, len(point.gradient))
                products.append(point.curvature(v))
                NaturalCG(
                    model.parameters(), curvature="hessian", backend=backend, max_kl=1e-4
                ).step(closure)
            with torch.no_grad():
                for p, old in zip(model.parameters(), start):
                    p.copy_(old)
        torch.testing.assert_close(*products)
print("alive")
"""


@pytest.mark.parametrize("part", range(0, len(LOSSES), 3))
def test_hessians_are_right_under_a_dispatch_mode(part):
    losses = ", ".join(f"lambda z, r: {loss}" for loss in LOSSES[part : part + 3])
    assert "alive" in run_python("-c", SCRIPT.format(losses=losses))
