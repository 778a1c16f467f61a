"""Exceptions of the package. Each message says what was expected, what came, and what to do."""

from __future__ import annotations

import torch

__all__ = [
    "CheckpointError",
    "LaunchError",
    "LowRankFusedError",
    "NotAcceleratedError",
    "SingularPivotError",
    "UnsupportedError",
    "failure_of",
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


def failure_of(what: str, error: Exception, label: str | None, without: str) -> Exception:
    """What to raise for an error in the middle of a launch: one with the layer's name and the ways around it.

    `without` is the route on which what failed does not run. An error that nobody can name a layer for, memory that
    ran out and a wrong request are raised as they are.
    """
    if label is None or isinstance(error, (torch.OutOfMemoryError, ValueError, TypeError, LowRankFusedError)):
        return error
    return LaunchError(
        f"{label}: {what} failed with {type(error).__name__}: {error}. To train on without our kernels set "
        f"LOWRANK_FUSED_ROUTE={without}, without this package call lowrank_fused.restore(model)"
    )
