"""A critic that is a chain of layers: its loss and derivatives, bit for bit as autograd computes them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import Tensor, nn

_aten = torch.ops.aten


def _relu_backward(gradient: Tensor, result: Tensor) -> Tensor:
    return _aten.threshold_backward(gradient, result, 0)


_ACTIVATIONS = {
    nn.Tanh: (torch.tanh, _aten.tanh_backward.default),
    nn.ReLU: (torch.relu, _relu_backward),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Linear(NamedTuple):
    """A layer ``x ↦ x Wᵀ + b``."""

    weight: Tensor
    bias: Tensor


class Activation(NamedTuple):
    """A function of each element, and ``gradient, result ↦ gradient``."""

    forward: Any
    backward: Any


class ChainLoss:
    """``mean (values − returns)²``, which can do what is asked of a loss.

    Args:
        layers: of the critic.
        x: their input, ``(n, features)``.
        returns: ``(n,)``.
    """

    def __init__(self, layers: Sequence[Linear | Activation], x: Tensor, returns: Tensor) -> None:
        self._layers = layers
        self._returns = returns
        self._passed = [x]  # what comes into each layer, and out of the last one
        with torch.no_grad():
            for layer in layers:
                is_linear = isinstance(layer, Linear)
                x = F.linear(x, *layer) if is_linear else layer.forward(x)
                self._passed.append(x)
            self._loss = F.mse_loss(x.flatten(), returns)

    def item(self) -> float:
        """The loss."""
        return self._loss.item()

    @torch.no_grad()
    def backward(self) -> None:
        """Set ``.grad`` of weights and biases."""
        values = self._passed[-1]
        one = torch.ones_like(self._loss)
        gradient = _aten.mse_loss_backward(one, values.flatten(), self._returns, 1).view_as(values)
        for i in reversed(range(len(self._layers))):
            layer = self._layers[i]
            if isinstance(layer, Activation):
                gradient = layer.backward(gradient, self._passed[i + 1])
                continue
            layer.weight.grad = gradient.t().mm(self._passed[i])
            layer.bias.grad = gradient.sum(0)
            if i:
                gradient = gradient.mm(layer.weight)


class Chain:
    """The critic of a policy of Stable-Baselines3.

    Args:
        policy: whose critic it is.
        layers: of that.
    """

    def __init__(self, policy: Any, layers: Sequence[Linear | Activation]) -> None:
        self._policy = policy
        self._layers = layers

    @classmethod
    def of(cls, policy: Any) -> "Chain | None":
        """That of a policy; None where it is more than a chain, or more than torch's own code sees to it."""
        is_plain = (
            type(policy).predict_values is ActorCriticPolicy.predict_values
            and type(policy).extract_features is ActorCriticPolicy.extract_features
            and vars(policy).keys().isdisjoint(("predict_values", "extract_features"))
            and type(policy.vf_features_extractor) is FlattenExtractor
            and type(policy.mlp_extractor) is MlpExtractor
            and type(policy.mlp_extractor.value_net) is nn.Sequential
            and not torch.is_autocast_enabled("cpu")
        )
        if not is_plain:
            return None
        modules = [
            policy.vf_features_extractor,
            policy.mlp_extractor,
            policy.mlp_extractor.value_net,
            *policy.mlp_extractor.value_net,
            policy.value_net,
        ]
        if any(getattr(module, name) for module in modules for name in _HOOKS):
            return None
        layers = list(_read(modules[3:]))
        return None if None in layers else cls(policy, layers)  # pyright: ignore[reportArgumentType]

    def loss(self, observations: Any, returns: Tensor) -> ChainLoss:
        """That of the values of some observations."""
        policy = self._policy
        seen: Any = preprocess_obs(
            observations, policy.observation_space, normalize_images=policy.normalize_images
        )
        return ChainLoss(self._layers, seen.flatten(1), returns)


def _read(modules: Sequence[nn.Module]) -> Iterator[Linear | Activation | None]:
    """The layers, None for those of other kinds."""
    for module in modules:
        if type(module) is nn.Linear and module.bias is not None:
            parameters = (module.weight, module.bias)
            are_plain = all(
                type(p) is nn.Parameter
                and p.requires_grad
                and not p._backward_hooks
                and p.dtype == torch.float32
                and p.device.type == "cpu"
                for p in parameters
            )
            yield Linear(*parameters) if are_plain else None
        elif type(module) in _ACTIVATIONS and not getattr(module, "inplace", False):
            yield Activation(*_ACTIVATIONS[type(module)])
        else:
            yield None
