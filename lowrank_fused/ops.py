"""The engine as operators of torch.library: schema, fake implementation, CPU and CUDA implementations.

`lowrank_fused::forward`, `lowrank_fused::add_` (for a product that somebody else computed, in place) and
`lowrank_fused::backward` are functions of their arguments alone (what the dropout mask comes from is one of them) and
know no autograd; `linear.py` and `add.py` put autograd Functions above them. Their route may be "auto". Optional
results that were not asked for come back as empty tensors, since an operator's outputs are never None; nor do they
alias an argument, so a mask that was given does not come back.

The functions `forward`, `add_` and `backward` here are what calls them, or their implementation where nobody watches.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .library import define, is_watched
from .routes import choose, implementation
from .routes.problem import NOWHERE, Grads, Into, Options, Saved
from .routes.rows import readable
from .target import target_of

__all__ = ["add_", "add_op", "backward", "backward_op", "forward", "forward_op"]


def _forward(x, weight, a, b, core, bias, drop, *, scale, core_kind, dropout_p, wants, route):
    o = Options(scale, core_kind, dropout_p, *wants)
    x = readable(x)
    route = _named(route, "forward", x, weight.shape[0], a, o)
    y, saved = implementation(route, x).forward(x, weight, a, b, core, bias, drop, o)
    return y, *_kept(saved, drop, x, o)


def _forward_fake(x, weight, a, b, core, bias, drop, *, scale, core_kind, dropout_p, wants, route):
    o = Options(scale, core_kind, dropout_p, *wants)
    return x.new_empty(x.shape[0], weight.shape[0]), *_kept_fake(x, a, drop, o, route)


def _add(y, x, a, b, core, drop, *, scale, core_kind, dropout_p, wants, route):
    o = Options(scale, core_kind, dropout_p, *wants)
    x = readable(x)
    route = _named(route, "forward", x, y.shape[1], a, o)
    return _kept(implementation(route, x).add_forward(y, x, a, b, core, drop, o), drop, x, o)


def _add_fake(y, x, a, b, core, drop, *, scale, core_kind, dropout_p, wants, route):
    return _kept_fake(x, a, drop, Options(scale, core_kind, dropout_p, *wants), route)


def _named(route: str, direction: Literal["forward", "backward"], rows: Tensor, n: int, a: Tensor, o: Options) -> str:
    """The route by name: compiled graphs, which serve any number of tokens, leave "auto" to be chosen here."""
    if route != "auto":
        return route
    r, k = a.shape
    return choose(direction, rows.shape[0], n, k, r, rows.dtype, o.dropout_p > 0, target_of(rows.device))


def _draws(drop: Tensor | None, o: Options) -> bool:
    """Whether a mask is made here and needed again."""
    return drop is not None and drop.dtype != torch.uint8 and o.keeps_mask


def _kept(saved: Saved, drop: Tensor | None, x: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    return _or_empty(saved.s if o.keeps_s else None, x), _or_empty(saved.mask if _draws(drop, o) else None, x)


def _kept_fake(x: Tensor, a: Tensor, drop: Tensor | None, o: Options, route: str) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32) if route == "precise" else x.dtype
    s = x.new_empty(m, a.shape[0], dtype=dtype) if o.keeps_s else None
    mask = x.new_empty(m, (k + 7) // 8, dtype=torch.uint8) if _draws(drop, o) else None
    return _or_empty(s, x), _or_empty(mask, x)


def _backward(dy, x, weight, a, b, core, s, mask, *, scale, core_kind, dropout_p, wants, route):
    o = Options(scale, core_kind, dropout_p, *wants)
    route = _named(route, "backward", dy, dy.shape[1], a, o)
    grads = _gradients(dy, x, weight, a, b, core, Saved(s, mask), o, route)
    return tuple(_or_empty(grad, dy) for grad in (grads.x, grads.a, grads.b, grads.core, grads.bias))


def _gradients(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    saved: Saved,
    o: Options,
    route: str,
    into: Into = NOWHERE,
) -> Grads:
    """Those of the factors in the dtypes of their leaves."""
    dy = readable(dy)
    grads = implementation(route, dy).backward(dy, x, weight, a, b, core, saved, o, into)
    grads.a, grads.b, grads.core = _like(grads.a, a, into.a), _like(grads.b, b, into.b), _like(grads.core, core)
    return grads


def _like(grad: Tensor | None, leaf: Tensor | None, into: Tensor | None = None) -> Tensor | None:
    """In the leaf's dtype and, as autograd wants it, laid out as the leaf is; what that copies goes to `into`."""
    if grad is None or leaf is None or grad is into:
        return grad
    if grad.dtype == leaf.dtype and grad.stride() == leaf.stride():
        return grad
    if into is not None:
        return into.copy_(grad)
    grad = grad.to(leaf.dtype)
    return grad.contiguous() if leaf.is_contiguous() else torch.empty_like(leaf).copy_(grad)


def _backward_fake(dy, x, weight, a, b, core, s, mask, *, scale, core_kind, dropout_p, wants, route):
    o = Options(scale, core_kind, dropout_p, *wants)
    of_bias = torch.promote_types(dy.dtype, torch.float32) if route == "precise" else dy.dtype
    return (
        _or_empty(dy.new_empty(dy.shape[0], a.shape[1]) if o.wants_x else None, dy),
        *(
            _or_empty(torch.empty_like(leaf) if wanted else None, dy)
            for leaf, wanted in ((a, o.wants_a), (b, o.wants_b), (core, o.wants_core))
        ),
        _or_empty(dy.new_empty(dy.shape[1], dtype=of_bias) if o.wants_bias else None, dy),
    )


def _or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if value is None else value


forward_op = define(
    "forward(Tensor x, Tensor weight, Tensor a, Tensor b, Tensor? core, Tensor? bias, Tensor? drop, *, "
    "float scale, str core_kind, float dropout_p, bool[] wants, str route) -> (Tensor y, Tensor s, Tensor mask)",
    _forward,
    _forward_fake,
)
add_op = define(
    "add_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor? core, Tensor? drop, *, "
    "float scale, str core_kind, float dropout_p, bool[] wants, str route) -> (Tensor s, Tensor mask)",
    _add,
    _add_fake,
)
backward_op = define(
    "backward(Tensor dy, Tensor? x, Tensor? weight, Tensor a, Tensor b, Tensor? core, Tensor? s, Tensor? mask, *, "
    "float scale, str core_kind, float dropout_p, bool[] wants, str route) "
    "-> (Tensor dx, Tensor da, Tensor db, Tensor dcore, Tensor dbias)",
    _backward,
    _backward_fake,
)


def forward(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    bias: Tensor | None,
    drop: Tensor | None,
    o: Options,
    route: str,
) -> tuple[Tensor, Saved]:
    """y [M, N] and what backward needs, x [M, K]."""
    if is_watched(x, weight, a, b, core, bias, drop):
        y, s, mask = forward_op(x, weight, a, b, core, bias, drop, **_as_arguments(o), route=route)
        return y, _needed(s, mask, drop, o)
    x = readable(x)
    y, saved = implementation(route, x).forward(x, weight, a, b, core, bias, drop, o)
    return y, _needed(saved.s, saved.mask, drop, o)


def add_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    drop: Tensor | None,
    o: Options,
    route: str,
) -> Saved:
    """The low-rank term added to y [M, N] in place, and what backward needs."""
    if is_watched(y, x, a, b, core, drop):
        s, mask = add_op(y, x, a, b, core, drop, **_as_arguments(o), route=route)
        return _needed(s, mask, drop, o)
    x = readable(x)
    saved = implementation(route, x).add_forward(y, x, a, b, core, drop, o)
    return _needed(saved.s, saved.mask, drop, o)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    core: Tensor | None,
    saved: Saved,
    o: Options,
    route: str,
    into: Into = NOWHERE,
) -> Grads:
    """The gradients that `o` asks for, those of the factors in `into` or in tensors of their own."""
    if is_watched(dy, x, weight, a, b, core, *saved):
        found = backward_op(dy, x, weight, a, b, core, *saved, **_as_arguments(o), route=route)
        return Grads(*(grad if wanted else None for grad, wanted in zip(found, o.wants, strict=True)))
    return _gradients(dy, x, weight, a, b, core, saved, o, route, into)


def _as_arguments(o: Options) -> dict[str, Any]:
    return {"scale": o.scale, "core_kind": o.core_kind, "dropout_p": o.dropout_p, "wants": o.wants}


def _needed(s: Tensor | None, mask: Tensor | None, drop: Tensor | None, o: Options) -> Saved:
    """s and the mask's bits, each only where `o` keeps it; bits that were given are handed on."""
    if drop is None or not o.keeps_mask:
        mask = None
    elif drop.dtype == torch.uint8:
        mask = drop
    return Saved(s if o.keeps_s else None, mask)
