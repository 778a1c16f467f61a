"""Starting values: pure functions from a frozen weight to factors.

A LoRA initialiser takes (weight [out, in], rank, scale) and returns A [rank, in] and B [out, rank] in the
precision it computed in (at least float32). Those registered with `residual=True` do not start at zero: the
layer subtracts scale · B A from its base weight, so that it still starts as the original layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_fused.registry import Registry

__all__ = ["Initializer", "check_rank", "compute_dtype", "get", "initializer", "registry"]


class Initializer(NamedTuple):
    """A way to start LoRA's factors; `function(weight, rank, scale)` returns (A, B)."""

    function: Callable[..., tuple[Tensor, Tensor]]
    residual: bool


_INITIALIZERS: Registry[Initializer] = Registry("init_lora_weights", __name__)


def initializer(name: str, *, residual: bool = False) -> Callable:
    """Register a function as the LoRA initialiser of that name."""

    def register(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        _INITIALIZERS.add(name, Initializer(function, residual))
        return function

    return register


def registry() -> dict[str, Initializer]:
    """All LoRA initialisers by name."""
    return _INITIALIZERS.all()


def get(value: bool | str) -> Initializer:
    """The initialiser that a value of `init_lora_weights` names.

    As in PEFT, True is "kaiming" and False is "random"; a suffix "_niter_<n>" asks for n iterations of the
    fast decomposition of an initialiser that has one ("pissa_niter_4"). Names are not case-sensitive.
    """
    if isinstance(value, bool):
        return _INITIALIZERS.get("kaiming" if value else "random")
    if not isinstance(value, str):
        raise TypeError(f"init_lora_weights must be True, False or a name, got {value!r}")
    name, _, count = value.lower().partition("_niter_")
    found = _INITIALIZERS.get(name)
    if not count:
        return found
    if name != "pissa" or not count.isdigit():
        raise ValueError(f"init_lora_weights must be 'pissa_niter_<number>' for a fast SVD, got {value!r}")
    return Initializer(partial(found.function, niter=int(count)), found.residual)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The precision in which starting values of a weight are computed: float64 stays, all else is float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def check_rank(weight: Tensor, rank: int) -> None:
    """ValueError if a decomposition of the weight has fewer than `rank` directions."""
    if rank > min(weight.shape):
        out_features, in_features = weight.shape
        raise ValueError(f"rank {rank} is too large to decompose a weight [{out_features}, {in_features}]")
