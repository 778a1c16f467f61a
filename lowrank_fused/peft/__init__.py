"""Models that already wear PEFT adapters, accelerated in place. Nothing of PEFT is imported before it is asked for."""

from __future__ import annotations

from typing import Any

from .report import Report, Row
from .swap import accelerate, accelerated, explain, restore

__all__ = ["AccelerateCallback", "Report", "Row", "accelerate", "accelerated", "explain", "restore"]


def __getattr__(name: str) -> Any:
    """`AccelerateCallback` derives from a class of transformers, which only its users need."""
    if name == "AccelerateCallback":
        from .callback import AccelerateCallback

        return AccelerateCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
