"""The demo: one pretrained model and one labelled data set, fine-tuned three times from the same start.

With PEFT's LoRA as it ships, with the same after `accelerate`, and with this package's own layers, step by step in
turn; what differs between them is reported in one table, in two pictures and in a JSON file.
"""

from __future__ import annotations

from .comparison import Result, Settings, run

__all__ = ["Result", "Settings", "run"]
