"""What the public functions of the engine share: checks of their operands, and the call of its operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .dropout import draw_seed, pack_any
from .errors import UnsupportedError, failure_of
from .flat_gradient import place_of
from .plain import why_not_plain
from .routes import choose, unavailable
from .routes.problem import NOWHERE, Grads, Into, Options, Saved
from .routes.small import is_small
from .target import target_of
from .terms import Core, Gate

__all__ = [
    "check_dropout",
    "check_dtypes",
    "check_factors",
    "check_input",
    "core_tensor",
    "guarded",
    "mask_source",
    "options_of",
    "routes_for",
    "rows_of",
    "run_backward",
    "save_for_backward",
]


def guarded(function: Callable[..., Any], *operands: Any, where: torch.device, route: str, label: str | None) -> Any:
    """function(*operands), autocast off: it would round the fp32 sums of gradients.

    `label` is put on whatever goes wrong in a launch; out of memory stays what it is.
    """
    try:
        if not torch.is_autocast_enabled(where.type):
            return function(*operands)
        with torch.autocast(where.type, enabled=False):
            return function(*operands)
    except Exception as error:
        failure = failure_of(f"route {route!r}", error, label, "addmm")
        if failure is error:
            raise
        raise failure from error


def rows_of(x: Tensor) -> Tensor:
    """[..., K] -> [M, K]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def core_tensor(core: Core) -> Tensor | None:
    """The core as operators take it; a gate has one row per token."""
    return rows_of(core.g) if isinstance(core, Gate) else core


def check_input(x: Tensor) -> None:
    """A tensor with a shape. Of other classes and layouts the operators say themselves what they can't do."""
    if not isinstance(x, Tensor) or x.is_nested:
        raise TypeError(f"x must be an ordinary tensor, not {why_not_plain(x)}")


def check_dropout(dropout_p: float) -> None:
    """A probability that leaves something."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")


def mask_source(x: Tensor, dropout_p: float, seed: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """What the mask of drop(x) comes from: a seed, drawn if there is none, or the packed bits of a given mask."""
    if not dropout_p:
        return None
    if keep is not None:
        if keep.dtype != torch.bool or keep.shape != x.shape:
            raise ValueError(f"keep must be boolean in x's shape {list(x.shape)}, got {keep.dtype} {list(keep.shape)}")
        return pack_any(keep)
    return draw_seed(x.device) if seed is None else seed


def options_of(scale: float, kind: str, dropout_p: float, *operands: Tensor | None) -> Options:
    """The options of a call, with the gradients that x, a, b, core and bias want at the moment."""
    grad = torch.is_grad_enabled()
    return Options(scale, kind, dropout_p, *(grad and t is not None and t.requires_grad for t in operands))


def save_for_backward(
    ctx: Any,
    weight: Tensor | None,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    saved: Saved,
    o: Options,
) -> None:
    """Keep what the gradients asked for need."""
    ctx.save_for_backward(weight, x if o.keeps_x else None, a, b, core, *saved)
    ctx.options, ctx.places = o, (place_of(a), place_of(b))


def run_backward(ctx: Any, dy: Tensor) -> Grads:
    """The gradients of a call after `save_for_backward`, dx in the shape of x."""
    weight, x, a, b, core, s, mask = ctx.saved_tensors
    x = None if x is None else rows_of(x)
    o, places = ctx.options, ctx.places
    into = NOWHERE
    if places != (None, None):
        wants = zip(places, (o.wants_a, o.wants_b), strict=True)
        into = Into(*(place() if place is not None and wanted else None for place, wanted in wants))
    operands = (rows_of(dy), x, weight, a, b, core, Saved(s, mask), o, ctx.route, into)
    grads: Grads = guarded(ops.backward, *operands, where=dy.device, route=ctx.route, label=ctx.label)
    if grads.x is not None and dy.dim() != 2:
        grads.x = grads.x.view(*dy.shape[:-1], a.shape[1])
    return grads


def routes_for(
    x: Tensor,
    shape: tuple[int, int],
    a: Tensor,
    b: Tensor,
    dropout_p: float,
    route: str = "auto",
    precision: str = "fast",
    own_mask: bool = True,
) -> tuple[str, str]:
    """The routes that serve forward and backward of such a call on W of `shape` [N, K].

    A named route serves both or raises; but with precision "match" factors of fp32 beside a 16-bit x always take the
    route that does not round them. Inside torch.compile "auto" stays what it is. Small calls are "eager", if it is
    for us to draw the mask (`own_mask`).
    """
    if precision not in ("fast", "match"):
        raise ValueError(f"precision must be 'fast' or 'match', got {precision!r}")
    if precision == "match" and x.element_size() == 2 and torch.float32 in (a.dtype, b.dtype):
        return "precise", "precise"
    if route != "auto":
        if reason := unavailable(route, x.device, x.dtype):
            error = UnsupportedError if route in ("thin", "split") else ValueError
            raise error(f"route {route!r} cannot run: {reason}")
        return route, route
    if torch.compiler.is_compiling():
        return "auto", "auto"  # one graph serves any number of tokens; operators choose when it runs
    n, k = shape
    if own_mask and x.is_cpu and is_small(x, n, dropout_p > 0):
        return "eager", "eager"
    m = x.numel() // k if k else 0
    sizes = (m, n, k, a.shape[0], x.dtype, dropout_p > 0, target_of(x.device))
    return choose("forward", *sizes), choose("backward", *sizes)


def check_factors(
    x: Tensor,
    shape: tuple[int, int],
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    kind: str,
    others: dict[str, Tensor | None],
) -> None:
    """Shapes and devices of the low-rank part beside W of `shape` [N, K]; a message says what was expected."""
    n, k = shape
    if a.dim() != 2 or a.shape[1] != k:
        hint = "; did you pass its transpose?" if a.dim() == 2 and a.shape[0] == k else ""
        raise ValueError(f"a must be [rank, in_features] = [rank, {k}], got {list(a.shape)}{hint}")
    if b.dim() != 2 or b.shape[0] != n:
        hint = "; did you pass its transpose?" if b.dim() == 2 and b.shape[1] == n else ""
        raise ValueError(f"b must be [out_features, rank] = [{n}, rank], got {list(b.shape)}{hint}")
    ra, rb = a.shape[0], b.shape[1]
    if ra < 1 or rb < 1:
        raise ValueError(f"the rank must be at least 1, got a {list(a.shape)} and b {list(b.shape)}")
    if kind in ("none", "diag") and ra != rb:
        raise ValueError(f"a has rank {ra} but b has rank {rb}; only a dense core or a gate may change the rank")
    if core is not None and kind != "gate" and list(core.shape) != (expected := [rb, ra][-core.dim() :]):
        raise ValueError(f"a {kind} core must be {expected}, got {list(core.shape)}")
    if (
        core is not None
        and kind == "gate"
        and (core.numel() != x.numel() // k * core.shape[1] or core.shape[1] * ra != rb)
    ):
        raise ValueError(
            f"a gate must have a row per token and E columns with b of rank E · {ra}; got g {list(core.shape)}, "
            f"x {list(x.shape)}, b {list(b.shape)}"
        )
    for name in ("out", "col", "bias"):
        vector = others.get(name)
        if vector is not None and list(vector.shape) != [n]:
            raise ValueError(f"{name} must be [out_features] = [{n}], got {list(vector.shape)}")
    device = x.device
    for name, tensor in (("a", a), ("b", b), ("core", core), *others.items()):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {device}; move them to one device")


def check_dtypes(x: Tensor, a: Tensor, b: Tensor) -> None:
    """Factors in x's dtype, or fp32."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating-point, got {x.dtype}")
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name} must be {x.dtype} like x, or torch.float32, got {tensor.dtype}")
