"""Operands and results as the libraries that multiply them take them, or make them fastest."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["across", "readable"]

# Columns of B up to which the transpose of its gradient, turned afterwards, costs a CPU less than the gradient.
_FEW = 64


def readable(rows: Tensor) -> Tensor:
    """These rows without gaps where a product with them would read what lies in the gaps.

    The CPU's bf16 products do, for some sizes and a first operand [M, K] whose rows are more than K elements apart:
    NaN there comes out.
    """
    gaps = rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and not rows.is_contiguous()
    return rows.contiguous() if gaps else rows


def across(b: Tensor) -> bool:
    """Whether to make the gradient of B as the transpose of vᵀ dy rather than as dyᵀ v.

    Products are faster with the long dimension last, but wherever B is [N, R] in memory its gradient has to be, too.
    """
    return b.shape[1] <= _FEW or not b.is_contiguous()
