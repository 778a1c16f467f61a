"""Published fused LoRA kernels, called by their public functions where a user has installed them.

None is required and none is tried by default: a provider of this kind runs when it is asked for by name. Importing
unsloth patches torch and transformers for the rest of the process, so measure it in a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedError

__all__ = ["PUBLISHED", "published_forward", "why_not"]

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", float, float], Tensor]


@dataclass(frozen=True)
class Published:
    """Where the function lives, what it can do, how it is called, and where it comes from."""

    module: str
    function: str
    call: Callable[[Callable[..., Tensor]], Forward]
    url: str
    dropout: tuple[bool, bool]  # whether its training works without dropout, and with
    bias: bool


def _call_lorafusion(function: Callable[..., Tensor]) -> Forward:
    """It takes [batch, tokens, features] and an integer seed, here drawn from torch's generator on the host."""

    def forward(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, p: float) -> Tensor:
        seed = int(torch.randint(1 << 30, ()))
        y = function(x[None], weight, a, b, alpha=scale, seed=seed, dropout_p=p, linear_bias=bias)
        return y[0]

    return forward


def _call_unsloth(function: Callable[..., Tensor]) -> Forward:
    """An autograd function over [batch, tokens, features] and a weight that may be quantised (None: it is not)."""

    def forward(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, p: float) -> Tensor:
        return function.apply(x[None], weight, None, a, b, scale)[0]  # type: ignore[attr-defined]

    return forward


PUBLISHED: dict[str, Published] = {
    # Its backward reads the shape of the dropout mask, which is not there without dropout.
    "lorafusion": Published(
        "lorafusion.ops.lora_v1",
        "fused_linear_lora",
        _call_lorafusion,
        "https://github.com/CentML/lorafusion",
        dropout=(False, True),
        bias=True,
    ),
    "unsloth": Published(
        "unsloth.kernels.fast_lora",
        "LoRA_W",
        _call_unsloth,
        "https://github.com/unslothai/unsloth",
        dropout=(True, False),
        bias=False,
    ),
}


def why_not(name: str, device: torch.device, dropout_p: float, bias: bool) -> str | None:
    """Why these published kernels cannot serve such a layer here, in a line; None where they can be tried."""
    kernels = PUBLISHED[name]
    package = kernels.module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed ({kernels.url})"
    if device.type != "cuda":
        return f"{package} needs a CUDA device"
    if not kernels.dropout[dropout_p > 0]:
        return f"{package} does not train {'with' if dropout_p else 'without'} dropout"
    return f"{package} takes no bias" if bias and not kernels.bias else None


def published_forward(name: str, device: torch.device, dropout_p: float, bias: bool) -> Forward:
    """The installed function with this package's signature. Raises UnsupportedError with the reason it cannot run."""
    if reason := why_not(name, device, dropout_p, bias):
        raise UnsupportedError(f"provider {name!r} cannot run here: {reason}")
    kernels = PUBLISHED[name]
    try:
        function = getattr(importlib.import_module(kernels.module), kernels.function)
    except Exception as failure:  # packages that patch others fail in any way
        raise UnsupportedError(
            f"provider {name!r} cannot run here: importing {kernels.module}.{kernels.function} "
            f"failed: {type(failure).__name__}: {failure}"
        ) from failure
    return kernels.call(function)
