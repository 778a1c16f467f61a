"""Exceptions of the package. Each message says what was expected, what came, and what to do."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "LaunchError",
    "LowRankFusedError",
    "NotAcceleratedError",
    "SingularPivotError",
    "UnsupportedError",
]


class LowRankFusedError(Exception):
    """Base class of everything this package raises on purpose, next to ValueError and TypeError."""


class UnsupportedError(LowRankFusedError, RuntimeError):
    """A request that is well formed but cannot be served here: a route, a layer, a device, a derivative."""


class LaunchError(LowRankFusedError, RuntimeError):
    """A kernel or library call that failed inside of a layer, with the layer's name and the way around it."""


class NotAcceleratedError(LowRankFusedError, RuntimeError):
    """`accelerate(strict=True)` found layers that it would have to leave to PEFT. The model is as it was."""


class CheckpointError(LowRankFusedError, ValueError):
    """An adapter file that does not fit the model it is loaded into. The model is left as it was."""


class SingularPivotError(LowRankFusedError, ValueError):
    """A weight whose LDU factorisation has a zero or vanishing pivot among the leading rank ones."""
