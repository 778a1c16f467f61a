"""The gate before every number: y and all gradients against float64, by `lowrank_fused.testing`'s rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..linear import lowrank_linear_ref
from ..testing import assert_as_accurate_as_torch
from .case import Case, Operands
from .providers import Provider

__all__ = ["absolute", "check", "double", "mask_probe", "recovered_mask", "seeded"]

SEED = 20_240_607


class OnDevice(Protocol):
    """Operands of any kind."""

    @property
    def device(self) -> torch.device: ...


AnyOperands = TypeVar("AnyOperands", bound=OnDevice)
Result = TypeVar("Result")


def check(provider: Provider, case: Case, operands: Operands | None = None) -> None:
    """Raise AssertionError unless y, dx, dA and dB of this provider are as accurate as PyTorch's own.

    The reference sees the mask that the provider drew, found by `recovered_mask`. The frozen linear has
    nothing to prove and passes.
    """
    if not provider.has_adapter:
        return
    o = operands or provider.operands(case)
    keep = recovered_mask(provider, o, case.dropout) if case.dropout else None

    def reference(o: Operands) -> Tensor:
        return lowrank_linear_ref(
            o.x, o.weight, o.a, o.b, scale=o.scale, bias=o.bias, dropout_p=case.dropout, keep=keep
        )

    ours = _values(lambda o: seeded(provider, o, case.dropout), o)
    plain = _values(reference, o)
    exact = _values(reference, double(o))
    for name, got, same_dtype, truth in zip(("y", "dx", "dA", "dB"), ours, plain, exact, strict=True):
        assert_as_accurate_as_torch(got, same_dtype, truth, name)


def recovered_mask(provider: Provider, o: Operands, dropout_p: float) -> Tensor:
    """The boolean mask that a provider draws from SEED, read off a gradient: no knowledge of its generator
    needed.
    """
    probe = mask_probe(o)
    y = seeded(provider, probe, dropout_p)
    (dx,) = torch.autograd.grad(y, probe.x, probe.dy)
    return dx != 0


def mask_probe(o: Operands) -> Operands:
    """Operands of these shapes whose input gradient shows the mask.

    With W = 0, A = 1, B = 1/N and dy = 1 it is scale · R / (1-p) where an element was kept, else 0.
    """
    return Operands(
        x=torch.ones_like(o.x).requires_grad_(),
        weight=torch.zeros_like(o.weight),
        a=torch.ones_like(o.a).requires_grad_(),
        b=torch.full_like(o.b, 1.0 / o.weight.shape[0]).requires_grad_(),
        bias=o.bias,
        dy=torch.ones_like(o.dy),
        scale=1.0,
    )


def seeded(provider: Callable[[AnyOperands, float], Result], o: AnyOperands, dropout_p: float) -> Result:
    """The provider's result with torch's generators at SEED; they are left as they were."""
    with torch.random.fork_rng(devices=[o.device] if o.device.type == "cuda" else []):
        torch.manual_seed(SEED)
        return provider(o, dropout_p)


def _values(forward: Callable[[Operands], Tensor], o: Operands) -> tuple[Tensor, ...]:
    """y, dx, dA, dB."""
    y = forward(o)
    return y.detach(), *torch.autograd.grad(y, o.leaves(), o.dy.to(y.dtype))


def double(o: Operands) -> Operands:
    """The same, already rounded, values in float64."""
    return _converted(o, lambda t: t.double())


def absolute(o: Operands) -> Operands:
    """Absolute values in float64: the same computation on them shows how large its intermediates get."""
    return _converted(o, lambda t: t.double().abs())


def _converted(o: Operands, convert: Callable[[Tensor], Tensor]) -> Operands:
    def leaf(t: Tensor) -> Tensor:
        return convert(t.detach()).requires_grad_()

    return Operands(
        x=leaf(o.x),
        weight=convert(o.weight),
        a=leaf(o.a),
        b=leaf(o.b),
        bias=None if o.bias is None else convert(o.bias),
        dy=convert(o.dy),
        scale=o.scale,
    )
