"""Which tensors the engine reads without asking what they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PLAIN", "why_not_plain"]

PLAIN = (Tensor, nn.Parameter)


def why_not_plain(x: Any) -> str | None:
    """What x is if it is no dense tensor whose sizes are numbers: "a list", "nested", "torch.sparse_coo", …"""
    if type(x) not in PLAIN:
        return f"a {type(x).__name__}"
    if x.is_nested:
        return "nested"
    if x.layout is not torch.strided:
        return str(x.layout)
    return "traced by torch.jit" if torch.jit.is_tracing() else None
