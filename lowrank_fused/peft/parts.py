"""What is made of adapters once they are read: several as one, or one that compiled graphs keep."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..terms import Terms
from .readers import Part

__all__ = ["for_graphs", "stacked"]


def stacked(parts: list[Part]) -> list[Part]:
    """Several plain adapters without dropout as one of their summed rank."""
    if any(not _is_plain(part) for part in parts):
        return parts
    terms = [part.terms for part in parts]
    dtype = reduce(torch.promote_types, (t.a.dtype for t in terms))
    a = torch.cat([t.a.to(dtype) for t in terms])
    b = torch.cat([(t.b * t.scale).to(dtype) for t in terms], dim=1)
    biases = [part.bias for part in parts if part.bias is not None]
    return [Part(Terms(a, b), parts[0].dropout, sum(biases) if biases else None)]  # type: ignore[arg-type]


def for_graphs(part: Part) -> Part:
    """In a compiled graph the scale goes into B: a graph is made anew for every value of a number that operators of
    ours take.
    """
    t = part.terms
    if isinstance(t.scale, Tensor):
        return part
    return replace(part, terms=replace(t, b=t.b * t.scale, scale=1.0))


def _is_plain(part: Part) -> bool:
    t = part.terms
    dropout: Any = part.dropout
    drops = type(dropout) is not nn.Identity and dropout.training and dropout.p
    return not drops and t.core is None and t.out is None and t.col is None
