"""How tests and benchmarks judge accuracy, and the operands they share.

One rule for every dtype and shape: against a float64 reference, our error is at most twice PyTorch's own error in
the same dtype. No tolerance is written down per test; where a result has too few elements for that comparison to mean
anything, operands of small integers make it exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .dropout import draw_keep, unpadded
from .linear import lowrank_linear, lowrank_linear_ref
from .terms import Gate

__all__ = ["Operands", "assert_as_accurate_as_torch", "check_against_float64", "integer_operand"]


def _errors(value: Tensor, exact: Tensor) -> tuple[float, float, tuple[int, ...]]:
    """Largest and root-mean-square difference, and where the largest is."""
    diff = (value.detach().to(exact.device, torch.float64) - exact.detach().double()).abs()
    if diff.numel() == 0:
        return 0.0, 0.0, ()
    where = torch.unravel_index(diff.argmax(), diff.shape)
    return diff.max().item(), diff.square().mean().sqrt().item(), tuple(int(i) for i in where)


def assert_as_accurate_as_torch(
    ours: Tensor,
    torch_same_dtype: Tensor,
    exact: Tensor,
    name: str = "y",
    magnitude: Tensor | None = None,
) -> None:
    """Raise unless ours is at most twice as far from exact as PyTorch is, in the maximum and in the RMS norm.

    `exact` is the float64 result from the same (already rounded) operands, `torch_same_dtype` what plain PyTorch
    gives in the dtype under test; shapes and dtypes must agree and every element must be finite.

    PyTorch's own error counts as at least one rounding of the largest intermediate: on a handful of elements it may
    be zero by luck, which is no standard. `magnitude` says how large intermediates are, the same computation on
    absolute values (sums without cancellation); |exact| serves where there is none.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == torch_same_dtype.dtype, f"{name}: {ours.dtype}, expected {torch_same_dtype.dtype}"
    assert torch.isfinite(ours).all(), f"{name}: {int((~torch.isfinite(ours)).sum())} elements are not finite"
    if ours.numel() == 0:
        return
    our_max, our_rms, where = _errors(ours, exact)
    torch_max, torch_rms, _ = _errors(torch_same_dtype, exact)
    size = (exact if magnitude is None else magnitude).detach().double().abs()
    rounding = torch.finfo(ours.dtype).eps / 2
    report = (
        f"{name}: ours max {our_max:.3e} rms {our_rms:.3e}, torch max {torch_max:.3e} rms {torch_rms:.3e}, "
        f"worst at {where}: {ours[where].item():.6g}, exact {exact[where].item():.6g}"
    )
    assert our_max <= 2 * max(torch_max, rounding * size.max().item()), report
    assert our_rms <= 2 * max(torch_rms, rounding * size.square().mean().sqrt().item()), report


def integer_operand(
    *shape: int,
    low: int = -2,
    high: int = 2,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Small random integers: sums of their products are exact in every dtype, so results must match bit for bit."""
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


@dataclass
class Operands:
    """What one call of the engine takes, and the upstream gradient; every tensor but weight and dy is a leaf."""

    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    core: Tensor | None
    bias: Tensor | None
    out: Tensor | None
    col: Tensor | None
    dy: Tensor
    is_gate: bool = False
    scale: float = 0.75

    @classmethod
    def random(
        cls,
        m: int,
        n: int,
        k: int,
        r: int,
        *,
        core: str = "none",
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
        vectors: tuple[str, ...] = (),
        device: torch.device | str = "cpu",
        seed: int = 0,
        make: Callable[..., Tensor] = torch.randn,
    ) -> Operands:
        """Operands of the sizes a trained network shows: y and the low-rank term near 1. Cores as in `terms.py`.

        `vectors` names those of bias, out and col that are there; a dense core has Rb = Ra + 1, a gate two experts.
        """
        g = torch.Generator().manual_seed(seed)
        adapter = adapter_dtype or dtype

        def leaf(*shape: int, std: float = 1.0, to: torch.dtype = dtype) -> Tensor:
            return make(*shape, generator=g).mul(std).to(device, to).requires_grad_()

        rb = {"none": r, "diag": r, "dense": r + 1, "gate": 2 * r}[core]
        shape = {"none": None, "diag": (r,), "dense": (rb, r), "gate": (m, 2)}[core]
        named: dict[str, Any] = {name: leaf(n) if name in vectors else None for name in ("bias", "out", "col")}
        return cls(
            x=leaf(m, k),
            weight=leaf(n, k, std=k**-0.5).detach(),
            a=leaf(r, k, std=k**-0.5, to=adapter),
            b=leaf(n, rb, std=rb**-0.5, to=adapter),
            core=None if shape is None else leaf(*shape, to=adapter),
            dy=leaf(m, n).detach(),
            is_gate=core == "gate",
            **named,
        )

    def to(self, dtype: torch.dtype) -> Operands:
        """The same values as fresh leaves of another dtype."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            k: v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in values.items() if isinstance(v, Tensor)
        }
        return replace(self, **moved)

    def absolute(self) -> Operands:
        """The absolute values in float64: the same computation on them shows how large its intermediates get."""
        positive = self.to(torch.float64)
        for f in fields(positive):
            value = getattr(positive, f.name)
            if isinstance(value, Tensor):
                value.data.abs_()
        return positive

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that require a gradient, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if isinstance(v, Tensor) and v.requires_grad}

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that `lowrank_linear` and its reference share."""
        core = Gate(self.core) if self.is_gate and self.core is not None else self.core
        return dict(scale=self.scale, core=core, bias=self.bias, out=self.out, col=self.col)

    def run(self, **options: Any) -> dict[str, Tensor]:
        """y and the gradient of every leaf from the engine; options: route, dropout_p, seed."""
        return self._with_gradients(lowrank_linear(self.x, self.weight, self.a, self.b, **self.arguments(), **options))

    def run_ref(self, **options: Any) -> dict[str, Tensor]:
        """The same from the reference by autograd; options: dropout_p, keep."""
        y = lowrank_linear_ref(self.x, self.weight, self.a, self.b, **self.arguments(), **options)
        return self._with_gradients(y)

    def _with_gradients(self, y: Tensor) -> dict[str, Tensor]:
        leaves = self.leaves()
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(y.dtype)) if leaves else ()
        return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}


def check_against_float64(operands: Operands, *, route: str, dropout_p: float = 0.0) -> None:
    """Hold y and every gradient of a route to the accuracy rule, with the mask that the seed determines."""
    m, k = operands.x.shape
    seed = torch.tensor([m * k + 1], device=operands.x.device)
    keep = unpadded(draw_keep(seed, m, k, dropout_p), k) if dropout_p else None
    ours = operands.run(route=route, dropout_p=dropout_p, seed=seed if dropout_p else None)
    plain = operands.run_ref(dropout_p=dropout_p, keep=keep)
    exact = operands.to(torch.float64).run_ref(dropout_p=dropout_p, keep=keep)
    magnitude = operands.absolute().run_ref(dropout_p=dropout_p, keep=keep)
    for name, value in ours.items():
        assert_as_accurate_as_torch(value, plain[name], exact[name], f"{route} {name}", magnitude[name])
