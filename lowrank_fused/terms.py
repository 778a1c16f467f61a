"""Terms: what a method hands to the engine, and the closed set of cores.

    y = col · ( x Wᵀ + scale · out · core(drop(x) Aᵀ) Bᵀ ) + bias

A method turns its parameters into Terms with ordinary differentiable PyTorch; the engine turns Terms, x and W
into y and the gradients of every tensor in here. Whatever touches x, W or dy is the engine's; whatever touches
only small parameters is autograd's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Core", "Gate", "Terms", "core_kind"]


@dataclass(frozen=True)
class Gate:
    """Per-token gate over E experts that share A: v[t, e, :] = g[t, e] · s[t, :], so B is [N, E · Ra].

    `g` has the leading dimensions of x and E columns.
    """

    g: Tensor


# None: v = s. A vector [R]: v = s ∘ d. A matrix [Rb, Ra]: v = s Cᵀ. A Gate: see above.
Core = Tensor | Gate | None


@dataclass(frozen=True)
class Terms:
    """The low-rank part of one layer.

    Shapes: a [Ra, K], b [N, Rb], out [N], col [N]; core as described at `Core`. `scale` is a plain float: a
    trainable scale belongs into the core, where it costs nothing.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    core: Core = None
    out: Tensor | None = None
    col: Tensor | None = None


def core_kind(core: Core) -> str:
    """The name under which kernels and ops know a core: none, diag, dense or gate."""
    if core is None:
        return "none"
    if isinstance(core, Gate):
        return "gate"
    if isinstance(core, torch.Tensor) and core.dim() in (1, 2):
        return "diag" if core.dim() == 1 else "dense"
    got = f"a tensor of {core.dim()} dimensions" if isinstance(core, torch.Tensor) else type(core).__name__
    raise TypeError(f"core must be None, a vector [R], a matrix [Rb, Ra] or Gate(g), got {got}")
