"""A step captured into a CUDA graph: replayed, it costs the host one call whatever the number of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import UnsupportedError
from .timing import Step

__all__ = ["captured"]

WARMUP_CALLS = 3  # lazy initialisation and autotuning must be over before the capture


def captured(run: Callable[[], Any], device: torch.device) -> tuple[Step, Any]:
    """A step that replays what `run` does, and what it returned in the capture: tensors that each replay overwrites.

    The capture's random numbers come from torch's CUDA generator, which each replay moves on. Raises UnsupportedError
    away from a CUDA device.
    """
    if device.type != "cuda":
        raise UnsupportedError(f"a CUDA graph needs a CUDA device, got {device}")
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(side):
        for _ in range(WARMUP_CALLS):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        result = run()
    return Step(lambda _: graph.replay()), result
