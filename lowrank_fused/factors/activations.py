"""Elementwise activations by name, as functions on a factor: transformers' names, and the sine.

All of transformers' that hold no trained values of their own. `add_activation` puts another one beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..registry import did_you_mean

__all__ = ["Activation", "activation", "activation_names", "add_activation"]

Activation = Callable[[Tensor], Tensor]

_gelu_tanh = partial(F.gelu, approximate="tanh")


def _linear(z: Tensor) -> Tensor:
    return z


def _laplace(z: Tensor) -> Tensor:
    """The distribution function of a normal variable with mean √½ and variance 1 / 4π, which is close to relu²."""
    mean, deviation = 0.707107, 0.282095
    return 0.5 * (1.0 + torch.erf((z - mean) / (deviation * math.sqrt(2.0))))


def _quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(1.702 * z)


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_10": lambda z: F.gelu(z).clamp(-10.0, 10.0),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": _linear,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": torch.sin,
    "sqrtsoftplus": lambda z: F.softplus(z).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Activation:
    """The activation of that name; ValueError with the nearest name otherwise."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; {did_you_mean(str(name), _ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def activation_names() -> list[str]:
    """All names, in alphabetical order."""
    return sorted(_ACTIVATIONS)


def add_activation(name: str, function: Activation) -> None:
    """Make an elementwise, differentiable function usable by name, in configs and saved adapters too.

    Whoever loads such an adapter has to add it first. ValueError if the name is taken, or if the function does not
    keep the shape of what it is given.
    """
    if name in _ACTIVATIONS:
        raise ValueError(f"the activation {name!r} exists already; choose another name")
    probe = torch.linspace(-1.0, 1.0, 6).view(2, 3)
    got = function(probe)
    if not isinstance(got, Tensor) or got.shape != probe.shape:
        shape = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(f"an activation maps a tensor elementwise; given one of shape [2, 3] it returned {shape}")
    _ACTIVATIONS[name] = function
