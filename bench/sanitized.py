"""What compute-sanitizer watches: `python -m bench.sanitized ROUTE DEVICE`, a few small layers off every tile size."""

from __future__ import annotations

import sys
from itertools import product

import torch

from lowrank_fused.benchmark import Case, check, providers_for


def main(route: str, device: str) -> None:
    """Forward and backward of one route, judged against float64 as ever."""
    for dtype, dropout, rank in product((torch.bfloat16, torch.float32), (0.0, 0.1), (16, 5)):
        case = Case(200, 136, 131, rank, dropout, dtype, torch.device(device))
        check(providers_for([route], case)[0], case)


if __name__ == "__main__":
    main(*sys.argv[1:])
