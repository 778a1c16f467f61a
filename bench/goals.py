"""Goal lines: what a benchmark must show, beside what it showed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Goal", "as_dicts", "missed"]


@dataclass(frozen=True)
class Goal:
    """`value` must be at least `bound`, or at most where `at_least` is False.

    `same` says why nothing but chance can tell the two sides apart: their 80th percentile must then reach the bound.
    """

    what: str
    value: float
    bound: float
    unit: str = "x"
    at_least: bool = True
    spread: tuple[float, float] | None = None
    same: str = ""

    @property
    def met(self) -> bool:
        """Whether the line holds."""
        value = self.spread[1] if self.same and self.spread else self.value
        return value >= self.bound if self.at_least else value <= self.bound

    def cells(self) -> tuple[str, str, str, str]:
        """What, measured (with the 20th to 80th percentile), goal, verdict."""
        digits = ".2f" if self.unit == "x" else ",.1f"
        around = f" ({self.spread[0]:{digits}} to {self.spread[1]:{digits}})" if self.spread else ""
        relation = "at least" if self.at_least else "at most"
        measured = f"{self.value:{digits}} {self.unit}{around}"
        return (
            self.what,
            measured,
            f"{relation} {self.bound:{digits}} {self.unit}",
            (self.same or "met") if self.met else "MISSED",
        )


def missed(goals: Iterable[Goal]) -> list[Goal]:
    """The goals that do not hold."""
    return [goal for goal in goals if not goal.met]


def as_dicts(goals: Iterable[Goal]) -> list[dict[str, Any]]:
    """For JSON, with the verdict."""
    return [asdict(goal) | {"met": goal.met} for goal in goals]
