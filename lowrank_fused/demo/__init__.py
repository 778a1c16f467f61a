"""The demo: one pretrained model, one labelled data set, fine-tuned twice from the same start, step by step in turn.

Once with PEFT's LoRA as it ships, once with this package; what differs between them is reported in one table, in two
pictures and in a JSON file. `lowrank-fused demo`, `python -m lowrank_fused.demo` and `run()` are the same thing.
"""

from __future__ import annotations

from .run import Settings, run

__all__ = ["Settings", "run"]
