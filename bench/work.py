"""Work of a forward and a backward pass, counted: operators that run, and multiplications in products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lowrank_fused import ops
from lowrank_fused.tools.flops import FORMULAS

__all__ = ["Work", "count_work"]

# Operators that compute nothing: views, and metadata.
_FREE = {
    "alias", "as_strided", "chunk", "detach", "expand", "lift_fresh", "permute", "select", "slice", "split", "squeeze",
    "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "empty", "empty_like",
    "new_empty", "split_with_sizes",
}  # fmt: skip


def _addmm(_: Any, p: Any, q: Any, **options: Any) -> int:
    return 2 * p[0] * p[1] * q[1]


# PyTorch's counter knows neither our operators nor the form of addmm that adds in place.
_MORE_FORMULAS = {**FORMULAS, torch.ops.aten.addmm_: _addmm}


@dataclass(frozen=True)
class Work:
    """Operators and floating-point operations of products, forward and backward."""

    forward_operators: int
    backward_operators: int
    forward_flops: int
    backward_flops: int


class _Operators(TorchDispatchMode):
    """Counts operators that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in _FREE:
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_work(forward: Callable[[Tensor], Tensor], x: Tensor, leaves: list[Tensor], dy: Tensor) -> Work:
    """Count forward(x) and its backward to `leaves`; what is computed once per step is computed before.

    The engine's two operators are looked into: what counts is what they call.
    """
    torch.autograd.grad(forward(x), leaves, dy, allow_unused=True)
    found = []
    with patch.object(ops, "is_watched", lambda *_: False):
        for counter in (_Operators, lambda: FlopCounterMode(display=False, custom_mapping=_MORE_FORMULAS)):
            with counter() as ahead:  # type: ignore[operator]
                y = forward(x)
            with counter() as behind:  # type: ignore[operator]
                torch.autograd.grad(y, leaves, dy, allow_unused=True)
            found.append((ahead, behind))
    (f_ops, b_ops), (f_flops, b_flops) = found
    return Work(f_ops.count, b_ops.count, f_flops.get_total_flops(), b_flops.get_total_flops())
