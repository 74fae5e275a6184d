"""Closures whose curvature lives at a model's outputs, with the dense matrices that it should be."""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.problems import (
    BATCH,
    FAMILIES,
    dense_fisher,
    dense_gauss_newton,
    flat_function,
    flatten,
    make_model,
)
from ngd_optim import least_squares

FORMS = ["least_squares", "cross_entropy", "class_weights", "mse", "normal"]


class Problem:
    """A closure, with its gradient and its curvature as a dense matrix."""

    def __init__(self, form, theta=None):
        torch.manual_seed(1)
        self.model, x = make_model("mlp", 3 if form != "normal" else 4)
        if theta is not None:
            nn.utils.vector_to_parameters(theta, self.model.parameters())
        self.output = flat_function(self.model, x)
        self.theta = flatten(self.model.parameters())
        y = torch.randn(BATCH, 3, dtype=torch.float64)
        labels = torch.arange(BATCH) % 3
        if form == "normal":
            family = FAMILIES["normal"]
            ones = torch.ones(BATCH, 2, dtype=torch.float64)
            self.loss = lambda z: -family.predict(z).log_prob(ones).mean()

            def closure():
                prediction = family.predict(self.model(x))
                return -prediction.log_prob(ones).mean(), prediction

            self.closure = closure
            self.curvature = dense_fisher(self.output, self.theta, family.predict)
        else:
            losses = {
                "least_squares": lambda z: least_squares(
                    z[:, :2] - y[:, :2], z[:, 2].sin(), weights=(2.0, 0.3)
                ),
                "cross_entropy": lambda z: F.cross_entropy(z, labels),
                "class_weights": lambda z: F.cross_entropy(z, labels, y[0].abs()),
                "mse": lambda z: F.mse_loss(z, y),
            }
            self.loss = losses[form]
            self.closure = lambda: self.loss(self.model(x))
            inner = (
                (lambda z: torch.cat([z[:, :2], z[:, 2:].sin()], 1))
                if form == "least_squares"
                else (lambda z: z)
            )
            outer = (
                self.loss
                if form != "least_squares"
                else (lambda z: least_squares(z[:, :2] - y[:, :2], z[:, 2], weights=(2.0, 0.3)))
            )
            self.curvature = dense_gauss_newton(lambda t: inner(self.output(t)), self.theta, outer)
        self.gradient = torch.func.grad(lambda t: self.loss(self.output(t)))(self.theta)
