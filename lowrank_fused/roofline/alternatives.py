"""The layer as others compute it, pass by pass: the frozen linear, PEFT's arithmetic, torch.compile of it, `addmm_`,
published kernels.

Nothing here is recorded from their code: each list is the kernels that the arithmetic comes to on a GPU, every one
with what it reads and writes.
"""

from __future__ import annotations

from dataclasses import replace

from .passes import Pass, Step, Tensors

__all__ = ["added_dx", "addmm", "compiled", "eager", "eager_fp32", "frozen", "limit", "lorafusion"]


def frozen(t: Tensors, dropout: bool) -> Step:
    """The linear layer without an adapter."""
    return Step([t.does("x Wᵀ", "x W", "y", t.main)], [t.does("dy W", "dy W", "dx", t.main)])


def limit(t: Tensors, dropout: bool) -> Step:
    """What no implementation can go below: operands read once, results written once, adapter's arithmetic included."""
    return Step(
        [t.does("everything", "x W A B", "y", t.main + t.down + t.up)],
        [t.does("everything", "dy W x A B", "dx dA dB", t.main + 2 * (t.down + t.up))],
    )


def added_dx(t: Tensors) -> Pass:
    """Autograd adds the input gradients of two layers that read the same x."""
    return t.does("dx + dx", "dx dx", "dx")


def _eager_backward(t: Tensors) -> list[Pass]:
    """Up to the gradient of what A multiplies, which is dx0."""
    return [
        t.does("scale · dy", "dy", "du"),
        t.does("du B", "du B", "ds", t.up),
        t.does("duᵀ s", "du s", "dB", t.up),
        t.does("ds A", "ds A", "dx0", t.down),
    ]


def eager(t: Tensors, dropout: bool) -> Step:
    """PEFT's arithmetic, operation by operation, with adapters in bf16: 5 + 7 launches, 6 + 8 with dropout."""
    seen = "dropped" if dropout else "x"
    drop = [t.does("drop(x)", "x", "dropped keep")]
    undrop = [t.does("keep ∘ dx0", "dx0 keep", "dx0")]
    return Step(
        [
            t.does("x Wᵀ", "x W", "y0", t.main),
            *drop * dropout,
            t.does("x Aᵀ", f"{seen} A", "s", t.down),
            t.does("s Bᵀ", "s B", "u", t.up),
            t.does("scale · u", "u", "su"),
            t.does("y0 + u", "y0 su", "y"),
        ],
        [
            *_eager_backward(t),
            t.does("dsᵀ x", f"ds {seen}", "dA", t.down),
            *undrop * dropout,
            t.does("dy W", "dy W", "dxW", t.main),
            t.does("dx0 + dx", "dx0 dxW", "dx"),
        ],
    )


def eager_fp32(t: Tensors, dropout: bool) -> Step:
    """PEFT as shipped: adapters in fp32 under autocast, so that x goes to fp32, through dropout, and back to bf16."""
    seen = "dropped" if dropout else "x"
    drop = [t.does("drop(x)", "x32", "dropped32 keep")]
    undrop = [t.does("keep ∘ dx0", "dx032 keep", "dx032")]
    return Step(
        [
            t.does("x Wᵀ", "x W", "y0", t.main),
            t.does("x to fp32", "x", "x32"),
            *drop * dropout,
            t.does("x to bf16", f"{seen}32", seen),
            t.does("A to bf16", "A32", "A"),
            t.does("B to bf16", "B32", "B"),
            t.does("x Aᵀ", f"{seen} A", "s", t.down),
            t.does("s Bᵀ", "s B", "u", t.up),
            t.does("scale · u", "u", "su"),
            t.does("y0 + u", "y0 su", "y"),
        ],
        [
            *_eager_backward(t),
            t.does("dsᵀ x", f"ds {seen}", "dA", t.down),
            t.does("dA to fp32", "dA", "dA32"),
            t.does("dB to fp32", "dB", "dB32"),
            t.does("dx0 to fp32", "dx0", "dx032"),
            *undrop * dropout,
            t.does("dx0 to bf16", "dx032", "dx0"),
            t.does("dy W", "dy W", "dxW", t.main),
            t.does("dx0 + dx", "dx0 dxW", "dx"),
        ],
    )


def compiled(t: Tensors, dropout: bool) -> Step:
    """torch.compile of the eager arithmetic: products stay the library's, pointwise passes in a row become one."""
    seen = "dropped" if dropout else "x"
    drop = [t.does("drop(x)", "x", "dropped keep")]
    return Step(
        [
            t.does("x Wᵀ", "x W", "y0", t.main),
            *drop * dropout,
            t.does("x Aᵀ", f"{seen} A", "s", t.down),
            t.does("s Bᵀ", "s B", "u", t.up),
            t.does("y0 + scale · u", "y0 u", "y"),
        ],
        [
            *_eager_backward(t),
            t.does("dsᵀ x", f"ds {seen}", "dA", t.down),
            t.does("dy W", "dy W", "dxW", t.main),
            t.does("keep ∘ dx0 + dx", "dx0 dxW keep" if dropout else "dx0 dxW", "dx"),
        ],
    )


def addmm(t: Tensors, joins: bool) -> Step:
    """Library products with the low-rank term added in place, s and dy B computed twice: hand-written LoRA backwards.

    Projections of one input are one function, in which every member but the first `joins` the gradient of x that is
    already there.
    """
    onto = t.does("dx += dy W", "dx dy W", "dx", t.main) if joins else t.does("dy W", "dy W", "dx", t.main)
    return Step(
        [
            t.does("x Wᵀ", "x W", "y", t.main),
            t.does("x Aᵀ", "x A", "s", t.down),
            t.does("y += s Bᵀ", "y s B", "y", t.up),
        ],
        [
            t.does("dy B", "dy B", "ds", t.up),
            t.does("dsᵀ x", "ds x", "dA", t.down),
            t.does("x Aᵀ", "x A", "s", t.down),
            t.does("dyᵀ s", "dy s", "dB", t.up),
            onto,
            t.does("dy B", "dy B", "ds", t.up),
            t.does("dx += ds A", "dx ds A", "dx", t.down),
        ],
    )


def lorafusion(t: Tensors, dropout: bool) -> Step:
    """LoRAFusion's kernels: dropped x and a mask of bytes are stored, ds and dB added up by fp32 atomics.

    The atomics' own traffic is left out: it is the cache's.
    """
    seen, keep = ("dropped", " keep") if dropout else ("x", "")
    drop = [t.does("drop(x)", "x", "dropped keep")]
    forward = t.does("x Wᵀ + s Bᵀ", "x W s B", "y", t.main + t.up)
    backward = t.does("dy W + keep ∘ ds A", f"dy W ds A{keep}", "dx", t.main + t.down)
    return Step(
        [*drop * dropout, t.does("x Aᵀ", f"{seen} A", "s", t.down), replace(forward, kind="product")],
        [
            t.does("ds to 0", "", "ds32"),
            t.does("dB to 0", "", "dB32"),
            t.does("dy B, dyᵀ s", "dy s B", "ds32 dB32", 2 * t.up),
            t.does("ds to bf16", "ds32", "ds"),
            t.does("dB to bf16", "dB32", "dB"),
            t.does("dsᵀ x", f"ds {seen}", "dA", t.down),
            replace(backward, kind="product"),
        ],
    )
