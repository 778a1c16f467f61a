"""The demo: one pretrained model and one labelled data set, fine-tuned twice from the same start.

Once with PEFT's LoRA as it ships, once with this package, step by step in turn; what differs between the two
is reported in one table, in two pictures and in a JSON file.
"""

from __future__ import annotations

from .comparison import Result, Settings, run

__all__ = ["Result", "Settings", "run"]
