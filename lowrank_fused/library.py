"""Our operators in torch.library: a schema, one implementation for CPU and CUDA, one that only makes shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["LIBRARY", "define"]

LIBRARY = torch.library.Library("lowrank_fused", "DEF")


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
