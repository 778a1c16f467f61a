"""The leading directions of data that arrives in batches, for starts that look at a layer's inputs.

After Ross et al. (2008, "Incremental learning for robust visual tracking"), which EVA (arXiv 2410.07170) uses: what is
kept of all rows so far is Σ Vᵀ of their scatter matrix, cut off at some rank; a batch is put below it and decomposed
together with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["IncrementalSVD", "leading_directions"]

# A stack with more rows and columns than this many times the directions wanted goes to the randomised decomposition.
_EXACT_UP_TO = 8
_POWER_ITERATIONS = 4


class IncrementalSVD:
    """The `count` leading right singular vectors of all rows given to `update`, less their mean if `center`.

    Twice as many are carried along, because what is cut off after one batch might have mattered with the next.

    components [<= count, in]: orthonormal rows, the largest element of each positive · values: their singular values ·
    total: the sum of all squared singular values, exact · similarity: |cosine| of each component to the one in its
    place before the last update, zeros after the first.
    """

    def __init__(self, count: int, *, center: bool = True) -> None:
        self.count, self.center = count, center
        self.rows = 0
        self.total = 0.0
        self.mean: Tensor | None = None
        self._directions: Tensor | None = None
        self._values: Tensor | None = None
        self.similarity = torch.zeros(0)

    @property
    def components(self) -> Tensor:
        """[<= count, in]; there must have been an update."""
        assert self._directions is not None
        return self._directions[: self.count]

    @property
    def values(self) -> Tensor:
        """Singular values of the components, in descending order."""
        assert self._values is not None
        return self._values[: self.count]

    @property
    def ratios(self) -> Tensor:
        """The share of all variance (of the sum of squares without `center`) that each component explains."""
        return self.values.square() / max(self.total, torch.finfo(self.values.dtype).tiny)

    def update(self, rows: Tensor) -> None:
        """Take in rows [n, in], of any floating dtype; computed in float32 or better."""
        if len(rows) == 0:
            return
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        parts = [rows]
        if self.center:
            mean = rows.mean(0)
            parts = [rows - mean]
            if self.mean is not None:
                # The scatter of both sets around their common mean, less each set's own scatter, has rank one.
                weight = self.rows * len(rows) / (self.rows + len(rows))
                parts.append((weight**0.5 * (self.mean - mean))[None])
                mean = self.mean + (mean - self.mean) * (len(rows) / (self.rows + len(rows)))
            self.mean = mean
        self.total += sum(part.square().sum(dtype=torch.float64).item() for part in parts)
        self.rows += len(rows)
        before = self._directions
        if before is not None and self._values is not None:
            parts.append(self._values[:, None] * before)
        self._values, self._directions = leading_directions(torch.cat(parts), 2 * self.count)
        self.similarity = self.values.new_zeros(len(self.components))
        if before is not None:
            n = min(len(self.components), len(before))
            self.similarity[:n] = (self._directions[:n] * before[:n]).sum(1).abs()


def leading_directions(stack: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading singular values [<= count] and right singular vectors [<= count, in] of `stack` [rows, in].

    Exact for a small stack; otherwise by subspace iteration from a fixed random start, which touches no global random
    state. The sign of a vector makes its largest element positive.
    """
    if min(stack.shape) <= _EXACT_UP_TO * count:
        _, values, directions = torch.linalg.svd(stack, full_matrices=False)
    else:
        generator = torch.Generator(stack.device).manual_seed(0)
        start = torch.randn(stack.shape[1], count, generator=generator, dtype=stack.dtype, device=stack.device)
        basis = torch.linalg.qr(stack @ start).Q
        for _ in range(_POWER_ITERATIONS):
            basis = torch.linalg.qr(stack @ torch.linalg.qr(stack.t() @ basis).Q).Q
        _, values, directions = torch.linalg.svd(basis.t() @ stack, full_matrices=False)
    values, directions = values[:count], directions[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return values, torch.where(largest < 0, -directions, directions)
