"""A small regression that takes several steps, for tests of the whole optimizer."""

import torch
import torch.nn.functional as F

from helpers.models import mlp
from helpers.problems import flatten


class Task:
    """Its data, model and closure."""

    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(12, 3, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randn(12, 2, generator=generator, dtype=torch.float64).to(dtype)
        self.model = mlp(3, 4, 2).to(dtype)

    def closure(self):
        return F.mse_loss(self.model(self.x), self.y)

    @property
    def theta(self):
        return flatten(self.model.parameters())


def have_equal_parameters(a, b):
    return all(
        torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True)
    )


def train(task, optimizer, steps):
    """Take the steps, and return their reports."""
    reports = []
    for _ in range(steps):
        optimizer.step(task.closure)
        reports.append(optimizer.last_step.as_dict())
    return reports
