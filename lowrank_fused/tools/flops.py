"""Floating-point operations of our operators, for PyTorch's FlopCounterMode, which cannot see into them.

    with FlopCounterMode(custom_mapping=FORMULAS) as counter:
        model(x).sum().backward()

As PyTorch's own formulas do, these count the products: two operations for each multiplication. They are not registered
when the package is imported, because `torch.utils.flop_counter` imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import ops
from ..factors import weight_factor

__all__ = ["FORMULAS"]

Shape = Sequence[int]


def _core_flops(m: int, core: Shape | None, core_kind: str) -> int:
    """s Cᵀ; the other cores are no products."""
    return 2 * m * core[0] * core[1] if core is not None and core_kind == "dense" else 0


def _forward(
    x: Shape, weight: Shape, a: Shape, b: Shape, core: Shape | None, *_: Any, core_kind: str, **__: Any
) -> int:
    """x Wᵀ, drop(x) Aᵀ, v Bᵀ."""
    (m, k), n = x, weight[0]
    return 2 * m * (n * k + k * a[0] + n * b[1]) + _core_flops(m, core, core_kind)


def _add(y: Shape, x: Shape, a: Shape, b: Shape, core: Shape | None, *_: Any, core_kind: str, **__: Any) -> int:
    """drop(x) Aᵀ, v Bᵀ."""
    m, k = x
    return 2 * m * (k * a[0] + y[1] * b[1]) + _core_flops(m, core, core_kind)


def _backward(
    dy: Shape,
    x: Shape | None,
    weight: Shape | None,
    a: Shape,
    b: Shape,
    core: Shape | None,
    *_: Any,
    core_kind: str,
    wants: Sequence[bool],
    **__: Any,
) -> int:
    """dy B, unless B alone is trained; dyᵀ v; dsᵀ drop(x); dy W, if there is a W, and ds A."""
    wants_x, wants_a, wants_b, wants_core, _bias = wants
    (m, n), k = dy, a[1]
    down = 2 * m * n * b[1]
    through_core = _core_flops(m, core, core_kind)
    return (
        down * (wants_x or wants_a or wants_core)
        + through_core * (wants_x or wants_a)
        + (down + through_core) * wants_b
        + through_core * wants_core
        + 2 * m * a[0] * k * wants_a
        + 2 * m * k * (a[0] + (0 if weight is None else n)) * wants_x
    )


def _weight_factor(a: Shape, w: Shape, *_: Any, **__: Any) -> int:
    """A W, and its transpose backward."""
    return 2 * a[0] * w[0] * w[1]


def _weight_factor_grad(dh: Shape, kept: Shape, w: Shape, *_: Any, **__: Any) -> int:
    return 2 * dh[0] * w[0] * w[1]


def _packet(operator: Any) -> Any:
    return operator.overloadpacket


FORMULAS: dict[Any, Callable[..., int]] = {
    _packet(ops.forward_op): _forward,
    _packet(ops.add_op): _add,
    _packet(ops.backward_op): _backward,
    _packet(weight_factor.weight_factor_op): _weight_factor,
    _packet(weight_factor.weight_factor_grad_op): _weight_factor_grad,
}
