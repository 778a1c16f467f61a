"""An A that repeats the identity along its columns: s is a sum over shards of x, and ds A is ds for each of them.

MiSS has such an A. Kernels multiply with it as with any other and lose nothing, being bound by memory; on a CPU the sum
takes a third of the product with as many fp32 elements. In bf16 the library's product is as fast as the sum.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor

__all__ = ["is_tiled", "repeated_identity", "shards", "tiled_identity"]

_made: WeakValueDictionary[tuple[int, int, torch.dtype, torch.device], Tensor] = WeakValueDictionary()


def tiled_identity(rank: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`repeated_identity`, one for all that ask while somebody keeps it, which `is_tiled` knows again."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return repeated_identity(rank, columns, dtype, device)
    key = (rank, columns, dtype, device)
    found = _made.get(key)
    if found is None or found._version:
        with torch.inference_mode(False):
            found = repeated_identity(rank, columns, dtype, device)
        found._is_tiled_identity = True  # type: ignore[attr-defined]
        _made[key] = found
    return found


def repeated_identity(rank: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new A [rank, columns] with A[k, c] = 1 where c ≡ k mod rank."""
    identity = torch.eye(rank, dtype=dtype, device=device)
    return identity.repeat(1, -(-columns // rank))[:, :columns].contiguous()


def is_tiled(a: Tensor) -> bool:
    """Whether `a` came from `tiled_identity`, cuts x into whole shards, and is on a CPU and not in bf16."""
    # Asked in every call: of most, this is all.
    if not getattr(a, "_is_tiled_identity", False):
        return False
    rank, columns = a.shape
    return not columns % rank and not a._version and a.device.type == "cpu" and a.dtype != torch.bfloat16


def shards(rows: Tensor, rank: int) -> Tensor:
    """[M, K] -> [M, K / rank, rank], a view."""
    return rows.unflatten(1, (-1, rank))
