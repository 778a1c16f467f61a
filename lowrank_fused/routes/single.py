"""Route `single`: forward in one launch, backward as in `split`.

For few output columns the work on s, repeated for each block of them, costs less than the pass over x that `split`
spends on it; for few tokens a launch saved counts. Dense and gated cores and ranks that do not fit beside a tile of y
take the two launches of `split`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_fused.kernels.single_forward import max_rank, single_forward

from .fused import KernelRoute
from .problem import Options, Saved

__all__ = ["SINGLE"]


class SingleRoute(KernelRoute):
    """`split` with the forward pass in one launch where it fits."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        core: Tensor | None,
        bias: Tensor | None,
        drop: Tensor | None,
        o: Options,
    ) -> tuple[Tensor, Saved]:
        """y and what backward needs; x [M, K]."""
        if o.core_kind not in ("none", "diag") or a.shape[0] > max_rank(x.dtype, a.dtype):
            return super().forward(x, weight, a, b, core, bias, drop, o)
        given = drop is not None and drop.dtype == torch.uint8
        y, s, mask = single_forward(
            x, weight, a, b, scale=o.scale, core=core, bias=bias, dropout_p=o.dropout_p,
            seed=None if given else drop, bits=drop if given else None, keep_s=o.keeps_s,
        )  # fmt: skip
        return y, Saved(s if o.keeps_s else None, mask if o.dropout_p else None)


SINGLE = SingleRoute(carries=True)
