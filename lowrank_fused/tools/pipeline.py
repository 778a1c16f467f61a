"""Loads on their way while a product is computed, read from a compiled kernel's TTGIR.

Triton's pipeliner gives a block that a loop loads asynchronously (TMA or cp.async) a ring of buffers in shared memory.
A loop of S stages has S - 1 loads of each block under way at most: where it multiplies out of shared memory (wgmma,
tcgen05) the ring has one buffer more, which is being read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import prod

__all__ = ["Pipeline", "read_pipeline"]

_VALUE = r"(%[\w$.#-]+)"
_EVENT = re.compile(
    rf"{_VALUE} = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x((?:\d+x)+)([a-z]+)(\d+),|ttg\.local_dealloc {_VALUE}"
)
_VIEW = re.compile(rf"{_VALUE} = ttg\.memdesc_(?:index|subview) {_VALUE}\[")
_COPY = re.compile(rf"async_(?:tma_)?copy_global_to_local (?:%[\w$.-]+\[[^\]]*\] |%[\w$.#-]+, ){_VALUE}")


@dataclass(frozen=True)
class Pipeline:
    """The most bytes that one program has on their way, and how many loads deep for each shape of block, its
    dimensions in ascending order.
    """

    bytes_in_flight: int = 0
    depths: dict[tuple[int, ...], int] = field(default_factory=dict)


def read_pipeline(ttgir: str, stages: int) -> Pipeline:
    """What the loops of a kernel that was compiled with `stages` keep on their way.

    Loops that follow one another take turns, so of those the one with most bytes counts.
    """
    of_view = dict(_VIEW.findall(ttgir))
    loaded = {of_view.get(target, target) for target in _COPY.findall(ttgir)}
    live: dict[str, int] = {}
    most, depths = 0, dict[tuple[int, ...], int]()
    for name, buffers, shape, _, bits, freed in _EVENT.findall(ttgir):
        live.pop(freed, None)
        if name not in loaded:
            continue
        block = tuple(sorted(int(size) for size in shape.split("x")[:-1]))
        depth = min(int(buffers), stages - 1)
        depths[block] = max(depth, depths.get(block, 0))
        live[name] = depth * prod(block) * int(bits) // 8
        most = max(most, sum(live.values()))
    return Pipeline(most, depths)
