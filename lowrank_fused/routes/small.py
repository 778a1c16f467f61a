"""Calls so small that a CPU spends their time on Python: plain PyTorch, with its own autograd, is fastest there.

What the routes save grows with x and y; what they cost besides, an autograd Function and a second way through Python,
does not. Both were measured equal where x and y have one to one and a half mebibytes together; with dropout, whose
masks cost the same in all dtypes, where they have about 200,000 elements.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from ..plain import why_not_plain
from .cores import core_forward

__all__ = ["ENVIRONMENT", "WITH_DROPOUT", "eager", "is_small", "without_eager"]

# Bytes of x and y from which on a call is not small, with dropout eight for every element; 0 leaves none to eager.
ENVIRONMENT = "LOWRANK_FUSED_SMALL"
_DEFAULT = 3 << 19
WITH_DROPOUT = 8


def _limit() -> int:
    given = os.environ.get(ENVIRONMENT, "")
    try:
        return int(given) if given else _DEFAULT
    except ValueError:
        raise ValueError(f"{ENVIRONMENT} must be a number of bytes, got {given!r}") from None


LIMIT = _limit()


def is_small(x: Tensor, n: int, drops: bool) -> bool:
    """Whether eager is fastest for x [..., K] and y [..., N]: on a CPU, and below the limit."""
    if why_not_plain(x) is not None or not x.is_cpu:
        return False
    k = x.shape[-1]
    return x.numel() * (k + n) * (WITH_DROPOUT if drops else x.element_size()) < k * LIMIT


@contextmanager
def without_eager() -> Iterator[None]:
    """Inside, every call takes a route however small it is: for checks that need few tokens. Not for many threads."""
    global LIMIT
    before, LIMIT = LIMIT, 0
    try:
        yield
    finally:
        LIMIT = before


def eager(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    bias: Tensor | None,
    scale: float,
    kind: str,
    dropout_p: float,
) -> Tensor:
    """x Wᵀ + bias + scale · core(drop(x) Aᵀ) Bᵀ in the fewest operators and x's dtype, with PyTorch's own mask."""
    s = F.linear(F.dropout(x, dropout_p) if dropout_p else x, a.to(x.dtype))
    if core is not None:
        s = core_forward(s.view(-1, a.shape[0]), kind, core).view(*s.shape[:-1], b.shape[1])
    return torch.add(F.linear(x, weight, bias), F.linear(s, b.to(x.dtype)), alpha=scale)
