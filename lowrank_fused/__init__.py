"""Fused Triton kernels and drop-in layers for fine-tuning with LoRA-family adapters."""

from __future__ import annotations

from .linear import lowrank_linear, lowrank_linear_ref
from .terms import Gate, Terms

__version__ = "0.1.0"

__all__ = ["Gate", "Terms", "lowrank_linear", "lowrank_linear_ref"]
