"""MiSS: one block for all shards of x, which is B of a pair whose A is a tiled identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lowrank_fused.terms import Terms
from lowrank_fused.tiled import tiled_identity

from . import Base, Part, Reader, Remembered, reader

# A of each layer's adapters, which keep it while they live: layers of one width share it.
_kept: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()


@reader("miss.layer:MissLinear")
class Miss(Reader):
    methods = ("miss",)
    returns_dtype_of_input = True
    break_even = 2.5

    @staticmethod
    def adapters(layer: Any) -> Mapping[str, Any]:
        return layer.miss_block

    @staticmethod
    def why_not(layer: Any, adapter: str) -> str | None:
        return "init_weights='bat', an update of full rank" if layer.miss_fn == "bat" else None

    @staticmethod
    def modules(layer: Any, adapter: str) -> tuple[nn.Module, ...]:
        return (layer.miss_dropout[adapter],)

    @staticmethod
    def tensors(layer: Any, adapter: str) -> tuple[Tensor, ...]:
        return (layer.miss_block[adapter],)

    @staticmethod
    def read(layer: Any, adapter: str, base: Base | None, remembered: Remembered) -> Part:
        block = layer.miss_block[adapter]
        a = tiled_identity(len(block), layer.in_features, block.dtype, block.device)
        if not torch.compiler.is_compiling():
            _kept.setdefault(layer, {})[adapter] = a
        b = block.t()
        if layer.miss_fn == "mini":
            b = b.repeat(layer.out_features // len(b), 1)
        return Part(Terms(a, b), layer.miss_dropout[adapter], dropped=(_padded(layer, adapter), block.dtype))


def _padded(layer: Any, adapter: str) -> int:
    """The columns of x when this adapter's dropout sees it: each adapter before it has padded x to whole shards."""
    columns = layer.in_features
    for name in layer.active_adapters:
        if name in layer.miss_block:
            columns += -columns % len(layer.miss_block[name])
        if name == adapter:
            break
    return columns
