"""Random starts of LoRA with W untouched (Hayou et al., 2024, arXiv 2406.08447, for Init[A] and Init[B]).

Init[A] draws A with variance of order 1/in and sets B to zero, Init[B] draws B with variance of order 1/r and
sets A to zero. Both start as the base layer. Init[A] stands larger learning rates, which is why it is the
usual choice.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.init import kaiming_uniform_, normal_

from . import compute_dtype, initializer

__all__ = ["gaussian", "init_a", "init_b", "kaiming", "random"]


def _zeros(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    a = weight.new_zeros(rank, weight.shape[1], dtype=compute_dtype(weight))
    return a, weight.new_zeros(weight.shape[0], rank, dtype=a.dtype)


@initializer("kaiming")
def kaiming(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Init[A], LoRA's usual start: A uniform in ±1/√in (variance 1/(3·in)), B zero."""
    a, b = _zeros(weight, rank)
    return kaiming_uniform_(a, a=math.sqrt(5)), b


@initializer("init_a")
def init_a(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Init[A] of the paper: A ~ N(0, 1/in), so that A x keeps the size of x's entries; B zero."""
    a, b = _zeros(weight, rank)
    return normal_(a, std=weight.shape[1] ** -0.5), b


@initializer("init_b")
def init_b(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Init[B] of the paper: B ~ N(0, 1/r), A zero."""
    a, b = _zeros(weight, rank)
    return a, normal_(b, std=rank**-0.5)


@initializer("gaussian")
def gaussian(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """What PEFT calls gaussian: A ~ N(0, 1/r²), B zero. For the paper's N(0, 1/in) take "init_a"."""
    a, b = _zeros(weight, rank)
    return normal_(a, std=1.0 / rank), b


@initializer("random")
def random(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Both factors uniform in ±1/√fan_in: what PEFT means by False. Does not start as the base layer."""
    a, b = _zeros(weight, rank)
    return kaiming_uniform_(a, a=math.sqrt(5)), kaiming_uniform_(b, a=math.sqrt(5))
