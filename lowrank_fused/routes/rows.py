"""Rows as the libraries that multiply them can take them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["readable"]


def readable(rows: Tensor) -> Tensor:
    """These rows without gaps where a product with them would read what lies in the gaps.

    The CPU's bf16 products do, for some sizes and a first operand [M, K] whose rows are more than K elements apart:
    NaN there comes out.
    """
    gaps = rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and not rows.is_contiguous()
    return rows.contiguous() if gaps else rows
