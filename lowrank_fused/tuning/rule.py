"""Which of several contestants goes into a table, given the times of all in the same rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..benchmark import Spread, paired_ratio

__all__ = ["NOISE", "Verdict", "verdict"]

# A contestant must be faster than the model's choice by more than this share: less is what runs differ by.
NOISE = 0.02


@dataclass(frozen=True)
class Verdict:
    """Who goes into the table, who the model would have taken, and everybody's median in microseconds."""

    winner: str
    model: str
    us: Mapping[str, float]

    @property
    def gain(self) -> float | None:
        """The model's time over the winner's; None where the model's choice got no number."""
        return self.us[self.model] / self.us[self.winner] if self.model in self.us else None


def verdict(
    times: Mapping[str, Sequence[float]], model: str, floor: str | None = None, noise: float = NOISE
) -> Verdict:
    """Judge by medians of ratios within rounds. `times` are milliseconds; `floor` is a contestant, or None.

    The fastest replaces the model's choice where it is faster by more than `noise`, or where the model's choice got no
    number. Whoever was not measured faster than the floor gives way to it.
    Raises ValueError if nobody was timed.
    """
    if not times:
        raise ValueError("nobody was timed")
    us = {name: 1e3 * Spread.of(found).p50 for name, found in times.items()}
    winner = min(us, key=us.__getitem__)
    if model in times and paired_ratio(times[model], times[winner]).p50 <= 1 + noise:
        winner = model
    if floor is not None and floor in times and winner != floor and paired_ratio(times[floor], times[winner]).p50 <= 1:
        winner = floor
    return Verdict(winner, model, us)
