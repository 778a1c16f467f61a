"""What counts as a linear layer that can carry an adapter, and why another does not."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["as_matrix", "is_conv1d", "is_linear_like", "parameters_of", "why_not_adaptable"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear with a transposed weight; imports nothing for it."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and type(module) is transformers.Conv1D


def is_linear_like(module: nn.Module) -> bool:
    """Whether a person would call this a linear layer, adaptable or not (quantised ones are subclasses)."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def parameters_of(linear: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias of an adaptable layer."""
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    assert weight is not None
    return weight, bias


def as_matrix(linear: nn.Module) -> Tensor:
    """The weight as [out, in]: Conv1D stores [in, out], of which this is a transposed view."""
    weight, _ = parameters_of(linear)
    return weight.t() if is_conv1d(linear) else weight


def why_not_adaptable(module: nn.Module, parent: nn.Module | None = None) -> str | None:
    """None if the module can carry an adapter, else the reason in words.

    `parent` is the module that holds it: some read their linears' weights instead of calling them, so an
    adapter would silently do nothing.
    """
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        return "its weight is parametrised (torch.nn.utils.parametrize); remove the parametrisation first"
    if type(module) is not nn.Linear and not is_conv1d(module):
        if isinstance(module, nn.Linear):
            return f"{kind} is a subclass of nn.Linear, perhaps quantised; only nn.Linear itself is known here"
        return f"{kind} is neither an nn.Linear nor a transformers Conv1D"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (accelerate's offloading does that)"
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        found = type(getattr(module, "weight", None)).__name__
        return f"its weight is a {found}, not a plain Parameter (quantised, sharded or normalised)"
    if weight.dim() != 2 or weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype} with shape {tuple(weight.shape)}, not a floating-point matrix"
    return _bypassed(module, parent)


def _bypassed(module: nn.Module, parent: nn.Module | None) -> str | None:
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"{type(parent).__name__} reads its weight instead of calling it"
    name = "" if parent is None else type(parent).__name__
    if "Mamba" in name and module is not getattr(parent, "in_proj", None):
        return f"{name} hands its weight to a fused kernel instead of calling it"
    return None
