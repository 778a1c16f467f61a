"""The engine as two operators of torch.library: schema, fake implementation, CPU and CUDA implementations.

`lowrank_fused::forward` and `lowrank_fused::backward` are pure functions of their arguments (the dropout seed is
one of them) and know no autograd; `linear.py` puts an autograd Function above them. Optional results that were not
asked for come back as empty tensors, since an operator's outputs are never None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import define
from .routes import implementation
from .routes.problem import Options, Saved

__all__ = ["backward", "forward"]


def _readable(rows: Tensor) -> Tensor:
    """Rows without gaps for the CPU's 16-bit products, which read what lies in the gaps: NaN there came out in y."""
    gaps = rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and not rows.is_contiguous()
    return rows.contiguous() if gaps else rows


def _forward(x, weight, a, b, core, bias, seed, *, scale, core_kind, dropout_p, wants, route):
    options = Options(scale, core_kind, dropout_p, *wants)
    x = _readable(x)
    y, saved = implementation(route, x).forward(x, weight, a, b, core, bias, seed, options)
    return y, _or_empty(saved.s if options.keeps_s else None, x), _or_empty(_kept_mask(saved, options), x)


def _kept_mask(saved: Saved, options: Options) -> Tensor | None:
    return saved.mask if options.keeps_mask else None


def _forward_fake(x, weight, a, b, core, bias, seed, *, scale, core_kind, dropout_p, wants, route):
    options = Options(scale, core_kind, dropout_p, *wants)
    m, k = x.shape
    s = x.new_empty(m, a.shape[0]) if options.keeps_s else None
    mask = x.new_empty(m, (k + 7) // 8, dtype=torch.uint8) if dropout_p and options.keeps_mask else None
    return x.new_empty(m, weight.shape[0]), _or_empty(s, x), _or_empty(mask, x)


def _backward(dy, x, weight, a, b, core, s, mask, *, scale, core_kind, dropout_p, wants, route):
    options = Options(scale, core_kind, dropout_p, *wants)
    dy = _readable(dy)
    grads = implementation(route, dy).backward(dy, x, weight, a, b, core, Saved(s, mask), options)
    leaves = ((grads.a, a), (grads.b, b), (grads.core, core))
    small = [_or_empty(None if g is None else g.to(leaf.dtype).contiguous(), dy) for g, leaf in leaves]
    return _or_empty(grads.x, dy), *small, _or_empty(grads.bias, dy)


def _backward_fake(dy, x, weight, a, b, core, s, mask, *, scale, core_kind, dropout_p, wants, route):
    o = Options(scale, core_kind, dropout_p, *wants)
    return (
        _or_empty(dy.new_empty(dy.shape[0], weight.shape[1]) if o.wants_x else None, dy),
        *(
            _or_empty(torch.empty_like(leaf, memory_format=torch.contiguous_format) if wanted else None, dy)
            for leaf, wanted in ((a, o.wants_a), (b, o.wants_b), (core, o.wants_core))
        ),
        _or_empty(dy.new_empty(weight.shape[0]) if o.wants_bias else None, dy),
    )


def _or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if value is None else value


forward = define(
    "forward(Tensor x, Tensor weight, Tensor a, Tensor b, Tensor? core, Tensor? bias, Tensor? seed, *, "
    "float scale, str core_kind, float dropout_p, bool[] wants, str route) -> (Tensor y, Tensor s, Tensor mask)",
    _forward,
    _forward_fake,
)
backward = define(
    "backward(Tensor dy, Tensor? x, Tensor weight, Tensor a, Tensor b, Tensor? core, Tensor? s, Tensor? mask, *, "
    "float scale, str core_kind, float dropout_p, bool[] wants, str route) "
    "-> (Tensor dx, Tensor da, Tensor db, Tensor dcore, Tensor dbias)",
    _backward,
    _backward_fake,
)
