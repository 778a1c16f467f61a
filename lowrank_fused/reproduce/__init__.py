"""Findings of the papers, done again: parameter counts, where LoRA may start, and what every method reaches.

    lowrank-fused reproduce counts
    lowrank-fused reproduce initialization
    lowrank-fused reproduce methods

Each leaves a Markdown page, the numbers as JSON and, where a picture says more, a PNG. The trainings keep what they
have finished, so that an interrupted command goes on where it stopped.
"""

from __future__ import annotations

from .counts import reproduce_counts
from .family import reproduce_family
from .initialization import reproduce_initialization

__all__ = ["REPRODUCTIONS"]

# Each takes (out, cache, progress, *, seeds, snippets, names), None for its own defaults, and returns its page's path.
REPRODUCTIONS = {
    "counts": reproduce_counts,
    "initialization": reproduce_initialization,
    "methods": reproduce_family,
}
