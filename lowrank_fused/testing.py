"""How tests and benchmarks judge accuracy, and the operands they share.

One rule for every dtype and shape: against a float64 reference, our error is at most twice PyTorch's own error in
the same dtype. No tolerance is written down per test.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_as_accurate_as_torch", "integer_operand"]


def _errors(value: Tensor, exact: Tensor) -> tuple[float, float, tuple[int, ...]]:
    """Largest and root-mean-square difference, and where the largest is."""
    diff = (value.detach().double().cpu() - exact.detach().double().cpu()).abs()
    if diff.numel() == 0:
        return 0.0, 0.0, ()
    where = torch.unravel_index(diff.argmax(), diff.shape)
    return diff.max().item(), diff.square().mean().sqrt().item(), tuple(int(i) for i in where)


def assert_as_accurate_as_torch(ours: Tensor, torch_same_dtype: Tensor, exact: Tensor, name: str = "y") -> None:
    """Raise unless max|ours − exact| ≤ 2 · max|torch − exact| + tiny, and the same for the RMS error.

    `exact` is the float64 result from the same (already rounded) operands, `torch_same_dtype` what plain PyTorch
    gives in the dtype under test; shapes and dtypes must agree and every element must be finite. `tiny` is one
    rounding of the largest exact value: a lucky exact PyTorch result must not demand exactness of us.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == torch_same_dtype.dtype, f"{name}: {ours.dtype}, expected {torch_same_dtype.dtype}"
    assert torch.isfinite(ours).all(), f"{name}: {int((~torch.isfinite(ours)).sum())} elements are not finite"
    if ours.numel() == 0:
        return
    our_max, our_rms, where = _errors(ours, exact)
    torch_max, torch_rms, _ = _errors(torch_same_dtype, exact)
    tiny = torch.finfo(ours.dtype).eps / 2 * exact.abs().max().item()
    rms_tiny = torch.finfo(ours.dtype).eps / 2 * exact.double().square().mean().sqrt().item()
    report = (
        f"{name}: ours max {our_max:.3e} rms {our_rms:.3e}, torch max {torch_max:.3e} rms {torch_rms:.3e}, "
        f"worst at {where}: {ours[where].item():.6g}, exact {exact[where].item():.6g}"
    )
    assert our_max <= 2 * torch_max + tiny, report
    assert our_rms <= 2 * torch_rms + rms_tiny, report


def integer_operand(
    *shape: int, low: int = -2, high: int = 2, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
) -> Tensor:
    """Small random integers: sums of their products are exact in every dtype, so results must match bit for bit."""
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)
