"""Our operators in torch.library: a schema, one implementation for CPU and CUDA, one that only makes shapes.

Compilers, tracers, profilers and dispatch modes have to see operators. A plain eager call may go to the implementation
directly (`is_watched`): the way through the dispatcher and back into Python costs as much as a small product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["LIBRARY", "define", "is_watched"]

LIBRARY = torch.library.Library("lowrank_fused", "DEF")

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None)})


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `lowrank_fused::<schema>` and return it.

    `function` serves both devices: which kernels run is decided inside. `fake` returns empty outputs of the right
    shapes and dtypes, for compilers and the meta device.
    """
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, function, device)
    torch.library.register_fake(f"lowrank_fused::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.lowrank_fused, name).default


def is_watched(*tensors: torch.Tensor | None) -> bool:
    """Whether somebody has to see the operator itself, or one of its tensors (the first is there) holds no memory."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled():
        return True
    if torch._C._are_functorch_transforms_active() or tensors[0].is_meta:  # type: ignore[union-attr]
        return True
    return not _PLAIN.issuperset(map(type, tensors))
