"""The core between the factors, on [M, R] tensors: v = core(s) and its two gradients.

| kind  | v                     | ds           | dcore                |
|-------|-----------------------|--------------|----------------------|
| none  | s                     | gv           | –                    |
| diag  | s ∘ d                 | gv ∘ d       | Σ_t s ∘ gv           |
| dense | s Cᵀ                  | gv C         | gvᵀ s                |
| gate  | v_e = g_e s           | Σ_e g_e gv_e | dg_e = Σ_r s ∘ gv_e  |
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["core_forward", "core_grad", "core_input_grad"]


def core_forward(s: Tensor, kind: str, core: Tensor | None) -> Tensor:
    """v [M, Rb] from s [M, Ra]; s itself for kind "none"."""
    if core is None:
        return s
    core = core.to(s.dtype)
    if kind == "diag":
        return s * core
    if kind == "dense":
        return s @ core.t()
    return (core[:, :, None] * s[:, None, :]).flatten(1)


def core_input_grad(gv: Tensor, kind: str, core: Tensor | None) -> Tensor:
    """ds [M, Ra] from gv [M, Rb]; gv itself for kind "none"."""
    if core is None:
        return gv
    core = core.to(gv.dtype)
    if kind == "diag":
        return gv * core
    if kind == "dense":
        return gv @ core
    return torch.einsum("me,mer->mr", core, gv.unflatten(1, (core.shape[1], -1)))


def core_grad(gv: Tensor, s: Tensor, kind: str) -> Tensor:
    """dcore in the shape of the core, summed in fp32 or wider."""
    wide = torch.promote_types(gv.dtype, torch.float32)
    if kind == "diag":
        return (s.to(wide) * gv.to(wide)).sum(0)
    if kind == "dense":
        return (gv.t() @ s).to(wide)
    return torch.einsum("mr,mer->me", s.to(wide), gv.to(wide).unflatten(1, (-1, s.shape[1])))
