"""Memory of a layer: what it keeps for its backward, and the peak of a step on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["kept_bytes", "peak_bytes"]


def kept_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes of all distinct storages that `forward` saves for backward, those of `parameters` left out.

    A tensor that several layers save, or of which several views are saved, is in memory once and counts once.
    Works on the meta device too.
    """
    # The address of the storage itself: that of its data is 0 for every tensor on the meta device.
    exempt = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in exempt:
            kept[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """Largest allocation during `step` beyond what was allocated before it; None away from a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
