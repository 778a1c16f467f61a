"""Which layers read the same x: those that the engine can run as one group."""

from __future__ import annotations

from collections.abc import Sequence

from ..grouping import NAMES
from ..tools.model_shapes import LinearShape

__all__ = ["Members", "groups", "label"]

Members = tuple[LinearShape, ...]


def groups(linears: Sequence[LinearShape]) -> list[Members]:
    """These layers, those that share their input together; the order is that of first members."""
    found: dict[object, list[LinearShape]] = {}
    for linear in linears:
        names = next((names for names in NAMES if linear.name in names), None)
        key = linear if names is None else (names, linear.in_features, linear.count)
        found.setdefault(key, []).append(linear)
    return [tuple(members) for members in found.values()]


def label(members: Sequence[LinearShape]) -> str:
    """The names of these layers; sizes where there is no name."""
    return " + ".join(member.name or f"{member.in_features} -> {member.out_features}" for member in members)
